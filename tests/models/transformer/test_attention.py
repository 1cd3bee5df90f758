"""Masks against their drawn examples, attention against float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer import attention
from chameleon_jax.models.transformer.slots import QuantizedSlots, quantize_tokens


def picture(mask) -> list[str]:
  return [''.join('x' if cell else '.' for cell in row) for row in np.asarray(mask)]


def draw(batch=3, length=20, slots=20, heads=6, kv_heads=2, d_head=8):
  rng = np.random.default_rng(0)
  shapes = (batch, length, heads, d_head), (batch, slots, kv_heads, d_head), (batch, slots, kv_heads, d_head)
  return [(2 * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]


def reference(q, k, v, mask):
  """float64, head by head; mask [B, T, S]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for head in range(q.shape[2]):
    group = head // (q.shape[2] // k.shape[2])
    scores = np.einsum('bth,bsh->bts', q[:, :, head], k[:, :, group]) / np.sqrt(q.shape[-1])
    weights = np.where(mask, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    out[:, :, head] = np.einsum('bts,bsh->bth', weights / weights.sum(-1, keepdims=True), v[:, :, group])
  return out


def test_segment_mask_is_the_drawn_one():
  mask = attention.segment_mask(jnp.array([[1, 1, 2, 2, 0]]))
  assert picture(mask[0, 0]) == ['x....', 'xx...', '..x..', '..xx.', '....x']


def test_causal_mask_is_the_lower_triangle():
  assert picture(attention.causal_mask(3)[0, 0]) == ['x..', 'xx.', 'xxx']


def test_cache_mask_is_the_drawn_one():
  mask = attention.cache_mask(jnp.array([[2], [0]]), 4)
  assert picture(mask[0, 0]) == ['xxx.'] and picture(mask[1, 0]) == ['x...']


@pytest.mark.parametrize('kv_heads', [1, 2, 6])
def test_attend_equals_float64(kv_heads):
  q, k, v = draw(kv_heads=kv_heads)
  mask = np.random.default_rng(1).random((3, 1, 20, 20)) < 0.5
  mask[:, :, :, 0] = True
  ours = attention.attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(mask), dtype='float32')
  np.testing.assert_allclose(ours, reference(q, k, v, mask[:, 0]), atol=1e-5)


def test_a_row_that_may_attend_nothing_stays_finite():
  q, k, v = (jnp.asarray(x) for x in draw())
  ours = attention.attend(q, k, v, jnp.zeros((3, 1, 20, 20), bool), dtype='float32')
  assert np.isfinite(ours).all()


