"""The sampler's benchmark on a tiny model: every figure comes out, its gates are there, and they refuse."""

import importlib.util
import os
import pathlib
import sys

import numpy as np
import pytest

_TOOLS = pathlib.Path(__file__).parents[2] / 'tools'


@pytest.fixture(scope='module')
def benchmark():
  """The tool as a module, with the folder of its neighbours on the path as when it is run."""
  spec = importlib.util.spec_from_file_location('benchmark_sampling', _TOOLS / 'benchmark_sampling.py')
  module = importlib.util.module_from_spec(spec)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'path', list(sys.path))
    patch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    patch.setattr(module, 'DTYPES', ('float32',))  # what bfloat16 adds is compilation
    yield module


@pytest.fixture(scope='module')
def tiny(benchmark):
  return benchmark.tiny()


@pytest.fixture(scope='module')
def bench(benchmark, tiny):
  return benchmark.Benchmark(tiny, benchmark.Protocol(warm_ups=1, repetitions=1), benchmark.CompileClock(), n_new=32)


def test_the_sixteen_are_of_every_kind_and_end_at_their_limits(benchmark, tiny):
  requests = benchmark.mixed_requests(tiny)
  kinds = [options.modalities for _, options in requests]
  assert (kinds.count('text'), kinds.count('image'), kinds.count('mixed')) == (5, 5, 6)
  assert len({len(prompt) for prompt, _ in requests}) > 4 and len({options.seed for _, options in requests}) == 16
  for (_, options), tokens in zip(requests, benchmark.together(tiny.engine('float32'), requests)):
    assert len(tokens) == (tiny.n_image_tokens if options.modalities == 'image' else options.max_new_tokens)
    codes = tiny.vocabulary.is_image[tokens].sum()
    assert codes >= options.min_images * tiny.n_image_tokens


def test_the_host_waits_as_often_as_the_engine_says(bench):
  mixed, text = bench.synchronisations()
  assert mixed.details['syncs'] == mixed.details['reads'] > 0
  assert text.details['decoded'] == 32 and text.details['syncs'] == text.details['reads']
  assert mixed.reached == (mixed.details['decoded'] / mixed.details['syncs'] >= 32)


def test_others_are_left_alone(bench):
  rows = bench.independence()
  assert [row.reached for row in rows] == [True]
  assert sorted(set(rows[0].details['refused'])) == ['empty', 'over-long', 'picture in a picture', 'unknown id']


def test_nothing_is_timed_where_tokens_differ(benchmark, bench, monkeypatch):
  monkeypatch.setattr(bench, 'equal', {'float32': 15})
  assert {row.value for row in bench.batching()} == {'not timed: 15 of 16 greedy rows equal'}
  assert not any(row.reached for row in bench.batching())
  honest = benchmark.together
  turns = iter(range(100))
  monkeypatch.setattr(benchmark, 'together', lambda *a: [row + next(turns) for row in honest(*a)])
  assert {row.value for row in bench.guidance()} == {'not timed: the tokens differ'}


def test_batched_and_guided_figures_come_out(bench):
  first = bench.batching()[0]
  seconds = first.details
  assert seconds['ratios'] == [seconds['second'][0] / seconds['first'][0]] and '16 of 16 greedy rows equal' in first.value
  assert first.reached == (seconds['ratios'][0] >= 4)


def test_the_peer_writes_the_same_tokens(benchmark, bench, tiny, tmp_path):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  v = tiny.vocabulary
  benchmark.benchmark_peer.write(tmp_path, tiny.config, tiny.params, v.config)
  prompt = np.array([v.begin_sequence, *tiny.starts[0][1:]], np.int32)
  peer = benchmark.benchmark_peer.Peer(tmp_path, v.is_text & ~v.is_barred)
  options = benchmark.SamplingOptions(
    'text', max_new_tokens=12, greedy=True, repetition_penalty=1.0, stop_at_end_turn=False, banned_tokens=(v.end_sequence,)
  )
  np.testing.assert_array_equal(peer(prompt, 12), tiny.engine('float32').generate_tokens([prompt], options)[0])


def test_a_busy_machine_is_not_timed(benchmark, monkeypatch):
  if not benchmark.FLAGS.is_parsed():
    benchmark.FLAGS.mark_as_parsed()
  for name, value in {'only': ['6'], 'quick': False, 'max_load': 0.7}.items():
    monkeypatch.setattr(type(benchmark.FLAGS), name, value, raising=False)
  monkeypatch.setattr(os, 'getloadavg', lambda: (3.0, 0.0, 0.0))
  with pytest.raises(benchmark.app.UsageError, match='load average is 3.00'):
    benchmark.main(['benchmark'])
