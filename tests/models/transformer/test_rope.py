"""Rotations against complex multiplication and the drawn example."""

import jax.numpy as jnp
import numpy as np

from chameleon_jax.models.transformer.rope import rotate, rotation


def test_drawn_example():
  position = 3
  turn = rotation(jnp.array([[position]]), 4, 1.0)
  sin, cos = np.sin(position), np.cos(position)
  x = jnp.array([[[[1.0, 0, 0, 0], [0, 0, 0, 1]]]])
  np.testing.assert_allclose(rotate(x, turn)[0, 0], [[cos, 0, sin, 0], [0, -sin, 0, cos]], atol=1e-6)


def test_pairs_turn_as_complex_numbers():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
  positions = rng.integers(0, 4096, (2, 5)).astype(np.int32)
  ours = np.asarray(rotate(jnp.asarray(x), rotation(positions, 8, 10_000.0)))
  angles = positions[:, :, None, None] * 10_000.0 ** (-2 * np.arange(4) / 8)
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
  np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-3)  # float32 angles up to 4095
  small = np.asarray(rotate(jnp.asarray(x), rotation(positions % 32, 8, 10_000.0)))
  angles = (positions % 32)[:, :, None, None] * 10_000.0 ** (-2 * np.arange(4) / 8)
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
  np.testing.assert_allclose(small, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-5)


def test_products_depend_on_the_distance_only():
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))

  def score(at, other):
    return jnp.sum(rotate(q, rotation(jnp.array([[at]]), 16, 100.0)) * rotate(k, rotation(jnp.array([[other]]), 16, 100.0)))

  np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-4)