@pytest.mark.parametrize('kv_heads', [1, 2, 6])
def test_cache_attention_equals_float64(kv_heads):
  q, k, v = draw(length=2, kv_heads=kv_heads)
  positions = np.array([[3, 4], [0, 1], [18, 19]], np.int32)
  slots = (jnp.swapaxes(jnp.asarray(x), 1, 2) for x in (k, v))
  ours = attention.attend_cache(jnp.asarray(q), *slots, positions=positions, dtype='float32')
  np.testing.assert_allclose(ours, reference(q, k, v, np.arange(20) <= positions[:, :, None]), atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(('length', 'starts'), [(64, (0, 200, 86)), (130, (134, 0, 57))], ids=['one_block', 'uneven'])
def test_a_piece_of_a_prompt_against_a_cache_equals_float64(dtype, length, starts):
  """Rows at different places, and slots that are no multiple of a block."""
  n_slots = 264
  q, k, v = draw(length=length, slots=n_slots)
  positions = np.array(starts, np.int32)[:, None] + np.arange(length, dtype=np.int32)
  expected = reference(q, k, v, np.arange(n_slots) <= positions[:, :, None])
  slots = (jnp.swapaxes(jnp.asarray(x), 1, 2) for x in (k, v))
  ours = jax.jit(functools.partial(attention.attend_cache, dtype=dtype))(jnp.asarray(q), *slots, positions=positions)
  assert ours.dtype == jnp.dtype(dtype)
  off = np.abs(np.asarray(ours, np.float64) - expected).max()
  assert off < (1e-5 if dtype == 'float32' else 0.05) * np.abs(expected).max()


def test_a_piece_of_a_prompt_against_an_int8_cache_is_that_against_what_it_stands_for():
  q, k, v = draw(length=130, slots=264)
  positions = np.array([[134], [0], [57]], np.int32) + np.arange(130, dtype=np.int32)
  rounded = [quantize_tokens(jnp.asarray(x)) for x in (k, v)]
  meant = [np.asarray(part.values, np.float64) * np.asarray(part.scale)[..., None] for part in rounded]
  expected = reference(q, *meant, np.arange(264) <= positions[:, :, None])
  cached = [QuantizedSlots(jnp.swapaxes(part.values, 1, 2), jnp.swapaxes(part.scale, 1, 2)) for part in rounded]
  ours = jax.jit(functools.partial(attention.attend_cache, dtype='float32'))(jnp.asarray(q), *cached, positions=positions)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_blocks_of_a_cache_that_no_query_sees_are_not_read():
  q, k, v = draw(length=64, slots=256)
  positions = np.array([[5], [60], [0]], np.int32) + np.arange(64, dtype=np.int32)  # up to slot 123
  expected = reference(q, k, v, np.arange(256) <= positions[:, :, None])
  k[:, 128:], v[:, 128:] = np.nan, np.nan
  slots = (jnp.swapaxes(jnp.asarray(x), 1, 2) for x in (k, v))
  ours = attention.attend_cache(jnp.asarray(q), *slots, positions=positions, dtype='float32')
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def packed_rows(length: int) -> np.ndarray:
  """One document; several, then padding; ids that come back, which no packer writes but the mask allows."""
  several = np.zeros(length, np.int32)
  for index, (start, end) in enumerate([(0, 7), (7, 90), (90, 91), (91, length - 5)]):
    several[start:end] = index + 1
  return np.stack([np.ones(length, np.int32), several[:length], np.arange(length, dtype=np.int32) // 11 % 3])


@pytest.mark.parametrize('packed', [False, True], ids=['one_document', 'packed'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('length', [20, 192, 150], ids=['one_block', 'three_blocks', 'uneven'])
def test_row_attention_and_its_gradients_equal_the_reference(packed, dtype, length):
  q, k, v = (jnp.asarray(x) for x in draw(length=length, slots=length))
  segments = jnp.asarray(packed_rows(length)) if packed else None
  mask = attention.causal_mask(length) if segments is None else attention.segment_mask(segments)
  weights = jnp.asarray(np.random.default_rng(2).standard_normal(q.shape), jnp.float32)

  def ours(q, k, v):
    out = attention.attend_rows(q, k, v, segment_ids=segments, dtype=dtype)
    return jnp.sum(out * weights), out

  def theirs(q, k, v):
    out = attention.attend(q, k, v, mask, dtype='float32')
    return jnp.sum(out * weights), out

  gradients, out = jax.jit(jax.grad(ours, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  expected_gradients, expected = jax.jit(jax.grad(theirs, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  tolerance = 1e-5 if dtype == 'float32' else 0.05
  assert out.dtype == jnp.dtype(dtype)
  for a, b in zip((out, *gradients), (expected, *expected_gradients)):
    assert np.abs(np.asarray(a, np.float32) - b).max() < tolerance * np.abs(b).max()
  np.testing.assert_allclose(expected, reference(q, k, v, np.asarray(mask[:, 0])), atol=1e-5)


HOPPER = {'platform': 'gpu', 'generation': (9, 0), 'length': 4096, 'dtype': 'bfloat16', 'd_head': 128, 'packed': False}


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        # (what differs from long unpacked rows of the 7B on Hopper, {asked: chosen or what the refusal says})
        ({}, {'auto': 'cudnn', 'plain': 'plain', 'blockwise': 'blockwise', 'cudnn': 'cudnn', 'pallas': 'pallas'}),
        ({'packed': True}, {'auto': 'blockwise', 'cudnn': 'rows of one document', 'pallas': 'pallas'}),
        ({'length': 512}, {'auto': 'plain', 'blockwise': 'blockwise', 'cudnn': 'cudnn', 'pallas': 'pallas'}),
        ({'length': 513, 'packed': True}, {'auto': 'blockwise'}),
        ({'dtype': 'float32'}, {'auto': 'blockwise', 'cudnn': 'model.dtype is float32', 'pallas': 'is float32', 'plain': 'plain'}),
        ({'d_head': 256}, {'auto': 'cudnn', 'cudnn': 'cudnn', 'pallas': 'heads of 16 to 128'}),
        ({'d_head': 256, 'generation': (8, 9)}, {'auto': 'blockwise', 'cudnn': 'at most 128 channels, and model.d_head is 256'}),
        ({'d_head': 100}, {'auto': 'blockwise', 'cudnn': 'a multiple of 8', 'pallas': 'pallas'}),
        ({'d_head': 8}, {'auto': 'cudnn', 'pallas': 'heads of 16 to 128 channels, and model.d_head is 8'}),
        ({'generation': (7, 5)}, {'auto': 'blockwise', 'cudnn': 'compute capability 8.0', 'pallas': 'compute capability 8.0'}),
        ({'generation': (0, 0)}, {'auto': 'blockwise', 'cudnn': 'an NVIDIA GPU', 'pallas': 'an NVIDIA GPU', 'plain': 'plain'}),
        ({'generation': None}, {'auto': 'blockwise', 'cudnn': 'cudnn', 'pallas': 'pallas'}),  # a program that is only looked at
        ({'platform': 'cpu', 'generation': None}, {'auto': 'blockwise', 'cudnn': 'this program is for cpu', 'pallas': 'for cpu'}),
        ({'platform': 'cpu', 'generation': None, 'length': 64}, {'auto': 'plain', 'blockwise': 'blockwise'}),
        ({'platform': 'cpu', 'generation': None, 'length': 65, 'dtype': 'float32'}, {'auto': 'blockwise'}),
        ({'platform': 'tpu', 'generation': None}, {'auto': 'blockwise', 'cudnn': 'this program is for tpu', 'pallas': 'for tpu'}),
        ({'platform': 'tpu', 'generation': None, 'length': 512}, {'auto': 'plain'}),
    ],
    ids=lambda value: ','.join(f'{name}={x}' for name, x in value.items()) if isinstance(value, dict) and 'auto' not in value else '',
)
def test_what_computes_attention(changes, expected):
  for asked, chosen in expected.items():
    if ' ' in chosen:
      with pytest.raises(ConfigError, match=chosen) as refused:
        attention.choose(asked, **HOPPER | changes)
      assert str(refused.value).startswith(f"model.attention_implementation is '{asked}', which ") and '\n' not in str(refused.value)
    else:
      assert attention.choose(asked, **HOPPER | changes) == chosen


@pytest.mark.parametrize('length', [20, 150])
def test_what_is_asked_for_is_what_runs(monkeypatch, length):
  """On the CPU: 'auto' makes the program that it made before there was a choice."""
  q, k, v = (jnp.asarray(x) for x in draw(length=length, slots=length))
  rows = jnp.asarray(packed_rows(length))

  def program(asked: str) -> str:
    attend = functools.partial(attention.attend_rows, segment_ids=rows, dtype='float32', implementation=asked)
    return str(jax.make_jaxpr(attend)(q, k, v))

  texts = {asked: program(asked) for asked in ('auto', 'plain', 'blockwise')}
  assert texts['auto'] == texts['plain' if length == 20 else 'blockwise'] != texts['blockwise' if length == 20 else 'plain']
  assert ('custom_vjp' in texts['blockwise']) and 'custom_vjp' not in texts['plain']
  with pytest.raises(ConfigError, match="is 'pallas', which is a kernel for GPUs, and this program is for cpu"):
    attention.attend_rows(q, k, v, segment_ids=rows, dtype='bfloat16', implementation='pallas')
