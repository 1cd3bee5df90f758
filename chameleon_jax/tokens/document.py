"""What goes in and what comes out: a document of text and pictures in any order, perhaps with turns.

A document is plain (one turn with the role 'document') or a conversation (turns that alternate between
'prompt' and 'answer'). A picture is pixels (`Image`) or already codes of the image tokenizer (`Codes`).
This file does not know tokens, codebooks or files. Format: spec model.md section 6 (paper section 2.2
and 3.1).
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal, TypeAlias

import numpy as np

from chameleon_jax.errors import DataError

Role: TypeAlias = Literal['document', 'prompt', 'answer']
_OTHER_ROLE: dict[str, Role] = {'prompt': 'answer', 'answer': 'prompt'}


def _frozen(array: np.ndarray) -> np.ndarray:
  """The same memory, read-only."""
  view = array.view()
  view.flags.writeable = False
  return view


@dataclasses.dataclass(frozen=True)
class Text:
  """A stretch of text. Any string is allowed; it never turns into special or image tokens."""

  text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
  """A picture as pixels, uint8 [H, W, 3], RGB, of any size."""

  pixels: np.ndarray

  def __post_init__(self) -> None:
    pixels = np.asarray(self.pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
      raise DataError(f'a picture must be uint8 [H, W, 3] and not empty, got {pixels.dtype} {list(pixels.shape)}')
    object.__setattr__(self, 'pixels', _frozen(pixels))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Image) and np.array_equal(self.pixels, other.pixels)

  def __hash__(self) -> int:
    return hash((self.pixels.shape, self.pixels.tobytes()))


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
  """A picture as codes of the image tokenizer, int32 [n], row by row from the top left.

  A picture that was cut off while it was sampled has fewer codes than the image tokenizer needs.
  """

  codes: np.ndarray

  def __post_init__(self) -> None:
    codes = np.asarray(self.codes)
    if not np.issubdtype(codes.dtype, np.integer) or codes.ndim != 1:
      raise DataError(f'codes of a picture must be integers [n], got {codes.dtype} {list(codes.shape)}')
    object.__setattr__(self, 'codes', _frozen(codes.astype(np.int32, copy=False)))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Codes) and np.array_equal(self.codes, other.codes)

  def __hash__(self) -> int:
    return hash(self.codes.tobytes())


Segment: TypeAlias = Text | Image | Codes


def _segment(value: object) -> Segment:
  if isinstance(value, str):
    return Text(value)
  if isinstance(value, (Text, Image, Codes)):
    return value
  raise DataError(f'a segment is a string, Text, Image or Codes, got {type(value).__name__}')


@dataclasses.dataclass(frozen=True, init=False)
class Turn:
  """Segments that one side says. Strings among them become `Text`; a single segment may stand alone."""

  segments: tuple[Segment, ...]
  role: Role

  def __init__(self, segments: Segment | str | Iterable[Segment | str], role: Role = 'document') -> None:
    values = (segments,) if isinstance(segments, (str, Text, Image, Codes)) else segments
    if role not in ('document', 'prompt', 'answer'):
      raise DataError(f'the role of a turn is document, prompt or answer, got {role!r}')
    object.__setattr__(self, 'segments', tuple(_segment(value) for value in values))
    object.__setattr__(self, 'role', role)


@dataclasses.dataclass(frozen=True)
class Document:
  """Turns in order: a single 'document' turn, or 'prompt' and 'answer' turns that alternate.

  >>> Document.plain('A cat: ', Codes(np.arange(4))).text
  'A cat: '
  >>> [turn.role for turn in Document.chat('Draw a cat.', Codes(np.arange(4))).turns]
  ['prompt', 'answer']
  """

  turns: tuple[Turn, ...]

  def __post_init__(self) -> None:
    object.__setattr__(self, 'turns', tuple(self.turns))
    roles = [turn.role for turn in self.turns]
    if not roles:
      raise DataError('a document needs at least one turn')
    if 'document' in roles and len(roles) > 1:
      raise DataError(f'a plain document has one turn only, got the roles {roles}')
    for before, after in zip(roles, roles[1:]):
      if before == after:
        raise DataError(f'prompts and answers must alternate, got the roles {roles}')

  @classmethod
  def plain(cls, *segments: Segment | str) -> 'Document':
    """A document without turns, as in pre-training."""
    return cls((Turn(segments, 'document'),))

  @classmethod
  def chat(cls, *turns: Turn | Segment | str | Iterable[Segment | str]) -> 'Document':
    """A conversation. What is not a `Turn` yet gets the role whose turn it is; the first is a prompt."""
    made: list[Turn] = []
    for turn in turns:
      if not isinstance(turn, Turn):
        role = _OTHER_ROLE.get(made[-1].role, 'prompt') if made else 'prompt'
        turn = Turn(turn, role)
      made.append(turn)
    document = cls(tuple(made))
    if document.is_plain:
      raise DataError("a conversation has the roles prompt and answer, got a turn with the role 'document'")
    return document

  @property
  def is_plain(self) -> bool:
    """Whether there are no turns of a conversation."""
    return self.turns[0].role == 'document'

  @property
  def segments(self) -> tuple[Segment, ...]:
    """The segments of all turns."""
    return tuple(segment for turn in self.turns for segment in turn.segments)

  @property
  def text(self) -> str:
    """The text of all turns, joined; pictures leave no trace."""
    return ''.join(segment.text for segment in self.segments if isinstance(segment, Text))

  @property
  def pictures(self) -> tuple[Image | Codes, ...]:
    """The pictures of all turns, pixels or codes."""
    return tuple(segment for segment in self.segments if not isinstance(segment, Text))
