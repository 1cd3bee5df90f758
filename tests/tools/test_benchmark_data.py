"""The benchmark of the data path: its gates, and a run at its smallest."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

_FILE = pathlib.Path(__file__).parents[2] / 'tools' / 'benchmark_data.py'


def _module():
  sys.path.insert(0, str(_FILE.parent))
  try:
    spec = importlib.util.spec_from_file_location('benchmark_data', _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
  finally:
    sys.path.remove(str(_FILE.parent))
  return module


@pytest.mark.slow
def test_a_quick_run_fills_its_table(tmp_path):
  """The tool with its flags, and every reading behind the table."""
  output = tmp_path / 'data.json'
  command = [sys.executable, str(_FILE), '--quick', '--only=2,3', f'--output={output}']
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
  assert done.returncode == 0, done.stderr
  rows = json.loads(output.read_text())['rows']
  assert [row['figure'] for row in rows] == [2, 3]
  rates = rows[0]['details']['tokens_per_second']
  assert len(rates) == 2
  assert rows[0]['reached'] == (np.median(rates) >= 50 * 11_400)
  assert rows[1]['reached'] is None  # not measured
  assert '| 2 | 7B, released vocabulary | 16 packed rows of 4,096 tokens from 60 tokenized documents | >= 50 |' in done.stdout


def test_nothing_is_timed_where_the_codes_differ(monkeypatch):
  benchmark = _module()
  encoders = benchmark.Tokenization

  class Other(encoders):
    """Whose encoder gives other codes each time it is asked."""

    def __init__(self, *arguments):
      super().__init__(*arguments)
      encode, calls = self._encode, iter(range(1 << 20))
      self._encode = lambda pictures: (np.asarray(encode(pictures)) + next(calls)) % 1024

  monkeypatch.setattr(benchmark, 'Tokenization', Other)
  row = benchmark.tokenizing('emoji', 4, benchmark.Protocol(repetitions=1), benchmark.CompileClock())
  assert row.reached is False
  assert row.value.startswith('not timed: the codes of ')
