"""SIGTERM and SIGINT end a run at the next step, with a checkpoint, and in a stated time whatever happens.

    the cluster            this process
    SIGTERM          ->    the step that runs is finished, its state saved, `InterruptedRunError` raised: exit code 143
                           or, `grace_seconds` after the signal: exit code 1, the checkpoint before is intact
    SIGINT, Ctrl-C   ->    the same with exit code 130; a second one stops at once, without a checkpoint

Notices of preemption reach a process as SIGTERM (Slurm, Kubernetes, cloud machines). On several hosts it is enough that one of
them gets the signal: all save the same step. The handlers must be installed after `jax.distributed.initialize`, whose own would
otherwise replace them; entering `Interruption` in a run's loop does that.

Does not know what is saved.
"""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from chameleon_jax.errors import ChameleonError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GAVE_UP = 1  # exit code where the grace ran out


class InterruptedRunError(ChameleonError):
  """The run was told to stop; its state is saved. `exit_code` is 128 and the signal's number, as shells have it."""

  def __init__(self, number: int, step: int):
    super().__init__(f'stopped by {signal.Signals(number).name} after step {step:,}; it is saved, and the same command goes on from there')
    self.exit_code = 128 + number


class Interruption:
  """While entered, signals set `number` instead of killing the process, and start the countdown.

  A thread of its own hears the signals, since Python runs handlers between two instructions of the main thread only, which may be
  inside a compilation of minutes. Outside the main thread signals cannot be handled; there it does nothing.
  """

  def __init__(self, grace_seconds: float):
    self.number = 0  # of the first signal
    self._interrupts = 0
    self._grace_seconds = grace_seconds
    self._old_handlers: dict[int, Any] = {}
    self._old_fd = -1
    self._reader, self._writer = -1, -1
    self._left = threading.Event()
    self._counting = threading.Lock()

  def __enter__(self) -> 'Interruption':
    if threading.current_thread() is not threading.main_thread():
      return self
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._old_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    self._old_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
    threading.Thread(target=self._listen, daemon=True, name='interruption').start()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
    self._left.set()
    if not self._old_handlers:
      return
    for number, handler in self._old_handlers.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None is a handler from outside Python
    signal.set_wakeup_fd(self._old_fd, warn_on_full_buffer=False)
    os.close(self._writer)  # the listener reads the end and closes its side
    self._old_handlers = {}

  def stop(self, number: int) -> None:
    """What a signal does, from the listener, or for one that came to another host: sets `number` and starts the countdown."""
    self.number = self.number or number
    if self._counting.acquire(blocking=False):
      threading.Thread(target=self._count_down, args=(number,), daemon=True, name='grace').start()

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self.number = self.number or number
    self._interrupts += number == signal.SIGINT
    if self._interrupts > 1:
      raise KeyboardInterrupt

  def _listen(self) -> None:
    """Reads the number of every signal from the pipe that Python writes it to, whatever the main thread does."""
    heard = False
    while numbers := os.read(self._reader, 1):
      if numbers[0] in SIGNALS and not heard:
        heard = True
        self._say(f'{signal.Signals(numbers[0]).name}: saving and stopping within {self._grace_seconds:g} s')
        self.stop(numbers[0])
    os.close(self._reader)

  def _count_down(self, number: int) -> None:
    if not self._left.wait(self._grace_seconds):
      self._say(f'{signal.Signals(number).name}: not saved within {self._grace_seconds:g} s; stopped, the last checkpoint is intact')
      os._exit(GAVE_UP)

  @staticmethod
  def _say(text: str) -> None:
    print(f'chameleon: {text}', file=sys.stderr, flush=True)
