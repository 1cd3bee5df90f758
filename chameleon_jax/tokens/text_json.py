"""The released text tokenizer, `text_tokenizer.json`, behind the interface of `text.py`; the only file with `tokenizers`.

Sizes, special tokens and image tokens are read from the file by their names (spec model.md 5.1 to 5.4); nothing is
taken from places. Two ways to write bytes are known, and the file says which one it has:

    byte level      every piece is written in the 256 letters of GPT-2's alphabet: the release (by the llama.cpp port)
    byte fallback   pieces are text, and `<0x41>` stands for one byte: what `text_export.py` makes of sentencepiece

The `tokenizers` library looks for special tokens in raw text, so that a user who types `<s>` gets the token. Here it
never sees them: it works on a copy without special and image tokens, without their names in the table and without the
merges that would make them. What is not in its table it cannot return, whatever the text or the pre-tokenizer.

Not established for the release (its file is gated): whether it has a normalizer, or a space put in front of a text;
both are followed where the file asks for them, and then decoding gives the changed text.
"""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import CheckpointError, DataError
from chameleon_jax.tokens import text_forms
from chameleon_jax.tokens.text import N_BYTES, PROBES, SPACE_SIGN, check_unicode, read_file, write_file
from chameleon_jax.tokens.vocabulary import (
  IMAGE_PREFIX,
  Vocabulary,
  config_of_names,
  is_known_special,
  is_special_by_rule,
  parse_image_token_name,
)

_BYTE_PIECE = re.compile(r'<0x([0-9A-F]{2})>')
_NO_TEXT = '\ufffd'.encode()  # what a token of the text range that is no text reads as
_NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))


