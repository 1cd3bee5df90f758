"""Tokens of one request in, events out: text as soon as it is certain, pictures row by row.

    tokens   the  red  B  c c  c c  E   .   #             B begin_image, E end_image, # end_sequence, grid of 2 x 2 codes
    events   'the red' started  rows  done  '.'  ended

Text is certain as far as no later piece can change it (`Detokenizer`); joined, the pieces are exactly the text that
`render.unrender` reads in the whole row. Cutting the tokens into other portions changes where text is cut and nothing else.
Knows no engine and no network: pictures are decoded by a function that is handed in, once for all that are due
(`decoded`), also across requests. Source: spec model.md 8.4 (segments of a stream), 4.5 (padding of a partial grid).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from chameleon_jax.array_types import Pictures
from chameleon_jax.errors import DataError
from chameleon_jax.sampling.events import Ended, Event, Failed, PictureDone, PictureRows, PictureStarted, Pixels, Reason, TextPiece
from chameleon_jax.tokens.document import Codes, Document, Image, Segment, Turn
from chameleon_jax.tokens.render import unrender
from chameleon_jax.tokens.text import TextTokenizer
from chameleon_jax.tokens.vocabulary import Vocabulary

# Codes int32 [B, n] -> pictures uint8 [B, H, W, 3].
Decode = Callable[[np.ndarray], Pictures]

_NO_CHARACTER = '\ufffd'
_LONGEST_BEGINNING = 3  # bytes of a UTF-8 character that may still lack its last one
_LONG_WINDOW, _SHORT_WINDOW = 32, 8


class Detokenizer:
  """Text of one run of pieces, handed out as far as it is certain.

  Held back are at most three U+FFFD at the end, which may be the beginning of a character whose last byte is missing, and
  nothing else. Decoding starts a few pieces back and not at the head of the run, with text in front, so that rules on
  the first piece of a text (sentencepiece may drop a space there) apply to the first piece of the run alone.
  """

  def __init__(self, text_tokenizer: TextTokenizer):
    self._tokenizer = text_tokenizer
    self._restart()

  def _restart(self) -> None:
    self._window: list[int] = []  # pieces whose text is looked at
    self._shown = 0  # characters of that text handed out

  def push(self, pieces: Sequence[int]) -> str:
    """Adds pieces; returns the text that is certain by them. A piece the tokenizer does not fill reads as U+FFFD."""
    text, run = '', []
    for piece in pieces:
      if piece < self._tokenizer.n_pieces:
        run.append(piece)
        continue
      self._window += run
      text, run = text + self.finish() + _NO_CHARACTER, []
    return text + self._push(run)

  def _push(self, pieces: list[int]) -> str:
    if not pieces:
      return ''
    self._window += pieces
    text = self._tokenizer.decode(self._window)
    open_end = min(len(text) - len(text.rstrip(_NO_CHARACTER)), _LONGEST_BEGINNING)
    certain = max(len(text) - open_end, self._shown)
    new, self._shown = text[self._shown : certain], certain
    if not open_end and len(self._window) > _LONG_WINDOW:
      self._shorten()
    return new

  def _shorten(self) -> None:
    """Forgets all but the last pieces, unless they are blank. The rest of a character in front reads as U+FFFD, as good a text as any."""
    tail = self._window[-_SHORT_WINDOW:]
    alone = self._tokenizer.decode(tail)
    if alone.strip():
      self._window, self._shown = tail, len(alone)

  def finish(self) -> str:
    """The text held back; the next piece begins a new run."""
    text = self._tokenizer.decode(self._window)[self._shown :]
    self._restart()
    return text


class Assembler:
  """Reads the new tokens of one request.

  Attributes:
    request: its number in the events.
  """

  def __init__(
    self,
    request: int,
    vocabulary: Vocabulary,
    text_tokenizer: TextTokenizer,
    *,
    n_image_tokens: int,
    decode: Decode | None = None,
    preview_every: int | None = None,
    given_codes: Sequence[int] | np.ndarray = (),
  ):
    """Begins a row.

    Args:
      request: number for the events.
      vocabulary: the token table.
      text_tokenizer: decodes the text pieces.
      n_image_tokens: codes of one picture, a square grid.
      decode: codes to pictures; None leaves them undecoded.
      preview_every: `PictureRows` comes after so many complete rows of codes, with a preview; by default after every row
        without one. The last row brings `PictureDone` instead.
      given_codes: codes of the picture that the prompt leaves open; it is shown as a whole.
    """
    self.request = request
    self._vocabulary = vocabulary
    self._text_tokenizer = text_tokenizer
    self._n = n_image_tokens
    self._grid = math.isqrt(n_image_tokens)
    self._decode = decode
    self._preview_every = preview_every
    self._given = [int(code) for code in given_codes]
    self._text = Detokenizer(text_tokenizer)
    self._tokens: list[int] = []
    self._is_over = False
    self._codes: list[int] | None = None  # of the open picture
    self._n_pictures = 0
    self._with_codes: list[int] = []  # numbers of the pictures that got codes: the pictures of the document
    self._images: dict[int, Pixels] = {}

  def feed(self, tokens: Sequence[int] | np.ndarray) -> list[Event]:
    """The events of new tokens, pictures decoded; `finish` follows the last ones."""
    return self.keep(decoded(self.read(tokens), self._decode, n_image_tokens=self._n, previews=self._preview_every is not None))

  def read(self, tokens: Sequence[int] | np.ndarray) -> list[Event]:
    """The events of new tokens with every picture still None; for `decoded`, then `keep`."""
    ids = [int(token) for token in tokens]
    self._tokens += ids
    return [*self._read(ids)]

  def keep(self, events: list[Event]) -> list[Event]:
    """Remembers the decoded pictures of these events for the document; returns the events."""
    self._images |= {event.picture: event.image for event in events if isinstance(event, PictureDone) and event.image is not None}
    return events

  def finish(self, reason: Reason) -> list[Event]:
    """The last events: text held back, and `Ended` (`Failed` where the tokens are no document)."""
    last = self._piece(self._text.finish())
    try:
      return [*last, Ended(self.request, reason, self._document(), np.array(self._tokens, np.int32))]
    except DataError as error:
      return [*last, Failed(self.request, str(error))]

  def fail(self, message: str) -> list[Event]:
    """The last events of a request that went wrong on the way."""
    return [*self._piece(self._text.finish()), Failed(self.request, message)]

  def _read(self, tokens: list[int]) -> Iterator[Event]:
    v = self._vocabulary
    pieces: list[int] = []
    for token in tokens:
      if self._is_over:
        break
      if v.is_text[token]:
        self._end_picture()
        pieces.append(token - v.text_start)
      elif v.is_image[token] or token in (v.begin_image, v.end_image, v.end_turn, v.end_sequence):
        yield from self._piece(self._text.push(pieces) + self._text.finish())
        pieces = []
        if v.is_image[token]:
          yield from self._code(int(v.code_of_token[token]))
        else:
          self._end_picture()
        if token == v.begin_image:
          yield self._start_picture()
        self._is_over = token == v.end_sequence
    yield from self._piece(self._text.push(pieces))

  def _piece(self, text: str) -> list[Event]:
    return [TextPiece(self.request, text)] if text else []

  def _start_picture(self) -> PictureStarted:
    self._codes, self._given = [*self._given], []
    self._n_pictures += 1
    return PictureStarted(self.request, self._n_pictures - 1)

  def _end_picture(self) -> None:
    self._codes, self._given = None, []

  def _code(self, code: int) -> Iterator[Event]:
    if self._codes is None:  # a prompt may end inside a picture
      yield self._start_picture()
    assert self._codes is not None
    picture = self._n_pictures - 1
    if picture not in self._with_codes[-1:]:
      self._with_codes.append(picture)
    self._codes.append(code)
    n = len(self._codes)
    if n == self._n:
      yield PictureDone(self.request, picture, np.array(self._codes, np.int32), None)
    elif n < self._n and n % self._grid == 0 and n // self._grid % (self._preview_every or 1) == 0:
      yield PictureRows(self.request, picture, np.array(self._codes, np.int32), None)

  def _document(self) -> Document:
    """All that was written, with the pictures that were decoded."""
    document = unrender(self._tokens, self._vocabulary, self._text_tokenizer)
    numbers = iter(self._with_codes)

    def shown(segment: Segment) -> Segment:
      image = self._images.get(next(numbers)) if isinstance(segment, Codes) else None
      return segment if image is None else Image(image)

    return Document(tuple(Turn([shown(segment) for segment in turn.segments], role=turn.role) for turn in document.turns))


def decoded(events: list[Event], decode: Decode | None, *, n_image_tokens: int, previews: bool) -> list[Event]:
  """The events with their pictures, all decoded in one call; they may be of many requests.

  Args:
    events: as `Assembler.read` makes them.
    decode: codes to pictures; None leaves the events as they are.
    n_image_tokens: codes of one picture.
    previews: whether `PictureRows` is due too. A partial grid is filled up by repeating its first code, as Meta's decoder
      does with fewer codes than it needs (spec model.md 4.5).
  """
  due = [event for event in events if isinstance(event, PictureDone) or (previews and isinstance(event, PictureRows))]
  if decode is None or not due:
    return events
  grids = [np.append(event.codes, np.full(n_image_tokens - len(event.codes), event.codes[0], np.int32)) for event in due]
  pictures = iter(decode(np.stack(grids).astype(np.int32)))

  def with_picture(event: Event) -> Event:
    if isinstance(event, PictureDone):
      return dataclasses.replace(event, image=next(pictures))
    if previews and isinstance(event, PictureRows):
      return dataclasses.replace(event, preview=next(pictures))
    return event

  return [with_picture(event) for event in events]
