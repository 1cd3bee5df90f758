"""An iterator of events over requests that share an engine; requests can be cancelled one by one or all together.

    with Stream(engine, prompts, options, vocabulary=..., text_tokenizer=..., n_image_tokens=..., decode=...) as stream:
      for event in stream:
        if isinstance(event, TextPiece):
          ...

One round of the engine (`max_steps` steps on the device) is run when events are asked for and none is left; what became
due in it is decoded together. Knows tokens and events, no documents: `Chameleon.stream` makes the prompts. Source:
architecture.md 4.
"""

import collections
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np

from chameleon_jax.config import SamplingOptions
from chameleon_jax.errors import ChameleonError, ConfigError, PromptError
from chameleon_jax.sampling.assembler import Assembler, Decode, decoded
from chameleon_jax.sampling.events import Event, Failed
from chameleon_jax.sampling.requests import Progress, open_codes
from chameleon_jax.tokens.text import TextTokenizer
from chameleon_jax.tokens.vocabulary import Vocabulary


@runtime_checkable
class EngineLike(Protocol):
  """What a stream asks of `engine.Engine`, which stands a level above this file."""

  def submit(self, prompt: np.ndarray, options: SamplingOptions, *, row: int, name: str) -> int:
    """Queues a request and returns its ticket; raises PromptError where it cannot be done."""
    ...

  def cancel(self, ticket: int) -> None:
    """Ends a request; its last report says 'cancelled'."""
    ...

  @property
  def pending(self) -> bool:
    """Whether requests are queued or under way."""
    ...

  def advance(self, max_steps: int) -> Sequence[Progress]:
    """Runs up to `max_steps` steps and reports what each request gained."""
    ...


class Stream:
  """Events of all requests as they come; see `events`.

  Leaving a `for` loop over it, an error, `close`, the end of a `with` block and losing the last reference to it all cancel
  whatever is still under way. A request draws what it would draw in `Engine.generate_tokens` with the same prompts.
  """

  def __init__(
    self,
    engine: EngineLike,
    prompts: Sequence[np.ndarray | ChameleonError],
    options: SamplingOptions | Sequence[SamplingOptions],
    *,
    vocabulary: Vocabulary,
    text_tokenizer: TextTokenizer,
    n_image_tokens: int,
    decode: Decode | None = None,
    max_steps: int = 16,
    preview_every: int | None = None,
  ):
    """Submits every request; one that cannot be done becomes a `Failed` event, the others go on.

    Args:
      engine: runs them; it may be at work for others too, as long as only this stream asks it for reports.
      prompts: int [T] of each request, or the error that kept its prompt from being made.
      options: for all requests, or one each.
      vocabulary: the token table.
      text_tokenizer: decodes text pieces.
      n_image_tokens: codes of one picture.
      decode: codes int32 [B, n] -> pictures uint8 [B, H, W, 3]; None leaves pictures undecoded.
      max_steps: decode steps between two looks at what came: few for lively text, many for speed.
      preview_every: rows of codes between two previews of a picture; None for no previews.

    Raises:
      ConfigError: `max_steps` or `preview_every` is not positive.
      PromptError: not as many options as prompts.
    """
    if max_steps < 1 or (preview_every is not None and preview_every < 1):
      raise ConfigError(f'max_steps and preview_every must be positive, got {max_steps} and {preview_every}')
    each = [options] * len(prompts) if isinstance(options, SamplingOptions) else list(options)
    if len(each) != len(prompts):
      raise PromptError(f'{len(prompts)} prompts and {len(each)} options; give one for all, or one for each')
    self._engine = engine
    self._decode = decode
    self._n_image_tokens = n_image_tokens
    self._max_steps = max_steps
    self._previews = preview_every is not None
    self._n_requests = len(prompts)
    self._ready: collections.deque[Event] = collections.deque()
    self._open: dict[int, Assembler] = {}  # by ticket
    weakref.finalize(self, _cancel_all, engine, self._open)
    try:
      for request, (prompt, option) in enumerate(zip(prompts, each)):
        try:
          if isinstance(prompt, ChameleonError):
            raise prompt
          ticket = engine.submit(prompt, option, row=request, name=f'prompt {request}')
        except ChameleonError as error:
          self._ready.append(Failed(request, str(error)))
          continue
        self._open[ticket] = Assembler(
          request,
          vocabulary,
          text_tokenizer,
          n_image_tokens=n_image_tokens,
          preview_every=preview_every,
          given_codes=_given_codes(np.asarray(prompt), vocabulary),
        )
    except BaseException:
      self.close()
      raise

  def __iter__(self) -> Iterator[Event]:
    """All events; leaving the loop early cancels the rest."""
    try:
      while True:
        try:
          event = next(self)
        except StopIteration:
          return
        yield event
    finally:
      self.close()

  def __next__(self) -> Event:
    """The next event; runs the engine where none is waiting."""
    while not self._ready:
      if not self._open:
        raise StopIteration
      try:
        self._advance()
      except BaseException:
        self.close()
        raise
    return self._ready.popleft()

  def cancel(self, request: int) -> None:
    """Ends one request: its last event is `Ended` with the reason 'cancelled' and what it has. One that has ended stays so.

    Raises:
      PromptError: there is no such request.
    """
    if not 0 <= request < self._n_requests:
      raise PromptError(f'there is no request {request} to cancel; they are 0 to {self._n_requests - 1}')
    for ticket, assembler in self._open.items():
      if assembler.request == request:
        self._engine.cancel(ticket)

  def close(self) -> None:
    """Cancels all that is under way; no events follow."""
    self._ready.clear()
    _cancel_all(self._engine, self._open)

  def __enter__(self) -> 'Stream':
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    self.close()

  def _advance(self) -> None:
    """Runs the engine once and queues the events of its reports."""
    reports = [report for report in self._engine.advance(self._max_steps) if report.ticket in self._open]
    if not reports and not self._engine.pending:
      lost = list(self._open.values())
      self._open.clear()
      for assembler in lost:
        self._ready += assembler.fail('its reports went to another caller of the engine; run one stream at a time')
      return
    read = [self._open[report.ticket].read(report.tokens) for report in reports]
    flat = [event for events in read for event in events]
    pictured = iter(decoded(flat, self._decode, n_image_tokens=self._n_image_tokens, previews=self._previews))
    for report, events in zip(reports, read):
      assembler = self._open[report.ticket]
      self._ready += assembler.keep([next(pictured) for _ in events])
      if report.finished is None:
        continue
      del self._open[report.ticket]
      if report.finished == 'failed':
        self._ready += assembler.fail(report.error or 'failed')
      else:
        self._ready += assembler.finish(report.finished)


def _cancel_all(engine: EngineLike, tickets: dict[int, Assembler]) -> None:
  for ticket in tickets:
    engine.cancel(ticket)
  tickets.clear()


def _given_codes(prompt: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  """Codes of the picture that a prompt leaves open."""
  n = open_codes(prompt, vocabulary) or 0
  return vocabulary.tokens_to_codes(prompt[len(prompt) - n :])
