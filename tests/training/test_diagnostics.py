"""Norms of every layer: told apart by name, equal to plain numpy, and written by a run."""

import json

import jax
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import DataConfig, OptimizerConfig, TrainConfig
from chameleon_jax.data.pipeline import to_devices
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.training.diagnostics import figures, kind_of, squares
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.state import abstract_state, init_state
from chameleon_jax.training.step import make_eval_step, make_train_step


@pytest.mark.parametrize(
    ('path', 'expected'),
    [
        ('layers_3/attention/q_proj', ('attention', 3, False)),
        ('layers/attention/q_norm/weight', ('norms', None, True)),
        ('layers_12/attention_norm/weight', ('norms', 12, False)),
        ('layers/feed_forward/down_proj', ('feed_forward', None, True)),
        ('layers_0/attention/q_proj/lora_a', ('attention', 0, False)),
        ('final_norm/weight', ('norms', None, False)),
        ('embedding', ('embedding', None, False)),
        ('lm_head', ('head', None, False)),
        ('adapter/kernel', ('other', None, False)),
    ],
)
def test_kinds(path, expected):
  assert kind_of(path) == expected


def _config(**changes):
  return TrainConfig(
      model=presets.tiny_transformer(n_layers=2, scan_layers=changes.pop('scan_layers', True)),
      vocabulary=presets.tiny_vocabulary(),
      data=DataConfig(seq_len=16, batch_size=8),
      optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0, schedule='constant', eps=1e-8, clip_norm=0.1),
      z_loss=1e-3,
      n_steps=10,
      **changes,
  )


def _batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, 128, (8, 16)).astype(np.int32)
  ones = np.ones((8, 16), np.int32)
  positions = np.tile(np.arange(16, dtype=np.int32), (8, 1))
  targets, weights = np.roll(tokens, -1, 1), ones.astype(np.float32)
  return {'tokens': tokens, 'targets': targets, 'loss_weights': weights, 'segment_ids': ones, 'positions': positions}


def test_stacked_layers_are_measured_as_layers_apart():
  rng = np.random.default_rng(1)
  attention = {'q_proj': (4, 2, 3), 'q_norm': {'weight': (2, 3)}}
  layer = {'attention': attention, 'feed_forward': {'up_proj': (4, 5)}, 'ffn_norm': {'weight': (4,)}}
  draw = lambda shape: rng.normal(size=shape).astype(np.float32)
  is_shape = lambda leaf: isinstance(leaf, tuple)
  layers = [jax.tree.map(draw, layer, is_leaf=is_shape) for _ in range(3)]
  rest = {'embedding': draw((7, 4)), 'final_norm': {'weight': draw((4,))}, 'lm_head': draw((4, 7)), 'count': np.int32(3)}
  stacked = squares(rest | {'layers': jax.tree.map(lambda *leaves: np.stack(leaves), *layers)})
  apart = squares(rest | {f'layers_{index}': tree for index, tree in enumerate(layers)})
  assert stacked.keys() == apart.keys() == {'embedding', 'attention', 'feed_forward', 'norms', 'head'}
  expected = [np.sum(tree['attention']['q_norm']['weight'] ** 2) + np.sum(tree['ffn_norm']['weight'] ** 2) for tree in layers]
  np.testing.assert_allclose(stacked['norms']['layers'], expected, rtol=1e-6)
  assert float(stacked['norms']['beside']) == pytest.approx(np.sum(rest['final_norm']['weight'] ** 2), rel=1e-6)
  for kind in stacked:
    assert stacked[kind].keys() == apart[kind].keys()
    for part in stacked[kind]:
      np.testing.assert_allclose(stacked[kind][part], apart[kind][part], rtol=1e-6)


@pytest.fixture(scope='module')
def one_step():
  """(figures of the step, its other metrics, parameters before and after, gradients by jax.grad of the evaluation's loss)."""
  config = _config(diagnostics_every=1)
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  model, optimizer = Transformer(config.model), make_optimizer(config.optimizer, config.n_steps)
  state = init_state(model, optimizer, mesh, key=jax.random.key(1))
  before = jax.device_get(state.params)
  evaluate = make_eval_step(model, config, mesh, jax.tree.map(lambda leaf: leaf.sharding, state.params))
  with jax.set_mesh(mesh):
    batch = to_devices(_batch(), mesh)
    gradients = jax.device_get(jax.grad(lambda params: evaluate(params, batch).loss(config.z_loss))(state.params))
    sums = jax.device_get(evaluate(state.params, batch))
    state, metrics = make_train_step(model, optimizer, config, mesh)(state, batch, jax.random.key(0))
  measured = metrics.pop('diagnostics')
  return figures(measured), jax.device_get(metrics), before, jax.device_get(state.params), gradients, sums


def _norm(*leaves):
  return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in leaves)))


