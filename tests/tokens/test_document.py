"""Documents: roles, coercion of strings, equality, and refusal of what is no picture."""

import dataclasses
import doctest

import numpy as np
import pytest

from chameleon_jax.errors import DataError
from chameleon_jax.tokens import document as module
from chameleon_jax.tokens.document import Codes, Document, Image, Text, Turn

PICTURE = np.zeros((2, 3, 3), np.uint8)


def codes(*values):
  return Codes(np.array(values, np.int32))


def test_plain():
  document = Document.plain('a', Image(PICTURE), Text('b'), codes(1, 2))
  assert document.is_plain
  assert document.turns == (Turn((Text('a'), Image(PICTURE), Text('b'), codes(1, 2)), 'document'),)
  assert document.segments == document.turns[0].segments
  assert document.text == 'ab'
  assert document.pictures == (Image(PICTURE), codes(1, 2))


def test_chat_gives_roles_in_turn():
  document = Document.chat('draw', codes(1), ['describe ', codes(1)], Turn('a cat', 'answer'))
  assert [turn.role for turn in document.turns] == ['prompt', 'answer', 'prompt', 'answer']
  assert document.turns[2].segments == (Text('describe '), codes(1))
  assert document.text == 'drawdescribe a cat'
  assert not document.is_plain


def test_chat_may_end_with_a_prompt_or_start_with_an_answer():
  assert [turn.role for turn in Document.chat('a', 'b', 'c').turns] == ['prompt', 'answer', 'prompt']
  assert [turn.role for turn in Document.chat(Turn('a', 'answer'), 'b').turns] == ['answer', 'prompt']


def test_turn_takes_a_string_or_one_segment():
  assert Turn('a', 'prompt') == Turn((Text('a'),), 'prompt')
  assert Turn(codes(1), 'answer').segments == (codes(1),)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Document(()), 'at least one turn'),
    (lambda: Document.chat(), 'at least one turn'),
    (lambda: Document.chat(Turn('a', 'prompt'), Turn('b', 'prompt')), 'must alternate'),
    (lambda: Document.chat(Turn('a', 'document')), 'prompt and answer'),
    (lambda: Document((Turn('a', 'document'), Turn('b', 'answer'))), 'one turn only'),
    (lambda: Image(PICTURE.astype(np.float32)), r'uint8 \[H, W, 3\]'),
    (lambda: Image(PICTURE[0]), r'uint8 \[H, W, 3\]'),
    (lambda: Image(PICTURE[..., :1]), r'uint8 \[H, W, 3\]'),
    (lambda: Image(PICTURE[:0]), 'not empty'),
    (lambda: Codes(np.zeros(3)), 'integers'),
    (lambda: Codes(np.zeros((1, 3), np.int32)), r'\[1, 3\]'),
  ],
)
def test_errors(make, message):
  with pytest.raises(DataError, match=message):
    make()


def test_equality_and_hash_go_by_content():
  assert codes(1, 2) == Codes(np.array([1, 2], np.int64)) != codes(2, 1)
  assert Image(PICTURE) == Image(PICTURE.copy()) != Image(PICTURE + 1)
  assert codes(1) != Text('1')
  documents = {Document.plain('a', Image(PICTURE), codes(1)), Document.plain('a', Image(PICTURE.copy()), codes(1))}
  assert len(documents) == 1


def test_arrays_are_read_only_views():
  pixels = PICTURE.copy()
  image, picture = Image(pixels), codes(1)
  assert np.shares_memory(image.pixels, pixels)
  assert pixels.flags.writeable
  assert picture.codes.dtype == np.int32
  for array in (image.pixels, picture.codes):
    with pytest.raises(ValueError, match='read-only'):
      array[0] = 1
  with pytest.raises(dataclasses.FrozenInstanceError):
    image.pixels = pixels


def test_docstring_examples():
  assert doctest.testmod(module, extraglobs={'np': np}).failed == 0
