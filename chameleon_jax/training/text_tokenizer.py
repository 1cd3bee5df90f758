"""Text of the training documents -> text tokenizer, and what it is worth on held-out documents.

The tokenizer learns from the text segments of the same sources the transformer will read, each as often as
the config says. Knows sources and the tokenizer; not the token table beyond its room for text, and no files.
Method: paper section 2.1 (a new BPE trained on a subset of the training data).
"""

from collections.abc import Iterator

import numpy as np

from chameleon_jax.config import TextTokenizerTrainConfig
from chameleon_jax.data.sources.source import make_source
from chameleon_jax.tokens.document import Text
from chameleon_jax.tokens.text import SentencePieceText, TextTokenizer, train_text_tokenizer


def source_texts(name: str, split: str, *, seed: int, n_documents: int | None = None) -> Iterator[str]:
  """The text segments of a source's documents in order, the randomness of each from the seed and its index.

  Raises:
    DataError: unknown source, or one of its records is damaged.
  """
  source = make_source(name, split)
  for index in range(len(source) if n_documents is None else min(n_documents, len(source))):
    for segment in source.document(index, np.random.default_rng((seed, index))).segments:
      if isinstance(segment, Text):
        yield segment.text


def training_texts(config: TextTokenizerTrainConfig) -> Iterator[str]:
  """All training text: each source as many times as the config says, with fresh randomness every time."""
  for name, times in config.sources:
    for turn in range(times):
      yield from source_texts(name, 'train', seed=config.seed + turn)


def train_from_sources(config: TextTokenizerTrainConfig) -> SentencePieceText:
  """Trains a text tokenizer that fills the vocabulary's room for text.

  Raises:
    DataError: a source is at fault, or its text does not support that many pieces.
  """
  return train_text_tokenizer(
      training_texts(config),
      n_pieces=config.vocabulary.n_text,
      character_coverage=config.character_coverage,
      seed=config.seed,
      max_sentences=config.max_sentences,
  )


def measure(text_tokenizer: TextTokenizer, config: TextTokenizerTrainConfig, *, n_documents: int = 500) -> dict[str, dict[str, float]]:
  """For each source, on at most `n_documents` validation documents.

  Returns:
    source -> {'bytes_per_piece', 'pieces_per_text' (mean over text segments), 'byte_share' (pieces that are raw bytes)}.
  """
  table = {}
  for name, _ in config.sources:
    texts = list(source_texts(name, 'validation', seed=config.seed, n_documents=n_documents))
    pieces = [text_tokenizer.encode(text) for text in texts]
    n_pieces = sum(map(len, pieces))
    table[name] = {
        'bytes_per_piece': sum(len(text.encode('utf-8')) for text in texts) / max(n_pieces, 1),
        'pieces_per_text': n_pieces / max(len(texts), 1),
        'byte_share': sum(piece < 256 for row in pieces for piece in row) / max(n_pieces, 1),
    }
  return table
