"""Schedules against closed forms; AdamW with clipping, Muon and Adafactor against their definitions; bytes and layout of states."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from chameleon_jax import presets
from chameleon_jax.config import MeshConfig, OptimizerConfig
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.training.optimizer import _orthogonalised_momentum, decayed, make_optimizer, make_schedule, matrices
from chameleon_jax.training.state import abstract_state


def test_warmup_is_linear_and_reaches_the_peak():
  schedule = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4), 100)
  np.testing.assert_allclose([schedule(step) for step in range(5)], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)


def test_exponential_decays_to_zero():
  k = math.log(100)
  schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, decay_rate=k), 110)
  for step in (10, 35, 60, 109):
    u = (step - 10) / 100
    assert float(schedule(step)) == pytest.approx((math.exp(-k * u) - math.exp(-k)) / (1 - math.exp(-k)), abs=1e-6)
  assert float(schedule(110)) == 0.0


def test_cosine_ends_at_its_fraction():
  schedule = make_schedule(OptimizerConfig(learning_rate=1.0, schedule='cosine', warmup_steps=0, end_fraction=0.1), 100)
  assert float(schedule(0)) == pytest.approx(1.0)
  assert float(schedule(50)) == pytest.approx(0.55)
  assert float(schedule(100)) == pytest.approx(0.1)
  assert float(schedule(500)) == pytest.approx(0.1)


def test_constant():
  schedule = make_schedule(OptimizerConfig(learning_rate=3.0, schedule='constant', warmup_steps=2), 10)
  np.testing.assert_allclose([schedule(step) for step in (0, 1, 2, 9)], [1.5, 3.0, 3.0, 3.0])


def test_a_run_shorter_than_its_warmup():
  schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=100), 10)
  assert float(schedule(9)) == pytest.approx(0.1)


PARAMS = {
    'embedding': jnp.ones((4, 3)),
    'lm_head': jnp.ones((3, 4)),
    'layers': {
        'attention': {'q_proj': jnp.ones((2, 3, 1, 3)), 'q_norm': {'weight': jnp.ones((2, 1, 3)), 'bias': jnp.ones((2, 1, 3))}},
        'attention_norm': {'weight': jnp.ones((2, 3))},
    },
    'conv_in': {'kernel': jnp.ones((3, 3, 3, 8)), 'bias': jnp.ones(8)},
    'norm_out': {'scale': jnp.ones(8)},
}


def test_only_matrices_decay():
  assert decayed(PARAMS) == {
      'embedding': True,
      'lm_head': True,
      'layers': {'attention': {'q_proj': True, 'q_norm': {'weight': False, 'bias': False}}, 'attention_norm': {'weight': False}},
      'conv_in': {'kernel': True, 'bias': False},
      'norm_out': {'scale': False},
  }


def test_two_updates_follow_the_definition():
  config = OptimizerConfig(
      learning_rate=0.1, schedule='constant', warmup_steps=2, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.3, clip_norm=1.0
  )
  optimizer = make_optimizer(config, 10)
  params = {'w': jnp.array([[1.0, -2.0]]), 'norm': {'weight': jnp.array([0.5])}}
  gradients = [
      {'w': jnp.array([[3.0, -4.0]]), 'norm': {'weight': jnp.array([12.0])}},  # norm 13: clipped
      {'w': jnp.array([[0.1, 0.2]]), 'norm': {'weight': jnp.array([-0.2])}},  # norm 0.3: not
  ]
  state = optimizer.init(params)
  w, norm = np.array([1.0, -2.0, 0.5]), [13.0, 1.0]
  m, v = np.zeros(3), np.zeros(3)
  for step, gradient in enumerate(gradients, start=1):
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)

    g = np.concatenate([gradient['w'][0], gradient['norm']['weight']]) / norm[step - 1]
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
    direction = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-5)
    w = w - 0.1 * step / 2 * (direction + 0.3 * w * np.array([1, 1, 0]))
    found = np.concatenate([params['w'][0], params['norm']['weight']])
    np.testing.assert_allclose(found, w, rtol=1e-5)


def test_no_clipping_when_switched_off():
  optimizer = make_optimizer(OptimizerConfig(clip_norm=None, weight_decay=0.0, warmup_steps=0, eps=1e6, learning_rate=1e6), 10)
  params = {'w': jnp.zeros((1, 1))}
  updates, _ = optimizer.update({'w': jnp.full((1, 1), 50.0)}, optimizer.init(params), params)
  assert float(jax.tree.leaves(updates)[0][0, 0]) == pytest.approx(-50.0, rel=1e-3)  # a huge eps makes Adam linear


def _muon_update(parameter, name, gradient):
  """First update of a parameter by Muon with rate 1 and no decay."""
  config = OptimizerConfig(name='muon', learning_rate=1.0, schedule='constant', warmup_steps=0, weight_decay=0.0, clip_norm=None)
  optimizer = make_optimizer(config, 10)
  params = {'layers': {name: jnp.asarray(parameter)}, 'embedding': jnp.ones((2, 2))}
  gradients = {'layers': {name: jnp.asarray(gradient)}, 'embedding': jnp.array([[1.0, -2.0], [3.0, -4.0]])}
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  return np.asarray(updates['layers'][name]), np.asarray(updates['embedding'])


def _orthogonalised(gradient):
  """Minus the gradient with every singular value s replaced by p(p(p(p(p(s / |gradient|))))), times 0.2 sqrt(the longer side)."""
  u, values, v = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
  values = values / np.linalg.norm(values)
  for _ in range(5):
    values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
  return -0.2 * math.sqrt(max(gradient.shape)) * (u * values) @ v


@pytest.mark.parametrize('name, shape, matrix', [
    ('up_proj', (6, 10), (6, 10)),
    ('down_proj', (10, 6), (10, 6)),
    ('q_proj', (8, 2, 4), (8, 8)),
    ('k_proj', (8, 1, 4), (8, 4)),
    ('o_proj', (2, 4, 8), (8, 8)),
])  # fmt: skip
def test_muon_orthogonalises_hidden_matrices(name, shape, matrix):
  gradient = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  update, embedding = _muon_update(np.ones(shape, np.float32), name, gradient)
  np.testing.assert_allclose(update.reshape(matrix), _orthogonalised(gradient.reshape(matrix)), rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(embedding, [[-1, 1], [-1, 1]], rtol=1e-4)  # the first update of Adam is the sign


def test_muon_takes_scanned_layers_one_by_one():
  gradient = np.random.default_rng(1).normal(size=(3, 4, 2, 2)).astype(np.float32)
  update, _ = _muon_update(np.ones((3, 4, 2, 2), np.float32), 'q_proj', gradient)
  for layer in range(3):
    np.testing.assert_allclose(update[layer].reshape(4, 4), _orthogonalised(gradient[layer].reshape(4, 4)), rtol=1e-3, atol=1e-4)


_STACKS = {'o_proj': (3, 2, 4, 8), 'down_proj': (3, 12, 8)}
_SPECS = {'o_proj': (None, 'tensor', None, 'fsdp'), 'down_proj': (None, 'tensor', 'fsdp')}


def test_muon_on_a_mesh_gives_what_optax_gives_without_gathering_a_stack():
  """Three updates of stacks of three layers, which two devices of the fsdp axis share, and of a layer by itself."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  rng = np.random.default_rng(0)
  shapes = {'layers': _STACKS, 'layers_0': {'gate_proj': (8, 12)}}
  specs = {'layers': _SPECS, 'layers_0': {'gate_proj': ('fsdp', 'tensor')}}
  is_shape = lambda found: isinstance(found, tuple)
  draws = [jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=is_shape) for _ in range(3)]
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, PartitionSpec(*spec)), specs, is_leaf=is_shape)
  ours = _orthogonalised_momentum(0.9)
  optaxs = optax.contrib.scale_by_muon(beta=0.9, weight_dimension_numbers=matrices, mu_dtype=jnp.float32)
  replicated = NamedSharding(mesh, PartitionSpec())
  laid_out = optax.contrib.MuonState(replicated, shardings, replicated)
  expected_state, state = optaxs.init(draws[0]), jax.device_put(ours.init(draws[0]), laid_out)
  assert jax.tree.structure(state) == jax.tree.structure(expected_state)
  with jax.set_mesh(mesh):
    update = jax.jit(ours.update, out_shardings=(shardings, laid_out))
    update = update.lower(jax.device_put(draws[0], shardings), state).compile()
  assert 'all-to-all' in update.as_text()
  assert not re.search(r'f32\[[34],(6|12),8\]|f32\[[34],[12],4,8\]', update.as_text())  # all layers, all that fsdp cuts
  reference = jax.jit(optaxs.update)
  for draw in draws:
    expected, expected_state = reference(draw, expected_state)
    found, state = update(jax.device_put(draw, shardings), state)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (found, state), (expected, expected_state))


