"""What one integer means: special tokens, image codes, text pieces. The only file with their raw names.

    0 <s>   1 <pad>   2 </s>   3 <unk>   4 .. 4+n-1 image codes   <eoss>   <racm3:break>
    <sentinel:0> ...   <reserved...> (the first one is end_turn)   text pieces up to size-1

A *code* is an index in the codebook of the image tokenizer, a *token* an index in this table. The file
knows neither how text becomes pieces nor how pictures become codes. Layout and names: spec model.md 5.1
to 5.3 (released tokenizer of facebookresearch/chameleon). A released file may list the same names in another
order (`Vocabulary(config, names=...)`): every token is then found by its name, none by its place.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import CheckpointError, DataError

IMAGE_PREFIX = 'IMGIMG'
BEGIN_SEQUENCE = '<s>'
PLACEHOLDER = '<image>'  # what Hugging Face calls one reserved token
_IMAGE_SUFFIX = 'Z'
_PAD, _END_SEQUENCE, _UNKNOWN, _END_IMAGE, _BEGIN_IMAGE = '<pad>', '</s>', '<unk>', '<eoss>', '<racm3:break>'
_LEADING = (BEGIN_SEQUENCE, _PAD, _END_SEQUENCE, _UNKNOWN)
_FIXED = (*_LEADING, _END_IMAGE, _BEGIN_IMAGE)
_SENTINEL = re.compile(r'<sentinel:[0-9]+>')
_RESERVED = re.compile(r'<reserved([0-9]+)>')
_UNUSED = re.compile(r'<unused:[0-9]+>')


def image_token_name(code: int) -> str:
  """Released name of an image token: `IMGIMG`, the decimal digits as letters (0 = A), `Z`.

  >>> [image_token_name(code) for code in (0, 53, 1024, 8191)]
  ['IMGIMGAZ', 'IMGIMGFDZ', 'IMGIMGBACEZ', 'IMGIMGIBJBZ']
  """
  return IMAGE_PREFIX + ''.join(chr(ord('A') + int(digit)) for digit in str(code)) + _IMAGE_SUFFIX


def parse_image_token_name(name: str) -> int | None:
  """The code of an image token's name; None for any other name, padded digits included."""
  if not (name.startswith(IMAGE_PREFIX) and name.endswith(_IMAGE_SUFFIX)):
    return None
  letters = name[len(IMAGE_PREFIX) : -len(_IMAGE_SUFFIX)]
  if not letters or any(letter not in 'ABCDEFGHIJ' for letter in letters):
    return None
  code = int(''.join(str(ord(letter) - ord('A')) for letter in letters))
  return code if image_token_name(code) == name else None


def reserved_name(token: int) -> str:
  """The name that the release gives a reserved token by its id: `<reserved08706>` is token 8710."""
  return f'<reserved{token - len(_LEADING):05d}>'


def unused_name(token: int) -> str:
  """Our name for a token of the text range that no piece of the text tokenizer fills."""
  return f'<unused:{token}>'


def is_known_special(name: str) -> bool:
  """Whether a name is one of the special tokens of the release or of its ports, wherever it stands."""
  return name in _FIXED or name == PLACEHOLDER or any(kind.fullmatch(name) for kind in (_SENTINEL, _RESERVED, _UNUSED))


def is_special_by_rule(name: str) -> bool:
  """The release's rule for what is no text: a name that starts with '<', unless that is all of it (spec model.md 5.3)."""
  return name.startswith('<') and name != '<'


def _special_and_image_names(config: VocabularyConfig) -> list[str]:
  """Names of the tokens before the first text piece, in order of their ids."""
  names = list(_LEADING)
  names += [image_token_name(code) for code in range(config.n_codes)]
  names += [_END_IMAGE, _BEGIN_IMAGE]
  names += [f'<sentinel:{i}>' for i in range(config.n_sentinels)]
  first = len(names)
  names += [reserved_name(token) for token in range(first, first + config.n_reserved)]
  return names


