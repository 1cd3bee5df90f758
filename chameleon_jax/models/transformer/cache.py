"""Key/value cache: an explicit argument and return value, so that a decode loop can carry and donate it.

Slot s of a row holds the key (after norm and rotation) and the value of the token at position s. New tokens are
written at their positions; a query sees the slots up to and including its own position. Slots beyond are never
read before they are written, so a row may be prefilled with padding behind its prompt and go on from its true length:

  prompt of 3 in a prefill of 5      a b c . .     slots 3, 4 hold padding
  first decoded token, position 3    a b c d .     slot 3 is overwritten, slot 4 is not attended

Slots are of a float type, or int8 with a scale for each token and head (`slots`).

Does not know: tokens, segments, or when a row is finished.
"""

from typing import get_args

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float

from chameleon_jax.array_types import Array, Positions
from chameleon_jax.config import CacheDtype, TransformerConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer.slots import QuantizedSlots, Slots, quantize_tokens
from chameleon_jax.partitioning import constrain, target_platform

LayerCache = tuple[Slots, Slots]  # k and v of one layer
_AXES = ('batch', 'act_kv_heads', 'cache_length', 'd_head')  # of slots; scales lack the last


@struct.dataclass
class KVCache:
  """Keys and values of all layers.

  Scanned layers keep one array [L, B, K, S, H] each (or both parts of `QuantizedSlots`); unrolled layers a tuple of L, because
  taking a layer out of a stacked array copies it in every step of a decode loop. The slots of one head lie together:
  the other order is transposed at every step (on the CPU a step of 24 rows took three times as long).
  """

  k: Slots | tuple[Slots, ...]
  v: Slots | tuple[Slots, ...]

  @property
  def n_slots(self) -> int:
    """Positions a row can hold (S)."""
    return jax.tree.leaves(self.k)[0].shape[-2]

  @property
  def batch_size(self) -> int:
    """Rows (B)."""
    return jax.tree.leaves(self.k)[0].shape[-4]

  def layer(self, index: int) -> LayerCache:
    """Keys and values of one unrolled layer."""
    assert isinstance(self.k, tuple) and isinstance(self.v, tuple), 'the layers are stacked'
    return self.k[index], self.v[index]


def check_cache_dtype(name: str | None) -> None:
  """Raises ConfigError for a type of cache that there is not."""
  if name not in (None, *get_args(CacheDtype)):
    raise ConfigError(f"cache_dtype {name!r} is not known; 'float32', 'bfloat16' and 'int8' are, None keeps the type of the computation")


def init_cache(config: TransformerConfig, batch: int, length: int, dtype: CacheDtype | None = None) -> KVCache:
  """Returns an empty cache of `length` slots a row.

  `dtype` is `config.dtype` unless given; on the CPU it is float32, since jax 0.10 rewrites a whole bfloat16 buffer
  at every update inside a loop there.

  Raises:
    ConfigError: there is no such type.
  """
  check_cache_dtype(dtype)
  if dtype is None:
    dtype = 'float32' if target_platform() == 'cpu' else config.dtype
  shape = (batch, config.n_kv_heads, length, config.d_head)

  def empty(*layers: int) -> Slots:
    values = jnp.zeros((*layers, *shape), dtype)
    return QuantizedSlots(values, jnp.zeros((*layers, *shape[:-1]), jnp.float32)) if dtype == 'int8' else values

  if config.scan_layers:
    return KVCache(*(empty(config.n_layers) for _ in range(2)))
  return KVCache(*(tuple(empty() for _ in range(config.n_layers)) for _ in range(2)))


def write(cache: LayerCache, k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H'], positions: Positions) -> LayerCache:
  """Writes the tokens of every row at their positions; a position outside the cache writes nothing."""
  rows = jnp.arange(k.shape[0])[:, None]

  def put(slots: Array, new: Array) -> Array:
    slots = slots.at[rows, :, positions].set(new.astype(slots.dtype), mode='drop')
    return constrain(slots, *_AXES[: slots.ndim])

  def update(slots: Slots, new: Array) -> Slots:
    return jax.tree.map(put, slots, quantize_tokens(new) if isinstance(slots, QuantizedSlots) else new)

  return update(cache[0], k), update(cache[1], v)