def test_adafactor_divides_by_the_factored_root_mean_square():
  """The first update: v = row means x column means / mean of all of g^2, then at most 1 in root mean square."""
  gradient = np.random.default_rng(0).normal(size=(128, 136)).astype(np.float32)
  gradient[:4] *= 30
  config = OptimizerConfig(
      name='adafactor', learning_rate=1.0, schedule='constant', warmup_steps=0, weight_decay=0.0, clip_norm=None, beta1=0.9
  )
  params = {'up_proj': jnp.ones((128, 136)), 'q_norm': {'weight': jnp.ones((2, 4))}}
  gradients = {'up_proj': jnp.asarray(gradient), 'q_norm': {'weight': jnp.full((2, 4), -3.0)}}
  squared = gradient.astype(np.float64) ** 2
  expected = gradient / np.sqrt(squared.mean(1, keepdims=True) * squared.mean(0, keepdims=True) / squared.mean())
  expected = expected / max(1.0, np.sqrt(np.mean(expected**2)))
  for momentum, share in ((None, 1.0), ('float32', 0.1), ('bfloat16', 0.1)):
    optimizer = make_optimizer(dataclasses.replace(config, momentum_dtype=momentum), 10)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates['up_proj'], -share * expected, rtol=1e-4 if momentum != 'bfloat16' else 1e-2, atol=1e-6)
    np.testing.assert_allclose(updates['q_norm']['weight'], np.full((2, 4), share), rtol=1e-2)


