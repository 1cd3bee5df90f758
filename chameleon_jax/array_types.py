"""Dimension legend and the tensor types of every public signature.

B rows (batch)          T tokens in a row         S slots of a KV cache      V vocabulary entries
D d_model               N query heads             K key/value heads          H d_head         F d_ff
L layers                H, W picture sides (in pixels), h, w grid sides (in codes)
C channels              n codes of a picture      M codebook entries         Z d_code

Shapes are checked while the tests run (`tests/conftest.py` installs the jaxtyping hook); in normal use the
annotations cost nothing.
"""

from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Array: TypeAlias = jax.Array
AnyArray: TypeAlias = jax.Array | np.ndarray
PyTree: TypeAlias = Any
Params: TypeAlias = Any  # nested dict of arrays

Tokens: TypeAlias = Int[AnyArray, 'B T']
Positions: TypeAlias = Int[AnyArray, 'B T']
SegmentIds: TypeAlias = Int[AnyArray, 'B T']
LossWeights: TypeAlias = Float[AnyArray, 'B T']
Activations: TypeAlias = Float[Array, 'B T D']
Logits: TypeAlias = Float[Array, 'B T V']
Mask: TypeAlias = Bool[Array, '#B 1 T S']  # True = may attend
Pixels: TypeAlias = Float[AnyArray, 'B H W 3']  # in [-1, 1]
Pictures: TypeAlias = UInt8[np.ndarray, 'B H W 3']
CodeGrid: TypeAlias = Int[AnyArray, 'B h w']
Codes: TypeAlias = Int[AnyArray, 'B n']
