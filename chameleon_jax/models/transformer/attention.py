"""Attention weights and sums, behind one function per case: rows in training, and queries against a cache.

Masks are boolean, True = may attend. Queries are grouped, [B, T, K, G, H], so that keys and values of grouped heads
are never repeated. Scores and softmax are float32; the two products take operands of the compute type.

Does not know: projections, norms or rotations (those are done by the caller), nor how the cache is written.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from chameleon_jax.array_types import Array, Mask, Positions, SegmentIds
from chameleon_jax.config import Dtype
from chameleon_jax.models.transformer.blockwise import attend_blockwise
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


def attend_rows(
    q: Float[Array, 'B T N H'], k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H'], *, segment_ids: SegmentIds | None, dtype: Dtype
) -> Float[Array, 'B T N H']:
  """Attention inside rows: causal, closed in each segment where `segment_ids` are given.

  Rows longer than one block run blockwise. Of two CPU cores, 64 is the fastest block (its scores stay in the cache);
  elsewhere fewer and larger products are.
  """
  batch, length, n_heads, d_head = q.shape
  block = 64 if target_platform() == 'cpu' else 512
  if length <= block:
    return attend(q, k, v, causal_mask(length) if segment_ids is None else segment_mask(segment_ids), dtype=dtype)
  if segment_ids is None:
    segment_ids = jnp.ones((batch, length), jnp.int32)
  missing = -length % block

  def whole_blocks(x: Array) -> Array:
    """[B, T, heads, H] -> [B, heads, whole blocks, H]; what is added lies behind every token."""
    return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))), 1, 2)

  grouped = (batch, k.shape[2], n_heads // k.shape[2], length + missing, d_head)
  context = attend_blockwise(
      block,
      whole_blocks((q * d_head**-0.5).astype(dtype)).reshape(grouped),
      whole_blocks(k.astype(dtype)),
      whole_blocks(v.astype(dtype)),
      jnp.pad(segment_ids, ((0, 0), (0, missing))),
  )
  context = context.astype(dtype).reshape(batch, n_heads, length + missing, d_head)
  return jnp.swapaxes(context, 1, 2)[:, :length]


def attend_cache(
    q: Float[Array, 'B T N H'], k: Float[Array, 'B K S H'] | QuantizedSlots, v: Float[Array, 'B K S H'] | QuantizedSlots, *,
    positions: Positions, dtype: Dtype,
) -> Float[Array, 'B T N H']:
  """Attention of new tokens to all slots of a cache up to their own position; `slots` has the products and their types."""
  batch, length, n_heads, d_head = q.shape
  n_kv_heads, n_slots = jax.tree.leaves(k)[0].shape[1:3]
  groups = (q * d_head**-0.5).astype(operand_dtype(k, dtype)).reshape(batch, length, n_kv_heads, n_heads // n_kv_heads, d_head)
  scores = key_product(jnp.swapaxes(groups, 1, 2), k)
  mask = cache_mask(positions, n_slots)[:, :, :, None]
  weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
  summed = value_product(weights, v, dtype)
  return jnp.swapaxes(summed, 1, 2).reshape(q.shape).astype(dtype)
