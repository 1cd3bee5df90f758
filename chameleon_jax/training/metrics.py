"""Where the numbers of a run go: a JSON-lines file, TensorBoard event files, and a line a person can watch.

The writer does not know what is measured; `StepLog` knows the metrics of the transformer's step. Only the first process of a
multi-host run writes.
"""

import collections
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter


def duration(seconds: float) -> str:
  """Seconds for people.

  Example:
    duration(42) == '42s'; duration(754) == '12m34s'; duration(7384) == '2h03m'
  """
  seconds = max(0, int(seconds + 0.5))
  if seconds < 60:
    return f'{seconds}s'
  if seconds < 3600:
    return f'{seconds // 60}m{seconds % 60:02d}s'
  return f'{seconds // 3600}h{seconds % 3600 // 60:02d}m'


def figure(value: float) -> str:
  """A number in four digits or so.

  Example:
    figure(3.14159) == '3.142'; figure(0.000123) == '1.23e-04'; figure(51234.0) == '51,234'; figure(7) == '7'
  """
  if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 10_000):
    return f'{value:,.0f}'
  if value != 0 and abs(value) < 0.01:
    return f'{value:.2e}'
  return f'{value:.4g}'


class MetricsWriter:
  """Writes `workdir/metrics.jsonl` and `workdir/tensorboard/`, and the progress line (to `stream`, a text file; stderr by default).

  A line of metrics.jsonl is `{"step": 20, "time": <seconds since 1970>, "train/loss": 3.2, ...}`. A resumed run calls `rewind` and
  appends, so each step has one line of each prefix, and the lines are those of a run that was never interrupted.
  """

  def __init__(self, workdir: str | os.PathLike, *, total_steps: int, stream: Any = None):
    self.total_steps = total_steps
    self._stream = sys.stderr if stream is None else stream
    self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=32)  # (time, step) of the last progress lines
    self._active = jax.process_index() == 0
    if self._active:
      self._workdir = Path(workdir)
      self._workdir.mkdir(parents=True, exist_ok=True)
      self._open(None)

  def _open(self, purge_step: int | None) -> None:
    self._jsonl = (self._workdir / 'metrics.jsonl').open('a', encoding='utf-8', buffering=1)
    self._events = SummaryWriter(str(self._workdir / 'tensorboard'), purge_step=purge_step, flush_secs=30)

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
    self.close()

  def rewind(self, step: int) -> None:
    """Takes back what was written for the steps after `step`, which the run does again, and a line that a kill cut off.

    TensorBoard is told to forget them; its old files stay.
    """
    if not self._active:
      return
    path = self._workdir / 'metrics.jsonl'
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True)
    kept = [line for line in lines if _is_whole(line) and json.loads(line)['step'] <= step]
    if len(kept) == len(lines):
      return
    self._jsonl.close()
    self._events.close()
    aside = path.with_suffix('.writing')
    aside.write_text(''.join(kept), encoding='utf-8')
    os.replace(aside, path)
    self._open(step + 1)
    self.say(f'{path}: {len(lines) - len(kept):,} lines after step {step:,} taken back')

  def write(self, step: int, values: Mapping[str, float], *, prefix: str = 'train') -> None:
    """Records scalars of one step under `prefix/name`; values that are not finite are kept as strings in the JSON."""
    if not self._active:
      return
    numbers = {f'{prefix}/{name}': float(value) for name, value in values.items()}
    plain = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
    self._jsonl.write(json.dumps({'step': int(step), 'time': round(time.time(), 3), **plain}) + '\n')
    for name, value in numbers.items():
      if math.isfinite(value):
        self._events.add_scalar(name, value, int(step))

  def show(self, step: int, name: str, *, text: str, pictures: Sequence[np.ndarray] = ()) -> None:
    """Puts a text, and pictures uint8 [H, W, 3], into TensorBoard."""
    if not self._active:
      return
    self._events.add_text(name, text, int(step))
    for number, picture in enumerate(pictures, start=1):
      self._events.add_image(f'{name}/picture_{number}', picture, int(step), dataformats='HWC')

  def progress(self, step: int, values: Mapping[str, float], *, note: str = '') -> None:
    """Prints one line on stderr: the step, the values, steps a second over the last lines, and the time left.

    Example:
      step 120/1,000 (12%)  loss 3.214  tok/s 4,120  1.9 steps/s  7m43s left
    """
    if not self._active:
      return
    now = time.monotonic()
    parts = [f'step {step:,}/{self.total_steps:,} ({100 * step // max(1, self.total_steps)}%)']
    parts += [f'{name} {figure(value)}' for name, value in values.items()]
    self._recent.append((now, step))
    seconds, done = now - self._recent[0][0], step - self._recent[0][1]
    if done > 0 and seconds > 0:
      parts += [f'{figure(done / seconds)} steps/s', f'{duration((self.total_steps - step) * seconds / done)} left']
    print('  '.join(parts + ([note] if note else [])), file=self._stream, flush=True)

  def say(self, text: str) -> None:
    """Prints a line of plain words to the same place."""
    if self._active:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._active:
      self._jsonl.close()
      self._events.close()
      self._active = False