@pytest.mark.parametrize(
    ('settings', 'per_parameter'),
    [
        ({}, 8),
        ({'momentum_dtype': 'bfloat16'}, 6),
        ({'name': 'muon'}, 4),
        ({'name': 'adafactor'}, 4 * (512 + 1024) / (512 * 1024)),
        ({'name': 'adafactor', 'momentum_dtype': 'bfloat16'}, 2 + 4 * (512 + 1024) / (512 * 1024)),
        ({'name': 'adafactor', 'momentum_dtype': 'float32'}, 4 + 4 * (512 + 1024) / (512 * 1024)),
    ],
)
def test_bytes_of_state_a_parameter(settings, per_parameter):
  """Of the hidden matrix of 4 layers; place holders and counts are a few bytes."""
  params = {'layers': {'feed_forward': {'up_proj': jax.ShapeDtypeStruct((4, 512, 1024), jnp.float32)}}}
  state = jax.eval_shape(make_optimizer(OptimizerConfig(**settings), 10).init, params)
  found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  assert found == pytest.approx(per_parameter * 4 * 512 * 1024, abs=64)


def test_factored_moments_lie_as_what_is_left_of_their_parameters():
  mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
  config = presets.tiny_transformer(n_layers=2, d_model=128, d_ff=256, n_heads=4, d_head=32)
  model, optimizer = Transformer(config), make_optimizer(OptimizerConfig(name='adafactor', momentum_dtype='bfloat16'), 10)
  factors, _, momentum = abstract_state(model, optimizer, mesh).opt_state[1]
  place = lambda tree: (tree.shape, tree.sharding.spec)
  up, head = (lambda tree: tree['layers']['feed_forward']['up_proj']), (lambda tree: tree['lm_head'])  # [L, D, F] and [D, V]
  assert place(up(factors.v_row)) == ((2, 128), jax.P(None, 'fsdp'))
  assert place(up(factors.v_col)) == ((2, 256), jax.P(None, 'tensor'))
  assert place(up(factors.v)) == ((1,), jax.P(None))
  assert place(up(momentum.ema)) == ((2, 128, 256), jax.P(None, 'fsdp', 'tensor'))
  assert place(head(factors.v_row)) == ((128,), jax.P('fsdp')) and place(head(factors.v_col)) == ((128,), jax.P('tensor'))
  query = factors.v['layers']['attention']['q_proj']  # [L, D, N, H] without two axes of 128
  assert place(query) == ((2, 128, 4, 32), jax.P(None, 'fsdp', 'tensor', None))


def test_a_type_of_momentum_is_not_for_muon():
  with pytest.raises(ValueError, match='momentum_dtype is for adamw and adafactor'):
    OptimizerConfig(name='muon', momentum_dtype='bfloat16')
