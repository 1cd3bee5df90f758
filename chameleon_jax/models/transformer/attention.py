"""Attention weights and sums, behind one function per case: rows in training, and queries against a cache.

Masks are boolean, True = may attend. Queries are grouped, [B, T, K, G, H], so that keys and values of grouped heads
are never repeated. Scores and softmax are float32; the two products take operands of the compute type.

Does not know: projections, norms or rotations (those are done by the caller), nor how the cache is written.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from chameleon_jax.array_types import Array, Mask, Positions, SegmentIds
from chameleon_jax.config import AttentionImplementation, Dtype
from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer import gpu_attention
from chameleon_jax.models.transformer.blockwise import attend_blockwise, attend_slots
from chameleon_jax.models.transformer.slots import QuantizedSlots, key_product, operand_dtype, value_product
from chameleon_jax.partitioning import target_platform


def segment_mask(segment_ids: SegmentIds) -> Mask:
  """Causal by place in the row and closed inside each segment, [B, 1, T, T]; segment 0 is padding.

  Row with segments 1 1 2 2 0, queries downwards, keys across (x = may attend):

        1 1 2 2 0
    1   x . . . .
    1   x x . . .
    2   . . x . .
    2   . . x x .
    0   . . . . x     padding sees padding only, so that no softmax is empty
  """
  segment_ids = jnp.asarray(segment_ids)
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return (same & jnp.tril(jnp.ones((1, segment_ids.shape[1], segment_ids.shape[1]), bool)))[:, None]


def causal_mask(length: int) -> Bool[Array, '1 1 T T']:
  """Lower triangle: a token sees itself and what stands before it in the row."""
  return jnp.tril(jnp.ones((1, 1, length, length), bool))


def cache_mask(positions: Positions, n_slots: int) -> Mask:
  """A query at position p sees the slots 0 .. p, [B, 1, T, S].

  Two rows at positions 2 and 0, one query each, four slots:

    row 0   x x x .
    row 1   x . . .
  """
  return (jnp.arange(n_slots) <= jnp.asarray(positions)[:, :, None])[:, None]


def attend(
    q: Float[Array, 'B T N H'], k: Float[Array, 'B S K H'], v: Float[Array, 'B S K H'], mask: Mask, *, dtype: Dtype
) -> Float[Array, 'B T N H']:
  """softmax(q k^T / sqrt(H)) v with grouped heads: query head h reads key/value head h // (N / K).

  The reference: it holds all scores [B, K, G, T, S] at once.
  """
  batch, length, n_heads, d_head = q.shape
  groups = (q * d_head**-0.5).astype(dtype).reshape(batch, length, k.shape[2], n_heads // k.shape[2], d_head)
  scores = jnp.einsum('btkgh,bskh->bkgts', groups, k.astype(dtype), preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
  summed = jnp.einsum('bkgts,bskh->btkgh', weights.astype(dtype), v.astype(dtype), preferred_element_type=jnp.float32)
  return summed.reshape(q.shape).astype(dtype)


def choose(
    asked: AttentionImplementation,
    *,
    platform: str,
    generation: gpu_attention.Generation | None,
    length: int,
    dtype: Dtype,
    d_head: int,
    packed: bool,
) -> Literal['plain', 'blockwise', 'cudnn', 'pallas']:
  """What computes attention inside rows of `length` tokens.

    asked        rows of one block    longer rows
    auto         plain                blockwise; on a GPU cudnn where it can serve, which is never with segment_ids
    any other    that one             that one

  On a GPU 'auto' takes what jax documents for it. Packed rows stay blockwise there until somebody measures 'pallas' on one.

  Args:
    asked: by `TransformerConfig.attention_implementation`.
    platform, generation, dtype, d_head, packed: as in `gpu_attention.obstacle`.
    length: of a row.

  Raises:
    ConfigError: one line, why the kernel that was asked for cannot serve.
  """
  facts: dict[str, Any] = {'platform': platform, 'generation': generation, 'dtype': dtype, 'd_head': d_head, 'packed': packed}
  if asked == 'auto':
    if length <= block_size(platform):
      return 'plain'
    known = platform == 'gpu' and generation is not None
    return 'cudnn' if known and gpu_attention.obstacle('cudnn', **facts) is None else 'blockwise'
  if asked in ('cudnn', 'pallas'):
    problem = gpu_attention.obstacle(asked, **facts)
    if problem:
      raise ConfigError(f"model.attention_implementation is '{asked}', {problem}; set it to 'auto', which takes what can serve")
  return asked


def block_size(platform: str) -> int:
  """Tokens of a block. Of two CPU cores, 64 is the fastest (its scores stay in the cache); elsewhere fewer and larger products are."""
  return 64 if platform == 'cpu' else 512


def _in_blocks(x: Float[Array, 'B T heads H'], block: int) -> Float[Array, 'B heads blocks H']:
  """Whole blocks of tokens, those of a head together; what is added lies behind every token."""
  return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))), 1, 2)


def _queries_in_blocks(q: Float[Array, 'B T N H'], n_kv_heads: int, block: int, dtype: Dtype) -> Float[Array, 'B K G blocks H']:
  """Scaled queries, those of one key/value head together."""
  blocks = _in_blocks((q * q.shape[-1] ** -0.5).astype(dtype), block)
  return blocks.reshape(q.shape[0], n_kv_heads, -1, *blocks.shape[2:])


def _out_of_blocks(context: Float[Array, 'B K G blocks H'], length: int, dtype: Dtype) -> Float[Array, 'B T N H']:
  """The tokens of each row again."""
  heads = context.astype(dtype).reshape(context.shape[0], -1, *context.shape[3:])
  return jnp.swapaxes(heads, 1, 2)[:, :length]


def attend_rows(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    *,
    segment_ids: SegmentIds | None,
    dtype: Dtype,
    implementation: AttentionImplementation = 'auto',
) -> Float[Array, 'B T N H']:
  """Attention inside rows: causal, closed in each segment where `segment_ids` are given.

  Raises:
    ConfigError: the implementation that was asked for cannot serve (`choose`).
  """
  batch, length, _, d_head = q.shape
  platform, packed = target_platform(), segment_ids is not None
  generation = gpu_attention.generation() if platform == 'gpu' else None
  chosen = choose(implementation, platform=platform, generation=generation, length=length, dtype=dtype, d_head=d_head, packed=packed)
  if chosen == 'cudnn':
    return gpu_attention.attend_cudnn(q, k, v, dtype=dtype)
  if chosen == 'pallas':
    return gpu_attention.attend_pallas(q, k, v, segment_ids=segment_ids, dtype=dtype)
  if chosen == 'plain':
    return attend(q, k, v, causal_mask(length) if segment_ids is None else segment_mask(segment_ids), dtype=dtype)
  block = block_size(platform)
  if segment_ids is None:
    segment_ids = jnp.ones((batch, length), jnp.int32)
  context = attend_blockwise(
      block,
      _queries_in_blocks(q, k.shape[2], block, dtype),
      _in_blocks(k.astype(dtype), block),
      _in_blocks(v.astype(dtype), block),
      jnp.pad(segment_ids, ((0, 0), (0, -length % block))),
  )
  return _out_of_blocks(context, length, dtype)


def attend_cache(
    q: Float[Array, 'B T N H'], k: Float[Array, 'B K S H'] | QuantizedSlots, v: Float[Array, 'B K S H'] | QuantizedSlots, *,
    positions: Positions, dtype: Dtype,
) -> Float[Array, 'B T N H']:
  """Attention of new tokens to the slots of a cache up to their own position.

  A piece of a prompt of one block or more runs blockwise, with operands of `dtype`; the products for fewer tokens are those of `slots`.
  """
  batch, length, n_heads, d_head = q.shape
  n_kv_heads, n_slots = jax.tree.leaves(k)[0].shape[1:3]
  block = block_size(target_platform())
  if length >= block and n_slots >= block:
    places = jnp.pad(jnp.asarray(positions), ((0, 0), (0, -length % block)))
    context = attend_slots(block, _queries_in_blocks(q, n_kv_heads, block, dtype), k, v, places, dtype=dtype)
    return _out_of_blocks(context, length, dtype)
  groups = (q * d_head**-0.5).astype(operand_dtype(k, dtype)).reshape(batch, length, n_kv_heads, n_heads // n_kv_heads, d_head)
  scores = key_product(jnp.swapaxes(groups, 1, 2), k)
  mask = cache_mask(positions, n_slots)[:, :, :, None]
  weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
  summed = value_product(weights, v, dtype)
  return jnp.swapaxes(summed, 1, 2).reshape(q.shape).astype(dtype)
