"""Tokens to events: text that never changes, pictures row by row, and the same document as reading the whole row at once."""

import functools
import pathlib
import random

import numpy as np
import pytest

from chameleon_jax.chameleon import shipped_path
from chameleon_jax.config import VocabularyConfig
from chameleon_jax.sampling.assembler import Assembler, Detokenizer
from chameleon_jax.sampling.events import Ended, Failed, PictureDone, PictureRows, PictureStarted, TextPiece
from chameleon_jax.tokens.document import Codes, Image, Text
from chameleon_jax.tokens.render import unrender
from chameleon_jax.tokens.text import SentencePieceText
from chameleon_jax.tokens.text_json import JsonText
from chameleon_jax.tokens.vocabulary import Vocabulary

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / 'golden'
N = 9  # a grid of 3 x 3 codes


def make(kind):
  """A text tokenizer and a vocabulary with three text tokens more than it fills (none more for the file, which says all)."""
  if kind == 'json':
    text = JsonText.load(GOLDEN / 'tokenizer' / 'text_tokenizer.json')
    return text, text.vocabulary
  text = SentencePieceText.load(shipped_path('emoji') / 'text_tokenizer.model')
  config = VocabularyConfig(size=4 + 16 + 2 + 1 + 2 + text.n_pieces + 3, n_codes=16, n_sentinels=1, n_reserved=2)
  return text, Vocabulary(config)


@pytest.fixture(scope='module', params=['emoji', 'json'])
def model(request):
  return make(request.param)


def pictures(codes):
  """A decoder that shows each code as one pixel."""
  grid = codes.reshape(-1, 3, 3).astype(np.uint8)
  return np.repeat(grid[..., None], 3, axis=-1)


def assembler(model, **settings):
  text, vocabulary = model
  return Assembler(7, vocabulary, text, n_image_tokens=N, **settings)


def portions(rng, tokens):
  """The tokens cut at random."""
  while tokens:
    n = rng.choice((1, 1, 2, 3, 16, 60))
    yield tokens[:n]
    tokens = tokens[n:]


def run(made, rng, tokens, reason='stop'):
  return [*(event for part in portions(rng, tokens) for event in made.feed(part)), *made.finish(reason)]


def random_text_tokens(rng, model):
  """Pieces as they come, runs of bytes, characters spelled in bytes, and such characters cut off."""
  text, vocabulary = model
  bytes_of = {bytes([b]): piece for b in range(256) for piece in [_byte_piece(text, b)] if piece is not None}
  tokens = []
  for _ in range(rng.randrange(1, 12)):
    kind = rng.randrange(5)
    if kind == 0:
      pieces = [rng.randrange(vocabulary.n_text) for _ in range(rng.randrange(1, 8))]
    elif kind == 1:
      pieces = [rng.choice([*bytes_of.values()]) for _ in range(rng.randrange(1, 6))]
    elif kind == 2:
      spelled = rng.choice(['\U0001f600', 'ä', '\u2581', '\ufffd', '\ufeff', '漢', '\U0010ffff']).encode()
      pieces = [bytes_of[bytes([b])] for b in spelled[: rng.randrange(1, 5)] if bytes([b]) in bytes_of]
    elif kind == 3:
      pieces = [rng.choice([*bytes_of.values()][0x80:])] * rng.randrange(1, 9)
    else:
      pieces = text.encode(rng.choice(['  two  spaces', ' a', '\n\n\t', 'red apple', ' ' * 50]))
    tokens += [vocabulary.text_start + piece for piece in pieces]
  return tokens


@functools.cache
def _byte_piece(text, byte):
  if isinstance(text, JsonText):
    return next((piece for piece in range(text.n_pieces) if text._bytes[piece] == bytes([byte])), None)
  return byte


def random_row(rng, model, *, lawful):
  """A row as a sampler writes it; without `lawful` special tokens stand anywhere too."""
  _, v = model
  row = []
  for _ in range(rng.randrange(1, 6)):
    row += random_text_tokens(rng, model)
    if rng.random() < 0.6:
      codes = [int(v.token_of_code[rng.randrange(v.n_codes)]) for _ in range(N)]
      row += [v.begin_image, *codes, v.end_image]
    if not lawful:
      row += rng.choices([v.pad, v.unknown, v.end_turn, v.end_image, v.begin_image, int(v.token_of_code[1])], k=rng.randrange(3))
  if rng.random() < 0.3:
    row += [v.begin_image, *(int(v.token_of_code[2]) for _ in range(rng.randrange(N)))]
  elif rng.random() < 0.7:
    row += [rng.choice([v.end_sequence, v.end_turn])]
  return row


