"""Keys and values in int8: the bound on what rounding costs, and the attention to what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.transformer import attention, slots
from chameleon_jax.models.transformer.slots import QuantizedSlots, quantize_tokens
from chameleon_jax.planning.layout import Layout


def draw(*shape, seed=0):
  """Of many sizes, so that one scale for all would show."""
  rng = np.random.default_rng(seed)
  return (rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 7, shape[:-1])[..., None]).astype(np.float32)


def buffer(tokens) -> QuantizedSlots:
  """[B, T, K, H] as a cache has it, every slot filled."""
  return jax.tree.map(lambda part: jnp.swapaxes(part, 1, 2), quantize_tokens(jnp.asarray(tokens)))


def stood_for(quantized: QuantizedSlots) -> np.ndarray:
  """float32 [B, S, K, H], by numpy."""
  values, scale = np.asarray(quantized.values, np.float64), np.asarray(quantized.scale, np.float64)
  return np.swapaxes(values * scale[..., None], 1, 2).astype(np.float32)


def test_no_value_moves_by_more_than_half_a_step():
  x = draw(3, 5, 2, 16)
  x[1, 2, 0] = 0
  quantized = quantize_tokens(jnp.asarray(x))
  assert quantized.values.dtype == jnp.int8 and quantized.scale.dtype == jnp.float32 and quantized.scale.shape == (3, 5, 2)
  step = np.asarray(quantized.scale, np.float64)[..., None]
  largest = np.abs(x).max(-1)
  np.testing.assert_allclose(np.where(largest > 0, quantized.scale, 0), largest / 127, rtol=1e-6)
  moved = np.abs(x - np.asarray(quantized.values, np.float64) * step)
  assert (moved <= step * (0.5 + 127 * 2.0**-23)).all()  # the second term: 127 steps, divided and rounded in float32
  assert moved.max() > 0.4 * step.max() and (np.asarray(quantized.values)[1, 2, 0] == 0).all()


@pytest.mark.parametrize('broken', [np.nan, np.inf], ids=str)
def test_what_is_not_finite_stays_visible(broken):
  x = draw(1, 2, 1, 8)
  x[0, 1, 0, 3] = broken
  scale = np.asarray(quantize_tokens(jnp.asarray(x)).scale)
  assert np.isfinite(scale[0, 0]) and not np.isfinite(scale[0, 1])


attend_cache = jax.jit(attention.attend_cache, static_argnames='dtype')
attend = jax.jit(attention.attend, static_argnames='dtype')


@pytest.mark.parametrize(('kv_heads', 'dtype'), [(1, 'float32'), (2, 'float32'), (2, 'bfloat16')])
def test_attention_is_that_to_the_float_slots_it_stands_for(kv_heads, dtype):
  q, k, v = draw(3, 2, 6, 8), draw(3, 20, kv_heads, 8, seed=1), draw(3, 20, kv_heads, 8, seed=2)
  q = q / np.linalg.norm(q, axis=-1, keepdims=True)
  k = 4 * k / np.linalg.norm(k, axis=-1, keepdims=True) * (1 + np.arange(20)[:, None, None] / 20)  # no slot has all the weight
  positions = jnp.array([[3, 4], [0, 1], [18, 19]], jnp.int32)
  keys, values = buffer(k), buffer(v)
  ours = attend_cache(jnp.asarray(q), keys, values, positions=positions, dtype=dtype)
  mask = attention.cache_mask(positions, 20)
  plain = attend(jnp.asarray(q), *map(jnp.asarray, (stood_for(keys), stood_for(values))), mask, dtype='float32')
  unrounded = attend(jnp.asarray(q), *map(jnp.asarray, (k, v)), mask, dtype='float32')
  assert ours.dtype == jnp.dtype(dtype)
  size = np.abs(plain).max(-1, keepdims=True)
  off, rounding = (np.abs(np.asarray(ours, np.float32) - other) / size for other in (plain, unrounded))
  assert off.max() < (1e-5 if dtype == 'float32' else 2.0**-8)  # on the CPU only the result is rounded to bfloat16
  assert dtype == 'bfloat16' or rounding.max() > 1e-3


@pytest.mark.parametrize(('platform', 'expected'), [('cpu', 'float32'), ('gpu', 'bfloat16'), ('tpu', 'bfloat16')])
def test_the_products_take_the_compute_type_and_float32_on_the_cpu(platform, expected):
  q, tokens = jnp.asarray(draw(1, 1, 2, 8)), draw(1, 4, 2, 8)
  with jax.sharding.use_abstract_mesh(Layout(1, 1, 1).mesh(platform)):
    program = jax.make_jaxpr(lambda keys, values: attention.attend_cache(q, keys, values, positions=jnp.array([[3]]), dtype='bfloat16'))(
      buffer(tokens), buffer(tokens)
    )
  products = [equation for equation in program.eqns if equation.primitive.name == 'dot_general']
  assert [{operand.aval.dtype.name for operand in equation.invars} for equation in products] == 2 * [{expected}]
  assert [equation.outvars[0].aval.dtype.name for equation in products] == 2 * ['float32']


def test_the_type_of_float_slots_is_theirs():
  assert slots.operand_dtype(jnp.zeros((1, 1, 1, 2), jnp.bfloat16), 'float32') == jnp.bfloat16
