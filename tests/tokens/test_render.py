"""Rendering against token lists written out by hand, the drawn examples, and round trips."""

import random

import numpy as np
import pytest

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import ConfigError, DataError, PromptError
from chameleon_jax.tokens.document import Codes, Document, Image, Text, Turn
from chameleon_jax.tokens.render import check_fits, render, render_prompt, unrender
from chameleon_jax.tokens.vocabulary import Vocabulary
from tests.tokens.conftest import HOSTILE, random_text

# The small vocabulary: 0 <s>, 1 <pad>, 2 </s>, 3 <unk>, codes 4 to 15, 16 <eoss>, 17 <racm3:break>, sentinels 18 and 19,
# 20 end_turn, two more reserved, text from 23.
S, PAD, E, D, B, T, TEXT = 0, 1, 2, 16, 17, 20, 23


class ByteText:
  """Bytes as pieces: what a text becomes can be written down by hand."""

  n_pieces = 256

  def encode(self, text):
    return list(text.encode())

  def decode(self, pieces):
    return bytes(pieces).decode(errors='replace')

  def save(self, path):
    raise AssertionError('nothing here saves a tokenizer')


def text(string):
  return [TEXT + byte for byte in string.encode()]


def codes(*values):
  return Codes(np.array(values, np.int32))


def test_plain_document_as_drawn(vocabulary):
  rendered = render(Document.plain('x', codes(0, 11)), vocabulary, ByteText())
  x = TEXT + ord('x')
  assert rendered.tokens.tolist() == [S, x, B, 4, 15, D, E]
  assert rendered.targets.tolist() == [x, B, 4, 15, D, E, PAD]
  assert rendered.loss_weights.tolist() == [1, 1, 1, 1, 1, 1, 0]
  assert (rendered.tokens.dtype, rendered.targets.dtype, rendered.loss_weights.dtype) == (np.int32, np.int32, np.float32)
  assert len(rendered) == 7


def test_conversation_as_drawn(vocabulary):
  rendered = render(Document.chat('?', '!'), vocabulary, ByteText())
  ask, answer = TEXT + ord('?'), TEXT + ord('!')
  assert rendered.tokens.tolist() == [S, ask, T, answer, T, E]
  assert rendered.targets.tolist() == [ask, T, answer, T, E, PAD]
  assert rendered.loss_weights.tolist() == [0, 0, 1, 1, 1, 0]


def test_long_conversation_counts_answers_only(vocabulary):
  document = Document.chat(['edit ', codes(1, 2)], [codes(3, 4), 'ok'], 'why', 'so')
  rendered = render(document, vocabulary, ByteText())
  prompt_1 = [*text('edit '), B, 5, 6, D, T]
  answer_1 = [B, 7, 8, D, *text('ok'), T]
  prompt_2, answer_2 = [*text('why'), T], [*text('so'), T]
  assert rendered.tokens.tolist() == [S, *prompt_1, *answer_1, *prompt_2, *answer_2, E]
  weight_of_token = [0, *[0] * len(prompt_1), *[1] * len(answer_1), *[0] * len(prompt_2), *[1] * len(answer_2), 1]
  assert rendered.loss_weights.tolist() == [*weight_of_token[1:], 0]


@pytest.mark.parametrize(
  ('document', 'tokens'),
  [
    (Document.plain(), [S, E]),
    (Document.plain(''), [S, E]),
    (Document.plain(codes()), [S, B, D, E]),
    (Document.chat('', ''), [S, T, T, E]),
  ],
)
def test_empty_documents(vocabulary, document, tokens):
  assert render(document, vocabulary, ByteText()).tokens.tolist() == tokens


def test_prompts_as_drawn(vocabulary):
  def prompt(document, **options):
    return render_prompt(document, vocabulary, ByteText(), **options).tolist()

  ask, answer = TEXT + ord('?'), TEXT + ord('!')
  assert prompt(Document.plain('?')) == [S, ask]
  assert prompt(Document.chat('?')) == [S, ask, T]
  assert prompt(Document.chat('?'), begin_answer=False) == [S, ask]
  assert prompt(Document.chat('?', '!')) == [S, ask, T, answer]
  assert prompt(Document.chat('?', '!', '?')) == [S, ask, T, answer, T, ask, T]
  assert prompt(Document.plain()) == [S]


