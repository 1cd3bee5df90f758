"""A small vocabulary, a text tokenizer that fits it, and strings meant to do harm."""

import random

import pytest

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.tokens.text import SentencePieceText, train_text_tokenizer
from chameleon_jax.tokens.vocabulary import Vocabulary

SENTENCES = (
  'woman astronaut: medium-dark skin tone',
  'Draw a thumbs up: light skin tone.\n',
  'What is this?  A red heart.\n\tindented 123 times\n\n',
) * 20

# None of them may become a special or image token, and all must come back as they were.
HOSTILE = (
  '',
  '<s>',
  '</s><pad><unk>',
  '<eoss>',
  '<racm3:break>',
  '<reserved08706>',
  '<sentinel:0>',
  'IMGIMGAZ',
  '<racm3:break>IMGIMGAZIMGIMGBZ<eoss>',
  '<0x41><0x00>',
  '\x00',
  'a\x00b\x1b[31m\x7f\x08',
  '\u2581',
  ' \u2581 \u2581\u2581',
  '\u2585\u2047 ',
  '\ufffd\ufeff\ufffe',
  '\r\n \t  \n\n',
  '  two  spaces  ',
  '\u2028\u2029\u0085\xa0\u3000',
  'e\u0301 \xe9 \ufb01 \uff21',  # identity normalisation keeps all of them apart
  '\U0001f469\U0001f3fe\u200d\U0001f680\ufe0f',
  '\u202eright to left\u202c \u05d0\u0628',
  '\U0010ffff\ud7ff\ue000',
  'x' * 10_000,
)


def random_text(rng: random.Random) -> str:
  """Characters from all of Unicode except surrogates, with the troublesome ones over-represented."""
  blocks = (
    lambda: rng.randrange(0x80),
    lambda: rng.randrange(0xD800),
    lambda: rng.randrange(0xE000, 0x110000),
    lambda: rng.choice((0, 9, 10, 13, 32, 0x2581, 0x2585, 0xFFFD, 0x200D, ord('<'), ord('>'))),
  )
  return ''.join(chr(rng.choice(blocks)()) for _ in range(rng.randrange(40)))


@pytest.fixture(scope='session')
def tokenizer() -> SentencePieceText:
  return train_text_tokenizer(SENTENCES, n_pieces=340, character_coverage=1.0, seed=0)


@pytest.fixture(scope='session')
def vocabulary() -> Vocabulary:
  """12 codes, 3 reserved tokens, room for 350 pieces (10 more than the tokenizer has); text starts at 23."""
  return Vocabulary(VocabularyConfig(size=373, n_codes=12, n_sentinels=2, n_reserved=3))
