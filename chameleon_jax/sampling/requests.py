"""One request: checked when it comes in, and where it stands while it is under way.

A request is a prompt (token ids) and its options. What cannot be done is said at once, in one line, for this request alone.
This file knows tokens and the context's length; it knows no model and no other request.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Int

from chameleon_jax.config import SamplingOptions
from chameleon_jax.errors import PromptError
from chameleon_jax.sampling import logits as drawing
from chameleon_jax.sampling import loop, modality
from chameleon_jax.sampling.stream_pool import Stream
from chameleon_jax.tokens.vocabulary import Vocabulary

Finished = Literal['stop', 'length', 'picture', 'cancelled', 'failed']


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a model can hold: `n_image_tokens` codes a picture, `max_seq_len` tokens a row."""

  vocabulary: Vocabulary
  n_image_tokens: int
  max_seq_len: int


@dataclasses.dataclass(frozen=True)
class Progress:
  """What one request gained since the last report.

  Attributes:
    ticket: the request.
    tokens: int32, new since the last report, in order; the stop token included.
    finished: None while it is under way; 'picture' is the end of a request with modalities='image'.
    error: one line, with 'failed'.
  """

  ticket: int
  tokens: np.ndarray
  finished: Finished | None = None
  error: str | None = None


def open_codes(prompt: Int[np.ndarray, ' T'], vocabulary: Vocabulary) -> int | None:
  """Number of codes in the picture that a prompt leaves open, None where it leaves none open.

  ... begin_image c c c   -> 3          ... begin_image   -> 0          ... c c end_image   -> None
  """
  is_code = vocabulary.is_image[prompt]
  run = len(prompt) if is_code.all() else int(np.argmin(is_code[::-1]))
  return run if run < len(prompt) and prompt[len(prompt) - run - 1] == vocabulary.begin_image else None


def only_pictures(tokens: Int[np.ndarray, ' T'], vocabulary: Vocabulary) -> Int[np.ndarray, ' I']:
  """The tokens that stream i takes (spec model.md 8.3): codes, begin_sequence, begin_image, end_image."""
  kept = vocabulary.is_image[tokens] | np.isin(tokens, (vocabulary.begin_sequence, vocabulary.begin_image, vocabulary.end_image))
  return tokens[kept]


