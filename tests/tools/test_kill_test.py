"""The kill test: that it notices what it is there for, and its short form."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

_FILE = pathlib.Path(__file__).parents[2] / 'tools' / 'kill_test.py'
_SPEC = importlib.util.spec_from_file_location('kill_test', _FILE)
kill_test = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(kill_test)


def _write(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))


@pytest.fixture
def runs(tmp_path):
  """Two equal runs of three steps; the second did step 2 twice, as after a kill, and was killed while it wrote a line."""
  steps = [{'step': step, 'batch': f'b{step}', 'loss': f'0x1.{step}p+1'} for step in (1, 2, 3)]
  for name, done in (('whole', steps), ('other', [*steps[:2], *steps[1:]])):
    (tmp_path / name).mkdir()
    _write(tmp_path / name / 'steps.jsonl', done)
    _write(tmp_path / name / 'metrics.jsonl', [{'step': step, 'time': hash(name), 'train/loss': 1.0 / step} for step in (1, 2, 3)])
    (tmp_path / name / 'state.sha256').write_text('abc')
  with (tmp_path / 'other' / 'steps.jsonl').open('a') as file:
    file.write('{"step": 3, "ba')
  return tmp_path / 'whole', tmp_path / 'other'


def test_a_run_that_repeated_its_steps_exactly_is_equal(runs):
  assert kill_test.differences(*runs, 3) == []


@pytest.mark.parametrize(
    ('file', 'old', 'new', 'message'),
    [
        ('steps.jsonl', '"step": 3, "batch"', '"step": 2, "batch"', 'no life did step 3'),
        ('steps.jsonl', '"b2"', '"b3"', r'step 2: another batch \(b3, undisturbed b2\)'),
        ('steps.jsonl', '0x1.2p', '0x1.20001p', 'step 2: another loss'),
        ('metrics.jsonl', '0.5', '0.5000000001', r'metrics.jsonl differs from line 2 on \(3 lines, undisturbed 3\)'),
        ('metrics.jsonl', '"step": 3', '"step": 4', 'metrics.jsonl differs from line 3'),
        ('state.sha256', 'abc', 'abd', 'the last state differs'),
    ],
)
def test_a_difference_is_found(runs, file, old, new, message):
  path = runs[1] / file
  assert old in path.read_text()
  path.write_text(path.read_text().replace(old, new))
  assert any(re.match(message, line) for line in kill_test.differences(*runs, 3))


def test_a_line_too_many_is_found(runs):
  path = runs[1] / 'metrics.jsonl'
  path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])
  assert kill_test.differences(*runs, 3) == ['metrics.jsonl differs from line 4 on (4 lines, undisturbed 3)']


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='forks')
def test_kills_leave_no_trace(tmp_path):
  """The short form of `python tools/kill_test.py --kills=100`, with the other optimizer."""
  command = [sys.executable, str(_FILE), '--kills=4', '--n_steps=20', '--optimizer=muon', f'--folder={tmp_path}']
  environment = {name: value for name, value in os.environ.items() if name not in ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR')}
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr
  last = done.stdout.splitlines()[-1]
  assert re.match(r'4 kills \(\d inside a save\), \d runs of 20 steps, muon, seed 0: .*bit-identical', last), last
  assert len(re.findall('^kill ', done.stdout, re.M)) == 4
  shutil.rmtree(tmp_path)
