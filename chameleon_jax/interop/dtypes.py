"""The types that weights are stored in, and the change from one to another that all writers share."""

from collections.abc import Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from chameleon_jax.config import Dtype
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.lazy import TensorSpec

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ('float32', 'bfloat16', 'float16')}  # to choose from when converting


def stored_dtype(specs: Mapping[str, TensorSpec]) -> Dtype:
  """The type to compute in: bfloat16 where every stored value has it, else float32."""
  kinds = {spec.dtype for spec in specs.values()}
  return 'bfloat16' if kinds == {np.dtype(ml_dtypes.bfloat16)} else 'float32'


def cast(values: np.ndarray, dtype: str | np.dtype | None, name: str = '') -> np.ndarray:
  """Floating values in another type; others, and with None all, as they are. `name` of the tensor is for the message.

  Raises:
    CheckpointError: a value is too large for float16.
  """
  if dtype is None or not jnp.issubdtype(values.dtype, jnp.floating):
    return values
  with np.errstate(over='ignore', invalid='ignore'):
    changed = values.astype(jnp.dtype(dtype), copy=False)
  if changed.dtype == np.float16 and changed is not values and not np.array_equal(np.isfinite(changed), np.isfinite(values)):
    who = f'tensor {name} has' if name else 'the weights have'
    raise CheckpointError(f'{who} values that float16 cannot hold; choose bfloat16 or float32')
  return changed
