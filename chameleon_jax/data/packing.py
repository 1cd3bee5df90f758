"""Documents -> rows of a fixed length that hold several documents without mixing them.

First fit: every document goes into the first of `n_rows` open rows that still has room; when none has, the
rows are done and the document opens the next group. Three rows of documents a to d, lengths 3, 4, 2, 5, with
`n_rows` 2 and `seq_len` 6 (`.` is padding):

    tokens        a0 a1 a2 c0 c1 .      b0 b1 b2 b3 .  .          then a new group: d0 d1 d2 d3 d4 .
    segment_ids   1  1  1  2  2  0      1  1  1  1  0  0          1  1  1  1  1  0
    positions     0  1  2  0  1  0      0  1  2  3  0  0          0  1  2  3  4  0

Attention is allowed inside a segment only, and targets were shifted inside each document before they came
here, so no token attends to or predicts another document. Pictures are never cut.

Knows token ids only as the `Limits` it is given. Pure numpy but for the Grain shell at the end.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from chameleon_jax.errors import DataError
from chameleon_jax.tokens.render import Rendered

Row = dict[str, np.ndarray]  # tokens, targets, loss_weights, segment_ids, positions, each [T]

_MAX_DROPS = 10_000  # documents dropped in a row before the source is called unusable


@dataclasses.dataclass(frozen=True, eq=False)
class Traced(Rendered):
  """A rendered document that remembers where it is from. `assemble` then adds to the row, for each of its tokens:

      sources        place of the source among the names of the run, -1 for padding
      documents      index of the document in its source, -1 for padding
      clean_tokens   the tokens before noise was put on pictures
  """

  source: int
  document: int
  clean_tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Limits:
  """Length of a row and the ids that decide where a document may be cut."""

  seq_len: int
  begin_image: int
  end_image: int
  pad: int


def fit(document: Rendered, limits: Limits) -> Rendered | None:
  """Cuts a document that is longer than a row, or returns None where it cannot be used.

      text text text | text          -> text text text      the last target is the first token cut off
      text begin code | code end     -> None                a picture would be cut
      ask ask ask | t answer t       -> None                nothing is left to learn (all weights 0)

  Args:
    document: any length.
    limits: where `|` is, and the picture ids.
  """
  if len(document) > limits.seq_len:
    tokens = document.tokens[: limits.seq_len]
    if np.count_nonzero(tokens == limits.begin_image) != np.count_nonzero(tokens == limits.end_image):
      return None
    document = Rendered(tokens, document.targets[: limits.seq_len], document.loss_weights[: limits.seq_len])
  return document if np.any(document.loss_weights > 0) else None


class OpenRows:
  """The rows of one group while documents are still being added."""

  def __init__(self, n_rows: int, seq_len: int):
    self._free = [seq_len] * n_rows
    self._rows: list[list[Rendered]] = [[] for _ in range(n_rows)]

  def add(self, document: Rendered) -> bool:
    """Puts the document into the first row with room; False if none has."""
    for row, free in enumerate(self._free):
      if free >= len(document):
        self._rows[row].append(document)
        self._free[row] = free - len(document)
        return True
    return False

  def filled(self) -> list[list[Rendered]]:
    """The documents of every row that has some."""
    return [row for row in self._rows if row]


def assemble(documents: Sequence[Rendered], limits: Limits) -> Row:
  """One row of documents in the order given, padded to `limits.seq_len`."""
  n = limits.seq_len
  row = {
      'tokens': np.full(n, limits.pad, np.int32),
      'targets': np.full(n, limits.pad, np.int32),
      'loss_weights': np.zeros(n, np.float32),
      'segment_ids': np.zeros(n, np.int32),
      'positions': np.zeros(n, np.int32),
  }
  if documents and isinstance(documents[0], Traced):
    row |= {'sources': np.full(n, -1, np.int32), 'documents': np.full(n, -1, np.int64), 'clean_tokens': row['tokens'].copy()}
  start = 0
  for segment, document in enumerate(documents, start=1):
    end = start + len(document)
    row['tokens'][start:end] = document.tokens
    row['targets'][start:end] = document.targets
    row['loss_weights'][start:end] = document.loss_weights
    row['segment_ids'][start:end] = segment
    row['positions'][start:end] = np.arange(end - start)
    if isinstance(document, Traced):
      row['sources'][start:end] = document.source
      row['documents'][start:end] = document.document
      row['clean_tokens'][start:end] = document.clean_tokens
    start = end
  return row


class PackedRows(grain.IterDataset):
  """Grain shell: an iterable of `Rendered` or None (a document that was dropped) -> rows.

  The saved position is that of the first document of the current group and the next row of it; a resumed
  iterator packs the group again and goes on with the same row.
  """

  def __init__(self, parent: grain.IterDataset, *, n_rows: int, limits: Limits):
    super().__init__(parent)
    self._n_rows, self._limits = n_rows, limits

  def __iter__(self) -> 'PackedRowsIterator':
    return PackedRowsIterator(self._parent.__iter__(), n_rows=self._n_rows, limits=self._limits)


class PackedRowsIterator(grain.DatasetIterator):
  """Iterator of `PackedRows`."""

  def __init__(self, parent: grain.DatasetIterator, *, n_rows: int, limits: Limits):
    super().__init__(parent)
    self._n_rows, self._limits = n_rows, limits
    self._first = self._position = (parent.get_state(), 0)  # (parent's state, documents dropped) at the group's first document, and now
    self._waiting: Rendered | None = None  # the document that opens the next group
    self._rows: list[list[Rendered]] = []
    self._next_row = 0

  def __next__(self) -> Row:
    if self._next_row >= len(self._rows):
      self._first, self._next_row = self._position, 0
      self._rows = self._pack_group()
      if not self._rows:
        raise StopIteration
    row = assemble(self._rows[self._next_row], self._limits)
    self._next_row += 1
    return row

  def _pack_group(self) -> list[list[Rendered]]:
    """Reads documents until one does not fit; leaves `_position` and `_waiting` at that one."""
    rows = OpenRows(self._n_rows, self._limits.seq_len)
    dropped, drops_in_a_row = self._position[1], 0
    if self._waiting is not None:
      rows.add(self._waiting)
      self._waiting = None
    while True:
      before = self._parent.get_state()
      try:
        document: Rendered | None = next(self._parent)
      except StopIteration:
        break
      if document is None:
        dropped, drops_in_a_row = dropped + 1, drops_in_a_row + 1
        if drops_in_a_row > _MAX_DROPS:
          raise DataError(f'{drops_in_a_row} documents in a row do not fit into {self._limits.seq_len} tokens; raise data.seq_len')
        continue
      drops_in_a_row = 0
      if not rows.add(document):
        self._waiting = document
        break
    self._position = (before, dropped)
    return rows.filled()

  def get_state(self) -> dict[str, Any]:
    return {'parent': self._first[0], 'dropped': self._first[1], 'next_row': self._next_row}

  def set_state(self, state: Mapping[str, Any]) -> None:
    self._parent.set_state(state['parent'])
    self._first = self._position = (state['parent'], state['dropped'])
    self._waiting, self._rows, self._next_row = None, [], 0
    if state['next_row']:
      self._rows = self._pack_group()
      self._next_row = state['next_row']
