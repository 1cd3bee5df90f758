"""The script for one GPU, on the CPU at its smallest: it keeps to its budget, and its gates refuse."""

import dataclasses
import functools
import importlib
import json
import pathlib
import sys
import time
import types

import jax
import numpy as np
import pytest

_TOOLS = pathlib.Path(__file__).parents[2] / 'tools'


@pytest.fixture(scope='module')
def tools():
  """The script and its cases as modules, programs compiled in haste."""
  before = set(sys.modules)
  sys.path.insert(0, str(_TOOLS))
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    names = ('gpu', 'gpu_cases', 'gpu_sampling', 'machine', 'protocol', 'torch_plain')
    yield types.SimpleNamespace(**{name: importlib.import_module(f'benchmark_{name}') for name in names})
  finally:
    sys.path.remove(str(_TOOLS))
    jax.config.update('jax_disable_most_optimizations', False)
    for name in set(sys.modules) - before:
      if name.startswith('benchmark'):
        del sys.modules[name]


@pytest.fixture(scope='module')
def sizes(tools):
  """Smaller still: what costs time here is compilation."""
  tiny = tools.gpu_cases.sizes_tiny()
  vqgan = dataclasses.replace(tiny.vqgan, channel_multipliers=(1, 1), n_res_blocks=1)
  return dataclasses.replace(tiny, transformer=dataclasses.replace(tiny.transformer, n_layers=1), vqgan=vqgan)


@pytest.fixture
def work(tools, sizes):
  """A case that has an hour."""
  ceilings = tools.machine.Ceilings({'float32': 1e9, 'bfloat16': 1e9}, 1e9, 1e9, {})
  given = tools.gpu_cases.Work(sizes, ceilings, time.monotonic() + 3600)
  given.protocol = tools.protocol.Protocol(warm_ups=1, repetitions=1, most_warm_ups=2)
  return given


@pytest.fixture(scope='module')
def subject(tools, sizes):
  return tools.gpu_sampling.subject_of(sizes, tools.gpu_cases.device_params(sizes.transformer))


def _script(body: str):
  """A command of `orchestrate`: a child that runs `body` with CASE, SECONDS and ROWS."""

  def command(case: str, seconds: float, rows: pathlib.Path) -> list[str]:
    return [sys.executable, '-c', f'CASE, SECONDS, ROWS = {case!r}, {seconds!r}, {str(rows)!r}\n{body}']

  return command


_CHILD = """
import json, sys, time
row = {'figure': CASE, 'model': 'm', 'what': 'w', 'aim': '-', 'value': f'{SECONDS:.0f}', 'reached': None, 'details': {}}
open(ROWS, 'a').write(json.dumps(row) + '\\n')
if CASE == 'hangs':
  time.sleep(60)
if CASE == 'fails':
  sys.exit('no such device')
"""


def test_a_case_that_hangs_or_fails_leaves_its_rows_and_the_others(tools, tmp_path, monkeypatch):
  monkeypatch.setattr(tools.gpu, 'SPARE', 0.0)
  monkeypatch.setitem(tools.gpu.LIMITS, 'hangs', 1.5)
  begun = time.monotonic()
  found = list(tools.gpu.orchestrate(['hangs', 'fails', 'works'], 30, tmp_path, _script(_CHILD), {}))
  assert time.monotonic() - begun < 20
  assert [row['figure'] for row in found] == ['hangs', 'hangs', 'fails', 'fails', 'works']
  assert found[1]['value'].startswith('ended after 2 s') and found[3]['value'] == 'ended with 1: no such device'


def test_the_budget_is_kept(tools, tmp_path, monkeypatch):
  monkeypatch.setattr(tools.gpu, 'SPARE', 0.0)
  monkeypatch.setitem(tools.gpu.LIMITS, 'hangs', 60.0)
  begun = time.monotonic()
  found = list(tools.gpu.orchestrate(['hangs', 'works'], 2.0, tmp_path, _script(_CHILD), {}))
  assert time.monotonic() - begun < 2.5
  assert [row['figure'] for row in found] == ['hangs', 'hangs', 'works']
  assert found[2]['value'].startswith('not measured: 0 s left') or found[2]['value'].startswith('not measured: -0 s left')


