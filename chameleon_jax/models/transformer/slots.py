"""Keys or values of one layer's cache slots, as they are or in int8, and the two products of attention with them.

In int8 each token of each head is rounded by itself when it is written (`quantization.quantize` over its channels):

    x  ~  values * scale      values = round(x / scale), integers in [-127, 127]      scale = max|x| / 127 over the channels of the head

so that |x - values * scale| <= scale / 2. All channels of a slot share the scale, so it leaves the products, and the values are
converted inside them:

    q . k[s] = (q . values[s]) scale[s]            sum_s w[s] v[s] = sum_s (w[s] scale[s]) values[s]

The scale is float32: one of bfloat16 is off by up to 2^-9 of itself, which adds 127 / 512, a quarter of a step, to the half step of the
largest channels, and saves 2 bytes of 132 (128 channels a head).

Does not know: which slots a query may see, softmax, or how slots are written. Sources: those of `quantization` for the rounding; arXiv
2402.02750 compares what may share a scale, a token or a channel, at fewer bits.
"""

from typing import Any, TypeAlias

import flax.struct
import jax.numpy as jnp
from jaxtyping import Float

from chameleon_jax.array_types import Array
from chameleon_jax.config import Dtype
from chameleon_jax.models.transformer.quantization import quantize
from chameleon_jax.partitioning import target_platform


@flax.struct.dataclass
class QuantizedSlots:
  """Keys or values in int8.

  Attributes:
    values: int8 [B, K, S, H], or [L, B, K, S, H] of stacked layers.
    scale: float32 [B, K, S], or [L, B, K, S].
  """

  values: Any  # arrays, but in maps over trees also their shapes or shardings
  scale: Any


Slots: TypeAlias = Array | QuantizedSlots  # [B, K, S, H]


def quantize_tokens(x: Float[Array, 'B T K H']) -> QuantizedSlots:
  """Rounds keys or values of new tokens: int8 [B, T, K, H] with float32 [B, T, K]. What is not finite gives a scale that is not."""
  rounded = quantize(x, (x.ndim - 1,))
  return QuantizedSlots(rounded.values, rounded.scale)


def operand_dtype(slots: Slots, dtype: Dtype) -> Any:
  """The type in which slots are multiplied: their own, as casting a whole cache would cost more than the products; of int8 the compute
  type, on the CPU float32, like the cache that they stand for there (`cache.init_cache`)."""
  if isinstance(slots, QuantizedSlots):
    return jnp.dtype('float32' if target_platform() == 'cpu' else dtype)
  return slots.dtype


def operand(slots: Slots, dtype: Any) -> tuple[Array, Array | float]:
  """Slots [B, K, S, H] in `dtype`, and what multiplies each: its scale [B, K, 1, 1, S], or 1 where there is none."""
  if isinstance(slots, QuantizedSlots):
    return slots.values.astype(dtype), slots.scale[:, :, None, None]
  return slots.astype(dtype), 1.0


def key_product(queries: Float[Array, 'B K T G H'], keys: Slots) -> Float[Array, 'B K T G S']:
  """float32 scores of queries, which are of the operands' type."""
  held, scale = operand(keys, queries.dtype)
  return jnp.einsum('bktgh,bksh->bktgs', queries, held, preferred_element_type=jnp.float32) * scale


def value_product(weights: Float[Array, 'B K T G S'], values: Slots, dtype: Dtype) -> Float[Array, 'B K T G H']:
  """float32 sums of values with float32 weights, which are rounded to the operands' type; `dtype` is the compute type."""
  held, scale = operand(values, operand_dtype(values, dtype))
  return jnp.einsum('bktgs,bksh->bktgh', (weights * scale).astype(held.dtype), held, preferred_element_type=jnp.float32)
