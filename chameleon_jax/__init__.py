"""Chameleon (arXiv 2405.09818) in JAX: one transformer reads and writes text and picture tokens in any order.

The public names below are loaded on first use, so that `import chameleon_jax` costs nothing.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from chameleon_jax.chameleon import Chameleon
  from chameleon_jax.config import SamplingOptions
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


def load(path: str | os.PathLike[str]) -> 'Chameleon':
  """Opens a model folder, or shipped weights by name ('emoji')."""
  return importlib.import_module('chameleon_jax.chameleon').Chameleon.load(path)


def __getattr__(name: str) -> Any:
  if name in _HOMES:
    return getattr(importlib.import_module(_HOMES[name]), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