def _alphabet() -> dict[str, int]:
  """GPT-2's letter of each byte: printable Latin-1 as it is, the other 68 as the characters from 256 on."""
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = [byte for byte in range(N_BYTES) if byte not in printable]
  return {**{chr(byte): byte for byte in sorted(printable)}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTE_OF_LETTER = _alphabet()


class JsonText:
  """A `text_tokenizer.json` in Meta's or Hugging Face's form. Piece = token - text_start, as with sentencepiece."""

  def __init__(self, data: bytes) -> None:
    """Reads the content of a file.

    Raises:
      CheckpointError: no BPE table in the `tokenizers` format, special tokens missing, codes and image tokens no
        bijection, or bytes that have no piece to go as.
    """
    try:
      self._read(bytes(data))
    except RecursionError as error:
      raise CheckpointError('the text tokenizer is nested too deeply') from error

  # ---------------------------------------------------------------------------------------- reading

  def _read(self, data: bytes) -> None:
    content = text_forms.parse_content(data)
    self._content = text_forms.to_meta(content)
    self._data = data if self._content is content else text_forms.dump(self._content)
    self._token_names = text_forms.token_names(self._content)
    coders = [*text_forms.parts_of(self._content.get('pre_tokenizer'), 'pretokenizers'), *self._decoders()]
    self._is_byte_level = any(part.get('type') == 'ByteLevel' for part in coders)
    if not self._is_byte_level and not self._content['model'].get('byte_fallback'):
      raise CheckpointError('the text tokenizer is neither byte-level nor has it byte_fallback, so it cannot write every text')
    self._text_start = self._end_of_block()
    self._config = config_of_names(self.names, len(self._token_names))
    self._is_text = self._find_text()
    text_tokens = range(self._text_start, self._config.size)
    self._barred = tuple(t for t in text_tokens if not self._is_text[t] or self._is_barred(self._token_names[t]))
    self._encoder = self._make_encoder()
    self._set_up_bytes()

  def _decoders(self) -> list[Any]:
    return list(text_forms.parts_of(self._content.get('decoder'), 'decoders'))

  def _is_barred(self, name: str) -> bool:
    """Byte fallback exists only in files made of our own tokenizers, in which nothing is barred."""
    return self._is_byte_level and (is_special_by_rule(name) or name.startswith(IMAGE_PREFIX))

  def _end_of_block(self) -> int:
    """First text token: the first name that is neither special nor of an image token."""
    start = next((token for token, name in enumerate(self._token_names) if not self._is_leading(name)), None)
    if start is None:
      raise CheckpointError('the text tokenizer has no text pieces')
    for token in range(start, len(self._token_names)):
      if parse_image_token_name(self._token_names[token]) is not None:
        raise CheckpointError(
            f'the image token {self._token_names[token]!r} (token {token}) stands among the text pieces, which start at {start}'
        )
    return start

  def _is_leading(self, name: str) -> bool:
    is_byte = not self._is_byte_level and _BYTE_PIECE.fullmatch(name) is not None
    return not is_byte and (is_special_by_rule(name) or name.startswith(IMAGE_PREFIX))

  def _find_text(self) -> list[bool]:
    """Which tokens are text; a special token behind the block (an added one, a reserved name) is not."""
    is_text = [token >= self._text_start and not is_known_special(name) for token, name in enumerate(self._token_names)]
    for entry in self._content['added_tokens']:
      is_text[entry['id']] &= not entry.get('special')
    return is_text

  def _make_encoder(self) -> tokenizers.Tokenizer:
    """The library's tokenizer over text pieces alone, at the ids of the file."""
    vocab = {name: token for token, name in enumerate(self._token_names) if self._is_text[token]}
    hidden = {name for token, name in enumerate(self._token_names) if not self._is_text[token]}
    model = dict(self._content['model'])
    merges = [text_forms.merge_parts(merge) for merge in model['merges']]
    model |= {
        'type': 'BPE',
        'vocab': vocab,
        'merges': [[a, b] for a, b in merges if a not in hidden and b not in hidden and a + b not in hidden],
        'unk_token': None,
        'dropout': None,
    }
    content = {
        'version': '1.0',
        'added_tokens': [entry for entry in self._content['added_tokens'] if self._is_text[entry['id']]],
        'normalizer': self._content.get('normalizer'),
        'pre_tokenizer': self._content.get('pre_tokenizer'),
        'model': model,
    }
    try:
      return tokenizers.Tokenizer.from_str(json.dumps(content))
    except BaseException as error:  # the library is written in Rust, and a panic of it is no Exception
      if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
        raise
      reason = ' '.join(str(error).split())[:200]
      raise CheckpointError(f'the tokenizers library {tokenizers.__version__} does not take the text tokenizer: {reason}') from error

  def _set_up_bytes(self) -> None:
    """Tables of bytes: of each piece, and of what no piece can write."""
    added = {entry['content'] for entry in self._content['added_tokens']}
    signs = [part for part in self._decoders() if part.get('type') == 'Replace' and part.get('content') == ' ']
    self._has_space_sign = any(part.get('pattern') == {'String': SPACE_SIGN} for part in signs) and not self._is_byte_level
    self._bytes = [
        (_NO_TEXT if not self._is_text[token] else name.encode() if name in added else self._bytes_of(name))
        for token, name in enumerate(self._token_names[self._text_start :], self._text_start)
    ]
    names = {name for token, name in enumerate(self._token_names) if self._is_text[token]}
    self._missing: frozenset[int] = frozenset()
    if self._is_byte_level:
      self._missing = frozenset(byte for letter, byte in _BYTE_OF_LETTER.items() if letter not in names) - _NEVER_IN_UTF8
      if len(self._missing) == N_BYTES - len(_NEVER_IN_UTF8):
        raise CheckpointError('the text tokenizer has no byte pieces')
      return
    for byte in range(N_BYTES):
      if f'<0x{byte:02X}>' not in names:
        raise CheckpointError(f'the text tokenizer falls back to bytes, and the piece <0x{byte:02X}> is missing')
    if any(self.decode(self.encode(probe)) != probe for probe in PROBES):
      raise CheckpointError('the text tokenizer changes text (normalisation or space rules), and decoding cannot undo it')

  def _bytes_of(self, name: str) -> bytes:
    if self._is_byte_level:
      letters = [_BYTE_OF_LETTER.get(letter) for letter in name]
      return bytes(byte for byte in letters if byte is not None) if None not in letters else name.encode()
    if found := _BYTE_PIECE.fullmatch(name):
      return bytes([int(found[1], 16)])
    return (name.replace(SPACE_SIGN, ' ') if self._has_space_sign else name).encode()

  @classmethod
  def load(cls, path: str | Path) -> 'JsonText':
    """Reads a file. Raises CheckpointError where it is missing or of another kind."""
    data = read_file(path)
    try:
      return cls(data)
    except CheckpointError as error:
      raise CheckpointError(f'text tokenizer {path}: {error}') from error

  def save(self, path: str | Path) -> None:
    """Writes Meta's form as one file; an interrupted write leaves no file of that name."""
    write_file(path, self._data)

  def to_json(self) -> bytes:
    """The file in Meta's form: the bytes that were read, if they had it."""
    return self._data

  # ------------------------------------------------------------------------------------- token table

  @property
  def vocabulary_config(self) -> VocabularyConfig:
    """The layout of the whole token table."""
    return self._config

  @property
  def names(self) -> tuple[str, ...]:
    """Meta's names of the tokens before the first text token."""
    return tuple(self._token_names[: self._text_start])

  @property
  def barred_text(self) -> tuple[int, ...]:
    """Tokens of the text range that sampling must not write: names that start with '<' (spec model.md 5.3), and no text."""
    return self._barred

  @functools.cached_property
  def vocabulary(self) -> Vocabulary:
    """The token table of the file."""
    return Vocabulary(self._config, names=self.names, barred_text=self._barred)

  @property
  def n_pieces(self) -> int:
    """Size of the table of pieces."""
    return self._config.n_text

  def piece(self, index: int) -> str:
    """How a piece is written in the file: for tables and tests."""
    return self._token_names[self._text_start + index]

  # -------------------------------------------------------------------------------------------- text

  def encode(self, text: str) -> list[int]:
    """Pieces of a text, never a special or image token.

    Raises:
      DataError: a lone surrogate, or a byte for which the file has no piece.
    """
    check_unicode(text)
    if self._missing:
      for byte in text.encode():
        if byte in self._missing:
          raise DataError(f'the text tokenizer has no piece for the byte 0x{byte:02X}, and the text holds it: remove it')
    if not self._has_space_sign:
      return self._encode(text)
    pieces: list[int] = []
    for i, part in enumerate(text.split(SPACE_SIGN)):
      pieces += self._space_sign_pieces if i else []
      pieces += self._encode(part)
    return pieces

  def _encode(self, text: str) -> list[int]:
    return [token - self._text_start for token in self._encoder.encode(text, add_special_tokens=False).ids]

  @functools.cached_property
  def _space_sign_pieces(self) -> list[int]:
    return [self._token_names.index(f'<0x{byte:02X}>') - self._text_start for byte in SPACE_SIGN.encode()]

  def decode(self, pieces: Sequence[int]) -> str:
    """Text of pieces. Bytes that are no UTF-8 become U+FFFD; a piece outside the table raises DataError."""
    for piece in pieces:
      if not 0 <= piece < self.n_pieces:
        raise DataError(f'text piece {piece} lies outside the table of {self.n_pieces}: text tokenizer and vocabulary do not match')
    joined = b''.join(self._bytes[piece] for piece in pieces)
    if self._is_byte_level:
      return joined.decode('utf-8', 'replace')
    # As sentencepiece: one U+FFFD for each byte, not for each broken character.
    return ''.join('\ufffd' if '\udc80' <= c <= '\udcff' else c for c in joined.decode('utf-8', 'surrogateescape'))

  # ------------------------------------------------------------------------------------------- value

  @functools.cached_property
  def _digest(self) -> bytes:
    return hashlib.sha256(json.dumps(self._content, sort_keys=True).encode()).digest()

  def __eq__(self, other: object) -> bool:
    return isinstance(other, JsonText) and self._digest == other._digest

  def __hash__(self) -> int:
    return hash(self._digest)

  def __reduce__(self) -> tuple[type['JsonText'], tuple[bytes]]:
    return JsonText, (self._data,)

  def __repr__(self) -> str:
    return f'JsonText(size={self._config.size}, n_codes={self._config.n_codes}, n_pieces={self.n_pieces})'
