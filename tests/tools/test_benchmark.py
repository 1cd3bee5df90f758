"""The side-by-side benchmark at its smallest: every case's gate lets equal models through and refuses a wrong weight before any clock."""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import types

import jax
import numpy as np
import pytest

_TOOLS = pathlib.Path(__file__).parents[2] / 'tools'
torch = pytest.importorskip('torch')
pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def tools():
  """The tool and its neighbours as modules, torch on one thread (its threads wait for each other in a spin), programs compiled in haste."""
  names = ('protocol', 'machine', 'models', 'torch', 'torch_plain', 'transformer', 'decoding', 'pictures', 'whole', 'curves')
  before, threads = dict(sys.modules), torch.get_num_threads()
  sys.path.insert(0, str(_TOOLS))
  torch.set_num_threads(1)
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    yield types.SimpleNamespace(
      **{name: importlib.import_module(f'benchmark_{name}') for name in names}, main=importlib.import_module('benchmark')
    )
  finally:
    torch.set_num_threads(threads)
    jax.config.update('jax_disable_most_optimizations', False)
    sys.path.remove(str(_TOOLS))
    for name in set(sys.modules) - set(before):
      if name.startswith('benchmark'):
        del sys.modules[name]


@pytest.fixture(scope='module')
def bench(tools, tmp_path_factory):
  ceilings = tools.machine.measure(shape=(16, 16, 16), n_bytes=1 << 16, turns=1)
  sizes = tools.models.tiny()
  vqgan = dataclasses.replace(sizes.vqgan, channel_multipliers=(1, 1, 1))
  sizes = dataclasses.replace(sizes, transformer=dataclasses.replace(sizes.transformer, n_layers=1), vqgan=vqgan)  # less to compile
  subject = tools.models.Subject.random(sizes)
  folder = tmp_path_factory.mktemp('bench')
  return tools.transformer.Bench(subject, tools.protocol.Protocol(1, 1, 4), tools.protocol.CompileClock(), ceilings, folder)


@pytest.fixture
def broken(tools, bench, tmp_path):
  """A bench whose peers have one wrong row of one matrix."""
  layer = bench.subject.params['layers_0']
  wrong = layer['feed_forward']['up_proj'].copy()
  wrong[0] = -wrong[0]
  changed = {**layer, 'feed_forward': {**layer['feed_forward'], 'up_proj': wrong}}
  peers = tools.models.Subject(bench.subject.sizes, {**bench.subject.params, 'layers_0': changed})
  tools.transformer.benchmark_peer.write(tmp_path, peers.sizes.transformer, peers.params, peers.sizes.vocabulary)
  copy = dataclasses.replace(bench)
  copy.__dict__['checkpoint'] = tmp_path
  return copy


@pytest.fixture
def no_clock(tools, monkeypatch):
  """Fails where anything is timed."""

  def race(*_):
    raise AssertionError('timed behind a closed gate')

  for module in (tools.transformer, tools.decoding, tools.pictures, tools.whole):
    monkeypatch.setattr(module, 'race', race)


def test_rounds_and_their_ratios(tools, monkeypatch):
  now, order = [0.0], []
  monkeypatch.setattr(tools.protocol.time, 'perf_counter', lambda: now[0])

  def contestant(name, durations):
    durations = iter(durations)

    def run(prepared):
      order.append(prepared)
      now[0] += next(durations)

    def prepare():
      now[0] += 100  # beside the clock
      return name

    return tools.protocol.Contestant(name, run, prepare)

  clock = types.SimpleNamespace(seconds=0.0, programs=0)
  runners = [contestant('a', [9, 1, 2, 4]), contestant('b', [9, 3, 2, 2]), contestant('c', [9, 2, 2, 2])]
  seen = tools.protocol.race(runners, tools.protocol.Protocol(warm_ups=1, repetitions=3), clock)
  assert order == ['a', 'b', 'c'] + ['a', 'b', 'c'] * 3
  assert seen.seconds == {'a': (1, 2, 4), 'b': (3, 2, 2), 'c': (2, 2, 2)}
  assert seen.ratios('a', 'b') == [3, 1, 0.5] and seen.fastest('abc') == 'a'
  assert seen.record()['median_s'] == {'a': 2, 'b': 2, 'c': 2}


def test_a_training_step_is_that_of_torch_and_is_timed(bench, tools):
  rows = tools.transformer.train(bench)
  assert [row.aim for row in rows] == ['>= 1.3x', '>= 0.9x', '-']
  for row in rows[:2]:
    limit = float(row.aim.strip('>= x'))
    assert row.reached == (np.median(row.details['ratios']) >= limit)
  assert set(rows[0].details['seconds']) == {'ours float32', 'ours bfloat16', 'HF float32', 'HF bfloat16'}


def test_a_wrong_weight_is_not_trained_under_the_clock(broken, no_clock, tools):
  (row,) = tools.transformer.train(broken)
  assert row.reached is False and row.value.startswith('not timed: step 1: loss and gradient norm')


