"""The frame around a run on several hosts: joined before the block, and no host waits for one that failed."""

import jax
import pytest
from absl import flags

from chameleon_jax import hosts
from chameleon_jax.cli import hosts as frame
from chameleon_jax.config import CheckpointConfig
from chameleon_jax.errors import DataError


@pytest.fixture
def joined(monkeypatch):
  """What `hosts.start` was called with, flags defined for process 1 of 2, and 'the end of the process' as an exception."""
  found, before = [], set(flags.FLAGS)
  frame.define_hosts()
  flags.FLAGS(['x', '--coordinator_address=127.0.0.1:1', '--num_processes=2', '--process_id=1', '--host_timeout=7'])
  monkeypatch.setattr(hosts, 'start', lambda place, facts, *, timeout: found.append((place, facts, timeout)))

  def end(code):
    raise SystemExit(code)

  monkeypatch.setattr(frame.os, '_exit', end)
  yield found
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()


def test_the_hosts_are_joined_before_the_block(joined):
  with frame.all_hosts(CheckpointConfig(every_steps=3), stop_after=5):
    ((place, facts, timeout),) = joined
  assert place == hosts.Place('127.0.0.1:1', 2, 1) and timeout == 7
  assert (facts['config.every_steps'], facts['--stop_after']) == ('3', '5')


def test_one_process_joins_nobody(joined):
  flags.FLAGS.num_processes = 1
  with frame.all_hosts(CheckpointConfig()):
    pass
  assert joined == []


def test_an_error_of_all_hosts_is_raised_as_ever(joined, monkeypatch):
  monkeypatch.setattr(hosts, 'leave', lambda: None)
  with pytest.raises(DataError, match='torn'), frame.all_hosts(CheckpointConfig()):
    raise DataError('torn')


@pytest.mark.parametrize(
    ('error', 'said'),
    [
        (DataError('torn\nin two'), 'chameleon: process 1: torn in two\n'),
        (KeyError('x'), "KeyError: 'x'\nchameleon: process 1: 'x'\n"),
        (jax.errors.JaxRuntimeError('reset'), 'chameleon: process 1: process 0 (a) did not come; this host stopped (reset); give the same'),
    ],
)
def test_a_host_that_fails_alone_ends_at_once(joined, monkeypatch, capsys, error, said):
  monkeypatch.setattr(hosts, 'leave', lambda: 'process 0 (a) did not come')
  with pytest.raises(SystemExit, match='1'), frame.all_hosts(CheckpointConfig()):
    raise error
  assert said in capsys.readouterr().err
