"""What a data set must offer, and the names under which experiment files find them.

A name is one of SOURCES, or KIND:ARGUMENT for data of one's own: `jsonl:data/train.jsonl` (see `naming.py`, and KINDS for the kinds).
To add a data set: write a file beside this one with a class that has `__len__` and `document`, and give it a line in SOURCES, or in
KINDS where it takes an argument. Importing is left to the factory, so a run loads only the data sets that it names.

The part of a name before the first underscore is its world: sources of one world share one table of codes.
"""

import importlib
from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from chameleon_jax.array_types import Codes
from chameleon_jax.data.sources.naming import SourceName, nearest
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


# KIND of KIND:ARGUMENT -> (module beside this one, class that takes (SourceName, split)). Such a class has besides:
# `where(index)`, file and record for messages, and `fingerprint()`, which changes with what is in the files.
KINDS: dict[str, tuple[str, str]] = {
  'jsonl': ('jsonl', 'JsonLines'),  # one JSON object a line: interleaved, conversations, pairs, text
  'image_folder': ('image_folder', 'ImageFolder'),  # pictures with captions
  'webdataset': ('webdataset', 'WebDataset'),  # tar archives
  'tfds': ('tfds', 'TfdsPairs'),  # tensorflow-datasets with pictures and text
  'text': ('plain_text', 'PlainText'),  # text and code
  'array_record': ('tokenized', 'TokenizedDocuments'),  # what `chameleon tokenize` writes
}


def make_source(name: str, split: str, codes: Codes | None = None) -> DocumentSource:
  """The source of that name.

  Args:
    name: a key of SOURCES, or KIND:ARGUMENT.
    split: 'train' | 'validation'.
    codes: int32 [pictures of the world, n], see `SourceFactory`; only the worlds of SOURCES use it.

  Raises:
    DataError: unknown name or split, the table of codes has another number of rows than the world has pictures, or files
      are missing, cut off or damaged.
  """
  if split not in ('train', 'validation'):
    raise DataError(f'unknown split {split!r} of source {name!r}: use train or validation')
  if name not in SOURCES and ':' in name:
    source = SourceName.parse(name)
    if source.kind not in KINDS:
      raise DataError(f'unknown kind {source.kind!r} of source {name!r}: {nearest(source.kind, KINDS)}')
    module, class_name = KINDS[source.kind]
    return getattr(importlib.import_module(f'chameleon_jax.data.sources.{module}'), class_name)(source, split)
  if name not in SOURCES:
    known = [*SOURCES, *(f'{kind}:...' for kind in KINDS)]
    raise DataError(f'unknown source {name!r}: {nearest(name, known)}')
  return SOURCES[name](split, codes)
