"""Text to pieces and back, without loss: byte pair encoding with byte fallback (sentencepiece).

A *piece* is an index in the text tokenizer's own table; `token = vocabulary.text_start + piece`. This file
knows neither special tokens nor pictures, so nothing that a user types can become one: the table holds the
256 bytes (piece b is byte b) and learned character sequences, nothing else. Method: paper section 2.1;
options: spec training.md section 4.
"""

import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import sentencepiece

from chameleon_jax.errors import CheckpointError, DataError

N_BYTES = 256
# sentencepiece writes a space as this character and would read it back as a space: it goes as bytes.
SPACE_SIGN = '\u2581'
_SPACE_SIGN_PIECES = list(SPACE_SIGN.encode('utf-8'))
_MAX_SENTENCE = 1 << 16  # characters per training sentence; the trainer drops what is longer than its limit in bytes
PROBES = ('', ' a  b ', '\n\t\ufb01 \U0001f600\u200d\u2642\ufe0f x\r\n', '<s><unk><0x41>\x00')


@runtime_checkable
class TextTokenizer(Protocol):
  """What the rest of the package asks of a text tokenizer."""

  @property
  def n_pieces(self) -> int:
    """Size of the table of pieces."""
    ...

  def encode(self, text: str) -> list[int]:
    """Pieces of a text; decoding them gives the same text."""
    ...

  def decode(self, pieces: Sequence[int]) -> str:
    """Text of pieces; bytes that are no UTF-8 become U+FFFD."""
    ...

  def save(self, path: str | Path) -> None:
    """Writes one file."""
    ...


class SentencePieceText:
  """A sentencepiece model without control symbols. Piece ids are the model's ids minus one (its unknown piece)."""

  def __init__(self, model: bytes) -> None:
    """Checks that the model has the form `train_text_tokenizer` gives it; raises CheckpointError if not."""
    self._model = bytes(model)
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(self._model)
    except RuntimeError as error:
      raise CheckpointError(f'not a sentencepiece model ({len(self._model)} bytes)') from error
    self._check_form()

  def _check_form(self) -> None:
    processor = self._processor
    n = processor.vocab_size()
    has_bytes = n > N_BYTES and all(processor.IsByte(1 + byte) for byte in range(N_BYTES))
    if not has_bytes or not processor.IsUnknown(0) or any(processor.IsControl(i) for i in range(n)):
      raise CheckpointError('the sentencepiece model is not <unk>, 256 byte pieces and text pieces: train it with this package')
    if any(self.decode(self.encode(probe)) != probe for probe in PROBES):
      raise CheckpointError('the sentencepiece model changes text (normalisation or space rules): train it with this package')

  @classmethod
  def load(cls, path: str | Path) -> 'SentencePieceText':
    """Reads what `save` wrote. Raises CheckpointError for a missing or foreign file."""
    model = read_file(path)
    try:
      return cls(model)
    except CheckpointError as error:
      raise CheckpointError(f'text tokenizer {path}: {error}') from error

  def save(self, path: str | Path) -> None:
    """Writes the model as one file; an interrupted write leaves no file of that name."""
    write_file(path, self._model)

  @property
  def n_pieces(self) -> int:
    """Size of the table of pieces, the 256 bytes included."""
    return self._processor.vocab_size() - 1

  def encode(self, text: str) -> list[int]:
    """Pieces of a text, [] for the empty string. Raises DataError for a string that is not Unicode text."""
    check_unicode(text)
    pieces: list[int] = []
    for i, part in enumerate(text.split(SPACE_SIGN)):
      pieces += _SPACE_SIGN_PIECES if i else []
      pieces += [int(piece) - 1 for piece in self._processor.EncodeAsIds(part)]
    return pieces

  def decode(self, pieces: Sequence[int]) -> str:
    """Text of pieces. Bytes that are no UTF-8 become U+FFFD; a piece outside the table raises DataError."""
    ids = [int(piece) + 1 for piece in pieces]
    for i in ids:
      if not 1 <= i <= self.n_pieces:
        raise DataError(f'text piece {i - 1} lies outside the table of {self.n_pieces}: text tokenizer and vocabulary do not match')
    return self._processor.DecodeIds(ids) if ids else ''

  def piece(self, index: int) -> str:
    """How a piece is written, spaces as spaces and bytes as `<0x41>`: for tables and tests."""
    return self._processor.IdToPiece(index + 1).replace(SPACE_SIGN, ' ')

  def score(self, index: int) -> float:
    """Rank of a piece: of all pairs that could be joined, encoding joins the one whose piece has the highest score."""
    return float(self._processor.GetScore(index + 1))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, SentencePieceText) and self._model == other._model

  def __hash__(self) -> int:
    return hash(self._model)

  def __reduce__(self) -> tuple[type['SentencePieceText'], tuple[bytes]]:
    return SentencePieceText, (self._model,)

  def __repr__(self) -> str:
    return f'SentencePieceText(n_pieces={self.n_pieces})'


