"""What trains and what does not: the split and its inverse, one step against a step that trains everything, and over a mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import DataConfig, FineTuneConfig, MeshConfig, OptimizerConfig, TrainConfig
from chameleon_jax.data.pipeline import to_devices
from chameleon_jax.errors import CheckpointError, ConfigError
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.state import abstract_frozen, abstract_state, init_frozen, init_state
from chameleon_jax.training.step import make_eval_step, make_train_step
from chameleon_jax.training.trainable import Tuning

CONFIG = TrainConfig(
    model=presets.tiny_transformer(n_layers=1),
    vocabulary=presets.tiny_vocabulary(),
    data=DataConfig(seq_len=16, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0, schedule='constant', eps=1e-8, clip_norm=None),
    n_steps=10,
)
HEAD = FineTuneConfig(method='selected', trainable=('lm_head', '*/*_norm/weight'), head_rows=(4, 36), frozen_dtype='float32')
LORA = FineTuneConfig(method='lora', lora_rank=4, lora_alpha=8.0, frozen_dtype='float32')


def _batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, 128, (8, 16)).astype(np.int32)
  positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
  ones = np.ones((8, 16), np.int32)
  targets = np.roll(tokens, -1, axis=1)
  return {'tokens': tokens, 'targets': targets, 'loss_weights': ones.astype(np.float32), 'segment_ids': ones, 'positions': positions}


@functools.cache
def _base():
  """Parameters to start from, on the host."""
  model = Transformer(CONFIG.model)
  return jax.device_get(init_state(model, make_optimizer(CONFIG.optimizer, 10), _mesh(), key=jax.random.key(1)).params)


def _mesh(*sizes):
  return make_mesh(MeshConfig(*(sizes or (1, 1, 1))), jax.devices()[: int(np.prod(sizes or 1))])


def _run(config, mesh, n_steps=1):
  """(trained parameters, frozen ones, whole network, metrics) after some steps."""
  model, optimizer, tuning = Transformer(config.model), make_optimizer(config.optimizer, config.n_steps), Tuning(config.fine_tune)
  trained, frozen = _base(), ()
  if tuning.freezes:
    trained, placed = init_frozen(model, mesh, _base(), tuning, key=jax.random.key(5))
    frozen = (placed,)
  state = init_state(model, optimizer, mesh, key=jax.random.key(5), params=trained, tuning=tuning)
  step = make_train_step(model, optimizer, config, mesh)
  with jax.set_mesh(mesh):
    for _ in range(n_steps):
      state, metrics = step(state, to_devices(_batch(), mesh), jax.random.key(7), *frozen)
  state, frozen = jax.device_get((state, frozen))
  return state.params, frozen, tuning.merged(state.params, *(frozen or (None,))), {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope='module')
def everything():
  return _run(CONFIG, _mesh())


def test_selected_parameters_get_the_update_they_get_when_all_train(everything):
  """Without clipping AdamW treats every number by itself; what is not selected stays bit for bit."""
  trained, (frozen,), whole, metrics = _run(dataclasses.replace(CONFIG, fine_tune=HEAD), _mesh())
  _, _, expected, full_metrics = everything
  assert sorted(trained) == ['layers', 'lm_head'] and trained['lm_head'].shape == (32, 32)
  np.testing.assert_allclose(whole['lm_head'][:, 4:36], expected['lm_head'][:, 4:36], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(whole['lm_head'][:, :4], _base()['lm_head'][:, :4])
  np.testing.assert_array_equal(whole['lm_head'][:, 36:], _base()['lm_head'][:, 36:])
  norm = whole['layers']['ffn_norm']['weight']
  np.testing.assert_allclose(norm, expected['layers']['ffn_norm']['weight'], rtol=1e-5)
  assert not np.array_equal(norm, _base()['layers']['ffn_norm']['weight'])
  np.testing.assert_array_equal(whole['layers']['attention']['q_proj'], _base()['layers']['attention']['q_proj'])
  assert 'q_proj' not in trained['layers'].get('attention', {}) and 'lm_head' in frozen
  assert metrics['loss'] == pytest.approx(full_metrics['loss'], rel=1e-6)
  assert metrics['gradient_norm'] < full_metrics['gradient_norm']


@pytest.mark.slow
def test_adapters_learn_over_a_mesh_as_on_one_device(everything):
  optimizer = dataclasses.replace(CONFIG.optimizer, name='adafactor', momentum_dtype='float32', learning_rate=0.05)
  fine_tune = dataclasses.replace(LORA, lora_targets=('q_proj', 'o_proj', 'up_proj', 'lm_head'))
  config = dataclasses.replace(CONFIG, fine_tune=fine_tune, optimizer=optimizer)
  alone, _, whole, metrics = _run(config, _mesh(), n_steps=4)
  meshed, _, _, meshed_metrics = _run(config, _mesh(1, 4, 2), n_steps=4)
  assert metrics['loss'] < everything[3]['loss'] - 0.05
  assert meshed_metrics['loss'] == pytest.approx(metrics['loss'], rel=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), alone, meshed)
  evaluate = make_eval_step(Transformer(CONFIG.model), CONFIG, _mesh(), jax.tree.map(lambda _: None, _base()))
  with jax.set_mesh(_mesh()):
    sums = evaluate(whole, _batch())  # of the merged network, without adapters
  next_loss = float(sums.cross_entropy / sums.weight)
  assert next_loss < metrics['loss']


def test_only_what_trains_has_moments_and_what_does_not_takes_two_bytes():
  model, mesh = Transformer(CONFIG.model), _mesh()
  optimizer = make_optimizer(CONFIG.optimizer, 10)
  size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  n_parameters = sum(leaf.size for leaf in jax.tree.leaves(_base()))
  tuning = Tuning(FineTuneConfig(method='selected', trainable=('lm_head',), head_rows=(4, 36)))
  state = abstract_state(model, optimizer, mesh, tuning)
  assert size(state.params) == 4 * 32 * 32
  assert size(state.opt_state) == 8 * 32 * 32 + 4 + 4  # two counts
  assert size(abstract_frozen(model, mesh, tuning)) == 2 * n_parameters
  lora = Tuning(dataclasses.replace(LORA, frozen_dtype='bfloat16', lora_targets=('q_proj', 'o_proj')))
  state = abstract_state(model, optimizer, mesh, lora)
  assert size(state.params) == 4 * 2 * 4 * (32 + 32)  # two pairs of rank 4 between 32 and 32
  assert size(state.opt_state) == 2 * size(state.params) + 8
  assert size(abstract_frozen(model, mesh, lora)) == 2 * n_parameters


def test_rows_can_start_anew():
  tuning = Tuning(dataclasses.replace(HEAD, trainable=('lm_head',), restart_std=0.25))
  trained, frozen = tuning.split(_base(), jax.random.key(2))
  assert np.std(trained['lm_head']) == pytest.approx(0.25, rel=0.1)
  np.testing.assert_array_equal(frozen['lm_head'], _base()['lm_head'])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'trainable': ('lm_haed',), 'head_rows': None}, "'lm_haed' names no parameter; there are embedding, "),
        ({'trainable': ('*norm*',)}, r"head_rows \(4, 36\) needs 'lm_head' among"),
        ({'trainable': ('*',), 'head_rows': None}, "names every parameter; method 'full' does that"),
    ],
)
def test_patterns_must_name_a_part(changes, message):
  with pytest.raises(ConfigError, match=message):
    Tuning(dataclasses.replace(HEAD, **changes)).split(_base(), jax.random.key(0))


def test_the_weights_must_fit():
  params = _base() | {'lm_head': np.zeros((32, 4), np.float32)}
  with pytest.raises(CheckpointError, match=r"'lm_head' has shape \(32, 4\), config.model wants \(32, 128\)"):
    init_frozen(Transformer(CONFIG.model), _mesh(), params, Tuning(LORA), key=jax.random.key(0))


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'method': 'selected'}, 'needs trainable'),
        ({'trainable': ('lm_head',)}, 'only it takes them'),
        ({'method': 'lora', 'head_rows': (4, 36)}, "head_rows is for method 'selected'"),
        ({'method': 'selected', 'trainable': ('lm_head',), 'head_rows': (36, 4)}, 'must be'),
        ({'export': 'apart'}, "'apart' is for method 'lora'"),
        ({'method': 'lora', 'lora_rank': 0}, 'lora_rank must be positive'),
    ],
)
def test_settings_that_contradict_each_other(values, message):
  with pytest.raises(ValueError, match=message):
    FineTuneConfig(**values)


def test_rows_must_be_in_the_vocabulary():
  with pytest.raises(ValueError, match=r'head_rows \(4, 200\) do not fit vocabulary.size 128'):
    dataclasses.replace(CONFIG, fine_tune=dataclasses.replace(HEAD, head_rows=(4, 200)))
