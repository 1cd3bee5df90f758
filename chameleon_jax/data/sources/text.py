"""Python's documentation topics, cut into documents of a bounded number of characters.

Text is the only thing it knows. Source of the text: `emoji_world.py` (PSF licence).
"""

from collections.abc import Sequence

import numpy as np

from chameleon_jax.array_types import Codes
from chameleon_jax.data.sources.emoji_world import EmojiWorld
from chameleon_jax.tokens.document import Document

MAX_CHARACTERS = 1000  # about 300 tokens of a small vocabulary


def chunks(text: str, *, max_characters: int = MAX_CHARACTERS) -> list[str]:
  r"""Cuts a text into pieces of at most `max_characters`; joined they are the text again.

  A cut falls behind the last empty line that keeps the piece at least half full, else behind the last line end, else
  anywhere:

      'aaa\n\nbbb\nccc', 8   ->  'aaa\n\n' | 'bbb\nccc'
      'aaa bbb\nccc', 9      ->  'aaa bbb\n' | 'ccc'
      'aaaaaa', 4            ->  'aaaa' | 'aa'
  """
  pieces = []
  start = 0
  while len(text) - start > max_characters:
    end = start + max_characters
    paragraph = text.rfind('\n\n', start + max(0, max_characters // 2 - 2), end)
    line = text.rfind('\n', start, end)
    if paragraph >= 0:
      end = paragraph + 2
    elif line >= 0:
      end = line + 1
    pieces.append(text[start:end])
    start = end
  if start < len(text):
    pieces.append(text[start:])
  return pieces


def fresh_pieces(pieces: Sequence[str], others: Sequence[str], *, window: int = 60) -> list[str]:
  """The pieces that share no run of `window` characters with any of the others (the whole piece, where it is shorter).

      'abcdef', 'xyz' | others 'zzcdezz', window 3  ->  'xyz'        'cde' stands in both
  """
  runs = {text[start : start + window] for text in others for start in range(max(1, len(text) - window + 1))}
  whole = '\0'.join(others)

  def is_fresh(piece: str) -> bool:
    if len(piece) < window:
      return piece not in whole
    return not any(piece[start : start + window] in runs for start in range(len(piece) - window + 1))

  return [piece for piece in pieces if is_fresh(piece)]


class DocumentationText:
  """Source 'emoji_text': one document for each piece of each topic of the split, always the same.

  Topics quote each other at length; of the training topics, pieces that share a sentence with a held-out topic are left
  out (`fresh_pieces`).
  """

  def __init__(self, split: str, codes: Codes | None = None, *, max_characters: int = MAX_CHARACTERS):
    del codes  # no pictures
    world = EmojiWorld.load()
    topics = world.text_train if split == 'train' else world.text_validation
    self._pieces = [piece for topic in topics for piece in chunks(topic, max_characters=max_characters)]
    if split == 'train':
      self._pieces = fresh_pieces(self._pieces, world.text_validation)

  def __len__(self) -> int:
    return len(self._pieces)

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """Piece `index`; draws nothing from `rng`."""
    del rng
    return Document.plain(self._pieces[index])