def test_every_case_has_a_limit_and_they_fit_the_nine_minutes(tools):
  assert list(tools.gpu.LIMITS) == ['train', 'sample', 'image_tokenizer']
  assert sum(tools.gpu.LIMITS.values()) <= 550  # the budget of 530 s cuts the last one


def test_a_case_writes_its_rows_as_json(tools, tmp_path, monkeypatch):
  def quick(work):
    yield work.row('train', 'one', '-', 'first', None)
    yield work.row('train', 'two', '-', 'second', True, {'mfu': 0.5})

  monkeypatch.setattr(tools.gpu_cases, 'train', quick)
  tools.gpu.run_case('train', 'tiny', 60, tmp_path / 'rows')
  rows = [json.loads(line) for line in (tmp_path / 'rows').read_text().splitlines()]
  assert [row['value'] for row in rows] == ['first', 'second'] and rows[1]['details']['mfu'] == 0.5
  table = tools.gpu.table(rows, 'python tools/benchmark_gpu.py', 12)
  assert '| train | tiny | two | - | second | yes |' in table and 'The whole took 12 s.' in table and 'product bfloat16' in table


def test_a_part_without_time_or_memory_says_so(tools, work):
  def too_much():
    raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate')
    yield

  def broken():
    raise RuntimeError('anything else')
    yield

  rows = list(tools.gpu_cases.parts(work, {'a': (7200, too_much), 'b': (1, too_much)}))
  assert [row.value for row in rows] == [f'not measured: {work.left:.0f} s left of the budget, it needs 7200', 'does not fit the memory']
  with pytest.raises(RuntimeError, match='anything else'):
    list(tools.gpu_cases.parts(work, {'c': (1, broken)}))


def test_the_sampler_is_let_through_and_measured(tools, work, subject):
  assert tools.gpu_sampling.drawn_otherwise(work, subject) is None
  (row,) = tools.gpu_sampling.decode_one(work, subject, 'bfloat16')
  rate = work.sizes.new / row.details['median_s']['ours']
  nbytes = tools.gpu_sampling.read_bytes(work, subject.way('bfloat16')[1], 12, 1)
  assert row.details['share'] == pytest.approx(nbytes * rate / 1e9) and row.reached == (row.details['share'] >= 0.7)
  weights = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 2 * 32 * 128  # bytes: a layer of matrices, and the head
  assert weights < nbytes < weights + 12 * 2 * 32 * 2 + 1000  # a few vectors beside them


def test_many_rows_with_an_int8_cache_are_a_row_of_their_own(tools, work, subject, monkeypatch):
  way = tools.gpu_sampling.INT8_CACHE
  (row,) = tools.gpu_sampling.decode_many(work, subject, way)
  assert row.what.endswith(', int8 weights and cache') and row.aim == '-' and row.reached is None and 'of the limit' in row.value
  more = [tools.gpu_sampling.read_bytes(work, subject.way(way)[1], slots, 3, way) for slots in (0, 10)]
  config = work.sizes.transformer
  assert more[1] - more[0] == 3 * 10 * 2 * config.n_layers * config.n_kv_heads * (config.d_head + 4)
  monkeypatch.setattr(tools.gpu_sampling, 'NARROW', 1e-9)
  (row,) = tools.gpu_sampling.decode_many(work, subject, way)
  assert row.reached is False and row.value.startswith('not timed: an int8 cache moves the logits by ')


def test_other_tokens_are_refused(tools, work, subject, monkeypatch):
  honest = tools.gpu_sampling.greedy
  monkeypatch.setattr(tools.gpu_sampling, 'greedy', lambda *a: np.roll(honest(*a), 1, axis=1))
  (row,) = tools.gpu_sampling.sample(work, subject)
  assert row.reached is False and row.value.startswith('not timed: ') and 'are the best of a forward pass' in row.value


def test_a_step_that_differs_from_the_plain_form_is_refused(tools, work, monkeypatch):
  honest = tools.gpu_cases.attention.attend
  monkeypatch.setattr(tools.gpu_cases.attention, 'attend', lambda q, k, v, mask, *, dtype: 0.9 * honest(q, k, v, mask, dtype=dtype))
  (row,) = tools.gpu_cases.train(work)
  assert row.reached is False and 'in the plain form' in row.value


