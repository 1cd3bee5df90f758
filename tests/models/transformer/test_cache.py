"""Slots of the key/value cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer.cache import check_cache_dtype, init_cache, write
from chameleon_jax.models.transformer.slots import QuantizedSlots


def test_shapes_and_types():
  config = presets.tiny_transformer(n_layers=3)
  stacked = init_cache(config, 2, 7, 'bfloat16')
  assert stacked.k.shape == stacked.v.shape == (3, 2, 2, 7, 8) and stacked.k.dtype == jnp.bfloat16
  layers = init_cache(dataclasses.replace(config, scan_layers=False), 2, 7)
  assert isinstance(layers.k, tuple) and [k.shape for k in layers.k] == 3 * [(2, 2, 7, 8)]
  assert layers.n_slots == stacked.n_slots == 7 and layers.batch_size == stacked.batch_size == 2
  assert init_cache(dataclasses.replace(config, dtype='bfloat16'), 1, 1).k.dtype == jnp.float32  # on the CPU


@pytest.mark.parametrize('scan_layers', [True, False])
def test_shapes_and_types_of_int8(scan_layers):
  config = presets.tiny_transformer(n_layers=3, scan_layers=scan_layers)
  cache = init_cache(config, 2, 7, 'int8')
  buffers = [cache.k, cache.v] if scan_layers else [*cache.k, *cache.v]
  lead = (3, 2, 2, 7) if scan_layers else (2, 2, 7)
  assert len(buffers) == (2 if scan_layers else 6) and (cache.n_slots, cache.batch_size) == (7, 2)
  for buffer in buffers:
    assert (buffer.values.shape, buffer.scale.shape) == ((*lead, 8), lead)
    assert (buffer.values.dtype, buffer.scale.dtype) == (jnp.int8, jnp.float32)


def test_an_unknown_type_is_one_line():
  with pytest.raises(ConfigError, match="cache_dtype 'int4' is not known; 'float32', 'bfloat16' and 'int8' are") as error:
    check_cache_dtype('int4')
  assert '\n' not in str(error.value)
  check_cache_dtype(None)


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


def test_int8_tokens_go_to_their_positions_with_their_scales():
  """The drawn example again: [2, 5] tokens of one head, two channels, of which the first is 127 steps."""

  def tokens(*values):
    steps = jnp.asarray(values, jnp.float32).reshape(2, -1, 1, 1)
    return steps * jnp.array([127, -3])

  def empty():
    return QuantizedSlots(jnp.zeros((2, 1, 6, 2), jnp.int8), jnp.zeros((2, 1, 6)))

  prefill, put = tokens(1, 2, 3, 98, 99, 11, 12, 13, 14, 15), jax.jit(write)
  k, v = put((empty(), empty()), prefill, -prefill, jnp.tile(jnp.arange(5), (2, 1)))
  k, v = put((k, v), tokens(4, 16), -tokens(4, 16), jnp.array([[3], [5]]))
  k, v = put((k, v), tokens(7, 8), -tokens(7, 8), jnp.array([[6], [99]]))  # outside: nowhere
  np.testing.assert_array_equal(k.scale[:, 0], [[1, 2, 3, 4, 99, 0], [11, 12, 13, 14, 15, 16]])
  np.testing.assert_array_equal(k.values[:, 0], np.array([[127, -3]]) * (np.asarray(k.scale)[:, 0, :, None] > 0))
  np.testing.assert_array_equal(v.values, -k.values)
  np.testing.assert_array_equal(v.scale, k.scale)
