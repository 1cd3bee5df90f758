"""One tokenized document as bytes: text as UTF-8, its pieces where a text tokenizer was at hand, pictures as codes. Version 1:

    "CJD1"  u32 CRC-32 of all that follows  u32 n segments  u8 bytes of a code (2, 4)  u8 bytes of a piece (0: none, 2, 4)  u16 0
    n times:  u8 kind (0 text, 1 picture)  u8 role (0 document, 1 prompt, 2 answer)  u16 0  u32 codes or pieces  u32 bytes of text
    codes of all pictures | pieces of all texts | texts          little endian, in the order of the segments

Segments of one role that follow one another are one turn. Texts that do are one segment, as `tokens.render` joins them, so that
the pieces of a segment are what it makes of it. Knows neither files nor tokens beyond what it is given.
"""

import dataclasses
import struct
import zlib
from collections.abc import Callable

import numpy as np

from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Codes, Document, Image, Role, Segment, Text, Turn
from chameleon_jax.tokens.render import Rendered
from chameleon_jax.tokens.vocabulary import Vocabulary

MAGIC = b'CJD1'
_HEAD = struct.Struct('<4sIIBBH')
_SEGMENT = np.dtype([('kind', 'u1'), ('role', 'u1'), ('zero', '<u2'), ('values', '<u4'), ('text', '<u4')])
_ROLES: tuple[Role, ...] = ('document', 'prompt', 'answer')
_TEXT, _PICTURE = 0, 1
_NARROW = 1 << 16


@dataclasses.dataclass(frozen=True)
class Packed:
  """A record and what is in it, for the table of counts."""

  data: bytes
  n_pictures: int
  n_text_bytes: int
  n_pieces: int


def pack(document: Document, *, n_codes: int, n_pieces: int = 0, encode: Callable[[str], list[int]] | None = None) -> Packed:
  """The record of a document without pixels.

  Args:
    document: its pictures are `Codes`.
    n_codes: size of the codebook; decides how wide a code is.
    n_pieces: size of the text tokenizer's table.
    encode: text -> pieces; without it the record holds none.

  Raises:
    DataError: a picture in pixels, a code outside the codebook, or text that is no Unicode.
  """
  table: list[tuple[int, int, int, int, int]] = []
  codes: list[np.ndarray] = []
  pieces: list[int] = []
  texts: list[bytes] = []
  for turn in document.turns:
    role = _ROLES.index(turn.role)
    for segment in _joined(turn.segments):
      if isinstance(segment, Codes):
        if segment.codes.size and not 0 <= segment.codes.min() <= segment.codes.max() < n_codes:
          raise DataError(f'a code outside the codebook of {n_codes}')
        codes.append(segment.codes)
        table.append((_PICTURE, role, 0, len(segment.codes), 0))
        continue
      if isinstance(segment, Image):
        raise DataError('a picture as pixels cannot be packed: encode it first')
      try:
        encoded = segment.text.encode('utf-8')
      except UnicodeEncodeError as error:
        raise DataError(f'text with a lone surrogate at character {error.start}') from error
      found = [] if encode is None else encode(segment.text)
      pieces += found
      texts.append(encoded)
      table.append((_TEXT, role, 0, len(found), len(encoded)))
  code_bytes = 2 if n_codes <= _NARROW else 4
  piece_bytes = 0 if encode is None else 2 if n_pieces <= _NARROW else 4
  body = np.array(table, _SEGMENT).tobytes()
  body += np.concatenate([np.zeros(0, np.int32), *codes]).astype(f'<u{code_bytes}').tobytes()
  body += np.array(pieces, f'<u{piece_bytes}').tobytes() if piece_bytes else b''
  body += b''.join(texts)
  counted = struct.pack('<IBBH', len(table), code_bytes, piece_bytes, 0) + body
  data = MAGIC + struct.pack('<I', zlib.crc32(counted)) + counted
  return Packed(data, len(codes), sum(map(len, texts)), len(pieces))


def _joined(segments: tuple[Segment, ...]) -> list[Segment]:
  """Texts that follow one another as one; a turn that says nothing as one empty text."""
  made: list[Segment] = []
  for segment in segments:
    if isinstance(segment, Text) and made and isinstance(made[-1], Text):
      made[-1] = Text(made[-1].text + segment.text)
    else:
      made.append(segment)
  return made or [Text('')]


