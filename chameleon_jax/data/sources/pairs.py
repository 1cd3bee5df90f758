"""A picture and its caption -> a document; the options that all sources of such pairs share.

    ?form=plain      caption and picture as in pre-training, in the order of ?order (default)
    ?form=draw       a conversation: the caption asks, the picture answers
    ?form=describe   a conversation: the picture and a question, the caption answers
    ?order=random    the picture first in half of the documents (default; paper section 2.2) | text_first | image_first

Of several captions one is drawn.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from chameleon_jax.data.sources.naming import SourceName
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document, Image

OPTIONS = ('form', 'order')
QUESTION = 'Describe this picture.'


@dataclasses.dataclass(frozen=True)
class PairForm:
  """How a pair becomes a document."""

  form: str = 'plain'
  order: str = 'random'

  @classmethod
  def of(cls, source: SourceName) -> 'PairForm':
    """Reads the options of a name."""
    form = source.choice('form', ('plain', 'draw', 'describe'))
    return cls(form, source.choice('order', ('random', 'text_first', 'image_first')))

  def document(self, captions: Sequence[str], pixels: np.ndarray, rng: np.random.Generator) -> Document:
    """The document of a picture uint8 [H, W, 3].

    Raises:
      DataError: there is no caption, or no picture in it.
    """
    texts = [text for text in captions if text.strip()]
    if not texts:
      raise DataError('the picture has no caption')
    picture = Image(pixels)
    text = texts[int(rng.integers(len(texts)))] if len(texts) > 1 else texts[0]
    if self.form == 'draw':
      return Document.chat(text, picture)
    if self.form == 'describe':
      return Document.chat([picture, QUESTION], text)
    picture_first = self.order == 'image_first' or (self.order == 'random' and rng.random() < 0.5)
    return Document.plain(picture, text) if picture_first else Document.plain(text, picture)


def texts_of(value: object) -> list[str]:
  """A caption or a list of them, given as text or UTF-8, as a list.

  Raises:
    DataError: it is something else.
  """
  values = value if isinstance(value, (list, tuple)) else [value]
  texts = []
  for one in values:
    try:
      text = one.decode('utf-8') if isinstance(one, bytes) else one
    except UnicodeDecodeError as error:
      raise DataError(f'the caption is not UTF-8 ({error.reason} at byte {error.start})') from error
    if not isinstance(text, str):
      raise DataError(f'a caption must be text, got {type(one).__name__}')
    texts.append(text)
  return texts
