"""Signals: what they set, that the process ends in the stated time even inside a long call, and that nothing is left behind."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from chameleon_jax.training.interruption import InterruptedRunError, Interruption

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _wait_for(condition, seconds=5.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_and_the_old_handlers_come_back(number, capfd):
  before = {signal.SIGTERM: signal.getsignal(signal.SIGTERM), signal.SIGINT: signal.getsignal(signal.SIGINT)}
  with Interruption(60) as interruption:
    assert interruption.number == 0
    os.kill(os.getpid(), number)
    _wait_for(lambda: interruption.number == number)
    _wait_for(lambda: 'saving and stopping within 60 s' in capfd.readouterr().err)
  assert {number: signal.getsignal(number) for number in before} == before
  assert signal.set_wakeup_fd(-1) == -1
  _wait_for(lambda: not any(thread.name in ('interruption', 'grace') for thread in threading.enumerate()))


def test_a_second_interrupt_stops_at_once():
  with Interruption(60) as interruption:
    os.kill(os.getpid(), signal.SIGINT)
    _wait_for(lambda: interruption.number == signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(5)


def test_the_first_signal_counts():
  with Interruption(60) as interruption:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
      os.kill(os.getpid(), number)
      _wait_for(lambda: interruption.number == signal.SIGTERM)


def test_outside_the_main_thread_signals_are_left_alone():
  before, seen = signal.getsignal(signal.SIGTERM), []

  def run():
    with Interruption(60) as interruption:
      seen.append((signal.getsignal(signal.SIGTERM), interruption.number))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [(before, 0)]


SCRIPT = """
import hashlib
from chameleon_jax.training.interruption import Interruption
with Interruption(0.5):
  print('ready', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)  # minutes in C, where Python handles no signal
"""


def test_the_process_ends_when_the_grace_is_over_whatever_it_does():
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen(
      [sys.executable, '-c', SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  try:
    assert process.stdout.readline() == 'ready\n'
    began = time.monotonic()
    process.terminate()
    _, said = process.communicate(timeout=30)
  finally:
    process.kill()
  assert process.returncode == 1
  assert 0.4 < time.monotonic() - began < 10
  assert said.splitlines() == [
      'chameleon: SIGTERM: saving and stopping within 0.5 s',
      'chameleon: SIGTERM: not saved within 0.5 s; stopped, the last checkpoint is intact',
  ]


def test_exit_codes_are_those_of_shells():
  assert InterruptedRunError(signal.SIGTERM, 1200).exit_code == 143
  assert InterruptedRunError(signal.SIGINT, 1200).exit_code == 130
  assert str(InterruptedRunError(signal.SIGTERM, 1200)).startswith('stopped by SIGTERM after step 1,200; it is saved')
