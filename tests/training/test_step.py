"""One update: independent of how it is cut into microbatches, pieces and devices; nothing crosses documents."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from chameleon_jax.data.packing import Limits, assemble
from chameleon_jax.data.pipeline import to_devices
from chameleon_jax.errors import CheckpointError, ConfigError
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.tokens.render import Rendered
from chameleon_jax.training.losses import Modalities
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.state import TrainState, abstract_state, init_state
from chameleon_jax.training.step import make_eval_step, make_train_step, modalities_of

CONFIG = TrainConfig(
    model=presets.tiny_transformer(n_layers=1),
    vocabulary=presets.tiny_vocabulary(),
    data=DataConfig(seq_len=16, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0, schedule='constant', eps=1e-8),
    n_steps=10,
)
LIMITS = Limits(seq_len=16, begin_image=37, end_image=36, pad=1)


def _document(rng, length):
  tokens = np.r_[0, rng.integers(4, 128, length - 1)].astype(np.int32)
  return Rendered(tokens, np.append(tokens[1:], np.int32(1)), np.r_[np.ones(length - 1), 0].astype(np.float32))


def _batch(seed=0):
  rng = np.random.default_rng(seed)
  rows = [assemble([_document(rng, n) for n in rng.integers(2, 8, 2)], LIMITS) for _ in range(8)]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _one_device():
  return make_mesh(MeshConfig(), jax.devices()[:1])


@functools.lru_cache
def _parts(config, mesh):
  """(model, optimizer, compiled step), made once for all tests."""
  model, optimizer = Transformer(config.model), make_optimizer(config.optimizer, config.n_steps)
  return model, optimizer, make_train_step(model, optimizer, config, mesh)


def _run(config, mesh=None, *, n_steps=1, params=None):
  """(state, metrics of the last step)."""
  mesh = mesh or _one_device()
  model, optimizer, step = _parts(config, mesh)
  state = init_state(model, optimizer, mesh, key=jax.random.key(1), params=params)
  with jax.set_mesh(mesh):
    for _ in range(n_steps):
      state, metrics = step(state, to_devices(_batch(), mesh), jax.random.key(7))
  return jax.device_get(state), {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope='module')
def plain():
  return _run(CONFIG)


def _change(config, **changes):
  for name, value in changes.items():
    value = dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
    config = dataclasses.replace(config, **{name: value})
  return config


@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2)])
def test_the_same_update_however_it_is_cut(plain, sizes):
  """Microbatches, pieces of the projection, recomputed layers; then over devices as well."""
  config = _change(CONFIG, optimizer={'accumulate_steps': 2}, loss_chunks=4, model={'remat': 'full'}, mesh=MeshConfig(*sizes))
  state, metrics = _run(config, make_mesh(config.mesh, jax.devices()[: math.prod(sizes)]))
  assert metrics.keys() == plain[1].keys()
  for name in metrics.keys() - {'output_rms', 'attention_logit_bound'}:  # these are not sums over the microbatches
    assert metrics[name] == pytest.approx(plain[1][name], rel=1e-5), name
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, plain[0].params)


def test_metrics_of_an_untrained_model(plain):
  _, metrics = plain
  batch = _batch()
  is_image = (batch['targets'] >= 4) & (batch['targets'] < 36)
  assert metrics['n_text'] == float(np.sum(batch['loss_weights'] * ~is_image))
  assert metrics['n_image'] == float(np.sum(batch['loss_weights'] * is_image))
  assert metrics['loss_text'] == pytest.approx(np.log(128), abs=0.1)
  assert metrics['z'] == pytest.approx(np.log(128), abs=0.1)
  assert metrics['finite'] == 1
  assert metrics['learning_rate'] == pytest.approx(0.01)
  assert {'output_rms', 'attention_logit_bound'} <= metrics.keys()


def test_packed_documents_learn_as_if_alone():
  """Sums over a packed row equal the sums over its documents in rows of their own, which need no segment ids."""
  rng = np.random.default_rng(3)
  documents = [_document(rng, n) for n in (5, 4, 6)]
  packed = [assemble(documents, LIMITS)] + [assemble([], LIMITS)] * 7
  alone = [assemble([document], LIMITS) for document in documents] + [assemble([], LIMITS)] * 5
  mesh = _one_device()
  model, optimizer, _ = _parts(CONFIG, mesh)
  state = init_state(model, optimizer, mesh, key=jax.random.key(1))
  evaluate = make_eval_step(model, CONFIG, mesh, jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh).params))
  with jax.set_mesh(mesh):
    batches = [{name: np.stack([row[name] for row in rows]) for name in rows[0]} for rows in (packed, alone)]
    batches.append({name: value for name, value in batches[1].items() if name != 'segment_ids'})
    sums = [evaluate(state.params, batch) for batch in batches]
  for other in sums[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sums[0], other)
  assert float(sums[0].weight) == 12


def test_it_learns_and_counts(plain):
  state, metrics = _run(CONFIG, n_steps=8)
  assert metrics['loss'] < plain[1]['loss'] - 1
  assert int(state.step) == 8


def test_dropout_depends_on_key_and_step_only():
  config = _change(CONFIG, model={'dropout': 0.5}, optimizer={'learning_rate': 1e-12, 'weight_decay': 0.0})
  first, again, second = _run(config)[1], _run(config)[1], _run(config, n_steps=2)[1]
  assert first['loss'] == again['loss']
  assert abs(first['loss'] - second['loss']) > 1e-4


def test_an_update_that_is_not_finite_is_not_applied(plain):
  params = plain[0].params
  poisoned = params | {'lm_head': np.where(np.arange(128) == 5, np.nan, params['lm_head'])}
  state, metrics = _run(CONFIG, params=poisoned)
  assert metrics['finite'] == 0
  assert int(state.step) == 0
  jax.tree.map(np.testing.assert_array_equal, state.params, poisoned)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_muon_learns_over_a_mesh_as_on_one_device():
  config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, name='muon'))
  alone, metrics = _run(config, n_steps=3)
  meshed, _ = _run(config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), n_steps=3)
  assert metrics['loss'] < _run(config)[1]['loss']
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), alone.params, meshed.params)


def test_the_batch_must_split():
  config = _change(CONFIG, optimizer={'accumulate_steps': 3})
  with pytest.raises(ConfigError, match='batch_size 8 is not a multiple of optimizer.accumulate_steps 3 times 1'):
    _run(config)


def test_modalities_come_from_the_config():
  config = dataclasses.replace(CONFIG, image_loss_weight=0.5)
  assert modalities_of(config) == Modalities((4, 36), text_weight=1.0, image_weight=0.5)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_states_are_plain_and_sharded(name):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  model, optimizer = Transformer(CONFIG.model), make_optimizer(dataclasses.replace(CONFIG.optimizer, name=name), 10)
  abstract = abstract_state(model, optimizer, mesh)
  state = init_state(model, optimizer, mesh, key=jax.random.key(0))
  assert isinstance(state, TrainState)
  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  assert not any(map(is_box, jax.tree.leaves(state, is_leaf=is_box)))
  layout = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding)
  assert jax.tree.map(layout, state) == jax.tree.map(layout, abstract)
  query = state.params['layers']['attention']['q_proj']
  assert query.sharding.spec == jax.P(None, 'fsdp', 'tensor', None)
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == query.shape]
  assert moments and all(leaf.sharding == query.sharding for leaf in moments)


def test_parameters_to_start_from_must_fit(plain):
  params = plain[0].params
  with pytest.raises(CheckpointError, match=r"'lm_head' has shape \(32, 4\), config.model wants \(32, 128\)"):
    _run(CONFIG, params=params | {'lm_head': params['lm_head'][:, :4]})
  model, optimizer, _ = _parts(CONFIG, _one_device())
  state = init_state(model, optimizer, _one_device(), key=jax.random.key(0), params=params)
  jax.tree.map(np.testing.assert_array_equal, state.params, params)