def test_a_wrong_update_is_seen_in_the_second_step(bench, no_clock, tools, monkeypatch):
  monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self: None)
  (row,) = tools.transformer.train(bench)
  assert row.reached is False and row.value.startswith('not timed: step 2')


def test_prefill_and_decoding_come_out_against_every_peer(bench, tools, monkeypatch):
  for module in (tools.transformer, tools.decoding):
    monkeypatch.setattr(module, 'WAYS', ('float32',))
  rows = tools.transformer.prefill(bench)
  assert [row.aim for row in rows] == ['>= 2.0x', '>= 0.8x'] * 2
  rows = tools.decoding.decode(bench, 2)
  assert {row.details['peer'].split(' (')[0] for row in rows} == {'HF', 'plain torch'}
  assert set(rows[0].details['peers_s']['HF']) == {
    f'{dtype}, {cache} cache' for dtype in tools.torch.DTYPES for cache in tools.torch.CACHES
  }


def test_a_wrong_weight_is_neither_filled_in_nor_decoded_under_the_clock(broken, no_clock, tools):
  for rows in (tools.transformer.prefill(broken), tools.decoding.decode(broken, 1)):
    assert [row.reached for row in rows] == [False] and rows[0].value.startswith('not timed: float32 logits differ by ')


def test_a_cache_in_int8_has_a_gate(bench, tools, monkeypatch):
  way, prompt = tools.models.INT8_CACHE, bench.subject.text(1, 16)
  assert tools.transformer.rounded_off(bench.subject, way, prompt) is None
  through_none = tools.transformer.last_logits(*bench.subject.way(way), all_positions=True)(prompt)
  through_int8 = tools.transformer.last_logits(*bench.subject.way(way), all_positions=True, cache='int8')(prompt)
  assert 1e-4 < tools.transformer.relative(through_int8, through_none) < tools.transformer.NARROW
  monkeypatch.setattr(tools.transformer, 'NARROW', 1e-9)
  assert tools.transformer.rounded_off(bench.subject, way, prompt).startswith('int8 weights and cache logits are ')


def test_other_tokens_are_not_timed(bench, no_clock, tools, monkeypatch):
  honest = tools.torch_plain.PlainDecoder.run
  monkeypatch.setattr(tools.torch_plain.PlainDecoder, 'run', lambda self, prepared: honest(self, prepared)[:, ::-1])
  (row,) = tools.decoding.decode(bench, 1)
  assert row.reached is False and 'greedy float32 tokens of plain torch (float32) differ in 1 of 1 rows' in row.value


def test_plain_torch_decodes_rows_that_stand_anywhere(bench, tools):
  """The general form, one position a row, gives what the fast form gives."""
  subject = bench.subject
  plain = tools.torch_plain.PlainDecoder(subject.params, subject.sizes.transformer, subject.allowed, dtype='float32', slots=16)
  tokens = torch.from_numpy(subject.text(2, 6).astype(np.int64))
  with torch.inference_mode():
    expected = plain.forward(tokens, 0, plain.empty_cache(2))
    cache = plain.empty_cache(2)
    plain.forward(tokens[:, :5], torch.arange(5).expand(2, 5), cache)
    found = plain.forward(tokens[:, 5:], torch.tensor([[5], [5]]), cache)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_codes_and_pixels_are_those_of_torch(bench, tools):
  given = tools.pictures.Pictures.random(bench.subject.sizes.vqgan)
  for case, peer in ((tools.pictures.encode, 'HF'), (tools.pictures.decode, 'plain torch')):
    rows = case(bench, given)
    assert [row.what for row in rows[:2]] == [f'ours float32 against {peer} {dtype}, channels last' for dtype in ('float32', 'bfloat16')]
    assert rows[0].aim == '>= 1.0x' and len(rows) == 4


def test_other_codes_and_other_pixels_are_not_timed(bench, no_clock, tools):
  given = tools.pictures.Pictures.random(bench.subject.sizes.vqgan)
  encoder, decoder = (dict(given.params[part]) for part in ('encoder', 'decoder'))
  encoder['conv_in'] = {**encoder['conv_in'], 'kernel': encoder['conv_in']['kernel'][::-1].copy()}
  decoder['conv_out'] = {**decoder['conv_out'], 'kernel': decoder['conv_out']['kernel'][::-1].copy()}
  changed = dataclasses.replace(given)
  changed.__dict__['on_device'] = {**given.params, 'encoder': encoder, 'decoder': decoder}  # of ours alone
  (row,) = tools.pictures.encode(bench, changed)[-1:]
  assert row.reached is False and 'of the float32 codes are those of the peer' in row.value
  (row,) = tools.pictures.decode(bench, changed)[-1:]
  assert row.reached is False and 'float32 pixels differ from those of the peer' in row.value


