"""Weight-only int8 quantization for sampling: symmetric, one float32 scale for each output channel.

    w  ~  values * scale      values = round(w / scale), integers in [-127, 127]      scale = max|w| / 127 over the contracted axes

so that |w - values * scale| <= scale / 2, and a whole product is `(x @ values) * scale`: the scale leaves the sum, and activations
are not quantized. A row of the embedding table, which is looked up and not multiplied, has one scale of its own. Norms stay as they are.

A quantized parameter is a `QuantizedKernel` in the place of the array; each of its two parts is an array whose axes are axes of the
original, so that it is sharded alike. For sampling and scoring only: gradients of rounded weights mean nothing, and model folders hold
the weights themselves.

Does not know: the network. Sources: arXiv 1712.05877 (section 2, symmetric), arXiv 2208.07339 (section 3, one scale a column).
"""

from typing import Any, TypeGuard

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from chameleon_jax.array_types import AnyArray, Array, Params, PyTree

LEVELS = 127  # -128 is not used, so that a weight and its negative round alike


@flax.struct.dataclass
class QuantizedKernel:
  """A parameter in int8.

  Attributes:
    values: int8 [contracted..., outputs...], or [V, D] of the embedding table.
    scale: float32 [outputs...], or [V].
  """

  values: Any  # arrays, but in maps over trees also their shapes or shardings
  scale: Any

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the original."""
    return self.values.shape


def is_quantized(leaf: Any) -> TypeGuard[QuantizedKernel]:
  """Whether a leaf of a parameter tree is quantized."""
  return isinstance(leaf, QuantizedKernel)


def contracted_axes(name: str) -> tuple[int, ...] | None:
  """The axes that share a scale in the parameter of this (last) name, of one layer; None for one that stays as it is."""
  if name == 'o_proj':
    return (0, 1)
  if name == 'embedding':
    return (1,)
  return (0,) if name.endswith('_proj') or name == 'lm_head' else None


def quantize(weights: AnyArray, axes: tuple[int, ...]) -> QuantizedKernel:
  """Rounds to the nearest of 255 levels, where the weights lie; channels of nought get the scale 1, those that are not finite one
  that is not finite either.

  Args:
    weights: any float type; of numpy or on a device.
    axes: those that share a scale.
  """
  xp: Any = jnp if isinstance(weights, jax.Array) else np
  wide = xp.asarray(weights).astype(np.float32)
  largest = xp.max(xp.abs(wide), axis=axes, keepdims=True)
  scale = xp.where(largest == 0, np.float32(1), largest / np.float32(LEVELS))
  scale = xp.maximum(scale, np.finfo(np.float32).tiny)
  with np.errstate(invalid='ignore'):  # the scale says it
    values = xp.clip(xp.rint(wide / scale), -LEVELS, LEVELS).astype(np.int8)
  return QuantizedKernel(values, xp.squeeze(scale, axes).astype(np.float32))


def dequantize(kernel: QuantizedKernel, axes: tuple[int, ...]) -> np.ndarray:
  """The weights that a quantized kernel stands for, float32."""
  return np.asarray(kernel.values, np.float32) * np.expand_dims(np.asarray(kernel.scale), axes)


def look_up(table: QuantizedKernel, tokens: AnyArray) -> Array:
  """Rows of a quantized embedding table, float32 [..., D]."""
  return jnp.take(table.values, tokens, axis=0).astype(jnp.float32) * jnp.take(table.scale, tokens, axis=0)[..., None]


def match_shardings(shardings: PyTree, params: Params) -> PyTree:
  """Shardings of parameters some of which are quantized, from those of the parameters as they were."""

  def matched(path: Any, leaf: Any, sharding: NamedSharding) -> Any:
    axes = contracted_axes(path[-1].key)
    return quantized_shardings(sharding, axes) if is_quantized(leaf) and axes is not None else sharding

  return jax.tree_util.tree_map_with_path(matched, params, shardings, is_leaf=is_quantized)


def quantized_shardings(sharding: NamedSharding, axes: tuple[int, ...]) -> QuantizedKernel:
  """Shardings of both parts of a kernel that lay as `sharding`: the scale keeps those of its own axes."""
  kept = [mesh_axis for index, mesh_axis in enumerate(sharding.spec) if index not in axes]
  return QuantizedKernel(sharding, NamedSharding(sharding.mesh, PartitionSpec(*kept)))
