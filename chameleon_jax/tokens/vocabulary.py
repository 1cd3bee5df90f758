"""What one integer means: special tokens, image codes, text pieces. The only file with their raw names.

    0 <s>   1 <pad>   2 </s>   3 <unk>   4 .. 4+n-1 image codes   <eoss>   <racm3:break>
    <sentinel:0> ...   <reserved...> (the first one is end_turn)   text pieces up to size-1

A *code* is an index in the codebook of the image tokenizer, a *token* an index in this table. The file
knows neither how text becomes pieces nor how pictures become codes. Layout and names: spec model.md 5.1
and 5.2 (released tokenizer of facebookresearch/chameleon).
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import DataError

_IMAGE_PREFIX, _IMAGE_SUFFIX = 'IMGIMG', 'Z'
_N_LEADING = 4  # <s> <pad> </s> <unk>


def image_token_name(code: int) -> str:
  """Released name of an image token: `IMGIMG`, the decimal digits as letters (0 = A), `Z`.

  >>> [image_token_name(code) for code in (0, 53, 1024, 8191)]
  ['IMGIMGAZ', 'IMGIMGFDZ', 'IMGIMGBACEZ', 'IMGIMGIBJBZ']
  """
  return _IMAGE_PREFIX + ''.join(chr(ord('A') + int(digit)) for digit in str(code)) + _IMAGE_SUFFIX


def parse_image_token_name(name: str) -> int | None:
  """The code of an image token's name; None for any other name, padded digits included."""
  if not (name.startswith(_IMAGE_PREFIX) and name.endswith(_IMAGE_SUFFIX)):
    return None
  letters = name[len(_IMAGE_PREFIX) : -len(_IMAGE_SUFFIX)]
  if not letters or any(letter not in 'ABCDEFGHIJ' for letter in letters):
    return None
  code = int(''.join(str(ord(letter) - ord('A')) for letter in letters))
  return code if image_token_name(code) == name else None


def _special_and_image_names(config: VocabularyConfig) -> list[str]:
  """Names of the tokens before the first text piece, in order of their ids."""
  names = ['<s>', '<pad>', '</s>', '<unk>']
  names += [image_token_name(code) for code in range(config.n_codes)]
  names += ['<eoss>', '<racm3:break>']
  names += [f'<sentinel:{i}>' for i in range(config.n_sentinels)]
  first = len(names)
  names += [f'<reserved{token - _N_LEADING:05d}>' for token in range(first, first + config.n_reserved)]
  return names


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The token table of one `VocabularyConfig`.

  Attributes:
    names: names of all tokens before `text_start`.
    token_of_code: int32 [n_codes].
    code_of_token: int32 [size], -1 where the token is not a code.
    is_image, is_text, is_special: bool [size]; exactly one is true for each token.
  """

  config: VocabularyConfig
  names: tuple[str, ...] = dataclasses.field(init=False, repr=False, compare=False)
  token_of_code: Int32[np.ndarray, ' n_codes'] = dataclasses.field(init=False, repr=False, compare=False)
  code_of_token: Int32[np.ndarray, ' size'] = dataclasses.field(init=False, repr=False, compare=False)
  is_image: Bool[np.ndarray, ' size'] = dataclasses.field(init=False, repr=False, compare=False)
  is_text: Bool[np.ndarray, ' size'] = dataclasses.field(init=False, repr=False, compare=False)
  is_special: Bool[np.ndarray, ' size'] = dataclasses.field(init=False, repr=False, compare=False)

  def __post_init__(self) -> None:
    names = _special_and_image_names(self.config)
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
    tables = {
        'token_of_code': token_of_code,
        'code_of_token': code_of_token,
        'is_image': is_image,
        'is_text': is_text,
        'is_special': ~(is_image | is_text),
    }
    for name, table in tables.items():
      table.flags.writeable = False
      object.__setattr__(self, name, table)
    object.__setattr__(self, 'names', tuple(names))

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
    return 0

  @property
  def pad(self) -> int:
    """Fills rows; never attended to, never a target with weight."""
    return 1

  @property
  def end_sequence(self) -> int:
    """Last token of every document."""
    return 2

  @property
  def unknown(self) -> int:
    """Unused: byte fallback leaves nothing unknown."""
    return 3

  @property
  def image_start(self) -> int:
    """Token of code 0."""
    return _N_LEADING

  @property
  def end_image(self) -> int:
    """Follows the last code of a picture."""
    return _N_LEADING + self.n_codes

  @property
  def begin_image(self) -> int:
    """Precedes the first code of a picture."""
    return _N_LEADING + self.n_codes + 1

  @property
  def end_turn(self) -> int:
    """Ends a prompt and an answer: the first reserved token."""
    return _N_LEADING + self.n_codes + 2 + self.config.n_sentinels

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
      raise DataError(f'token {bad[0]} is not an image token (these are {self.image_start} to {self.end_image - 1})')
    return np.asarray(self.code_of_token[tokens])


def _integers(values: np.ndarray, what: str) -> np.ndarray:
  array = np.asarray(values)
  if array.size == 0:
    return array.astype(np.int32)
  if not np.issubdtype(array.dtype, np.integer):
    raise DataError(f'{what} must be integers, got {array.dtype}')
  return array