class Record:
  """A record taken apart, nothing copied.

  Raises:
    DataError: no record of this version, cut off, or damaged.
  """

  def __init__(self, data: bytes):
    if len(data) < _HEAD.size or data[:4] != MAGIC:
      raise DataError(f'{len(data)} bytes are no tokenized document of version 1')
    _, crc, n, code_bytes, piece_bytes, _ = _HEAD.unpack_from(data)
    if zlib.crc32(memoryview(data)[8:]) != crc:
      raise DataError('damaged: its checksum differs')
    self.table: list[tuple[int, int, int, int, int]] = np.frombuffer(data, _SEGMENT, n, _HEAD.size).tolist()
    start = _HEAD.size + n * _SEGMENT.itemsize
    n_codes = sum(values for kind, _, _, values, _ in self.table if kind == _PICTURE)
    n_pieces = sum(values for kind, _, _, values, _ in self.table if kind == _TEXT)
    self.codes = np.frombuffer(data, f'<u{code_bytes}', n_codes, start)
    start += n_codes * code_bytes
    self.pieces = np.frombuffer(data, f'<u{piece_bytes}', n_pieces, start) if piece_bytes else None
    self._texts = memoryview(data)[start + n_pieces * piece_bytes :]

  def document(self) -> Document:
    """The document, pictures as `Codes`."""
    turns: list[tuple[int, list[Segment]]] = []
    code = text = 0
    for kind, role, _, values, n_bytes in self.table:
      if not turns or turns[-1][0] != role:
        turns.append((role, []))
      if kind == _PICTURE:
        turns[-1][1].append(Codes(self.codes[code : code + values].astype(np.int32)))
        code += values
      else:
        turns[-1][1].append(Text(str(self._texts[text : text + n_bytes], 'utf-8')))
        text += n_bytes
    return Document(tuple(Turn(segments, _ROLES[role]) for role, segments in turns))

  def render(self, vocabulary: Vocabulary) -> Rendered:
    """What `tokens.render.render` makes of the document, from the stored pieces.

    The pieces must be those of the tokenizer in use, the codes in range: for the caller to check once for a whole file.

    Raises:
      DataError: a conversation that does not start with a prompt or end with an answer.
    """
    assert self.pieces is not None, 'the record holds no pieces'
    plain = self.table[0][1] == 0
    if not plain and (self.table[0][1] != 1 or self.table[-1][1] != 2):
      raise DataError('a conversation to learn from starts with a prompt and ends with an answer')
    n_turns = 0 if plain else 1 + sum(self.table[i][1] != self.table[i - 1][1] for i in range(1, len(self.table)))
    total = 2 + n_turns + len(self.codes) + len(self.pieces) + 2 * sum(row[0] == _PICTURE for row in self.table)
    tokens = np.empty(total + 1, np.int32)
    weights = np.empty(total + 1, np.float32)
    tokens[0], weights[0] = vocabulary.begin_sequence, 0
    code_tokens = vocabulary.token_of_code[self.codes]
    piece_tokens = self.pieces.astype(np.int32) + np.int32(vocabulary.text_start)
    place, code, piece, begun, role = 1, 0, 0, 1, self.table[0][1]
    for kind, next_role, _, values, _ in self.table:
      if next_role != role:
        tokens[place] = vocabulary.end_turn
        place += 1
        weights[begun:place] = role != 1
        begun, role = place, next_role
      if kind == _PICTURE:
        tokens[place] = vocabulary.begin_image
        tokens[place + 1 : place + 1 + values] = code_tokens[code : code + values]
        tokens[place + 1 + values] = vocabulary.end_image
        code, place = code + values, place + values + 2
      else:
        tokens[place : place + values] = piece_tokens[piece : piece + values]
        piece, place = piece + values, place + values
    if not plain:
      tokens[place] = vocabulary.end_turn
      place += 1
    weights[begun:place] = role != 1
    tokens[place], weights[place] = vocabulary.end_sequence, 1
    tokens[total], weights[total] = vocabulary.pad, 0
    return Rendered(tokens[:-1], tokens[1:], weights[1:])
