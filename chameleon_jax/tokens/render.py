"""Document -> tokens, targets and loss weights; and sampled tokens -> Document.

Knows the order of segments and which targets count. Does not know files, batches, packing or networks:
pictures become codes through a function the caller hands in. Format: spec model.md section 6 (release),
loss on answers only: paper section 3.1.

A plain document (s = begin_sequence, e = end_sequence, p = pad, b and d = begin_image and end_image):

    tokens   s  text  b  code code  d  e
    targets  text b  code code  d   e  p
    weights  1    1   1    1    1   1  0

A conversation (t = end_turn): only what the answering side says counts.

    tokens   s  ask  t  answer t  e
    targets  ask t   answer t  e  p
    weights  0   0   1      1  1  0
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32, Int32

from chameleon_jax.errors import ConfigError, DataError, PromptError
from chameleon_jax.tokens.document import Codes, Document, Image, Role, Segment, Text, Turn
from chameleon_jax.tokens.text import TextTokenizer
from chameleon_jax.tokens.vocabulary import Vocabulary

# k pictures uint8 [H, W, 3] of any size -> int [k, n_image_tokens]
EncodeImages = Callable[[list[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rendered:
  """One document as the network sees it; targets are the tokens shifted by one inside the document."""

  tokens: Int32[np.ndarray, ' T']
  targets: Int32[np.ndarray, ' T']
  loss_weights: Float32[np.ndarray, ' T']

  def __len__(self) -> int:
    return len(self.tokens)


def check_fits(vocabulary: Vocabulary, text_tokenizer: TextTokenizer) -> None:
  """Raises ConfigError unless every text piece has a token."""
  if text_tokenizer.n_pieces > vocabulary.n_text:
    raise ConfigError(
        f'the text tokenizer has {text_tokenizer.n_pieces} pieces, the vocabulary room for {vocabulary.n_text}: they are not of one model'
    )


def render(
    document: Document,
    vocabulary: Vocabulary,
    text_tokenizer: TextTokenizer,
    *,
    encode_images: EncodeImages | None = None,
) -> Rendered:
  """A whole document for training, as drawn at the head of this file.

  Args:
    document: plain, or a conversation that starts with a prompt and ends with an answer.
    vocabulary: the token table.
    text_tokenizer: its pieces must fit into the vocabulary.
    encode_images: pictures given as pixels -> codes, called once for all of them.

  Raises:
    DataError: a picture as pixels without `encode_images`, codes outside the codebook, a lone surrogate,
      or a conversation without an answer at its end.
  """
  roles = [turn.role for turn in document.turns]
  if not document.is_plain and (roles[0] != 'prompt' or roles[-1] != 'answer'):
    raise DataError(f'a conversation to learn from starts with a prompt and ends with an answer, got {roles}')
  parts: list[tuple[list[int], float]] = [([vocabulary.begin_sequence], 0.0)]
  for turn, tokens in zip(document.turns, _turn_tokens(document, vocabulary, text_tokenizer, encode_images)):
    end = [] if document.is_plain else [vocabulary.end_turn]
    parts.append((tokens + end, 0.0 if turn.role == 'prompt' else 1.0))
  parts.append(([vocabulary.end_sequence], 1.0))
  tokens_array = np.array([token for tokens, _ in parts for token in tokens], np.int32)
  weight_of_token = np.repeat(np.array([weight for _, weight in parts], np.float32), [len(tokens) for tokens, _ in parts])
  return Rendered(
      tokens_array,
      np.append(tokens_array[1:], np.int32(vocabulary.pad)),
      np.append(weight_of_token[1:], np.float32(0)),
  )


def render_prompt(
    document: Document,
    vocabulary: Vocabulary,
    text_tokenizer: TextTokenizer,
    *,
    encode_images: EncodeImages | None = None,
    begin_answer: bool = True,
) -> Int32[np.ndarray, ' T']:
  """The tokens a model continues.

      plain          s text          ...
      prompt last    s ask t         ...   the answer starts here; without `begin_answer`: s ask ...
      answer last    s ask t answer  ...   the answer goes on

  Args:
    document: plain, or a conversation that starts with a prompt.
    vocabulary: the token table.
    text_tokenizer: its pieces must fit into the vocabulary.
    encode_images: pictures given as pixels -> codes, called once for all of them.
    begin_answer: whether a last prompt is closed by end_turn; without it the model goes on with the prompt.

  Raises:
    PromptError: the conversation starts with an answer.
    DataError: as `render`.
  """
  if document.turns[0].role == 'answer':
    raise PromptError('a conversation to sample from starts with a prompt, got an answer first')
  tokens = [vocabulary.begin_sequence]
  last = len(document.turns) - 1
  for i, turn_tokens in enumerate(_turn_tokens(document, vocabulary, text_tokenizer, encode_images)):
    tokens += turn_tokens
    if i < last or (document.turns[i].role == 'prompt' and begin_answer):
      tokens.append(vocabulary.end_turn)
  return np.array(tokens, np.int32)


def _turn_tokens(
    document: Document,
    vocabulary: Vocabulary,
    text_tokenizer: TextTokenizer,
    encode_images: EncodeImages | None,
) -> list[list[int]]:
  """Tokens of each turn without separators. Neighbouring texts are joined first, so only content decides the pieces."""
  check_fits(vocabulary, text_tokenizer)
  turns: list[list[int]] = []
  for turn in _with_codes(document, vocabulary, encode_images).turns:
    tokens: list[int] = []
    text = ''
    for segment in (*turn.segments, None):
      if isinstance(segment, Text):
        text += segment.text
        continue
      tokens += [vocabulary.text_start + piece for piece in text_tokenizer.encode(text)]
      text = ''
      if isinstance(segment, Codes):
        tokens += [vocabulary.begin_image, *vocabulary.codes_to_tokens(segment.codes).tolist(), vocabulary.end_image]
    turns.append(tokens)
  return turns


def _with_codes(document: Document, vocabulary: Vocabulary, encode_images: EncodeImages | None) -> Document:
  """The document with every `Image` turned into `Codes`."""
  pixels = [segment.pixels for segment in document.segments if isinstance(segment, Image)]
  if not pixels:
    return document
  if encode_images is None:
    raise DataError('the document holds a picture as pixels, and no image tokenizer was given: encode it first or pass encode_images')
  codes = np.asarray(encode_images(pixels))
  if codes.ndim != 2 or len(codes) != len(pixels):
    raise DataError(f'encode_images must return [{len(pixels)}, n] codes for {len(pixels)} pictures, got {list(codes.shape)}')
  rows = iter(codes)
  return Document(
      tuple(Turn(tuple(Codes(next(rows)) if isinstance(s, Image) else s for s in turn.segments), turn.role) for turn in document.turns)
  )


def unrender(tokens: np.ndarray | Sequence[int], vocabulary: Vocabulary, text_tokenizer: TextTokenizer) -> Document:
  """The document that tokens spell: the inverse of `render` and `render_prompt`, and the reader of sampled tokens.

  Pictures come back as `Codes`; one that was cut off has fewer codes, one without any code is left out.
  Image tokens without begin_image count as a picture too (a sampler may have been given begin_image).
  Reading stops at the first end_sequence. Other special tokens hold no content and are left out; a text
  token for which the tokenizer has no piece reads as U+FFFD.

      s ask t answer t e      prompt, answer
      s text e                plain
      answer t                answer        (new tokens only: what begin_sequence does not open is an answer)
      text                    plain         (new tokens only, no end_turn seen)

  Args:
    tokens: int [T], one document or the new tokens of one sampled row.
    vocabulary: the token table.
    text_tokenizer: decodes the text pieces.

  Raises:
    DataError: a token outside the vocabulary, or a second begin_sequence (more than one document).
  """
  ids = np.asarray(tokens).reshape(-1).tolist()
  for token in ids:
    if not 0 <= token < vocabulary.size:
      raise DataError(f'token {token} lies outside the vocabulary of {vocabulary.size}')
  is_whole = bool(ids) and ids[0] == vocabulary.begin_sequence
  ids = ids[1:] if is_whole else ids
  if vocabulary.end_sequence in ids:
    ids = ids[: ids.index(vocabulary.end_sequence)]
  if vocabulary.begin_sequence in ids:
    raise DataError('tokens hold more than one document: split them at begin_sequence first')
  if vocabulary.end_turn not in ids:
    return Document((Turn(_segments(ids, vocabulary, text_tokenizer), 'document'),))
  roles: list[Role] = ['prompt', 'answer'] if is_whole else ['answer', 'prompt']
  turns: list[Turn] = []
  while ids:
    end = ids.index(vocabulary.end_turn) if vocabulary.end_turn in ids else len(ids)
    turns.append(Turn(_segments(ids[:end], vocabulary, text_tokenizer), roles[len(turns) % 2]))
    ids = ids[end + 1 :]
  return Document(tuple(turns))


def _segments(tokens: list[int], vocabulary: Vocabulary, text_tokenizer: TextTokenizer) -> tuple[Segment, ...]:
  """Segments of one turn: runs of text tokens and runs of image tokens."""
  segments: list[Segment] = []
  codes: list[int] = []
  pieces: list[int] = []

  def close() -> None:
    if codes:
      segments.append(Codes(np.array(codes, np.int32)))
      codes.clear()
    if pieces:
      segments.append(Text(_decode(pieces, text_tokenizer)))
      pieces.clear()

  for token in tokens:
    if vocabulary.is_image[token]:
      if pieces:
        close()
      codes.append(int(vocabulary.code_of_token[token]))
    elif vocabulary.is_text[token]:
      if codes:
        close()
      pieces.append(token - vocabulary.text_start)
    elif token in (vocabulary.begin_image, vocabulary.end_image):
      close()
  close()
  return tuple(segments)


def _decode(pieces: list[int], text_tokenizer: TextTokenizer) -> str:
  """Text of pieces; U+FFFD for tokens of the vocabulary that the tokenizer does not fill."""
  n = text_tokenizer.n_pieces
  if all(piece < n for piece in pieces):
    return text_tokenizer.decode(pieces)
  text = ''
  run: list[int] = []
  for piece in pieces:
    if piece < n:
      run.append(piece)
    else:
      text += text_tokenizer.decode(run) + '\ufffd'
      run = []
  return text + text_tokenizer.decode(run)