@pytest.fixture
def as_on_a_gpu(tools, monkeypatch):
  """Kernels of GPUs run interpreted, for models whose heads are wide enough."""
  attention = tools.gpu_cases.attention
  honest = attention.gpu_attention.attend_pallas
  monkeypatch.setattr(attention.gpu_attention, 'obstacle', lambda kernel, **_: None if kernel == 'pallas' else 'which is not here')
  monkeypatch.setattr(attention.gpu_attention, 'attend_pallas', functools.partial(honest, interpret=True))
  return attention.gpu_attention


def test_an_attention_that_cannot_run_is_told_and_not_timed(tools, work):
  assert tools.gpu_cases.attention_problem(work, 'blockwise') is None
  for kernel in ('cudnn', 'pallas'):
    assert 'which is a kernel for GPUs, and this program is for cpu' in tools.gpu_cases.attention_problem(work, kernel)


def test_an_attention_kernel_is_compared_before_it_is_timed(tools, work, as_on_a_gpu, monkeypatch):
  assert tools.gpu_cases.attention_problem(work, 'pallas') is None
  assert tools.gpu_cases.attention_problem(work, 'cudnn').endswith("which is not here; set it to 'auto', which takes what can serve")
  honest = as_on_a_gpu.attend_pallas
  monkeypatch.setattr(as_on_a_gpu, 'attend_pallas', lambda *a, segment_ids, dtype: honest(*a, segment_ids=None, dtype=dtype))
  assert 'off the plain form' in tools.gpu_cases.attention_problem(work, 'pallas')  # one that forgets the documents

  def fails(*a, **b):
    raise RuntimeError('INTERNAL: the compiler\n  gave up')

  monkeypatch.setattr(as_on_a_gpu, 'attend_pallas', fails)
  assert tools.gpu_cases.attention_problem(work, 'pallas') == 'it does not run: INTERNAL: the compiler gave up'


def test_the_variants_of_training_are_all_named(tools, work, monkeypatch):
  """Where the gate lets Pallas through and cuDNN not, and time ends after the first: each says so, under the name of its attention."""
  cases, seen = tools.gpu_cases, []

  def trainer(config):
    seen.append((config.model.attention_implementation, config.model.remat))
    return lambda _=None: (1.0, 1.0)

  monkeypatch.setattr(cases, '_training_differs', lambda work: None)
  monkeypatch.setattr(cases, 'attention_problem', lambda work, kernel: 'it is not here' if kernel == 'cudnn' else None)
  monkeypatch.setattr(cases, 'Trainer', trainer)
  said = [(row.what.split('attention ')[1], row.value) for row in cases.train(work)]
  timed = [name for name, value in said if 'MFU' in value]
  assert [line for line in said if line[0] == 'cudnn'] == [('cudnn', 'not timed: it is not here')]
  assert timed == ['pallas', 'blockwise', 'pallas', 'blockwise', 'pallas', 'pallas'] == [name for name, _ in seen]
  assert [remat for _, remat in seen] == ['dots', 'dots', 'full', 'full', 'dots', 'dots']
  work.deadline = time.monotonic()
  assert [row.value.split(':')[0] for row in cases.train(work)][1:] == ['not timed', *5 * ['not measured']]


def test_rows_come_without_documents_for_cudnn_alone(tools, work, monkeypatch):
  monkeypatch.setattr(tools.gpu_cases, 'init_state', lambda *a, **b: None)
  monkeypatch.setattr(tools.gpu_cases, 'make_train_step', lambda *a, **b: None)
  for kernel in ('blockwise', 'pallas', 'cudnn'):
    model = dataclasses.replace(work.sizes.transformer, attention_implementation=kernel)
    batch = tools.gpu_cases.Trainer(tools.gpu_cases._train_config(model, tools.gpu_cases.vocabulary_of(work.sizes), (2, 8), 1))._batch
    assert ('segment_ids' in batch) == (kernel != 'cudnn') and set(batch) >= {'tokens', 'targets', 'loss_weights', 'positions'}


def test_pixels_or_codes_off_are_refused(tools, work, monkeypatch):
  monkeypatch.setattr(tools.gpu_cases, 'ROUNDED', 1e-9)
  (row,) = tools.gpu_cases.image_tokenizer(work)
  assert row.reached is False and row.value.startswith('not timed: ')
