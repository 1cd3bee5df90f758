"""The 3x3 convolutions of the image tokenizer, behind two functions: `convolve` and `convolve_upsampled`.

Both choose the form. The plain one is XLA's convolution, NHWC, right on GPUs and TPUs and in any program for several
devices. On one CPU device XLA's convolution runs at the rate of its matrix product, so only fewer products are faster:
`winograd` takes a quarter of them (arXiv 1509.09308), `phases` 4 / 9. Both are the same sums up to rounding, in
float32 whatever the compute type is.

Does not know: parameters, norms or what the channels mean. Layout is NHWC; kernels are [kh, kw, in, out].
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from chameleon_jax.array_types import Array
from chameleon_jax.partitioning import on_one_cpu

Padding = Sequence[tuple[int, int]]
Feature = Float[Array, 'B H W C']
Kernel = Float[Array, 'kh kw C C2']
Kernel3x3 = Float[Array, '3 3 C C2']

TILE = 4  # outputs along one side that `winograd` computes together
MIN_CHANNELS = 64  # with fewer, the sums around the products weigh too much
MIN_POSITIONS = 32 * 32  # of one picture: on smaller grids making the kernels of `winograd` costs more than it saves
ONE_BY_ONE = 64 * 64  # positions from which on `winograd` takes the pictures of a batch one by one: what it makes stays in the cache
_SAME = ((1, 1), (1, 1))


def plain(x: Feature, kernel: Kernel, strides: Sequence[int], padding: Padding) -> Float[Array, 'B h w C2']:
  """XLA's convolution: the reference."""
  return lax.conv_general_dilated(x, kernel, tuple(strides), tuple(padding), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def convolve(x: Feature, kernel: Kernel, strides: Sequence[int], padding: Padding, **_: Any) -> Array:
  """Convolution in the form that is fastest here; the signature is the one that `nn.Conv(conv_general_dilated=...)` calls.

  What is swallowed are dilations, groups and dimension numbers, of which the image tokenizer has only the plain ones.
  """
  keeps_grid = kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and tuple(map(tuple, padding)) == _SAME
  large = min(kernel.shape[2:]) >= MIN_CHANNELS and x.shape[1] * x.shape[2] >= MIN_POSITIONS
  if on_one_cpu() and keeps_grid and large and x.shape[1] % TILE == x.shape[2] % TILE == 0:
    return _in_float32(winograd, x, kernel)
  return plain(x, kernel, strides, padding)


def convolve_upsampled(x: Feature, kernel: Kernel3x3, *_: Any, **__: Any) -> Float[Array, 'B H2 W2 C2']:
  """Nearest neighbour to twice the grid, then a 3x3 convolution; signature as `convolve`, strides and padding are 1."""
  if on_one_cpu() and min(kernel.shape[2:]) >= MIN_CHANNELS and x.shape[1] * x.shape[2] >= MIN_POSITIONS // 4:
    return _in_float32(phases, x, kernel)
  return upsampled(x, kernel)


def _in_float32(form: Any, x: Array, kernel: Array) -> Array:
  return form(x.astype(jnp.float32), kernel.astype(jnp.float32)).astype(x.dtype)


# ------------------------------------------------------------------------------------------------ Winograd


def _matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Input [6, 6], kernel [6, 3] and output [4, 6] matrices of F(4, 3): y = outputs ((kernels g) * (inputs d)).

  Cook-Toom at 0, +-sqrt(1/2), +-sqrt(2) and infinity: rounding errors are half of those at the usual 0, +-1, +-2.
  """
  points = [0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)]
  whole = np.poly(points)  # of degree 5, highest power first
  rests = [np.polydiv(whole, [1, -point])[0] for point in points]  # whole / (x - point)
  inputs = np.stack([np.pad(rest[::-1], (0, 1)) for rest in rests] + [whole[::-1]])
  powers = np.vander(points, TILE, increasing=True)
  slopes = [np.polyval(rest, point) for rest, point in zip(rests, points)]
  kernels = np.concatenate([powers[:, :3] / np.stack(slopes)[:, None], [[0, 0, 1]]])
  outputs = np.concatenate([powers, [[0, 0, 0, 1]]]).T
  return np.round(inputs, 12), kernels, np.round(outputs, 12)


def _combine(weights: np.ndarray, parts: Sequence[Array]) -> Array:
  """Weighted sum; a weight of 0 costs nothing."""
  terms = [part if weight == 1 else np.float32(weight) * part for weight, part in zip(weights, parts) if weight]
  return functools.reduce(jnp.add, terms)


def _along(axis: int, x: Array, taps: Sequence[Array], product: Callable[[Array, Array], Array]) -> Array:
  """F(4, 3) along one axis: the correlation of `x` with three `taps`, of which `product` multiplies one place.

  Every four outputs come from six inputs through six products in place of twelve:

    inputs     d0 d1 d2 d3 d4 d5         tile t reads the places 4t - 1 .. 4t + 4, zero outside
    places     v0 v1 v2 v3 v4 v5         v = inputs d, each times its own kernel, u = kernels taps
    outputs       y0 y1 y2 y3            places 4t .. 4t + 3

  XLA keeps the padded array as one: without it, whatever made `x` would be computed anew in every sum.
  """
  inputs, kernels, outputs = _matrices()
  length = x.shape[axis]
  padded = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(4)])
  parts = [lax.slice_in_dim(padded, i, i + length - TILE + 1, TILE, axis) for i in range(TILE + 2)]
  products = [product(_combine(v, parts), _combine(u, taps)) for v, u in zip(inputs, kernels)]
  tiles = jnp.stack([_combine(row, products) for row in outputs], axis=axis + 1)
  return tiles.reshape(*products[0].shape[:axis], length, *products[0].shape[axis + 1 :])


def _one_place(x: Array, kernel: Array) -> Array:
  """[B, H, W, C] and [C, C2]: a matrix product."""
  return lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


def _one_row(x: Array, kernel: Array) -> Array:
  """[B, H, W, C] and [3, C, C2]: a convolution along the width."""
  return _along(2, x, list(kernel), _one_place)


@jax.custom_vjp
def winograd(x: Feature, kernel: Kernel3x3) -> Float[Array, 'B H W C2']:
  """3x3 convolution that keeps the grid, with a quarter of the products: F(4, 3) along columns of F(4, 3) along rows.

  float32, H and W multiples of 4. The gradient of `x` is the same convolution with the kernel turned round, that of the
  kernel is the plain one.
  """
  if len(x) > 1 and x.shape[1] * x.shape[2] >= ONE_BY_ONE:
    return lax.map(lambda picture: _along(1, picture[None], list(kernel), _one_row)[0], x)
  return _along(1, x, list(kernel), _one_row)


def _winograd_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  return winograd(x, kernel), (x, kernel)


def _winograd_bwd(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
  x, kernel = saved
  _, to_kernel = jax.vjp(lambda kernel: plain(x, kernel, (1, 1), _SAME), kernel)
  return winograd(dy, jnp.swapaxes(kernel[::-1, ::-1], 2, 3)), to_kernel(dy)[0]


winograd.defvjp(_winograd_fwd, _winograd_bwd)


# ---------------------------------------------------------------------------------------------- upsampling


def upsampled(x: Feature, kernel: Kernel3x3) -> Float[Array, 'B H2 W2 C2']:
  """Repeats rows and columns, then convolves: the reference."""
  return plain(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel, (1, 1), _SAME)


def _folded(kernel: Array, axis: int) -> tuple[Array, Array]:
  """Kernels of two taps for even and for odd outputs: of the three inputs under an output two are the same one.

  even: (k0, k1 + k2) on inputs i - 1, i;  odd: (k0 + k1, k2) on inputs i, i + 1.
  """
  first, middle, last = jnp.split(kernel, 3, axis=axis)
  return jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis)


def phases(x: Feature, kernel: Kernel3x3) -> Float[Array, 'B H2 W2 C2']:
  """`upsampled` as four 2x2 convolutions of the small grid, one for each place in a 2x2 block of outputs; float32."""
  batch, height, width, _ = x.shape
  rows = []
  for i, half in enumerate(_folded(kernel, 0)):
    row = [plain(x, quarter, (1, 1), ((1 - i, i), (1 - j, j))) for j, quarter in enumerate(_folded(half, 1))]
    rows.append(jnp.stack(row, axis=3))
  return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, kernel.shape[-1])