def _one_line(error: Exception) -> str:
  """The message of a sentencepiece error without the place in its C++ source."""
  return re.sub(r'^[A-Z]+: src/\S+ ', '', ' '.join(str(error).split()))


def read_file(path: str | Path) -> bytes:
  """The bytes of a text tokenizer's file. Raises CheckpointError where it cannot be read."""
  try:
    return Path(path).read_bytes()
  except (OSError, ValueError) as error:  # ValueError: a path with a null character
    raise CheckpointError(f'cannot read the text tokenizer {path}: {getattr(error, "strerror", None) or error}') from error


def write_file(path: str | Path, content: bytes) -> None:
  """Writes one file; an interrupted write leaves no file of that name."""
  path = Path(path)
  aside = path.with_name(f'{path.name}.{os.getpid()}.part')
  try:
    aside.write_bytes(content)
    os.replace(aside, path)
  finally:
    aside.unlink(missing_ok=True)


def check_unicode(text: str) -> None:
  """Raises DataError for a string with a lone surrogate, which no encoding can write."""
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    code_point = ord(text[error.start])
    raise DataError(f'text holds a lone surrogate U+{code_point:04X} at character {error.start}: remove or replace it') from error


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  """Texts cut to lengths that the trainer takes; empty ones left out."""
  for text in texts:
    check_unicode(text)
    for start in range(0, len(text), _MAX_SENTENCE):
      yield text[start : start + _MAX_SENTENCE]


def _sample(sentences: Iterable[str], n: int, seed: int) -> list[str]:
  """At most n of the sentences, each with equal chance, in one pass (reservoir sampling)."""
  rng = random.Random(seed)
  kept: list[str] = []
  for seen, sentence in enumerate(sentences):
    if seen < n:
      kept.append(sentence)
    elif (place := rng.randrange(seen + 1)) < n:
      kept[place] = sentence
  return kept


def train_text_tokenizer(
    sentences: Iterable[str],
    *,
    n_pieces: int,
    character_coverage: float,
    seed: int,
    max_sentences: int | None = None,
) -> SentencePieceText:
  """Learns a byte pair encoding with byte fallback.

  Single digits and each punctuation run stay apart from letters, and no piece crosses from one word into
  the next. The result depends on the sentences and the arguments alone.

  Args:
    sentences: training text; a text that comes twice counts twice.
    n_pieces: size of the table, the 256 bytes included.
    character_coverage: share of the characters that get a piece of their own; the rest goes as bytes.
    seed: draws the subset when there are more than `max_sentences`.
    max_sentences: how many sentences the trainer keeps; None keeps all.

  Raises:
    DataError: if the text is too little (or has too many characters) for this many pieces.
  """
  if n_pieces <= N_BYTES:
    raise DataError(f'a text tokenizer needs more than the {N_BYTES} byte pieces, got n_pieces = {n_pieces}')
  texts = _sentences(sentences)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts if max_sentences is None else iter(_sample(texts, max_sentences, seed)),
        model_writer=model,
        model_type='bpe',
        vocab_size=n_pieces + 1,  # and the unknown piece that sentencepiece insists on
        character_coverage=character_coverage,
        byte_fallback=True,
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        required_chars=SPACE_SIGN,  # without a piece of its own a space would go as the bytes of this character
        max_sentence_length=4 * _MAX_SENTENCE,
        minloglevel=2,
    )
  except RuntimeError as error:
    reason = _one_line(error)
    if most := re.search(r'Please set it to a value <= (\d+)', reason):
      reason = f'the text supports at most {int(most.group(1)) - 1}; give more text or ask for fewer'
    elif 'required_chars' in reason:
      reason = 'its distinct characters alone need more; ask for more pieces or lower character_coverage'
    elif 'sentences_.empty()' in reason:
      reason = 'there is no training text'
    raise DataError(f'cannot train a text tokenizer of {n_pieces} pieces: {reason}') from error
  return SentencePieceText(model.getvalue())