def _is_whole(line: str) -> bool:
  """Whether it is a line of metrics.jsonl, to its end."""
  try:
    values = json.loads(line)
  except ValueError:
    return False
  return line.endswith('\n') and isinstance(values, dict) and isinstance(values.get('step'), int)


class StepLog:
  """Collects the metrics of the steps since the last line."""

  def __init__(self, writer: MetricsWriter, *, parts: int | None = None):
    self._writer = writer
    self._parts = jax.process_count() if parts is None else parts  # of which a batch consists; each of them is one host's
    self._reset()

  def _reset(self) -> None:
    self._metrics: list[Mapping[str, Any]] = []
    self._n_tokens, self._n_positions, self._waited, self._paused = 0, 0, 0.0, 0.0
    self._began = time.monotonic()

  def add(self, metrics: Mapping[str, Any], batch: Mapping[str, np.ndarray], waited: float) -> None:
    """Takes one step; device values are not fetched yet. Hosts are taken to have equally full batches."""
    self._metrics.append(metrics)
    self._n_tokens += int(np.count_nonzero(batch['segment_ids'])) * self._parts
    self._n_positions += batch['tokens'].size * self._parts
    self._waited += waited

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """What happens inside does not count as time of the steps."""
    began = time.monotonic()
    yield
    self._paused += time.monotonic() - began

  def write(self, step: int, *, dropped: int) -> None:
    """Means over the steps since the last call: losses over tokens, the rest over steps."""
    fetched = jax.device_get(self._metrics)
    values: dict[str, float] = {}
    for name in fetched[0]:
      values[name] = float(np.mean([metrics[name] for metrics in fetched]))
    for modality in ('text', 'image'):
      counts = np.array([metrics[f'n_{modality}'] for metrics in fetched], np.float64)
      losses = np.array([metrics[f'loss_{modality}'] for metrics in fetched], np.float64)
      values.pop(f'loss_{modality}')
      if counts.sum() > 0:
        values[f'loss_{modality}'] = float(np.sum(np.where(counts > 0, losses, 0) * counts) / counts.sum())
    values['learning_rate'] = float(fetched[-1]['learning_rate'])
    del values['finite']
    seconds = max(1e-9, time.monotonic() - self._began - self._paused)
    values['tokens_per_second'] = self._n_tokens / seconds
    values['fill'] = self._n_tokens / self._n_positions
    values['data_wait_ms'] = 1000 * self._waited / len(fetched)
    values['data_wait_fraction'] = self._waited / seconds
    values['dropped_documents'] = float(dropped)
    self._writer.write(step, values)
    shown = {name.removeprefix('loss_'): values[name] for name in ('loss', 'loss_text', 'loss_image') if name in values}
    self._writer.progress(step, {**shown, 'tok/s': round(values['tokens_per_second'])})
    self._reset()