def test_prompt_is_the_beginning_of_the_document(vocabulary, tokenizer):
  turns = ['Draw a red heart.', codes(1, 2, 3), 'What is this?', 'A red heart.']
  whole = render(Document.chat(*turns), vocabulary, tokenizer)
  prompt = render_prompt(Document.chat(*turns[:3]), vocabulary, tokenizer)
  np.testing.assert_array_equal(whole.tokens[: len(prompt)], prompt)
  np.testing.assert_array_equal(whole.loss_weights[len(prompt) - 1 : -1], 1)


def test_neighbouring_texts_are_one(vocabulary, tokenizer):
  split = render(Document.plain('light sk', '', Text('in tone'), codes(1)), vocabulary, tokenizer)
  whole = render(Document.plain('light skin tone', codes(1)), vocabulary, tokenizer)
  np.testing.assert_array_equal(split.tokens, whole.tokens)


@pytest.mark.parametrize('string', HOSTILE, ids=lambda string: ascii(string[:12]))
def test_text_never_becomes_special_or_image_tokens(vocabulary, tokenizer, string):
  tokens = render(Document.plain(string), vocabulary, tokenizer).tokens
  assert vocabulary.is_text[tokens[1:-1]].all()
  tokens = render(Document.chat(string, 'a'), vocabulary, tokenizer).tokens
  assert (tokens == vocabulary.end_turn).sum() == 2
  assert not vocabulary.is_image[tokens].any()


def test_pixels_become_codes_in_one_call(vocabulary):
  calls = []

  def encode(pictures):
    calls.append([picture.shape for picture in pictures])
    return np.array([[picture[0, 0, 0], 9] for picture in pictures])

  red, blue = (np.full((height, 5, 3), value, np.uint8) for height, value in ((2, 1), (3, 2)))
  document = Document.chat([Image(red), 'a', codes(7, 8)], Image(blue))
  rendered = render(document, vocabulary, ByteText(), encode_images=encode)
  assert calls == [[(2, 5, 3), (3, 5, 3)]]
  same = Document.chat([codes(1, 9), 'a', codes(7, 8)], codes(2, 9))
  np.testing.assert_array_equal(rendered.tokens, render(same, vocabulary, ByteText()).tokens)
  np.testing.assert_array_equal(
    render_prompt(document, vocabulary, ByteText(), encode_images=encode), render_prompt(same, vocabulary, ByteText())
  )


@pytest.mark.parametrize(
  ('document', 'options', 'message'),
  [
    (Document.plain(Image(np.zeros((1, 1, 3), np.uint8))), {}, 'no image tokenizer was given'),
    (Document.plain(Image(np.zeros((1, 1, 3), np.uint8))), {'encode_images': lambda _: np.zeros(3, int)}, r'must return \[1, n\]'),
    (Document.plain(Image(np.zeros((1, 1, 3), np.uint8))), {'encode_images': lambda _: np.full((1, 3), 12)}, 'outside the codebook'),
    (Document.plain(codes(12)), {}, 'code 12 lies outside the codebook of 12'),
    (Document.plain(codes(-1)), {}, 'code -1 lies outside'),
    (Document.plain('\ud800'), {}, 'lone surrogate'),
    (Document.chat('a'), {}, 'ends with an answer'),
    (Document.chat(Turn('a', 'answer')), {}, 'starts with a prompt'),
  ],
)
def test_render_errors(vocabulary, tokenizer, document, options, message):
  with pytest.raises(DataError, match=message):
    render(document, vocabulary, tokenizer, **options)


def test_prompt_that_starts_with_an_answer(vocabulary):
  with pytest.raises(PromptError, match='starts with a prompt'):
    render_prompt(Document.chat(Turn('a', 'answer'), 'b'), vocabulary, ByteText())


def test_tokenizer_that_does_not_fit(tokenizer):
  small = Vocabulary(VocabularyConfig(size=100, n_codes=12, n_sentinels=0, n_reserved=1))
  for call in (lambda: render(Document.plain('a'), small, tokenizer), lambda: check_fits(small, tokenizer)):
    with pytest.raises(ConfigError, match='340 pieces, the vocabulary room for 81'):
      call()


