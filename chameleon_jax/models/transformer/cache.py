"""Key/value cache: an explicit argument and return value, so that a decode loop can carry and donate it.

Slot s of a row holds the key (after norm and rotation) and the value of the token at position s. New tokens are
written at their positions; a query sees the slots up to and including its own position. Slots beyond are never
read before they are written, so a row may be prefilled with padding behind its prompt and go on from its true length:

  prompt of 3 in a prefill of 5      a b c . .     slots 3, 4 hold padding
  first decoded token, position 3    a b c d .     slot 3 is overwritten, slot 4 is not attended

Does not know: tokens, segments, or when a row is finished.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float

from chameleon_jax.array_types import Array, Positions
from chameleon_jax.config import Dtype, TransformerConfig
from chameleon_jax.partitioning import constrain, target_platform

LayerCache = tuple[Array, Array]  # k and v of one layer, [B, K, S, H]


@struct.dataclass
class KVCache:
  """Keys and values of all layers.

  Scanned layers keep one array [L, B, K, S, H] each; unrolled layers a tuple of L arrays [B, K, S, H], because
  taking a layer out of a stacked array copies it in every step of a decode loop. The slots of one head lie together:
  the other order is transposed at every step (on the CPU a step of 24 rows took three times as long).
  """

  k: Array | tuple[Array, ...]
  v: Array | tuple[Array, ...]

  @property
  def n_slots(self) -> int:
    """Positions a row can hold (S)."""
    return jax.tree.leaves(self.k)[0].shape[-2]

  @property
  def batch_size(self) -> int:
    """Rows (B)."""
    return jax.tree.leaves(self.k)[0].shape[-4]


def init_cache(config: TransformerConfig, batch: int, length: int, dtype: Dtype | None = None) -> KVCache:
  """Returns an empty cache of `length` slots a row.

  `dtype` is `config.dtype` unless given; on the CPU it is float32, since jax 0.10 rewrites a whole bfloat16 buffer
  at every update inside a loop there.
  """
  if dtype is None:
    dtype = 'float32' if target_platform() == 'cpu' else config.dtype
  shape = (batch, config.n_kv_heads, length, config.d_head)

  def empty() -> Array:
    return jnp.zeros(shape, dtype)

  if config.scan_layers:
    return KVCache(*(jnp.zeros((config.n_layers, *shape), dtype) for _ in range(2)))
  return KVCache(*(tuple(empty() for _ in range(config.n_layers)) for _ in range(2)))


def write(cache: LayerCache, k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H'], positions: Positions) -> LayerCache:
  """Writes the tokens of every row at their positions; a position outside the cache writes nothing."""
  rows = jnp.arange(k.shape[0])[:, None]

  def update(slots: Array, new: Array) -> Array:
    slots = slots.at[rows, :, positions].set(new.astype(slots.dtype), mode='drop')
    return constrain(slots, 'batch', 'act_kv_heads', 'cache_length', 'd_head')

  return update(cache[0], k), update(cache[1], v)