def spelled(events):
  """The order of text and pictures with codes in the events, text joined between pictures."""
  parts = []
  for event in events:
    if isinstance(event, TextPiece):
      if parts and isinstance(parts[-1], str):
        parts[-1] += event.text
      else:
        parts.append(event.text)
    elif isinstance(event, PictureDone):
      parts.append(event.codes.tolist())
  return parts


def spelled_by(document):
  parts = []
  for segment in document.segments:
    if isinstance(segment, Text):
      if parts and isinstance(parts[-1], str):
        parts[-1] += segment.text
      elif segment.text:
        parts.append(segment.text)
    elif len(segment.codes) == N:
      parts.append(segment.codes.tolist())
  return parts


@pytest.mark.parametrize('seed', range(100))
def test_events_spell_what_the_whole_row_spells(model, seed):
  rng = random.Random(seed)
  row = random_row(rng, model, lawful=True)
  whole = unrender(row, model[1], model[0])
  events = run(assembler(model), rng, row)
  assert spelled(events) == spelled_by(whole)
  end = events[-1]
  assert isinstance(end, Ended) and end.document == whole and end.tokens.tolist() == row
  texts = [event.text for event in events if isinstance(event, TextPiece)]
  assert all(texts) and ''.join(texts) == whole.text


@pytest.mark.parametrize('seed', range(100))
def test_text_of_any_tokens_in_any_order(model, seed):
  rng = random.Random(1000 + seed)
  row = random_row(rng, model, lawful=False)
  whole = unrender(row, model[1], model[0])
  events = run(assembler(model), rng, row)
  assert ''.join(event.text for event in events if isinstance(event, TextPiece)) == whole.text
  assert events[-1].document == whole


def test_half_a_character_is_held_back_and_a_broken_one_let_go(model):
  text, v = model
  pieces = [_byte_piece(text, byte) for byte in 'a\U0001f600'.encode()]
  made = Detokenizer(text)
  assert [made.push([piece]) for piece in pieces] == ['a', '', '', '', '\U0001f600']
  assert [made.push([pieces[1]]), made.push([pieces[0]]), made.finish()] == ['', '\ufffda', '']
  assert made.push([pieces[1]]) == '' and made.finish() == '\ufffd'


def test_not_more_than_three_characters_wait_however_broken_the_bytes(model):
  text, _ = model
  broken = [_byte_piece(text, 0x80)] * 40
  made = Detokenizer(text)
  shown = [made.push([piece]) for piece in broken]
  assert len(''.join(shown)) == 37 and ''.join(shown) + made.finish() == text.decode(broken)


def test_a_long_run_is_decoded_in_windows(model):
  """The work does not grow with what is behind: no call of the tokenizer sees much more than the new pieces."""
  text, _ = model

  class Counting:
    n_pieces = text.n_pieces
    longest = 0

    def encode(self, text):
      raise NotImplementedError

    save = encode

    def decode(self, pieces):
      Counting.longest = max(Counting.longest, len(pieces))
      return text.decode(pieces)

  pieces = text.encode('a red apple and 7 pears, ' * 40)
  made = Detokenizer(Counting())
  assert ''.join(made.push([piece]) for piece in pieces) + made.finish() == text.decode(pieces)
  assert len(pieces) > 300 and Counting.longest <= 40


class DropsLeadingSpace:
  """As sentencepiece models with a dummy prefix: a space in front of a decoded text is dropped, by some models all of them."""

  n_pieces = 3

  def __init__(self, drop):
    self.drop = drop

  def encode(self, text):
    raise NotImplementedError

  save = encode

  def decode(self, pieces):
    return self.drop(''.join((' a', ' b', ' ')[piece] for piece in pieces))


@pytest.mark.parametrize('drop', [lambda text: text.removeprefix(' '), str.lstrip])
@pytest.mark.parametrize('pieces', [[0], [2, 0], [0, 1, 2] * 40, [2] * 40 + [1] * 40 + [2] * 80 + [0] * 3 + [2]])
def test_space_dropped_in_front_of_a_text_is_dropped_there_alone(drop, pieces):
  text = DropsLeadingSpace(drop)
  made = Detokenizer(text)
  assert ''.join([*(made.push([piece]) for piece in pieces), made.finish()]) == text.decode(pieces)


