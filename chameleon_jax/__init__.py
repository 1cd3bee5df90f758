"""Chameleon (arXiv 2405.09818) in JAX: one transformer reads and writes text and picture tokens in any order.

The public names below are loaded on first use, so that `import chameleon_jax` costs nothing.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from chameleon_jax.chameleon import Chameleon
  from chameleon_jax.config import CacheDtype, Dtype, Quantization, SamplingOptions
  from chameleon_jax.tokens.document import Codes, Document, Image, Text, Turn

__version__ = '0.1.0'

_HOMES = {
    'Chameleon': 'chameleon_jax.chameleon',
    'SamplingOptions': 'chameleon_jax.config',
    'Document': 'chameleon_jax.tokens.document',
    'Turn': 'chameleon_jax.tokens.document',
    'Text': 'chameleon_jax.tokens.document',
    'Image': 'chameleon_jax.tokens.document',
    'Codes': 'chameleon_jax.tokens.document',
}

__all__ = ['Chameleon', 'Codes', 'Document', 'Image', 'SamplingOptions', 'Text', 'Turn', 'load']


def load(
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    dtype: 'Dtype | None' = None,
    mesh: 'Mesh | None' = None,
    quantization: 'Quantization | None' = None,
    cache_dtype: 'CacheDtype | None' = None,
) -> 'Chameleon':
  """Opens weights of any format of the family (ours, Meta's, Hugging Face's, Anole's, Lumina-mGPT's), or shipped ones by name ('emoji').

  The arguments are those of `Chameleon.load`.
  """
  cls = importlib.import_module('chameleon_jax.chameleon').Chameleon
  return cls.load(path, tokenizer=tokenizer, adapter=adapter, dtype=dtype, mesh=mesh, quantization=quantization, cache_dtype=cache_dtype)


def __getattr__(name: str) -> Any:
  if name in _HOMES:
    return getattr(importlib.import_module(_HOMES[name]), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
