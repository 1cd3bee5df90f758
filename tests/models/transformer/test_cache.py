"""Slots of the key/value cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax import presets
from chameleon_jax.models.transformer.cache import init_cache, write


def test_shapes_and_types():
  config = presets.tiny_transformer(n_layers=3)
  stacked = init_cache(config, 2, 7, 'bfloat16')
  assert stacked.k.shape == stacked.v.shape == (3, 2, 2, 7, 8) and stacked.k.dtype == jnp.bfloat16
  layers = init_cache(dataclasses.replace(config, scan_layers=False), 2, 7)
  assert isinstance(layers.k, tuple) and [k.shape for k in layers.k] == 3 * [(2, 2, 7, 8)]
  assert layers.n_slots == stacked.n_slots == 7 and layers.batch_size == stacked.batch_size == 2
  assert init_cache(dataclasses.replace(config, dtype='bfloat16'), 1, 1).k.dtype == jnp.float32  # on the CPU


def test_tokens_go_to_their_positions_and_nowhere_else():
  """Drawn example of the module: a prefill of five with a prompt of three, then the token at position 3."""
  empty = jnp.zeros((2, 1, 6, 1))

  def column(*values):
    return jnp.asarray(values, jnp.float32).reshape(2, -1, 1, 1)

  prefill = column(1, 2, 3, 98, 99, 11, 12, 13, 14, 15)
  k, v = write((empty, empty), prefill, -prefill, jnp.tile(jnp.arange(5), (2, 1)))
  k, v = jax.jit(write)((k, v), column(4, 16), column(-4, -16), jnp.array([[3], [5]]))
  np.testing.assert_array_equal(k[:, 0, :, 0], [[1, 2, 3, 4, 99, 0], [11, 12, 13, 14, 15, 16]])
  np.testing.assert_array_equal(v, -k)


def test_positions_outside_write_nothing():
  empty = jnp.zeros((1, 1, 3, 1))
  k, _ = write((empty, empty), jnp.ones((1, 2, 1, 1)), jnp.ones((1, 2, 1, 1)), jnp.array([[3, 1]]))
  np.testing.assert_array_equal(k[0, 0, :, 0], [0, 1, 0])