def row_of_one_picture(v, *, end=True):
  return [v.begin_image, *(int(v.token_of_code[code]) for code in range(N)), *([v.end_image] if end else [])]


def test_rows_of_a_picture_with_previews(model):
  text, v = model
  made = assembler(model, decode=pictures, preview_every=1)
  events = made.feed(row_of_one_picture(v)) + made.finish('length')
  started, first, second, done, end = events
  assert started == PictureStarted(7, 0)
  assert isinstance(first, PictureRows) and first.codes.tolist() == [0, 1, 2]
  np.testing.assert_array_equal(first.preview[..., 0], [[0, 1, 2], [0, 0, 0], [0, 0, 0]])  # filled up with the first code
  np.testing.assert_array_equal(second.preview[..., 1], [[0, 1, 2], [3, 4, 5], [0, 0, 0]])
  assert isinstance(done, PictureDone) and done.codes.tolist() == list(range(9))
  np.testing.assert_array_equal(done.image[..., 2], np.arange(9).reshape(3, 3))
  assert end.reason == 'length' and end.document.pictures == (Image(done.image),)


def test_previews_only_as_often_as_asked(model):
  _, v = model
  kinds = {}
  for every in (None, 1, 2, 3):
    calls = []
    made = assembler(model, decode=lambda codes, calls=calls: calls.append(len(codes)) or pictures(codes), preview_every=every)
    events = [event for token in row_of_one_picture(v) for event in made.feed([token])]
    rows = [event for event in events if isinstance(event, PictureRows)]
    kinds[every] = [len(event.codes) for event in rows]
    assert sum(calls) == 1 + (0 if every is None else len(rows))  # the picture itself is decoded in any case
    assert all((event.preview is None) == (every is None) for event in rows)
  assert kinds == {None: [3, 6], 1: [3, 6], 2: [6], 3: []}


def test_without_a_decoder_codes_stay(model):
  _, v = model
  made = assembler(model, preview_every=1)
  events = made.feed(row_of_one_picture(v)) + made.finish('stop')
  assert [getattr(event, 'image', None) for event in events] == [None] * 5
  assert events[-1].document.pictures == (Codes(np.arange(N)),)


def test_two_pictures_of_which_one_is_cut_off(model):
  _, v = model
  made = assembler(model, decode=pictures)
  events = made.feed([*row_of_one_picture(v), *row_of_one_picture(v)[:6]]) + made.finish('cancelled')
  assert [event.picture for event in events if isinstance(event, PictureStarted)] == [0, 1]
  assert [event.picture for event in events if isinstance(event, PictureDone)] == [0]
  image, codes = events[-1].document.pictures
  assert isinstance(image, Image) and codes == Codes(np.arange(5))


def test_a_picture_begun_and_left_without_codes_keeps_the_numbers_right(model):
  _, v = model
  made = assembler(model, decode=pictures)
  events = made.feed([v.begin_image, v.end_image, *row_of_one_picture(v)]) + made.finish('stop')
  assert [event.picture for event in events if isinstance(event, PictureDone)] == [1]
  assert [type(picture) for picture in events[-1].document.pictures] == [Image]


def test_a_picture_that_the_prompt_left_open_is_shown_whole(model):
  _, v = model
  made = assembler(model, decode=pictures, preview_every=1, given_codes=[8, 8, 8, 8])
  events = made.feed([int(v.token_of_code[code]) for code in (1, 2, 3, 4, 5)]) + made.finish('picture')
  started, rows, done, end = events
  assert started.picture == 0 and rows.codes.tolist() == [8, 8, 8, 8, 1, 2]
  assert done.codes.tolist() == [8, 8, 8, 8, 1, 2, 3, 4, 5]
  assert end.document.pictures == (Image(done.image),)


def test_nothing_is_read_behind_the_end(model):
  text, v = model
  word = [v.text_start + piece for piece in text.encode('red')]
  made = assembler(model)
  events = made.feed([*word, v.end_sequence, *word, v.begin_image]) + made.finish('stop')
  assert [event.text for event in events if isinstance(event, TextPiece)] == ['red']
  assert not any(isinstance(event, PictureStarted) for event in events)


def test_tokens_that_are_no_document_fail_this_request_with_a_line(model):
  text, v = model
  made = assembler(model)
  word = [v.text_start + piece for piece in text.encode('red')]
  events = made.feed([*word, v.begin_sequence, *word]) + made.finish('stop')
  assert isinstance(events[-1], Failed) and 'more than one document' in events[-1].message