class Row:
  """A request under way. The device moves on copies of the numbers; `take` brings them home.

  Attributes:
    ticket, options: of the request.
    tokens: all tokens so far, prompt included.
    start: length of the prompt, without what the result begins with.
    state: [1] arrays of `modality.RowState`.
    marks: uint8 [V], see `loop`.
    fixed: int32 [n], see `loop.Request`.
    key_data: raw random key.
    image_length: tokens in stream i.
    f, i, u: its streams.
    shared_picture: number of the picture in which one stream serves as i and u, see `guidance`.
  """

  def __init__(self, ticket: int, prompt: np.ndarray, options: SamplingOptions, *, row: int, limits: Limits, name: str):
    """Checks a request, which messages call `name`.

    Raises:
      PromptError: the prompt is empty, too long, of ids outside the vocabulary or with a picture inside an unfinished one;
        a token of the options does not exist; or the pictures asked for do not fit.
    """
    try:
      tokens, codes, remaining = _check(np.asarray(prompt), options, limits)
    except PromptError as error:
      raise PromptError(f'{name} {error}') from None
    v = limits.vocabulary
    self.ticket, self.options = ticket, options
    self.start = len(tokens) - len(options.prefix)
    self.tokens: list[int] = tokens.tolist()
    opened = int(np.sum(tokens[self.start :] == v.begin_image)) + (codes >= 0 and codes + 1 > len(options.prefix))
    state = modality.init_state(np.array([len(tokens)]), open_codes=np.array([codes]), remaining=np.array([remaining]))
    self.state = dataclasses.replace(state, images=np.array([opened], np.int32))
    self.marks = np.zeros(v.size, np.uint8)
    self.marks[tokens] |= loop.SEEN
    self.marks[list(options.banned_tokens)] |= loop.BANNED
    self.marks[list(options.stop_tokens)] |= loop.STOP
    self.fixed = np.full(limits.n_image_tokens, -1, np.int32)
    for place, code in enumerate(options.fixed_codes or ()):
      if code is not None:
        self.fixed[place] = v.token_of_code[code]
    self.key_data = np.asarray(jax.random.key_data(drawing.row_keys(options.seed, np.array([row]))))[0]
    self.image_length = len(only_pictures(tokens, v))
    self.f: Stream | None = None
    self.i: Stream | None = None
    self.u: Stream | None = None
    self.shared_picture: int | None = None
    self.reported = self.start
    self.cancelled = False

  @property
  def mode(self) -> int:
    """modality.TEXT, IMAGE or DONE."""
    return int(self.state.mode[0])

  def room(self, steps: int | None = None) -> int:
    """Slots that its streams can come to need, or can need in the next `steps`: stream u may be one longer than the row."""
    remaining = int(self.state.remaining[0])
    return len(self.tokens) + (remaining if steps is None else min(remaining, steps)) + 1

  def take(self, state: modality.RowState, out: np.ndarray, image_length: int) -> None:
    """Brings home what a run of steps did to this row: its state ([1] arrays) and the tokens it drew."""
    self.state, self.image_length = state, image_length
    self.tokens.extend(out.tolist())
    self.marks[out] |= loop.SEEN

  def report(self, *, vocabulary: Vocabulary, failed: int = 0) -> Progress | None:
    """What is new, None if nothing is."""
    finished: Finished | None = None
    error = None
    if failed:
      finished = 'failed'
      where = f'after {len(self.tokens) - self.start} tokens'
      error = {
        loop.NOT_FINITE: f'the logits are not finite {where}; the weights may be damaged, or the computing type too narrow (try float32)',
        loop.NOTHING_ALLOWED: f'every token that may follow {where} is banned; ban fewer',
      }[failed]
    elif self.cancelled:
      finished = 'cancelled'
    elif self.mode == modality.DONE:
      finished = self._reason(vocabulary)
    tokens = np.array(self.tokens[self.reported :], np.int32)
    self.reported = len(self.tokens)
    return Progress(self.ticket, tokens, finished, error) if finished or len(tokens) else None

  def _reason(self, vocabulary: Vocabulary) -> Finished:
    if len(self.tokens) == self.start:
      return 'length'
    last = self.tokens[-1]
    if last in (vocabulary.end_sequence, *self.options.stop_tokens) or (last == vocabulary.end_turn and self.options.stop_at_end_turn):
      return 'stop'
    return 'picture' if self.options.modalities == 'image' else 'length'


