"""What the tokenizer is trained on: which texts, how often, and the numbers that are printed."""

import numpy as np
import pytest

from chameleon_jax.config import TextTokenizerTrainConfig, VocabularyConfig
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Codes, Document
from chameleon_jax.training import text_tokenizer as module

N_PIECES = 256 + 13  # f, s, the digits and the space


class Letters:
  """Documents 'a <number>', picture, 'a <random digit>'."""

  def __init__(self, letter):
    self.letter = letter

  def __len__(self):
    return 3

  def document(self, index, rng):
    return Document.chat([f'{self.letter} {index}', Codes(np.array([1], np.int32))], f'{self.letter} {rng.integers(10)}')


@pytest.fixture
def sources(monkeypatch):
  def make_source(name, split, codes=None):
    if name not in ('first', 'second'):
      raise DataError(f'unknown source {name!r}')
    return Letters(name[0] if split == 'train' else name[0].upper())

  monkeypatch.setattr(module, 'make_source', make_source)


def config(**fields):
  vocabulary = VocabularyConfig(size=4 + 1 + 2 + 1 + N_PIECES, n_codes=1, n_sentinels=0, n_reserved=1)
  return TextTokenizerTrainConfig(vocabulary=vocabulary, **fields)


def test_every_source_is_read_as_often_as_asked(sources):
  texts = list(module.training_texts(config(sources=(('first', 2), ('second', 1)))))
  assert len(texts) == 2 * 6 + 6
  assert [text for text in texts if text.startswith('f')] == texts[:12]
  assert texts[::2] == ['f 0', 'f 1', 'f 2', 'f 0', 'f 1', 'f 2', 's 0', 's 1', 's 2'], 'pictures leave no trace'


def test_randomness_is_of_the_seed_and_fresh_each_time(sources):
  def random_texts(seed):
    return list(module.training_texts(config(sources=(('first', 8),), seed=seed)))[1::2]

  assert random_texts(3) == random_texts(3) != random_texts(30)
  assert len(set(random_texts(3))) > 3


def test_tokenizer_fills_the_vocabulary(sources):
  tokenizer = module.train_from_sources(config(sources=(('first', 30), ('second', 30))))
  assert tokenizer.n_pieces == N_PIECES


class Bytes:
  """One piece a byte."""

  n_pieces = 256

  def encode(self, text):
    return list(text.encode())

  def decode(self, pieces):
    return bytes(pieces).decode()

  def save(self, path):
    raise AssertionError('nothing here saves a tokenizer')


class Pairs(Bytes):
  """One piece for two bytes, a byte piece for the last one of an odd number."""

  def encode(self, text):
    return [300] * (len(text.encode()) // 2) + [0] * (len(text.encode()) % 2)


def test_measure_on_validation_documents(sources):
  row = module.measure(Bytes(), config(sources=(('first', 1),)))['first']
  assert row == {'bytes_per_piece': 1, 'pieces_per_text': 3, 'byte_share': 1}
  row = module.measure(Pairs(), config(sources=(('first', 1),)), n_documents=1)['first']
  assert row == {'bytes_per_piece': 1.5, 'pieces_per_text': 2, 'byte_share': 0.5}


def test_emoji_sources_hold_text():
  for name in ('emoji_text', 'emoji_pairs', 'emoji_chat'):
    texts = list(module.source_texts(name, 'train', seed=0, n_documents=3))
    assert any(text.strip() for text in texts), name
