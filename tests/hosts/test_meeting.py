"""Meetings inside a run: a store in memory stands for jax's coordinator, one thread for each host."""

import concurrent.futures
import threading
import types

import jax
import pytest

from chameleon_jax.errors import CheckpointError, HostError
from chameleon_jax.hosts import meeting


class Store:
  """The part of the coordinator's client that is used, with its blocking read and its error."""

  def __init__(self):
    self.values, self.changed = {}, threading.Condition()

  def key_value_set(self, key, value):
    with self.changed:
      assert key not in self.values, key  # the coordinator refuses to overwrite, too
      self.values[key] = value
      self.changed.notify_all()

  def key_value_dir_get(self, prefix):
    return [(key, value) for key, value in list(self.values.items()) if key.startswith(prefix)]

  def blocking_key_value_get(self, key, timeout_in_ms):
    with self.changed:
      if not self.changed.wait_for(lambda: key in self.values, timeout=timeout_in_ms / 1000):
        raise jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED')
      return self.values[key]


class Hosts(threading.local):
  """`jax._src.distributed.global_state`, another one in each thread."""

  client, process_id, num_processes = None, 0, 1


@pytest.fixture
def meet_as(monkeypatch):
  state, store, counts = Hosts(), Store(), threading.local()
  monkeypatch.setattr(meeting, 'distributed', types.SimpleNamespace(global_state=state))
  monkeypatch.setattr(meeting, '_machines', {0: 'a', 1: 'b', 2: 'c'})

  class Counter:
    """One counter of meetings a thread."""

    def __getitem__(self, name):
      return counts.__dict__.get(name, 0)

    def __setitem__(self, name, value):
      counts.__dict__[name] = value

  monkeypatch.setattr(meeting, '_meetings', Counter())

  def together(*hosts, times=1):
    """hosts: (process, error, timeout) -> what each call of `meet` raised, None for nothing."""

    def one(process, error, timeout):
      state.client, state.process_id, state.num_processes = store, process, 3
      found = []
      for _ in range(times):
        try:
          meeting.meet('model folder', error=error, timeout=timeout)
          found.append(None)
        except (HostError, CheckpointError) as raised:
          found.append(raised)
      return found

    with concurrent.futures.ThreadPoolExecutor(len(hosts)) as pool:
      return [job.result(timeout=30) for job in [pool.submit(one, *host) for host in hosts]]

  return together


def test_all_meet_as_often_as_they_like(meet_as):
  assert meet_as((0, None, 20), (1, None, 20), (2, None, 20), times=3) == [[None] * 3] * 3


def test_an_error_of_one_is_an_error_of_all(meet_as):
  full = CheckpointError('the disk\nis full')
  (zero,), (one,), (two,) = meet_as((0, full, 20), (1, None, 20), (2, None, 20))
  assert zero is full
  assert str(one) == str(two) == "process 0 (a) failed at 'model folder': the disk is full"


def test_who_does_not_come_is_named(meet_as):
  (zero,), (one,) = meet_as((0, None, 0.3), (1, None, 0.3))
  assert str(zero) == str(one) == "process 2 (c) did not come to 'model folder' within 0.3 s; look at the logs there"


def test_a_missing_first_process_is_named(meet_as):
  (one,), (two,) = meet_as((1, None, 0.2), (2, None, 0.2))
  assert str(one) == str(two) == "process 0 (a) did not come to 'model folder' within 0.2 s; look at the log there"


def test_alone_nobody_waits():
  meeting.meet('model folder')
  with pytest.raises(CheckpointError, match='full'):
    meeting.meet('model folder', error=CheckpointError('full'))
  assert meeting.is_first() and meeting.leave() is None
