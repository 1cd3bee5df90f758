"""Traces of a running training, for TensorBoard's and XProf's profile page: asked for by steps, or by a file.

    chameleon train ... --profile_steps=100:105      steps 100 to 105, both included
    touch WORKDIR/profile                            the next 5 steps of a run under way; `echo 20 > WORKDIR/profile` for 20

A trace lies in WORKDIR/profile_FIRST_LAST, with a file for every host. The file that asks is removed when its trace begins. Of several
hosts the first looks for it, at steps that are logged, and all begin together.

Does not know what a step does.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from chameleon_jax.errors import ConfigError

_STEPS_ASKED_BY_FILE = 5
_SECONDS_BETWEEN_LOOKS = 1.0  # a look at a network disk may take milliseconds


def parse_steps(text: str) -> tuple[int, int]:
  """'100:105' -> (100, 105).

  Raises:
    ConfigError: it is no such pair.
  """
  first, colon, last = text.partition(':')
  if not (colon and first.strip().isdigit() and last.strip().isdigit() and 1 <= int(first) <= int(last)):
    raise ConfigError(f'--profile_steps={text}: write FIRST:LAST, two steps from 1 on, such as 100:105')
  return int(first), int(last)


class Profiler:
  """Starts and stops traces between the steps of a loop.

  Args:
    workdir: where traces go and the file is looked for.
    steps: first and last step to trace.
    say: prints a line.
    agree: makes the first host's flag everyone's; None on one host, where the file may be looked for at any step.
  """

  def __init__(
      self,
      workdir: Path,
      steps: tuple[int, int] | None = None,
      *,
      say: Callable[[str], None] = print,
      agree: Callable[[int], int] | None = None,
  ):
    self._workdir, self._steps, self._say, self._agree = workdir, steps, say, agree
    self._request = workdir / 'profile'
    self._last: int | None = None  # of the trace under way
    self._directory = workdir
    self._looked = -_SECONDS_BETWEEN_LOOKS

  def before(self, step: int, *, look: bool) -> None:
    """Called before `step` starts. `look`: whether all hosts are at a step where they may talk."""
    if self._last is not None:
      return
    if self._steps is not None and self._steps[0] <= step <= self._steps[1]:
      self._start(step, self._steps[1])
    elif self._agree is None or look:
      n_steps = self._asked()
      if n_steps:
        self._start(step, step + n_steps - 1)

  def after(self, step: int, results: Any) -> None:
    """Called when `step` was started; `results` are arrays that it makes."""
    if self._last is not None and step >= self._last:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """Ends the trace under way, if there is one."""
    if self._last is None:
      return
    self._last = None
    jax.profiler.stop_trace()
    self._say(f'profile: {self._directory} (tensorboard --logdir={self._directory}, with tensorboard-plugin-profile)')

  def _start(self, first: int, last: int) -> None:
    self._directory = self._workdir / f'profile_{first}_{last}'
    jax.profiler.start_trace(str(self._directory))
    self._last = last

  def _asked(self) -> int:
    """Steps that the file asks for, 0 where there is none; takes the file away."""
    n_steps = 0
    if self._agree is not None or time.monotonic() - self._looked >= _SECONDS_BETWEEN_LOOKS:
      self._looked = time.monotonic()
      if jax.process_index() == 0:
        n_steps = self._take_request()
    return n_steps if self._agree is None else self._agree(n_steps)

  def _take_request(self) -> int:
    try:
      text = self._request.read_text(encoding='utf-8', errors='replace').strip()
      self._request.unlink()
    except OSError:
      return 0
    return max(1, int(text)) if text.isdigit() else _STEPS_ASKED_BY_FILE
