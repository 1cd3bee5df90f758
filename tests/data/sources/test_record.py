"""A record says what the document said, and renders as `render` does."""

import numpy as np
import pytest

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.data.sources.record import MAGIC, Record, pack
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Codes, Document, Image, Text, Turn
from chameleon_jax.tokens.render import render
from chameleon_jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(VocabularyConfig(size=34 + 4 + 2 + 300, n_codes=32, n_sentinels=0, n_reserved=2))


class Bytes:
  """One piece for each byte, but two bytes `aa` make piece 256: what joins matters."""

  n_pieces = 257

  def encode(self, text):
    pieces = []
    for byte in text.encode():
      if byte == ord('a') and pieces and pieces[-1] == ord('a'):
        pieces[-1] = 256
      else:
        pieces.append(byte)
    return pieces

  def decode(self, pieces):
    return b''.join(b'aa' if piece == 256 else bytes([piece]) for piece in pieces).decode('utf-8', 'replace')

  def save(self, path):
    path.write_bytes(b'bytes')


def _pack(document, *, pieces=True, n_codes=32, n_pieces=257):
  encode = Bytes().encode if pieces else None
  return pack(document, n_codes=n_codes, n_pieces=n_pieces, encode=encode)


def _random_document(rng):
  def segments():
    made = []
    for _ in range(rng.integers(0, 4)):
      picture = Codes(rng.integers(0, 32, rng.integers(1, 5)))
      made.append(Text(''.join(rng.choice(list('aé\U0001f600 '), rng.integers(0, 6)))) if rng.random() < 0.6 else picture)
    return made

  if rng.random() < 0.4:
    return Document.plain(*segments())
  return Document.chat(*(segments() for _ in range(2 * rng.integers(1, 3))))


def _joined(document):
  """Neighbouring texts as one, empty texts gone: what has the same tokens."""
  turns = []
  for turn in document.turns:
    made = []
    for segment in turn.segments:
      if isinstance(segment, Text) and made and isinstance(made[-1], Text):
        made[-1] = Text(made[-1].text + segment.text)
      else:
        made.append(segment)
    turns.append(Turn([segment for segment in made if segment != Text('')], turn.role))
  return Document(tuple(turns))


@pytest.mark.parametrize('wide', [False, True])
def test_a_record_says_what_the_document_said(wide):
  sizes = {'n_codes': 1 << 17, 'n_pieces': 1 << 17} if wide else {}
  for seed in range(80):
    document = _random_document(np.random.default_rng(seed))
    packed = _pack(document, **sizes)
    record = Record(packed.data)
    assert _joined(record.document()) == _joined(document)
    assert packed.n_pictures == len(document.pictures)
    assert packed.n_text_bytes == len(document.text.encode())
    rendered, expected = record.render(VOCABULARY), render(document, VOCABULARY, Bytes())
    for name in ('tokens', 'targets', 'loss_weights'):
      found = getattr(rendered, name)
      np.testing.assert_array_equal(found, getattr(expected, name))
      assert found.dtype == getattr(expected, name).dtype
    assert packed.n_pieces == VOCABULARY.is_text[expected.tokens].sum()


def test_the_bytes_are_as_documented():
  data = _pack(Document.plain('aa', Codes(np.array([3, 31]))), pieces=True).data
  head = MAGIC + data[4:8] + bytes([2, 0, 0, 0, 2, 2, 0, 0])
  text = bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])
  picture = bytes([1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0])
  assert data == head + text + picture + bytes([3, 0, 31, 0]) + bytes([0, 1]) + b'aa'


def test_without_pieces():
  record = Record(_pack(Document.chat('ask', 'answer'), pieces=False).data)
  assert record.pieces is None
  assert record.document() == Document.chat('ask', 'answer')


def test_any_flipped_bit_and_any_cut_is_seen():
  data = _pack(Document.plain('text', Codes(np.array([1, 2, 3])))).data
  for place in range(len(data)):
    flipped = bytearray(data)
    flipped[place] ^= 1 << (place % 8)
    with pytest.raises(DataError, match='damaged|no tokenized document'):
      Record(bytes(flipped))
    with pytest.raises(DataError, match='damaged|no tokenized document'):
      Record(data[:place])


def test_what_cannot_be_packed():
  with pytest.raises(DataError, match='outside the codebook of 32'):
    _pack(Document.plain(Codes(np.array([32]))))
  with pytest.raises(DataError, match='encode it first'):
    _pack(Document.plain(Image(np.zeros((1, 1, 3), np.uint8))))
  with pytest.raises(DataError, match='lone surrogate at character 1'):
    _pack(Document.plain('a\ud800'), pieces=False)
  with pytest.raises(DataError, match='starts with a prompt and ends with an answer'):
    Record(_pack(Document.chat('ask')).data).render(VOCABULARY)
