"""Packing: the drawn examples, and what must hold for any documents."""

import grain
import numpy as np
import pytest

from chameleon_jax.data.packing import Limits, OpenRows, PackedRows, assemble, fit
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.render import Rendered

BEGIN, END, PAD = 91, 92, 1
LIMITS = Limits(seq_len=6, begin_image=BEGIN, end_image=END, pad=PAD)


def _document(tokens, weights=None):
  tokens = np.array(tokens, np.int32)
  weights = np.r_[np.ones(len(tokens) - 1), 0] if weights is None else weights
  return Rendered(tokens, np.append(tokens[1:], np.int32(PAD)), np.array(weights, np.float32))


class _List(grain.IterDataset):
  """Documents of a list, as an iterable with state."""

  def __init__(self, documents):
    super().__init__()
    self._documents = documents

  def __iter__(self):
    return _ListIterator(self._documents)


class _ListIterator(grain.DatasetIterator):
  def __init__(self, documents):
    super().__init__()
    self._documents, self._next = documents, 0

  def __next__(self):
    if self._next == len(self._documents):
      raise StopIteration
    self._next += 1
    return self._documents[self._next - 1]

  def get_state(self):
    return {'next': self._next}

  def set_state(self, state):
    self._next = state['next']


def test_the_drawn_example():
  a, b, c, d = (_document(range(10 * i, 10 * i + n)) for i, n in ((1, 3), (2, 4), (3, 2), (4, 5)))
  rows = list(iter(PackedRows(_List([a, b, c, d]), n_rows=2, limits=LIMITS)))
  found = {name: [row[name].tolist() for row in rows] for name in rows[0]}
  assert found['tokens'] == [[10, 11, 12, 30, 31, 1], [20, 21, 22, 23, 1, 1], [40, 41, 42, 43, 44, 1]]
  assert found['segment_ids'] == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
  assert found['positions'] == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 0]]
  assert found['targets'] == [[11, 12, 1, 31, 1, 1], [21, 22, 23, 1, 1, 1], [41, 42, 43, 44, 1, 1]]
  assert found['loss_weights'] == [[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]


def test_first_fit():
  rows = OpenRows(n_rows=2, seq_len=6)
  lengths = [3, 4, 2, 5, 1, 2, 1]
  assert [rows.add(_document(range(n))) for n in lengths] == [True, True, True, False, True, True, False]
  assert [[len(document) for document in row] for row in rows.filled()] == [[3, 2, 1], [4, 2]]


@pytest.mark.parametrize(
    ('tokens', 'weights', 'expected'),
    [
        ([5, 6, 7], None, 3),
        ([5, 6, 7, 8, 9, 10], None, 6),
        ([5, 6, 7, 8, 9, 10, 11], None, 6),  # text is cut
        ([5, BEGIN, 20, 21, END, 6, 7], None, 6),  # the picture is whole
        ([5, 6, BEGIN, 20, 21, END, 7], None, 6),  # just whole
        ([5, 6, 7, BEGIN, 20, 21, END], None, None),  # its end would be cut
        ([5, 6, 7, 8, 9, BEGIN, 20, 21, END], None, None),  # only its beginning would be left
        ([5, 6, 7, 8, 9, 10, BEGIN, 20, 21, END], None, 6),  # cut before the picture
        ([5, BEGIN, 20, END, BEGIN, 21, 22, END], None, None),  # the second one would be cut
        ([5, 6, 7, 8, 9, 10, 11], [0, 0, 0, 0, 0, 0, 1], None),  # the answer is cut off: nothing to learn
        ([5, 6], [0, 0], None),
    ],
)
def test_fit(tokens, weights, expected):
  document = _document(tokens, weights)
  found = fit(document, LIMITS)
  if expected is None:
    assert found is None
    return
  np.testing.assert_array_equal(found.tokens, tokens[:expected])
  np.testing.assert_array_equal(found.targets, document.targets[:expected])
  assert len(found) == len(found.targets) == len(found.loss_weights) == expected


def test_cut_text_still_predicts_the_token_after_the_cut():
  found = fit(_document([5, 6, 7, 8, 9, 10, 11]), LIMITS)
  assert found.targets[-1] == 11
  assert found.loss_weights[-1] == 1


@pytest.mark.parametrize('seed', range(5))
def test_any_documents(seed):
  """Every document is there once, unbroken and unmixed; rows are nearly full."""
  rng = np.random.default_rng(seed)
  limits = Limits(seq_len=64, begin_image=BEGIN, end_image=END, pad=PAD)
  documents = [_document(rng.integers(100, 200, rng.integers(2, 40))) for _ in range(200)]
  rows = list(iter(PackedRows(_List(documents), n_rows=4, limits=limits)))
  found = []
  for row in rows:
    n_segments = row['segment_ids'].max()
    used = np.count_nonzero(row['segment_ids'])
    assert np.all(np.diff(row['segment_ids'][:used]) >= 0)
    assert not row['segment_ids'][used:].any()
    assert not row['loss_weights'][used:].any()
    assert np.all(row['tokens'][used:] == PAD)
    for segment in range(1, n_segments + 1):
      where = row['segment_ids'] == segment
      np.testing.assert_array_equal(row['positions'][where], np.arange(where.sum()))
      found.append((row['tokens'][where].tolist(), row['targets'][where].tolist(), row['loss_weights'][where].tolist()))
  assert sorted(found) == sorted((d.tokens.tolist(), d.targets.tolist(), d.loss_weights.tolist()) for d in documents)
  # A target never comes from another document: it is the next token of the same segment, or nothing is learned there.
  for tokens, targets, weights in found:
    assert targets[:-1] == tokens[1:]
    assert weights[-1] == 0
  assert np.mean([np.count_nonzero(row['segment_ids']) for row in rows[:-4]]) / 64 > 0.8


def test_state_resumes_at_every_row():
  rng = np.random.default_rng(0)
  documents = [None if i % 7 == 3 else _document(rng.integers(100, 200, rng.integers(2, 7))) for i in range(60)]
  dataset = PackedRows(_List(documents), n_rows=3, limits=LIMITS)
  whole, states = [], []
  iterator = iter(dataset)
  while True:
    states.append(iterator.get_state())
    try:
      whole.append(next(iterator))
    except StopIteration:
      break
  assert len(whole) > 10
  assert states[-1]['dropped'] > 5
  for done, state in enumerate(states[:-1]):
    resumed = iter(dataset)
    resumed.set_state(state)
    for expected in whole[done : done + 4]:
      row = next(resumed)
      assert all(np.array_equal(row[name], expected[name]) for name in expected)


def test_an_endless_source_of_unusable_documents_is_an_error():
  with pytest.raises(DataError, match='do not fit into 6 tokens'):
    next(iter(PackedRows(_List([None] * 20_000), n_rows=2, limits=LIMITS)))


def test_no_documents():
  assert list(iter(PackedRows(_List([]), n_rows=2, limits=LIMITS))) == []


def test_assemble_nothing():
  row = assemble([], LIMITS)
  assert not row['segment_ids'].any()
  assert row['tokens'].tolist() == [PAD] * 6
