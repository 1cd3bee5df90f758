"""Causal attention in blocks of queries and keys: exact, without ever holding all scores.

Forward keeps a running maximum and sum of each query (arXiv 2112.05682, 2205.14135); backward recomputes the weights
of a block from the saved log-sum. Blocks above the diagonal are skipped, and so are blocks of keys that no row of the
batch attends, because its documents begin later. With two documents in every row, four blocks:

  segments   1 1 | 1 2 | 2 2 | 2 2         block of queries   first block of keys   blocks visited
                                                 0                   0                  0
                                                 1                   0                  0 1
                                                 2                   1                    1 2
                                                 3                   1                    1 2 3

New tokens attend to a cache by blocks too, forward only (`attend_slots`).

Does not know: projections, norms or rotations. The plain form to compare with is `attention.attend`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from chameleon_jax.array_types import Array
from chameleon_jax.config import Dtype
from chameleon_jax.models.transformer.slots import Slots, operand

CONTEXT = 'context'  # name of the results that a rematerialisation policy may keep
_FAR = -1e30  # score of a masked pair
_FARTHER = -1e29  # start of the running maximum: above _FAR, so that a block that is masked whole adds nothing

Queries = Float[Array, 'B K G T H']
Keys = Float[Array, 'B K T H']
LogSums = Float[Array, 'B K G T 1']
SegmentIds = Int[Array, 'B T']


def first_blocks(segment_ids: SegmentIds, block: int) -> Int[Array, 'n']:
  """For each block of queries the first block of keys that any row of the batch has to visit; see the drawn example.

  Blocks whose ranges of segment ids overlap are taken to share a segment; padding counts as the last segment.
  Right for ids in any order, tight for ids that grow along the row.
  """
  ids = jnp.where(segment_ids == 0, jnp.iinfo(jnp.int32).max, segment_ids).reshape(segment_ids.shape[0], -1, block)
  low, high = ids.min(-1), ids.max(-1)
  shared = (low[:, None, :] <= high[:, :, None]) & (high[:, None, :] >= low[:, :, None])
  return jnp.argmax(shared.any(0), axis=-1).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_blockwise(block: int, q: Queries, k: Keys, v: Keys, segment_ids: SegmentIds) -> Queries:
  """softmax(q k^T) v over rows, causal and closed in each segment.

  Args:
    block: queries and keys of one block; divides T.
    q: queries, already scaled; k, v: keys and values. Their type is that of the operands of the products.
    segment_ids: [B, T], 0 = padding.

  Returns:
    float32 [B, K, G, T, H].
  """
  return _forward(block, q, k, v, segment_ids)[0]


def _cut(x: Array, index: Array, block: int) -> Array:
  """Block `index` of the axis of positions, the last but one."""
  return lax.dynamic_slice_in_dim(x, index * block, block, axis=x.ndim - 2)


def _join(blocks: Array) -> Array:
  """[n, B, K, G, block, H] -> [B, K, G, n * block, H]."""
  blocks = jnp.moveaxis(blocks, 0, 3)
  return blocks.reshape(*blocks.shape[:3], -1, blocks.shape[-1])


def _einsum(spec: str, a: Array, b: Array) -> Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _masked(scores: Array, mask: Array) -> Array:
  """float32 scores [B, K, G, t, s] where the mask [B, t, s] is true."""
  return jnp.where(mask[:, None, None], scores, _FAR)


def _scores(q: Array, k: Array, segment_ids: Array, *, row: Array, column: Array) -> Array:
  """Masked float32 scores [B, K, G, block, block] of one block of queries and one of keys."""
  block = q.shape[-2]
  places = jnp.arange(block)
  causal = (row * block + places)[:, None] >= (column * block + places)[None, :]
  queries = lax.dynamic_slice_in_dim(segment_ids, row * block, block, axis=1)
  keys = lax.dynamic_slice_in_dim(segment_ids, column * block, block, axis=1)
  return _masked(_einsum('bkgth,bksh->bkgts', q, k), causal & (queries[:, :, None] == keys[:, None, :]))


def _softmax_over_blocks(
    q: Array, blocks: tuple[Array, Array], of: Callable[[Array], tuple[Array, Callable[[Array], Array]]], d_value: int
) -> tuple[Array, Array]:
  """Attention of one block of queries to a range of blocks of keys, with a running maximum and sum.

  Args:
    q: [B, K, G, t, H].
    blocks: first, and the one behind the last.
    of: block index -> (masked float32 scores [B, K, G, t, s], function from such weights to float32 sums of values [B, K, G, t, d_value]).
    d_value: channels of a value.

  Returns:
    float32 context [B, K, G, t, d_value] and logarithms of the softmax denominators [B, K, G, t, 1].
  """
  shape = q.shape[:-1]

  def one_block(column: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    top, total, summed = carry
    scores, sum_values = of(column)
    new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
    weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
    return new_top, total * shrink + weights.sum(-1, keepdims=True), summed * shrink + sum_values(weights)

  empty = jnp.full((*shape, 1), _FARTHER), jnp.zeros((*shape, 1)), jnp.zeros((*shape, d_value))
  top, total, summed = lax.fori_loop(*blocks, one_block, empty)
  return summed / total, top + jnp.log(total)


def _forward(block: int, q: Queries, k: Keys, v: Keys, segment_ids: SegmentIds) -> tuple[Queries, LogSums]:
  starts = first_blocks(segment_ids, block)

  def one_row(row: Array) -> tuple[Array, Array]:
    q_row = _cut(q, row, block)

    def of(column: Array) -> tuple[Array, Callable[[Array], Array]]:
      v_column = _cut(v, column, block)
      scores = _scores(q_row, _cut(k, column, block), segment_ids, row=row, column=column)
      return scores, lambda weights: _einsum('bkgts,bksh->bkgth', weights.astype(v.dtype), v_column)

    return _softmax_over_blocks(q_row, (starts[row], row + 1), of, v.shape[-1])

  context, log_sums = lax.map(one_row, jnp.arange(q.shape[3] // block, dtype=jnp.int32))
  return _join(context), _join(log_sums)


def attend_slots(block: int, q: Queries, k: Slots, v: Slots, positions: Int[Array, 'B T'], *, dtype: Dtype) -> Queries:
  """softmax(q k^T) v of new tokens over the slots of a cache up to their own position; slots behind the last one are not read.

  Args:
    block: queries and slots of one block; divides T, and is at most S.
    q: queries, already scaled, of the type `dtype`.
    k, v: the cache [B, K, S, H], of any type; blocks of it are cast to `dtype` as they are read, and scales of int8 leave the products.
    positions: slot of each query.
    dtype: type of the operands of the products.

  Returns:
    float32 [B, K, G, T, H]. For reading only: loops whose bound is data have no reverse derivative.
  """
  n_slots = jax.tree.leaves(k)[0].shape[2]

  def one_row(row: Array) -> Array:
    q_row = _cut(q, row, block)
    places = lax.dynamic_slice_in_dim(positions, row * block, block, axis=1)

    def of(column: Array) -> tuple[Array, Callable[[Array], Array]]:
      first = jnp.minimum(column * block, n_slots - block)  # the last block may overlap the one before
      numbers = first + jnp.arange(block, dtype=jnp.int32)
      read = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, block, axis=2), (k, v))
      (keys, key_scale), (values, value_scale) = (operand(slots, dtype) for slots in read)
      mask = (numbers <= places[:, :, None]) & (numbers >= column * block)
      scores = _masked(_einsum('bkgth,bksh->bkgts', q_row, keys) * key_scale, mask)
      return scores, lambda weights: _einsum('bkgts,bksh->bkgth', (weights * value_scale).astype(dtype), values)

    last = jnp.minimum(places.max(), n_slots - 1)
    return _softmax_over_blocks(q_row, (jnp.zeros_like(last), last // block + 1), of, q.shape[-1])[0]

  return _join(lax.map(one_row, jnp.arange(q.shape[3] // block, dtype=jnp.int32)))


def _attend_fwd(block: int, q: Queries, k: Keys, v: Keys, segment_ids: SegmentIds) -> tuple[Queries, tuple[Array, ...]]:
  context, log_sums = _forward(block, q, k, v, segment_ids)
  context, log_sums = checkpoint_name(context, CONTEXT), checkpoint_name(log_sums, CONTEXT)
  return context, (q, k, v, segment_ids, context, log_sums)


def _attend_bwd(block: int, saved: tuple[Array, ...], d_context: Queries) -> tuple[Queries, Keys, Keys, None]:
  q, k, v, segment_ids, context, log_sums = saved
  starts = first_blocks(segment_ids, block)
  inner = jnp.sum(d_context * context, axis=-1, keepdims=True)
  d_context = d_context.astype(v.dtype)

  def one_row(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], Array]:
    q_row, d_row, log_sum, inner_row = (_cut(x, row, block) for x in (q, d_context, log_sums, inner))

    def add(whole: Array, part: Array, column: Array) -> Array:
      return lax.dynamic_update_slice_in_dim(whole, _cut(whole, column, block) + part, column * block, axis=2)

    def one_block(column: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
      dq, dk, dv = carry
      k_column, v_column = _cut(k, column, block), _cut(v, column, block)
      weights = jnp.exp(_scores(q_row, k_column, segment_ids, row=row, column=column) - log_sum)
      d_scores = weights * (_einsum('bkgth,bksh->bkgts', d_row, v_column) - inner_row)
      weights, d_scores = weights.astype(v.dtype), d_scores.astype(v.dtype)
      dq = dq + _einsum('bkgts,bksh->bkgth', d_scores, k_column)
      dk = add(dk, _einsum('bkgts,bkgth->bksh', d_scores, q_row), column)
      dv = add(dv, _einsum('bkgts,bkgth->bksh', weights, d_row), column)
      return dq, dk, dv

    dq, dk, dv = lax.fori_loop(starts[row], row + 1, one_block, (jnp.zeros(q_row.shape), *carry))
    return (dk, dv), dq

  (dk, dv), dq = lax.scan(one_row, (jnp.zeros(k.shape), jnp.zeros(v.shape)), jnp.arange(q.shape[3] // block, dtype=jnp.int32))
  return _join(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


attend_blockwise.defvjp(_attend_fwd, _attend_bwd)
