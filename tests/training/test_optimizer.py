"""Schedules against closed forms; AdamW with clipping against its definition in numpy."""

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
