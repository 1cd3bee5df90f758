"""Schedules against closed forms; AdamW with clipping and Muon against their definitions in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chameleon_jax.config import OptimizerConfig
from chameleon_jax.training.optimizer import decayed, make_optimizer, make_schedule


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