@pytest.mark.parametrize('name', ['vqgan_512', 'tiny_vqgan'])
def test_operations_are_counted_as_the_compiler_counts_them(tools, name):
  """Dense convolutions; the compiler leaves out what zero padding saves and adds the pointwise work."""
  from chameleon_jax import presets
  from chameleon_jax.interop.native import abstract_vqgan
  from chameleon_jax.models.vqgan.model import VQGAN
  from chameleon_jax.training.state import unboxed

  if name == 'vqgan_512':  # performance.md counts 554 and 1,005 GFLOP
    config = presets.vqgan_512()
    assert round(tools.pictures.encoder_flops(config) / 1e9) == 554
    assert abs(tools.pictures.decoder_flops(config) / 1e9 - 1005) < 2
    return
  config = presets.tiny_vqgan(base_channels=64)
  params = unboxed(abstract_vqgan(config))
  pixels = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
  compiled = jax.jit(lambda p, x: VQGAN(config).apply({'params': p}, x, method='encode')[0]).lower(params, pixels).compile()
  assert abs(compiled.cost_analysis()['flops'] / tools.pictures.encoder_flops(config) - 1) < 0.2


def test_the_cost_model_is_fitted_to_its_points(tools):
  point = tools.curves.Point
  points = [point(('one row', 'prefill'), x, x, 2.0 * x, lambda products, memory, x=x: x / products, 'products') for x in (1, 2, 3)]
  points += [point(('decoding', 'decode'), x, x, 4.0, lambda products, memory: 1 / memory, 'memory') for x in (1, 2)]
  shares = tools.curves.fit(points)
  assert shares == {'products': 0.5, 'memory': 0.25}
  found = tools.curves.record(points, shares)
  assert found['median_error'] == pytest.approx(0) and found['points'][0]['limit_per_second'] == 1


@pytest.fixture
def small_picture(tools, monkeypatch, tiny_model_folder):
  """In place of the shipped weights."""
  import functools

  import chameleon_jax

  monkeypatch.setattr(tools.whole, '_emoji', functools.cache(lambda dtype: chameleon_jax.load(tiny_model_folder, dtype=dtype)))


def test_a_guided_picture_is_that_of_plain_torch(bench, tools, small_picture):
  whole, *alone = tools.whole.picture(bench)
  assert whole.value.endswith(' ms') and [row.what.split(', ours ')[1].split(' against ')[0] for row in alone] == ['float32', 'bfloat16']
  assert set(whole.details['seconds']) == {f'{who} {dtype}' for who in ('ours', 'plain torch') for dtype in tools.torch.DTYPES} | {
    'ours bfloat16, whole'
  }


def test_another_picture_is_not_timed(bench, tools, small_picture, no_clock, monkeypatch):
  monkeypatch.setattr(tools.torch_plain.PlainDecoder, 'guided', lambda *_: np.zeros(16, np.int32))
  (row,) = tools.whole.picture(bench)
  assert row.reached is False and row.value.startswith('not timed: ') and 'codes differ from those of plain torch' in row.value


def test_a_command_is_timed_to_its_first_text(tools, tmp_path, tiny_model_folder):
  assert 0.5 < tools.whole.first_text(str(tmp_path), model=str(tiny_model_folder)) < 300
  with pytest.raises(RuntimeError, match='ended with 1: .*missing'):
    tools.whole.first_text(str(tmp_path), model='missing')


def test_without_torch_ours_is_timed_alone(bench, tools, monkeypatch):
  monkeypatch.setattr(tools.decoding, 'WAYS', ('float32',))
  first, second = tools.decoding.decode(dataclasses.replace(bench, peers=False), 2)
  assert first.value == 'left out: torch and transformers are not installed (extra `parity`)' and 'tokens/s' in second.value


def test_the_command_fills_its_table_and_its_section(tools, tmp_path, monkeypatch, capsys):
  begin, end = tools.protocol.markers('side by side')
  page, output = tmp_path / 'page.md', tmp_path / 'out.json'
  page.write_text(f'{tools.protocol.BEGIN}\nkept\n{tools.protocol.END}\n{begin}\nold\n{end}\ntail\n')
  given = {
    'cases': ['pipeline'],
    'size': 'tiny',
    'repetitions': 1,
    'max_load': 0.0,
    'output': str(output),
    'page': str(page),
    'curves': None,
  }
  monkeypatch.setattr(tools.main, 'FLAGS', types.SimpleNamespace(**given))
  tools.main.main(['benchmark'])
  text = page.read_text()
  assert 'kept' in text and 'old' not in text and text.endswith(f'{end}\ntail\n') and '| input pipeline |' in text
  read = json.loads(output.read_text())
  assert read['rows'][0]['details']['tokens_per_second'] and read['machine']['ceilings']['product float32, jax'] > 0
  assert 'Ceilings in the same run' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('given', 'message'), [({'cases': ['trian']}, 'takes names out of train'), ({'size': 'small', 'cases': []}, 'load average')]
)
def test_a_wrong_case_and_a_busy_machine_are_refused(tools, monkeypatch, given, message):
  defaults = {'cases': [], 'size': 'tiny', 'repetitions': 1, 'max_load': -1.0, 'output': None, 'page': None, 'curves': None}
  monkeypatch.setattr(tools.main, 'FLAGS', types.SimpleNamespace(**{**defaults, **given}))
  with pytest.raises(tools.main.app.UsageError, match=message):
    tools.main.main(['benchmark'])