# ------------------------------------------------------------------------------------------- unrender


@pytest.mark.parametrize(
  ('tokens', 'document'),
  [
    ([S, *text('?'), T, *text('!'), T, E], Document.chat('?', '!')),
    ([S, *text('x'), E], Document.plain('x')),
    ([*text('!'), T], Document.chat(Turn('!', 'answer'))),
    (text('x'), Document.plain('x')),
    ([S, *text('?'), T], Document.chat('?')),
    ([S, *text('?'), T, *text('cut o')], Document.chat('?', 'cut o')),
    ([S, *text('?'), T, T, E], Document.chat('?', ())),
    ([], Document.plain()),
    ([S], Document.plain()),
    ([E, PAD, PAD], Document.plain()),
    ([*text('x'), E, PAD, *text('never read')], Document.plain('x')),
    ([B, 4, 5, D, B, 6, 7, D], Document.plain(codes(0, 1), codes(2, 3))),
    ([*text('x'), B, 4, 5], Document.plain('x', codes(0, 1))),  # cut off in a picture
    ([B, 4, E], Document.plain(codes(0))),
    ([4, 5, 6], Document.plain(codes(0, 1, 2))),  # begin_image was in the prompt
    ([4, 5, D, *text('x')], Document.plain(codes(0, 1), 'x')),
    ([*text('x'), B], Document.plain('x')),
    ([B, D], Document.plain()),
    ([B, 4, *text('x'), 5], Document.plain(codes(0), 'x', codes(1))),  # a damaged picture
    ([*text('a'), 3, 18, 21, *text('b')], Document.plain('ab')),  # other specials hold no content
  ],
)
def test_unrender(vocabulary, tokens, document):
  assert unrender(np.array(tokens, np.int32), vocabulary, ByteText()) == document
  assert unrender(tokens, vocabulary, ByteText()) == document


def test_text_token_without_piece(vocabulary, tokenizer):
  beyond = TEXT + tokenizer.n_pieces
  tokens = [TEXT + 65, beyond, beyond + 1, TEXT + 66]
  assert unrender(tokens, vocabulary, tokenizer).text == 'A\ufffd\ufffdB'


@pytest.mark.parametrize('token', [-1, 373])
def test_token_outside_the_vocabulary(vocabulary, tokenizer, token):
  with pytest.raises(DataError, match='outside the vocabulary of 373'):
    unrender([token], vocabulary, tokenizer)


def test_two_documents_are_refused(vocabulary, tokenizer):
  with pytest.raises(DataError, match='more than one document'):
    unrender([S, *text('a'), S, *text('b')], vocabulary, tokenizer)


def random_segments(rng):
  """Texts and pictures without empty or neighbouring texts: the form that unrender gives."""
  segments = []
  for _ in range(rng.randrange(4)):
    words = random_text(rng) + 'x'
    if rng.random() < 0.5 and not (segments and isinstance(segments[-1], Text)):
      segments.append(Text(words))
    else:
      segments.append(codes(*(rng.randrange(12) for _ in range(rng.randrange(1, 6)))))
  return tuple(segments)


def test_random_documents_come_back(vocabulary, tokenizer):
  rng = random.Random(1)
  for _ in range(100):
    plain = Document.plain(*random_segments(rng))
    chat = Document.chat(*(random_segments(rng) for _ in range(2 * rng.randrange(1, 4))))
    for document in (plain, chat):
      rendered = render(document, vocabulary, tokenizer)
      assert unrender(rendered.tokens, vocabulary, tokenizer) == document
      if document.turns[-1].segments:  # an end_turn at the end reads as a prompt that waits for its answer
        assert unrender(render_prompt(document, vocabulary, tokenizer), vocabulary, tokenizer) == document
      np.testing.assert_array_equal(rendered.targets[:-1], rendered.tokens[1:])
      assert rendered.targets[-1] == PAD
      assert rendered.loss_weights[-1] == 0


def test_random_tokens_always_read(vocabulary, tokenizer):
  rng = np.random.default_rng(0)
  for _ in range(300):
    tokens = rng.integers(1, vocabulary.size, rng.integers(0, 40))
    document = unrender(tokens, vocabulary, tokenizer)
    assert all(segment.codes.size for segment in document.pictures)
