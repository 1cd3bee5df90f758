"""The one matrix product of the transformer: every projection runs through `linear`.

Operands are cast to the compute type and products are summed in float32. In bfloat16 the backward products are
written out, because automatic differentiation would multiply a float32 cotangent with a bfloat16 operand, which
no platform does fast. On one CPU device two more forms matter (see `_weight_gradient`, measured with
AVX512-BF16, and `_product`); elsewhere the plain products are right.

Does not know: what the axes mean, or how they are sharded.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from chameleon_jax.array_types import Array
from chameleon_jax.config import Dtype
from chameleon_jax.partitioning import target_platform

PROJECTION = 'projection'  # name of every result of `linear` for rematerialisation policies


def linear(
    x: Array, kernel: Array, dims: int, dtype: Dtype, *, out_dtype: Dtype | None = None, adapter: Mapping[str, Array] | None = None
) -> Array:
  """Contracts the last `dims` axes of `x` with the first `dims` axes of `kernel`.

  `linear(x [B, T, D], q_proj [D, N, H], 1, dtype) -> [B, T, N, H]`
  `linear(o [B, T, N, H], o_proj [N, H, D], 2, dtype) -> [B, T, D]`

  Args:
    x: activations [..., contracted].
    kernel: weights [contracted, ...] in any float type; master weights stay as they are.
    dims: number of contracted axes.
    dtype: type of both operands inside the product; the sum is float32.
    out_dtype: type of the result, `dtype` unless given.
    adapter: {'a': [contracted, r], 'b': [r, outputs]}, whose product is added to the kernel without being formed: x W + (x A) B.

  Returns:
    Array [..., outputs] of `out_dtype`.
  """
  compute, result = jnp.dtype(dtype), jnp.dtype(out_dtype or dtype)
  if adapter is None:
    return checkpoint_name(_multiply(x, kernel, dims, compute, result), PROJECTION)
  wide = jnp.dtype(jnp.float32)  # the two products meet before they are rounded
  thin = _multiply(x, adapter['a'], dims, compute, compute)
  y = _multiply(x, kernel, dims, compute, wide) + _multiply(thin, adapter['b'], 1, compute, wide)
  return checkpoint_name(y.astype(result), PROJECTION)


def _multiply(x: Array, kernel: Array, dims: int, compute: jnp.dtype, result: jnp.dtype) -> Array:
  if compute == jnp.float32:
    return lax.dot_general(x.astype(compute), kernel.astype(compute), _contract(x.ndim, dims)).astype(result)
  return _mixed_linear(dims, result, x.astype(compute), kernel)


def _contract(ndim: int, dims: int) -> lax.DotDimensionNumbers:
  return (tuple(range(ndim - dims, ndim)), tuple(range(dims))), ((), ())


def _on_one_cpu() -> bool:
  """Whether this trace is for a single CPU device, where the layout of an operand decides the speed."""
  mesh = jax.sharding.get_abstract_mesh()
  return target_platform() == 'cpu' and (mesh.empty or mesh.size == 1)


def _product(x: Array, kernel: Array, dims: int) -> Array:
  """float32 [..., outputs]; one row is doubled on the CPU: alone it misses the bfloat16 fast path (seen with AMX)."""
  if not (_on_one_cpu() and math.prod(x.shape[:-dims]) == 1):
    return lax.dot_general(x, kernel, _contract(x.ndim, dims), preferred_element_type=jnp.float32)
  row = x.reshape(1, *x.shape[-dims:])
  pair = lax.dot_general(jnp.concatenate([row, row]), kernel, _contract(row.ndim, dims), preferred_element_type=jnp.float32)
  return pair[0].reshape(*x.shape[:-dims], *kernel.shape[dims:])


def _weight_gradient(x: Array, dy: Array, dims: int, n_outputs: int) -> Array:
  """float32 gradient of the kernel, `x^T dy` over all leading axes.

  On the CPU the product that contracts the leading axis of both operands leaves the bfloat16 library path.
  Asking for `x^T` in the layout of a stored matrix brings it back: 220 instead of 130 GFLOP/s on two cores.
  """
  lead = x.ndim - dims
  if not _on_one_cpu():
    axes = tuple(range(lead))
    return lax.dot_general(x, dy, ((axes, axes), ((), ())), preferred_element_type=jnp.float32)
  rows = x.reshape(-1, math.prod(x.shape[lead:]))
  columns = dy.reshape(rows.shape[0], -1)
  stored = with_layout_constraint(rows.T, Layout((0, 1)))
  gradient = lax.dot_general(stored, columns, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
  return gradient.reshape(*x.shape[lead:], *dy.shape[dy.ndim - n_outputs :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixed_linear(dims: int, result: jnp.dtype, x: Array, kernel: Array) -> Array:
  """`x` is of the compute type already; `kernel` is cast here so that its gradient is never rounded."""
  return _product(x, kernel.astype(x.dtype), dims).astype(result)


def _mixed_linear_fwd(dims: int, result: jnp.dtype, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  return _mixed_linear(dims, result, x, kernel), (x, kernel)


def _mixed_linear_bwd(dims: int, result: jnp.dtype, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
  del result
  x, kernel = saved
  n_outputs = kernel.ndim - dims
  dy = dy.astype(x.dtype)
  outputs = (tuple(range(dy.ndim - n_outputs, dy.ndim)), tuple(range(dims, kernel.ndim)))
  dx = lax.dot_general(dy, kernel.astype(x.dtype), (outputs, ((), ())), preferred_element_type=jnp.float32)
  return dx.astype(x.dtype), _weight_gradient(x, dy, dims, n_outputs).astype(kernel.dtype)


_mixed_linear.defvjp(_mixed_linear_fwd, _mixed_linear_bwd)
