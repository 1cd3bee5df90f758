"""The quantizer against numpy and hand-made ties."""

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.models.vqgan import quantizer


def test_nearest_codes_against_numpy():
  rng = np.random.default_rng(0)
  z, codebook = rng.normal(size=(3, 4, 4, 5)).astype(np.float32), rng.normal(size=(17, 5)).astype(np.float32)
  distances = np.square(z[..., None, :].astype(np.float64) - codebook).sum(-1)
  codes = quantizer.nearest_codes(jnp.asarray(z), jnp.asarray(codebook))
  np.testing.assert_array_equal(codes, distances.argmin(-1))
  assert codes.dtype == jnp.int32


def test_ties_go_to_the_first_code():
  codebook = jnp.array([[5.0, 5.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
  np.testing.assert_array_equal(quantizer.nearest_codes(jnp.array([[0.0, 0.0], [2.0, 0.0], [-2.0, 0.0]]), codebook), [1, 1, 2])


def test_bfloat16_latents_are_compared_in_float32():
  codebook = jnp.array([[1.0], [1.001]])  # equal in bfloat16
  np.testing.assert_array_equal(quantizer.nearest_codes(jnp.array([[1.02]], jnp.bfloat16), codebook), [1])


def test_straight_through():
  z, z_q = jnp.array([1.0, 2.0]), jnp.array([3.0, 5.0])
  np.testing.assert_allclose(quantizer.straight_through(z, z_q), z_q)
  weighted = lambda a, b: jnp.sum(quantizer.straight_through(a, b) * jnp.array([10.0, 20.0]))
  gradient_z, gradient_q = jax.grad(weighted, argnums=(0, 1))(z, z_q)
  np.testing.assert_allclose(gradient_z, [10, 20])
  np.testing.assert_allclose(gradient_q, [0, 0])
