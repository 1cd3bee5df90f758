"""Finds jumps of the loss, and keeps the books of the batches that a run has thrown away because of them.

A loss is a spike where it is not finite, or where

    z = (loss - median) / deviation > threshold,      deviation = max(1.4826 x median |loss - median|, min_deviation)

over the last `window` losses, once there are so many; median and MAD, since a spike must not widen the measure that should find it.

The data is one endless row of batches, numbered from 1. A run goes back to the parameters of its newest checkpoint K and goes on with
the data behind the spike; here step 7 spiked, with K = 4 and `skip_batches` 2:

    batch   1 2 3 4 5 6 7 8 9 10 11 12
    step    1 2 3 4 x x x x x 5  6  7           x: never seen by the run that goes on

so step n of a run has seen the n-th batch that was not thrown away. The books (batch number, pieces thrown away, losses of the window,
rewinds so far) are saved with every checkpoint: a run that is killed and resumed finds the same spikes and throws away the same batches.

Losses are the same number on all hosts, being replicated outputs of one program, so all hosts decide alike without a word.
Method: arXiv 2204.02311, section 5.1 (PaLM went back about 100 steps and skipped 200 to 500 batches by hand).
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from chameleon_jax.config import SpikeConfig
from chameleon_jax.training.checkpoint import Checkpoints
from chameleon_jax.training.metrics import MetricsWriter, figure


@dataclasses.dataclass(frozen=True)
class Spike:
  """A step whose loss jumped: its number, that of its batch, and how far out it was (inf where it is not finite)."""

  step: int
  batch: int
  loss: float
  gradient_norm: float
  z_score: float
  finite: bool


def z_score(loss: float, losses: Sequence[float], *, min_deviation: float) -> float:
  """Robust standard deviations of `loss` above the median of `losses`.

  Example:
    z_score(5.0, [1, 2, 2, 2, 3], min_deviation=0.5) == (5 - 2) / 0.5      the MAD is 0
  """
  values = np.asarray(losses, np.float64)
  median = float(np.median(values))
  return (loss - median) / max(1.4826 * float(np.median(np.abs(values - median))), min_deviation)


class SpikeGuard:
  """Reads the losses of a run in the order of its steps.

  Attributes:
    batch: number of the last batch that was drawn.
    skipped: (first, last) numbers of the batches thrown away, oldest first.
    rewinds: how often the run went back.
  """

  def __init__(self, config: SpikeConfig):
    self._config = config
    self._losses: collections.deque[float] = collections.deque(maxlen=config.window)
    self._pending: collections.deque[tuple[int, int, Mapping[str, Any]]] = collections.deque()
    self.batch, self.rewinds = 0, 0
    self.skipped: list[tuple[int, int]] = []

  def add(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Takes note of a step that was started with the next batch; nothing is fetched."""
    self.batch += 1
    self._pending.append((step, self.batch, {name: metrics[name] for name in ('loss', 'gradient_norm', 'finite')}))

  def judge(self, *, wait: bool) -> Spike | None:
    """The first spike among the steps not looked at so far; without `wait` the newest step is left, so the device need not pause."""
    while len(self._pending) > (0 if wait else 1):
      step, batch, metrics = self._pending.popleft()
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
      loss, norm, finite = values['loss'], values['gradient_norm'], values['finite'] == 1.0
      if not finite:
        return Spike(step, batch, loss, norm, math.inf, False)
      threshold, full = self._config.threshold, len(self._losses) == self._config.window
      score = z_score(loss, self._losses, min_deviation=self._config.min_deviation) if threshold is not None and full else 0.0
      if threshold is not None and score > threshold:
        if not self.may_rewind:
          self._losses.append(loss)
        return Spike(step, batch, loss, norm, score, True)
      if threshold is not None:
        self._losses.append(loss)
    return None

  @property
  def may_rewind(self) -> bool:
    """Whether the config allows one more."""
    return self._config.threshold is not None and self.rewinds < self._config.max_rewinds

  def rewind(self, spike: Spike, books: Mapping[str, Any] | None) -> int:
    """Books the return to a checkpoint; returns how many batches to draw and throw away now.

    Args:
      spike: why.
      books: of the checkpoint; None for the start of the run.
    """
    first, last = (0 if books is None else int(books['batch'])) + 1, spike.batch + self._config.skip_batches
    n_to_draw = last - self.batch
    self._pending.clear()
    self._losses.clear()
    self._losses.extend([] if books is None else books['losses'])
    self.skipped = [piece for piece in self.skipped if piece[1] < first] + [(first, last)]
    self.batch, self.rewinds = last, self.rewinds + 1
    return n_to_draw

  def books(self) -> dict[str, Any]:
    """What a checkpoint must hold, as JSON values. Every step that was added must have been judged."""
    assert not self._pending, 'a checkpoint was saved before its loss was looked at'
    return {'batch': self.batch, 'skipped': [list(piece) for piece in self.skipped], 'losses': list(self._losses), 'rewinds': self.rewinds}

  def restore(self, books: Mapping[str, Any] | None, *, step: int) -> None:
    """Takes over the books of the checkpoint of `step`; None where it has none: then every step saw the batch of its number."""
    books = books or {'batch': step, 'skipped': [], 'losses': [], 'rewinds': 0}
    self.batch, self.rewinds = int(books['batch']), int(books['rewinds'])
    self.skipped = [(int(first), int(last)) for first, last in books['skipped']]
    self._losses.clear()
    self._losses.extend(float(loss) for loss in books['losses'])