def config_of_names(names: Sequence[str], size: int) -> VocabularyConfig:
  """The layout that a list of special and image names has, in any order.

  Args:
    names: name of each token before the first text piece. What is neither named in spec model.md 5.1 nor an image
      token counts as reserved.
    size: number of tokens, text included.

  Raises:
    CheckpointError: a name comes twice or is missing, an image name spells no code, or the codes have a gap.
  """
  token_of: dict[str, int] = {}
  for token, name in enumerate(names):
    if name in token_of:
      raise CheckpointError(f'the tokens {token_of[name]} and {token} have the same name {name!r}')
    token_of[name] = token
  for name in _FIXED:
    if name not in token_of:
      raise CheckpointError(f'the special token {name!r} is missing')
  if not any(_RESERVED.fullmatch(name) for name in names):
    raise CheckpointError('there is no reserved token <reservedNNNNN>, and the first of them ends a turn')
  name_of_code = {}
  for name in names:
    if name.startswith(IMAGE_PREFIX):
      code = parse_image_token_name(name)
      if code is None:
        raise CheckpointError(f'the image token name {name!r} (token {token_of[name]}) spells no code')
      name_of_code[code] = name
  n_codes = len(name_of_code)
  for code in range(n_codes):
    if code not in name_of_code:
      raise CheckpointError(
          f'the image token {image_token_name(code)!r} (code {code}) is missing, though {name_of_code[max(name_of_code)]!r} is there'
      )
  n_sentinels = sum(_SENTINEL.fullmatch(name) is not None for name in names)
  n_reserved = len(names) - len(_FIXED) - n_codes - n_sentinels
  try:
    return VocabularyConfig(size=size, n_codes=n_codes, n_sentinels=n_sentinels, n_reserved=n_reserved)
  except ValueError as error:
    raise CheckpointError(f'the token table has no usable layout: {error}') from error


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """The token table of one `VocabularyConfig`.

  Attributes:
    names: names of all tokens before `text_start`. Left out, they are those of spec model.md 5.1 in their order; a
      tokenizer file that lists the same tokens in another order gives its own.
    barred_text: text tokens that are read and may stand in a prompt, and that sampling never writes (spec model.md
      5.3: pieces whose name starts with '<').
    token_of_code: int32 [n_codes].
    code_of_token: int32 [size], -1 where the token is not a code.
    is_image, is_text, is_special: bool [size]; exactly one is true for each token.
    is_barred: bool [size], the text tokens of `barred_text`.

  Raises:
    CheckpointError: `names` are not those of a table with this config, or a barred token is no text token.
  """

  config: VocabularyConfig
  names: tuple[str, ...] = dataclasses.field(default=(), kw_only=True, repr=False)
  barred_text: tuple[int, ...] = dataclasses.field(default=(), kw_only=True, repr=False)
  token_of_code: Int32[np.ndarray, ' n_codes'] = dataclasses.field(init=False, repr=False)
  code_of_token: Int32[np.ndarray, ' size'] = dataclasses.field(init=False, repr=False)
  is_image: Bool[np.ndarray, ' size'] = dataclasses.field(init=False, repr=False)
  is_text: Bool[np.ndarray, ' size'] = dataclasses.field(init=False, repr=False)
  is_special: Bool[np.ndarray, ' size'] = dataclasses.field(init=False, repr=False)
  is_barred: Bool[np.ndarray, ' size'] = dataclasses.field(init=False, repr=False)
  _special: dict[str, int] = dataclasses.field(init=False, repr=False)

  def __post_init__(self) -> None:
    names = list(self.names) or _special_and_image_names(self.config)
    if self.names and config_of_names(names, self.size) != self.config:
      raise CheckpointError(f'the token names are those of {config_of_names(names, self.size)}, not of {self.config}')
    codes = [parse_image_token_name(name) for name in names]
    code_of_token = np.full(self.size, -1, np.int32)
    code_of_token[: len(codes)] = [-1 if code is None else code for code in codes]
    is_image = code_of_token >= 0
    token_of_code = np.full(self.n_codes, -1, np.int32)
    token_of_code[code_of_token[is_image]] = np.flatnonzero(is_image)
    # The two tables must be inverse to each other, whatever the names were.
    assert len(names) == len(set(names)) == self.text_start
    assert is_image.sum() == self.n_codes and np.array_equal(code_of_token[token_of_code], np.arange(self.n_codes))
    is_text = np.arange(self.size) >= self.text_start
    is_barred = np.zeros(self.size, bool)
    for token in self.barred_text:
      if not self.text_start <= token < self.size:
        raise CheckpointError(f'the barred token {token} is no text token (these are {self.text_start} to {self.size - 1})')
      is_barred[token] = True
    tables = {
        'token_of_code': token_of_code,
        'code_of_token': code_of_token,
        'is_image': is_image,
        'is_text': is_text,
        'is_special': ~(is_image | is_text),
        'is_barred': is_barred,
    }
    for name, table in tables.items():
      table.flags.writeable = False
      object.__setattr__(self, name, table)
    object.__setattr__(self, 'names', tuple(names))
    object.__setattr__(self, 'barred_text', tuple(np.flatnonzero(is_barred).tolist()))
    special = {name: names.index(name) for name in _FIXED}
    reserved = [(int(found[1]), token) for token, name in enumerate(names) if (found := _RESERVED.fullmatch(name))]
    special['end_turn'] = min(reserved)[1]
    object.__setattr__(self, '_special', special)

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Vocabulary):
      return NotImplemented
    return (self.config, self.names, self.barred_text) == (other.config, other.names, other.barred_text)

  def __hash__(self) -> int:
    return hash((self.config,))

  @property
  def size(self) -> int:
    """Number of tokens."""
    return self.config.size

  @property
  def n_codes(self) -> int:
    """Entries of the codebook."""
    return self.config.n_codes

  @property
  def n_text(self) -> int:
    """Room for text pieces."""
    return self.config.n_text

  @property
  def begin_sequence(self) -> int:
    """First token of every document."""
    return self._special[BEGIN_SEQUENCE]

  @property
  def pad(self) -> int:
    """Fills rows; never attended to, never a target with weight."""
    return self._special[_PAD]

  @property
  def end_sequence(self) -> int:
    """Last token of every document."""
    return self._special[_END_SEQUENCE]

  @property
  def unknown(self) -> int:
    """Unused: byte fallback leaves nothing unknown."""
    return self._special[_UNKNOWN]

  @property
  def image_start(self) -> int:
    """Token of code 0."""
    return int(self.token_of_code[0])

  @property
  def end_image(self) -> int:
    """Follows the last code of a picture."""
    return self._special[_END_IMAGE]

  @property
  def begin_image(self) -> int:
    """Precedes the first code of a picture."""
    return self._special[_BEGIN_IMAGE]

  @property
  def end_turn(self) -> int:
    """Ends a prompt and an answer: the reserved token with the lowest number."""
    return self._special['end_turn']

  @property
  def text_start(self) -> int:
    """Token of text piece 0."""
    return self.config.text_start

  def name(self, token: int) -> str:
    """Released name of a special or image token; `text:<piece>` for a text piece, whose name the text tokenizer knows."""
    if not 0 <= token < self.size:
      raise DataError(f'token {token} lies outside the vocabulary of {self.size}')
    return self.names[token] if token < self.text_start else f'text:{token - self.text_start}'

  def codes_to_tokens(self, codes: np.ndarray) -> Int32[np.ndarray, '...']:
    """Tokens of codes, any shape. Raises DataError for a code outside [0, n_codes)."""
    codes = _integers(codes, 'codes')
    bad = codes[(codes < 0) | (codes >= self.n_codes)]
    if bad.size:
      raise DataError(f'code {bad[0]} lies outside the codebook of {self.n_codes}: image tokenizer and vocabulary do not match')
    return np.asarray(self.token_of_code[codes])

  def tokens_to_codes(self, tokens: np.ndarray) -> Int32[np.ndarray, '...']:
    """Codes of image tokens, any shape. Raises DataError for a token that is not an image token."""
    tokens = _integers(tokens, 'tokens')
    bad = tokens[(tokens < 0) | (tokens >= self.size)]
    if not bad.size:
      bad = tokens[~self.is_image[tokens]]
    if bad.size:
      first, last = self.token_of_code.min(), self.token_of_code.max()
      raise DataError(f'token {bad[0]} is not an image token (these are {first} to {last})')
    return np.asarray(self.code_of_token[tokens])


def _integers(values: np.ndarray, what: str) -> np.ndarray:
  array = np.asarray(values)
  if array.size == 0:
    return array.astype(np.int32)
  if not np.issubdtype(array.dtype, np.integer):
    raise DataError(f'{what} must be integers, got {array.dtype}')
  return array
