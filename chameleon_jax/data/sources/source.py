"""What a data set must offer, and the names under which experiment files find them.

To add a data set: write a file beside this one with a class that has `__len__` and `document`, and give it a line in SOURCES.
Importing is left to the factory, so a run loads only the data sets that it names.

The part of a name before the first underscore is its world: sources of one world share one table of codes.
"""

import difflib
import importlib
from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from chameleon_jax.array_types import Codes
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document


@runtime_checkable
class DocumentSource(Protocol):
  """Documents by index."""

  def __len__(self) -> int:
    """Number of documents; 0 where the split has none."""
    ...

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """Document `index`: a pure function of the index and of what it draws from `rng` (wording, order, partners).

    Raises:
      DataError: the record is damaged.
    """
    ...


# (split: 'train' | 'validation', codes) -> source. `codes` is int32 [pictures of the world, n], row = index of the
# picture; with it documents hold `Codes` segments, without it `Image` segments.
SourceFactory: TypeAlias = Callable[[str, Codes | None], DocumentSource]


def _lazy(module: str, class_name: str) -> SourceFactory:
  def make(split: str, codes: Codes | None) -> DocumentSource:
    return getattr(importlib.import_module(f'chameleon_jax.data.sources.{module}'), class_name)(split, codes)

  return make


SOURCES: dict[str, SourceFactory] = {
  'emoji_text': _lazy('text', 'DocumentationText'),  # pieces of Python's documentation
  'emoji_pairs': _lazy('emoji_documents', 'Pairs'),  # a picture and its name, the picture first in half of them
  'emoji_interleaved': _lazy('emoji_documents', 'Interleaved'),  # two to four related pictures with text between them
  'emoji_describe': _lazy('emoji_documents', 'Describe'),  # conversations: picture in, name out
  'emoji_draw': _lazy('emoji_documents', 'Draw'),  # name in, picture out
  'emoji_edit': _lazy('emoji_documents', 'Edit'),  # picture and change in, picture out
  'emoji_chat': _lazy('emoji_chat', 'Chat'),  # all three, several pictures, two turns, questions
}


def make_source(name: str, split: str, codes: Codes | None = None) -> DocumentSource:
  """The source of that name.

  Args:
    name: a key of SOURCES.
    split: 'train' | 'validation'.
    codes: int32 [pictures of the world, n], see `SourceFactory`.

  Raises:
    DataError: unknown name or split, or the table of codes has another number of rows than the world has pictures.
  """
  if name not in SOURCES:
    near = difflib.get_close_matches(name, SOURCES, n=1)
    hint = f'did you mean {near[0]!r}?' if near else f'known are {", ".join(SOURCES)}'
    raise DataError(f'unknown source {name!r}: {hint}')
  if split not in ('train', 'validation'):
    raise DataError(f'unknown split {split!r} of source {name!r}: use train or validation')
  return SOURCES[name](split, codes)
