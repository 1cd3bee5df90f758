"""Traces: at the steps that were asked for, or when a file asks."""

import jax.numpy as jnp
import pytest

from chameleon_jax.errors import ConfigError
from chameleon_jax.training import profiling
from chameleon_jax.training.profiling import Profiler, parse_steps


def test_steps_are_read_or_refused():
  assert parse_steps('100:105') == (100, 105)
  assert parse_steps('7:7') == (7, 7)
  for text in ('', '5', '9:3', '0:3', 'a:b', '1:2:3', '-1:2'):
    with pytest.raises(ConfigError, match='write FIRST:LAST'):
      parse_steps(text)


def test_traces_of_a_run_lie_in_its_folder(seen_run):
  """Steps 2 and 3 by a flag; one step by a file that held 1 when the run was resumed after step 5."""
  for name in ('profile_2_3', 'profile_6_6'):
    (trace,) = (seen_run.workdir / name).rglob('*.xplane.pb')
    assert trace.stat().st_size > 1000
  assert sorted(path.name for path in seen_run.workdir.glob('profile*')) == ['profile_2_3', 'profile_6_6']


@pytest.fixture
def calls(monkeypatch):
  found = []
  monkeypatch.setattr(profiling.jax.profiler, 'start_trace', lambda path: found.append(path))
  monkeypatch.setattr(profiling.jax.profiler, 'stop_trace', lambda: found.append('stop'))
  return found


def _run(profiler, calls, steps, **options):
  """The steps after whose start a trace began, and after which it ended."""
  began, ended = [], []
  for step in steps:
    n = len(calls)
    profiler.before(step, **{'look': False, **options})
    began += [step] if len(calls) > n else []
    n = len(calls)
    profiler.after(step, jnp.zeros(()))
    ended += [step] if len(calls) > n else []
  return began, ended


def test_a_trace_begins_late_in_a_resumed_run_and_ends_with_it(tmp_path, calls):
  profiler = Profiler(tmp_path, (3, 5), say=lambda line: None)
  assert _run(profiler, calls, range(4, 9)) == ([4], [5])
  assert calls == [str(tmp_path / 'profile_4_5'), 'stop']
  profiler = Profiler(tmp_path, (3, 50), say=lambda line: None)
  assert _run(profiler, calls, range(1, 9)) == ([3], [])
  profiler.close()
  profiler.close()
  assert calls[2:] == [str(tmp_path / 'profile_3_50'), 'stop']


@pytest.mark.parametrize(('text', 'n_steps'), [('', 5), ('2', 2), ('0', 1), ('soon', 5)])
def test_a_file_asks_for_steps(tmp_path, calls, monkeypatch, text, n_steps):
  now = [0.0]
  monkeypatch.setattr(profiling.time, 'monotonic', lambda: now[0])
  profiler = Profiler(tmp_path, say=lambda line: None)
  assert _run(profiler, calls, range(1, 3)) == ([], [])
  (tmp_path / 'profile').write_text(text)
  assert _run(profiler, calls, range(3, 5)) == ([], [])  # the folder was looked at less than a second ago
  now[0] = 1.5
  assert _run(profiler, calls, range(5, 15)) == ([5], [4 + n_steps])
  assert not (tmp_path / 'profile').exists()


def test_hosts_begin_together_where_they_may_talk(tmp_path, calls):
  asked = []

  def agree(number):
    asked.append(number)
    return 2  # the first host has found the file

  profiler = Profiler(tmp_path, say=lambda line: None, agree=agree)
  assert _run(profiler, calls, range(1, 3)) == ([], []) and not asked
  assert _run(profiler, calls, range(3, 5), look=True) == ([3], [4])
  assert asked == [0]