def test_norms_are_those_of_numpy(one_step):
  found, metrics, before, after, gradients, _ = one_step
  updates = jax.tree.map(lambda new, old: new.astype(np.float64) - old, after, before)
  for quantity, tree, tolerance in (('gradient_norm', gradients, 1e-4), ('update_norm', updates, 1e-3), ('parameter_norm', after, 1e-5)):
    attention, norms = tree['layers']['attention'], [tree['layers']['attention_norm'], tree['layers']['ffn_norm']]
    for layer in range(2):
      projections = [attention[f'{name}_proj'][layer] for name in 'qkvo']
      head_norms = [leaf[layer] for name in ('q_norm', 'k_norm') for leaf in jax.tree.leaves(attention[name])]
      own_norms = [*head_norms, *(norm['weight'][layer] for norm in norms)]
      forward = [leaf[layer] for leaf in jax.tree.leaves(tree['layers']['feed_forward'])]
      expected = {
          f'attention/layer_0{layer}': _norm(*projections),
          f'norms/layer_0{layer}': _norm(*own_norms),
          f'feed_forward/layer_0{layer}': _norm(*forward),
          f'layer_0{layer}': _norm(*projections, *own_norms, *forward),
      }
      for name, value in expected.items():
        assert found[f'{quantity}/{name}'] == pytest.approx(value, rel=tolerance), (quantity, name)
    assert found[f'{quantity}/embedding'] == pytest.approx(_norm(tree['embedding']), rel=tolerance)
    assert found[f'{quantity}/head'] == pytest.approx(_norm(tree['lm_head']), rel=tolerance)
    whole = _norm(*(found[f'{quantity}/{kind}'] for kind in ('embedding', 'attention', 'feed_forward', 'norms', 'head')))
    assert whole == pytest.approx(_norm(*jax.tree.leaves(tree)), rel=tolerance)
  assert _norm(*(found[f'gradient_norm/{kind}'] for kind in ('embedding', 'attention', 'feed_forward', 'norms', 'head'))) == pytest.approx(
      float(metrics['gradient_norm']), rel=1e-5
  )
  ratio = found['update_norm/layer_01'] / found['parameter_norm/layer_01']
  assert found['update_ratio/layer_01'] == pytest.approx(ratio) and 0 < ratio < 1


def test_the_z_term_and_activations(one_step):
  found, metrics, _, _, _, sums = one_step
  assert found['z_mean'] == pytest.approx(float(metrics['z']), rel=1e-5)
  assert found['logit_norm'] == pytest.approx(float(metrics['logit_norm']), rel=1e-5)
  z_loss = 1e-3 * float(sums.z_squared) / float(sums.weight)
  assert found['z_loss'] == pytest.approx(z_loss, rel=1e-5) and z_loss == pytest.approx(1e-3 * np.log(128) ** 2, rel=0.05)
  assert found['z_loss_share'] == pytest.approx(z_loss / float(metrics['loss']), rel=1e-5)
  assert found['output_rms/layer_01'] == pytest.approx(float(metrics['output_rms']), rel=1e-5)
  bounds = [found[f'attention_logit_bound/layer_0{layer}'] for layer in range(2)]
  assert max(bounds) == pytest.approx(float(metrics['attention_logit_bound']), rel=1e-5)


def test_a_run_writes_them_at_their_steps(seen_run):
  found = {}
  for line in (seen_run.workdir / 'metrics.jsonl').read_text().splitlines():
    record = json.loads(line)
    kept = {name: value for name, value in record.items() if name.startswith('diagnostics/')}
    if kept:
      found[record['step']] = kept
  assert sorted(found) == [3, 6]
  train = {r['step']: r for r in map(json.loads, (seen_run.workdir / 'metrics.jsonl').read_text().splitlines()) if 'train/loss' in r}
  for step, values in found.items():
    kinds = [values[f'diagnostics/gradient_norm/{kind}'] for kind in ('embedding', 'attention', 'feed_forward', 'norms', 'head')]
    assert _norm(*kinds) == pytest.approx(train[step]['train/gradient_norm'], rel=1e-5)
    assert {f'diagnostics/output_rms/layer_0{layer}' for layer in range(2)} <= values.keys()
    assert not any('diagnostics' in name for name in train[step])


def test_off_means_off():
  """Without `diagnostics_every` the step returns nothing of it."""
  config = _config()
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  model, optimizer = Transformer(config.model), make_optimizer(config.optimizer, config.n_steps)
  state = abstract_state(model, optimizer, mesh)
  with jax.set_mesh(mesh):
    _, metrics = jax.eval_shape(make_train_step(model, optimizer, config, mesh), state, _batch(), jax.random.key(0))
  assert all(value.shape == () for value in jax.tree.leaves(metrics)) and not metrics.keys() & {'diagnostics', 'per_layer'}
  with pytest.raises(ValueError, match='diagnostics_every must be positive or None'):
    _config(diagnostics_every=0)
