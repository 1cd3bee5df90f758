"""The one matrix product of the transformer: every projection runs through `linear`.

Operands are cast to the compute type and products are summed in float32. In bfloat16 the backward products are
written out, because automatic differentiation would multiply a float32 cotangent with a bfloat16 operand, which
no platform does fast. On one CPU device other forms are faster (see `_weight_gradient`, `_input_gradient` and `one_row`, measured with
AVX512-BF16); elsewhere the plain products are right. A kernel may be stored in int8 (`quantization.QuantizedKernel`).

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
from chameleon_jax.models.transformer.quantization import QuantizedKernel
from chameleon_jax.partitioning import on_one_cpu

PROJECTION = 'projection'  # name of every result of `linear` for rematerialisation policies
_UNROLLED = 8  # terms of a partial sum of `one_row`: more, and XLA converts the whole kernel beforehand
_NARROW = ('bfloat16', 'int8')  # float32 has a fast product of its own


def linear(
    x: Array,
    kernel: Array | QuantizedKernel,
    dims: int,
    dtype: Dtype,
    *,
    out_dtype: Dtype | None = None,
    adapter: Mapping[str, Array] | None = None,
) -> Array:
  """Contracts the last `dims` axes of `x` with the first `dims` axes of `kernel`.

  `linear(x [B, T, D], q_proj [D, N, H], 1, dtype) -> [B, T, N, H]`
  `linear(o [B, T, N, H], o_proj [N, H, D], 2, dtype) -> [B, T, D]`

  Args:
    x: activations [..., contracted].
    kernel: weights [contracted, ...] in any float type; master weights stay as they are. Or int8 values with a scale an output,
      which multiplies the sum, so that the values are converted inside the product and never stored; such a kernel has no gradient.
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


def _multiply(x: Array, kernel: Array | QuantizedKernel, dims: int, compute: jnp.dtype, result: jnp.dtype) -> Array:
  if isinstance(kernel, QuantizedKernel):
    # The barrier keeps the conversion of the values inside a decode loop: in front of it they would be stored in a float type after all.
    x, values = lax.optimization_barrier((x.astype(compute), kernel.values))
    return (_product(x, values, dims) * kernel.scale).astype(result)
  if compute == jnp.float32:
    return lax.dot_general(x.astype(compute), kernel.astype(compute), _contract(x.ndim, dims)).astype(result)
  return _mixed_linear(dims, result, x.astype(compute), kernel)


def _contract(ndim: int, dims: int) -> lax.DotDimensionNumbers:
  return (tuple(range(ndim - dims, ndim)), tuple(range(dims))), ((), ())


def _product(x: Array, kernel: Array, dims: int) -> Array:
  """float32 [..., outputs] of `x` and a kernel whose values the type of `x` holds exactly."""
  narrow, contracted = kernel.dtype.name in _NARROW, math.prod(kernel.shape[:dims])
  if narrow and math.prod(x.shape[:-dims]) == 1 and contracted % _UNROLLED == 0 and on_one_cpu():
    return one_row(x, kernel, dims)
  return lax.dot_general(x, kernel.astype(x.dtype), _contract(x.ndim, dims), preferred_element_type=jnp.float32)


def one_row(x: Array, kernel: Array, dims: int) -> Array:
  """The product of a single row on the CPU, where reading the kernel is all the work: float32 [..., outputs].

  The contracted axis is cut in pieces of 8, whose partial sums are one elementwise loop over the outputs (contiguous) that
  converts what it reads; a second product adds the partial sums.

      y[n] = sum_c p[c, n],   p[c, n] = sum_u x[8 c + u] kernel[8 c + u, n],   u = 0 .. 7

  For two rows and more this form is 3 to 20 times slower than the common product (two cores, 512 x 65,536 and 512 x 1,376).
  """
  x, kernel = lax.optimization_barrier((x, kernel))  # else pieces of the kernel are copied in front of a decode loop
  row = x.reshape(-1, _UNROLLED).astype(jnp.float32)
  pieces = kernel.reshape(len(row), _UNROLLED, -1)
  products = [row[:, u, None] * pieces[:, u].astype(jnp.float32) for u in range(_UNROLLED)]
  partial = functools.reduce(jnp.add, products)  # [c, n]; `jnp.sum` would be a reduction, which XLA does not vectorise here
  summed = lax.dot_general(jnp.ones((1, len(partial)), jnp.float32), partial, _contract(2, 1))  # no loop that others could be fused with
  return summed.reshape(*x.shape[: x.ndim - dims], *kernel.shape[dims:])


def _input_gradient(dy: Array, kernel: Array, dims: int, n_outputs: int) -> Array:
  """float32 gradient of the input, `dy kernel^T`.

  On the CPU the transposed kernel is said to lie as the kernel does; else XLA makes a transposed copy of it.
  """
  if not on_one_cpu():
    outputs = (tuple(range(dy.ndim - n_outputs, dy.ndim)), tuple(range(dims, kernel.ndim)))
    return lax.dot_general(dy, kernel, (outputs, ((), ())), preferred_element_type=jnp.float32)
  columns = dy.reshape(-1, math.prod(kernel.shape[dims:]))
  transposed = with_layout_constraint(kernel.reshape(-1, columns.shape[1]).T, Layout((1, 0)))
  dx = lax.dot_general(columns, transposed, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
  return dx.reshape(*dy.shape[: dy.ndim - n_outputs], *kernel.shape[:dims])


def _weight_gradient(x: Array, dy: Array, dims: int, n_outputs: int) -> Array:
  """float32 gradient of the kernel, `x^T dy` over all leading axes.

  On the CPU the product that contracts the leading axis of both operands leaves the bfloat16 library path.
  Asking for `x^T` in the layout of a stored matrix brings it back: 220 instead of 130 GFLOP/s on two cores.
  """
  lead = x.ndim - dims
  if not on_one_cpu():
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
  dx = _input_gradient(dy, kernel.astype(x.dtype), dims, n_outputs)
  return dx.astype(x.dtype), _weight_gradient(x, dy, dims, n_outputs).astype(kernel.dtype)


_mixed_linear.defvjp(_mixed_linear_fwd, _mixed_linear_bwd)