def go_back(guard: SpikeGuard, spike: Spike, *, checkpoints: Checkpoints, batches: Iterator[Any], writer: MetricsWriter) -> int | None:
  """Moves books and data behind a spike, and says so; returns the step whose parameters come next, None for those of the start."""
  checkpoints.wait()
  kept = checkpoints.latest_step()
  books = None if kept is None else checkpoints.notes(kept).get('spikes') or {'batch': kept, 'losses': []}
  for _ in range(guard.rewind(spike, books)):
    next(batches)
  writer.rewind(kept or 0)  # the steps behind it are done again
  first, last = guard.skipped[-1]
  values = {'loss': spike.loss, 'z_score': spike.z_score, 'rewound_to': kept or 0, 'first_skipped': first, 'last_skipped': last}
  writer.write(spike.step, values, prefix='spike')
  where = 'the start' if kept is None else f'the checkpoint of step {kept:,}'
  writer.say(f'{_described(spike)}; back to {where}, {last - first + 1} batches skipped ({first:,} to {last:,})')
  return kept


def report(spike: Spike, writer: MetricsWriter) -> None:
  """Says that a spike was seen and left as it is."""
  writer.write(spike.step, {'loss': spike.loss, 'z_score': spike.z_score}, prefix='spike')
  writer.say(f'{_described(spike)}; left as it is: spikes.max_rewinds is reached')


def _described(spike: Spike) -> str:
  return f'step {spike.step:,}: the loss {figure(spike.loss)} is a spike (z-score {spike.z_score:.1f})'


def batch_of_step(step: int, skipped: Sequence[Sequence[int]]) -> int:
  """Number of the batch that a step saw: the `step`-th that is in none of the pieces thrown away, which may overlap.

  Example:
    batch_of_step(5, [(5, 9)]) == 10
  """
  batch = step
  for first, last in _joined(skipped):
    if batch < first:
      break
    batch += last - first + 1
  return batch


def _joined(pieces: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
  """The same numbers as pieces that neither overlap nor touch, in order."""
  found: list[tuple[int, int]] = []
  for first, last in sorted((int(first), int(last)) for first, last in pieces):
    if found and first <= found[-1][1] + 1:
      found[-1] = (found[-1][0], max(last, found[-1][1]))
    else:
      found.append((first, last))
  return found
