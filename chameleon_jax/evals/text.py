"""How well a model predicts text: bits per UTF-8 byte (spec evaluation.md section 8).

Bits per byte compare models with different text tokenizers. Knows no data set.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from chameleon_jax.tokens.text import TextTokenizer
from chameleon_jax.tokens.vocabulary import Vocabulary

_TEXT_BATCH = 8


def text_rows(stream: Sequence[int], *, begin: int, length: int) -> list[list[int]]:
  """Cuts the tokens of one text into rows of at most `length` inputs, each opened by `begin`; every token is a target once.

      stream a b c d e, length 3:   s a b c | s d e        targets  a b c | d e
  """
  return [[begin, *stream[start : start + length]] for start in range(0, len(stream), length)]


def nats_of_targets(logits: Float[np.ndarray, 'B T V'], targets: Int[np.ndarray, 'B T'], mask: np.ndarray) -> float:
  """Sum of -log softmax at the targets where `mask` (bool [B, T]) is set, in float64."""
  scores = logits.astype(np.float64)
  top = scores.max(-1, keepdims=True)
  log_total = np.log(np.exp(scores - top).sum(-1)) + top[..., 0]
  picked = np.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
  return float(((log_total - picked) * mask).sum())


def bits_per_byte(
    logits: Callable[[np.ndarray], Any], texts: Sequence[str], vocabulary: Vocabulary, tokenizer: TextTokenizer, *, context: int
) -> float:
  """Bits per UTF-8 byte: nats of all text tokens and each text's end_sequence, over ln 2 and the number of bytes.

  A text longer than the context is cut into rows that see nothing of one another (`text_rows`). The softmax runs over the
  whole vocabulary, picture tokens included.

  Args:
    logits: int32 [B, context] -> float32 [B, context, V], next-token logits of causal rows.
    texts: documents.
    vocabulary: the token table.
    tokenizer: of the text.
    context: most tokens the model reads at once.
  """
  rows: list[list[int]] = []
  for text in texts:
    stream = [vocabulary.text_start + piece for piece in tokenizer.encode(text)] + [vocabulary.end_sequence]
    rows += text_rows(stream, begin=vocabulary.begin_sequence, length=context)
  nats = 0.0
  for start in range(0, len(rows), _TEXT_BATCH):
    batch = np.full((_TEXT_BATCH, context + 1), vocabulary.pad, np.int32)
    mask = np.zeros((_TEXT_BATCH, context), bool)
    for k, row in enumerate(rows[start : start + _TEXT_BATCH]):
      batch[k, : len(row)] = row
      mask[k, : len(row) - 1] = True
    # Attention is causal, so the padding behind a row does not reach it.
    nats += nats_of_targets(np.asarray(logits(batch[:, :-1])), batch[:, 1:], mask)
  return nats / math.log(2) / sum(len(text.encode('utf-8')) for text in texts)
