"""What the benchmarks count: order, ratios, warm-up, compilation; and the page they write."""

import importlib.util
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

_TOOLS = pathlib.Path(__file__).parents[2] / 'tools'
_SPEC = importlib.util.spec_from_file_location('benchmark_protocol', _TOOLS / 'benchmark_protocol.py')
protocol = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = protocol  # dataclasses look their module up
_SPEC.loader.exec_module(protocol)


class Clock:
  """No compilation, unless `programs` is moved."""

  seconds, programs = 0.0, 0


def test_pairs_are_taken_in_turn_and_ratios_are_of_neighbours(monkeypatch):
  now, order = [0.0], []
  monkeypatch.setattr(time, 'perf_counter', lambda: now[0])

  def run(name, durations):
    durations = iter(durations)

    def go():
      order.append(name)
      now[0] += next(durations)

    return go

  pairs = protocol.alternate(run('a', [9, 9, 1, 2, 4]), run('b', [9, 9, 3, 2, 2]), protocol.Protocol(warm_ups=2, repetitions=3), Clock())
  assert order == ['a', 'a', 'b', 'b'] + ['a', 'b'] * 3
  assert (pairs.first, pairs.second) == ((1, 2, 4), (3, 2, 2))
  assert pairs.ratios == [3, 1, 0.5]
  assert pairs.record()['first_median_s'] == 2 and pairs.record()['second_median_s'] == 2
  assert protocol.spread(pairs.ratios) == '1.00 (0.50 to 3.00)'


def test_warm_up_goes_on_until_nothing_is_compiled():
  clock, runs = Clock(), []

  def compiles_three_times():
    runs.append('a')
    if len(runs) <= 3:
      clock.programs += 1
      clock.seconds += 0.5

  pairs = protocol.alternate(compiles_three_times, lambda: None, protocol.Protocol(warm_ups=1, repetitions=1), clock)
  assert len(runs) == 4 + 1  # three that compile, one that does not, one under the clock
  assert pairs.compile_s == 1.5 and pairs.compiled_meanwhile == 0


def test_the_compile_clock_sees_what_jax_compiles():
  clock = protocol.CompileClock()
  salt = float(np.random.default_rng().random())  # never compiled before
  jax.jit(lambda x: x * salt)(jnp.ones(3)).block_until_ready()
  assert clock.programs >= 1 and clock.seconds > 0
  before = clock.programs
  np.asarray(jnp.ones(3))
  assert clock.programs - before <= 1


def test_the_page_is_rewritten_between_its_markers_only(tmp_path):
  rows = [protocol.Row(1, 'm', 'what', '>= 4', '5.00', True), protocol.Row(2, 'm', 'other', 'none', '-', None)]
  table = protocol.markdown(rows, protocol.machine(), 'python tools/x.py')
  assert '| 1 | m | what | >= 4 | 5.00 | yes |' in table and '| 2 | m | other | none | - | - |' in table
  page = tmp_path / 'page.md'
  page.write_text(f'head\n{protocol.BEGIN}\nold\n{protocol.END}\ntail\n')
  protocol.write_page(page, table)
  text = page.read_text()
  assert text.startswith(f'head\n{protocol.BEGIN}\n') and text.endswith(f'{protocol.END}\ntail\n')
  assert table in text and 'old' not in text
  assert [path.name for path in tmp_path.iterdir()] == ['page.md']


@pytest.mark.parametrize('text', ['no markers', f'{protocol.END} {protocol.BEGIN}', f'{protocol.BEGIN} {protocol.BEGIN} {protocol.END}'])
def test_a_page_without_its_markers_is_left_alone(tmp_path, text):
  page = tmp_path / 'page.md'
  page.write_text(text)
  with pytest.raises(ValueError, match='must hold the lines'):
    protocol.write_page(page, 'table')
  assert page.read_text() == text


def test_every_reading_goes_into_the_json(tmp_path):
  protocol.write_json(tmp_path / 'b.json', [protocol.Row(1, 'm', 'w', 'a', 'v', False, {'ratios': [1.0]})], {'cores': 2})
  read = json.loads((tmp_path / 'b.json').read_text())
  assert read['machine'] == {'cores': 2} and read['rows'][0]['details'] == {'ratios': [1.0]} and read['rows'][0]['reached'] is False