def _check(prompt: np.ndarray, options: SamplingOptions, limits: Limits) -> tuple[np.ndarray, int, int]:
  """Prompt with what the result begins with, codes of its open picture (-1 outside), tokens it may still draw."""
  context, n, vocabulary = limits.max_seq_len, limits.n_image_tokens, limits.vocabulary
  if prompt.ndim != 1 or prompt.size == 0 or not np.issubdtype(prompt.dtype, np.integer):
    raise PromptError(f'is empty or no list of token ids; give at least begin_sequence ({vocabulary.begin_sequence})')
  _check_ids(prompt.tolist(), 'holds token id', vocabulary)
  for option in ('prefix', 'stop_tokens', 'banned_tokens'):
    _check_ids(getattr(options, option), f'has the option {option} with token id', vocabulary)
  _check_options(options, limits)
  prompt = prompt.astype(np.int32)
  if options.modalities == 'image' and open_codes(prompt, vocabulary) is None:
    prompt = np.append(prompt, np.int32(vocabulary.begin_image))
  prompt = np.append(prompt, np.array(options.prefix, np.int32))
  _check_pictures(prompt, vocabulary)
  codes = open_codes(prompt, vocabulary)
  budget = options.max_new_tokens - len(options.prefix)
  if len(prompt) > context:
    raise PromptError(f'has {len(prompt)} tokens, the context of this model {context}; shorten it')
  room = min(budget, context - len(prompt))
  if codes is None:
    if options.modalities == 'image':
      raise PromptError("has the option prefix with other than image tokens, and modalities='image'")
    _check_room(options, limits, position=len(prompt), remaining=room, owed=options.min_images)
    return prompt, -1, max(room, 0)
  if options.modalities == 'text':
    raise PromptError("ends inside a picture, which modalities='text' cannot finish; add end_image or ask for 'mixed'")
  if codes > n or (codes == n and options.modalities == 'image'):
    raise PromptError(f'ends in a picture of {codes} codes without end_image; a picture has {n}')
  needed = n - codes + (options.modalities == 'mixed')
  if len(prompt) + needed > context:
    raise PromptError(f'has {len(prompt)} tokens, its picture needs {needed} more, the context is {context}; shorten it')
  if needed > budget:
    raise PromptError(f'has a picture that needs {needed} tokens; raise max_new_tokens, now {options.max_new_tokens}')
  if options.modalities == 'image':
    return prompt, codes, needed
  _check_room(options, limits, position=len(prompt) + needed, remaining=room - needed, owed=options.min_images - 1)
  return prompt, codes, room


def _check_ids(ids: Sequence[int], what: str, vocabulary: Vocabulary) -> None:
  for token in ids:
    if not 0 <= token < vocabulary.size:
      raise PromptError(f'{what} {token}, outside the vocabulary of {vocabulary.size}')


def _check_options(options: SamplingOptions, limits: Limits) -> None:
  """What options cannot ask of this model."""
  n, vocabulary = limits.n_image_tokens, limits.vocabulary
  if len(options.prefix) > options.max_new_tokens:
    raise PromptError(f'has the option prefix with {len(options.prefix)} tokens; raise max_new_tokens, now {options.max_new_tokens}')
  if options.min_images and vocabulary.begin_image in (*options.banned_tokens, *options.stop_tokens):
    raise PromptError(f'asks for {options.min_images} pictures and bans begin_image ({vocabulary.begin_image}) or stops at it')
  if options.modalities == 'image' and options.min_images > 1:
    raise PromptError(f"asks for {options.min_images} pictures with modalities='image', which writes one; use 'mixed'")
  fixed = options.fixed_codes
  if fixed is None:
    return
  if options.modalities == 'text':
    raise PromptError("has fixed_codes with modalities='text'; ask for 'image' or 'mixed'")
  if len(fixed) != n:
    raise PromptError(f'has the option fixed_codes with {len(fixed)} entries, a picture has {n} codes')
  for place, code in enumerate(fixed):
    if code is not None and not 0 <= code < vocabulary.n_codes:
      raise PromptError(f'has the option fixed_codes with code {code} at {place}, outside the codebook of {vocabulary.n_codes}')


def _check_pictures(prompt: np.ndarray, vocabulary: Vocabulary) -> None:
  """No picture begins inside an unfinished one."""
  marks = [place for place, token in enumerate(prompt) if token in (vocabulary.begin_image, vocabulary.end_image)]
  for before, after in zip(marks, marks[1:]):
    if prompt[before] == prompt[after] == vocabulary.begin_image:
      raise PromptError(f'begins a picture at token {after}, inside the unfinished picture that began at {before}; add end_image')


def _check_room(options: SamplingOptions, limits: Limits, *, position: int, remaining: int, owed: int) -> None:
  """The pictures that must still be written fit the budget and the context (rules at the top of `modality`)."""
  if owed <= 0:
    return
  picture = limits.n_image_tokens + 2
  if remaining < owed * picture or position + (owed - 1) * picture >= limits.max_seq_len - picture:
    raise PromptError(
      f'asks for {options.min_images} pictures of {picture} tokens, has room for {remaining} tokens '
      f'(max_new_tokens {options.max_new_tokens}, context {limits.max_seq_len})'
    )
