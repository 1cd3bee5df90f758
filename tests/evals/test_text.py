"""evals/text.py against closed forms."""

import math

import numpy as np
import pytest

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.evals.text import bits_per_byte, nats_of_targets, text_rows
from chameleon_jax.tokens.vocabulary import Vocabulary


class Bytes:
  """One piece a byte."""

  n_pieces = 256

  def encode(self, text):
    return list(text.encode())

  def decode(self, pieces):
    return bytes(pieces).decode()

  def save(self, path):
    raise AssertionError('not used')


VOCABULARY = Vocabulary(VocabularyConfig(size=512, n_codes=16, n_sentinels=0, n_reserved=2))


def test_text_rows_drawn_example():
  assert text_rows([1, 2, 3, 4, 5], begin=0, length=3) == [[0, 1, 2, 3], [0, 4, 5]]
  assert text_rows([1, 2, 3], begin=0, length=3) == [[0, 1, 2, 3]]


def test_nats_of_targets_against_scipy_free_softmax():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
  targets = rng.integers(0, 5, (2, 3))
  mask = np.array([[True, True, False], [True, False, False]])
  expected = 0.0
  for b, t in ((0, 0), (0, 1), (1, 0)):
    p = [math.exp(float(x)) for x in logits[b, t]]
    expected -= math.log(p[targets[b, t]] / sum(p))
  assert nats_of_targets(logits, targets, mask) == pytest.approx(expected, rel=1e-6)
  # Large logits do not overflow.
  assert nats_of_targets(np.full((1, 1, 4), 1e4, np.float32), np.zeros((1, 1), int), np.ones((1, 1), bool)) == pytest.approx(math.log(4))


def test_a_uniform_model_needs_log2_of_the_vocabulary_for_each_token():
  texts = ['a' * 37, 'b', 'é']
  tokens = 38 + 2 + 3  # one piece a byte, and an end_sequence each
  value = bits_per_byte(lambda rows: np.zeros((*rows.shape, 512), np.float32), texts, VOCABULARY, Bytes(), context=8)
  assert value == pytest.approx(9.0 * tokens / 40)


def test_a_model_that_knows_the_text_needs_nothing_and_rows_are_what_it_expects():
  text = 'abcdefghij'
  stream = [VOCABULARY.text_start + byte for byte in text.encode()] + [VOCABULARY.end_sequence]
  seen = []

  def logits(rows):
    seen.append(np.asarray(rows))
    out = np.zeros((*rows.shape, 512), np.float32)
    for b, row in enumerate(rows):
      for t, token in enumerate(row):
        at = b * 4 + t  # row b holds stream[4 b : 4 b + 4]
        if at < len(stream):
          out[b, t, stream[at]] = 1000.0
        assert t == 0 or token in (*stream, VOCABULARY.pad)
    return out

  assert bits_per_byte(logits, [text], VOCABULARY, Bytes(), context=4) == pytest.approx(0.0, abs=1e-9)
  assert seen[0].shape == (8, 4)
  assert seen[0][:3, 0].tolist() == [VOCABULARY.begin_sequence] * 3
