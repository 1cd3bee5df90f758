"""Measures the sampler: batching, host synchronisations, the price of guidance in text, one row against Hugging Face, independence.

    python tools/benchmark_sampling.py --output=benchmark.json --page=experiments/benchmarks.md
    python tools/benchmark_sampling.py --quick --only=1,2          # a tiny model, in seconds: says that the tool works, nothing else

Every figure is a ratio of two things measured in turn in this run, behind a gate: what the two compute is compared first, and nothing is
timed where it differs. experiments/benchmarks.md says what each figure means. Figure 4 needs the `parity` extra.
"""

import dataclasses
import functools
import pathlib
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Literal
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import benchmark_peer
from benchmark_protocol import (
  CompileClock,
  Protocol,
  Row,
  alternate,
  asked,
  define_flags,
  machine,
  markdown,
  spread,
  write_json,
  write_page,
)

import chameleon_jax
from chameleon_jax import presets
from chameleon_jax.array_types import Params
from chameleon_jax.config import SamplingOptions, TransformerConfig, VocabularyConfig
from chameleon_jax.errors import PromptError
from chameleon_jax.interop.native import abstract_transformer
from chameleon_jax.models.transformer.model import quantize_params
from chameleon_jax.sampling.engine import Engine
from chameleon_jax.tokens.document import Document
from chameleon_jax.tokens.vocabulary import Vocabulary

FLAGS = flags.FLAGS

Dtype = Literal['float32', 'bfloat16']
DTYPES: tuple[Dtype, ...] = ('float32', 'bfloat16')
AIMS = {1: '>= 4', 2: '<= 1/32', 3: '<= 1.05', 4: '>= 1.3', 5: 'unchanged', 6: 'none'}
SENTENCES = (
  'Draw a red apple.',
  'What is this?',
  'Write about pears, apples and plums, one after the other, with a picture of each where it helps.',
  'Draw a woman with dark skin who is running.',
  'Describe the picture.',
  'A short story of a fox and a lighthouse, please; the fox should be orange and the lighthouse red and white.',
  'Hello!',
  'Draw a sailing boat on the sea at night.',
)
Request = tuple[np.ndarray, SamplingOptions]


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """A model to measure.

  Attributes:
    name: cell of the table.
    config, params: of the transformer; float32 masters, one tree a layer.
    vocabulary: its ids.
    n_image_tokens: codes of a picture.
    starts: prompts of text, of different lengths.
  """

  name: str
  config: TransformerConfig
  params: Params
  vocabulary: Vocabulary
  n_image_tokens: int
  starts: tuple[np.ndarray, ...]

  def engine(self, dtype: Dtype, *, int8: bool = False) -> Engine:
    """An engine that computes in `dtype`, its weights in `dtype` or int8; the params of one type are shared."""
    params = self._int8_params() if int8 else self._params(dtype)
    return Engine(self._config(dtype), params, self.vocabulary, n_image_tokens=self.n_image_tokens)

  def _config(self, dtype: Dtype) -> TransformerConfig:
    return dataclasses.replace(self.config, dtype=dtype, param_dtype=dtype)

  @functools.cache  # noqa: B019 (a subject lives as long as the run)
  def _params(self, dtype: Dtype) -> Params:
    return jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, dtype), self.params)

  @functools.cache  # noqa: B019
  def _int8_params(self) -> Params:
    return jax.tree.map(jax.numpy.asarray, quantize_params(self.params, self.config))


def emoji() -> Subject:
  """The shipped weights."""
  model = chameleon_jax.load('emoji', dtype='float32')
  starts = tuple(model.prompt_tokens(Document.chat(sentence)) for sentence in SENTENCES)
  return Subject('emoji, 6.4M', model.config, model.parts.transformer_params, model.vocabulary, model.n_image_tokens, starts)


def random_model(name: str, config: TransformerConfig, vocabulary_config: VocabularyConfig, n_image_tokens: int) -> Subject:
  """Normal weights of `init_std`, norms of one, biases of nought."""
  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: Any) -> np.ndarray:
    last, shape = path[-1].key, leaf.shape
    if last in ('weight', 'bias'):
      return np.full(shape, last == 'weight', np.float32)
    return config.init_std * rng.standard_normal(shape, np.float32)

  params = jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(abstract_transformer(config)))
  vocabulary = Vocabulary(vocabulary_config)
  lengths = [length for length in (9, 5, 33, 17, 6, 48, 3, 14) if length < config.max_seq_len // 3]
  text = [rng.integers(vocabulary.text_start, vocabulary.size, length) for length in lengths]
  starts = tuple(np.array([vocabulary.begin_sequence, *row], np.int32) for row in text)
  return Subject(name, config, params, vocabulary, n_image_tokens, starts)


def random_100m() -> Subject:
  """92.4 million parameters, 67 of them in the embedding and the head of the released vocabulary."""
  sizes: dict[str, Any] = {'d_model': 512, 'n_layers': 8, 'n_heads': 8, 'n_kv_heads': 8, 'd_head': 64, 'd_ff': 1376, 'max_seq_len': 512}
  vocabulary = presets.released_vocabulary()
  return random_model('random, 92M', TransformerConfig(vocab_size=vocabulary.size, scan_layers=False, **sizes), vocabulary, 64)


def tiny() -> Subject:
  """For --quick."""
  return random_model('tiny', presets.tiny_transformer(init_std=0.3, scan_layers=False, n_kv_heads=4), presets.tiny_vocabulary(), 4)


SUBJECTS: dict[str, Callable[[], Subject]] = {'emoji': emoji, 'random': random_100m, 'tiny': tiny}


def mixed_requests(subject: Subject) -> list[Request]:
  """Sixteen: five of text, five pictures (four of them guided), six interleaved; they end at their limits, so that the work is the same."""
  v, n, starts = subject.vocabulary, subject.n_image_tokens, subject.starts
  rng = np.random.default_rng(1)
  fixed: dict[str, Any] = {'stop_at_end_turn': False, 'banned_tokens': (v.end_sequence,)}

  def start(index: int, *, seen: bool = False) -> np.ndarray:
    row = starts[index % len(starts)]
    picture = [v.begin_image, *rng.choice(v.token_of_code, n), v.end_image] if seen else []
    return np.array([row[0], *picture, *row[1:]], np.int32)

  requests: list[Request] = []
  for index, length in enumerate((3, 4, 1.5, 2, 5)):
    options = SamplingOptions(modalities='text', max_new_tokens=int(length * n // 2), greedy=index % 2 == 0, temperature=0.7 + 0.1 * index)
    requests.append((start(index, seen=index == 1), options))
  for index in range(5):
    scale = (1.0, 1.0) if index == 4 else (3.0, 1.2)
    options = SamplingOptions(modalities='image', image_greedy=index % 2 == 0, guidance_text=scale[0], guidance_image=scale[1])
    requests.append((start(index + 1, seen=index == 3), options))
  for index in range(6):
    count = 1 + index % 2
    options = SamplingOptions(max_new_tokens=count * (n + 2) + (index + 1) * n // 4, min_images=count, max_images=count)
    options = dataclasses.replace(options, greedy=index % 3 == 0, image_greedy=index % 2 == 0, top_p=0.8 + 0.03 * index)
    requests.append((start(index + 2, seen=index == 5), options))
  return [(prompt, dataclasses.replace(o, seed=place, **fixed)) for place, (prompt, o) in enumerate(requests)]


def together(engine: Engine, requests: Sequence[Request]) -> list[np.ndarray]:
  """All requests as one batch."""
  return engine.generate_tokens([prompt for prompt, _ in requests], [options for _, options in requests])


def one_by_one(engine: Engine, requests: Sequence[Request]) -> list[np.ndarray]:
  """One request after the other."""
  return [engine.generate_tokens([prompt], options)[0] for prompt, options in requests]


def greedy(requests: Sequence[Request]) -> list[Request]:
  """The same requests without chance."""
  return [(prompt, dataclasses.replace(options, greedy=True, image_greedy=True)) for prompt, options in requests]


def n_equal(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> int:
  """Rows that are the same."""
  return sum(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


class Benchmark:
  """The figures of one model. Each method gives the rows of one figure."""

  def __init__(self, subject: Subject, protocol: Protocol, clock: CompileClock, *, n_new: int):
    """n_new: tokens of the text that figures 3 and 4 write."""
    self.subject, self.protocol, self.clock, self.n_new = subject, protocol, clock, n_new
    self.requests = mixed_requests(subject)

  def row(self, figure: int, what: str, value: str, reached: bool | None, details: dict[str, Any] | None = None) -> Row:
    """A row of this model."""
    return Row(figure, self.subject.name, what, AIMS[figure], value, reached, details or {})

  @functools.cached_property
  def equal(self) -> dict[str, int]:
    """Computing type -> greedy rows of the sixteen that are the same together and one by one."""
    rows, engines = greedy(self.requests), {dtype: self.subject.engine(dtype) for dtype in DTYPES}
    return {dtype: n_equal(together(engine, rows), one_by_one(engine, rows)) for dtype, engine in engines.items()}

  def batching(self) -> list[Row]:
    """1: tokens per second of sixteen requests together over one by one."""
    rows = []
    for dtype in DTYPES:
      what = f'16 mixed requests together against one by one, {dtype}'
      gate = f'{self.equal[dtype]} of 16 greedy rows equal'
      if self.equal[dtype] < 16:
        rows.append(self.row(1, what, f'not timed: {gate}', False))
        continue
      batch, single = self.subject.engine(dtype), self.subject.engine(dtype)
      pairs = alternate(lambda: together(batch, self.requests), lambda: one_by_one(single, self.requests), self.protocol, self.clock)  # noqa: B023
      n_image = self.subject.n_image_tokens
      n_tokens = sum(n_image if options.modalities == 'image' else options.max_new_tokens for _, options in self.requests)
      rates = [n_tokens / statistics.median(times) for times in (pairs.first, pairs.second)]
      value = f'{spread(pairs.ratios)}: {rates[0]:,.0f} against {rates[1]:,.0f} tokens/s; {gate}'
      details = pairs.record() | {'tokens': n_tokens, 'dtype': dtype}
      rows.append(self.row(1, what, value, statistics.median(pairs.ratios) >= 4, details))
    return rows

  def synchronisations(self) -> list[Row]:
    """2: how often the host waits for the device, by the engine's counter and by a count of its reads from outside."""
    rows = []
    text = [(self.subject.starts[0], dataclasses.replace(self.requests[0][1], max_new_tokens=self.n_new))]
    for name, requests in (('16 mixed requests together', self.requests), ('one row of text', text)):
      engine = self.subject.engine('float32')
      with mock.patch.object(jax, 'device_get', wraps=jax.device_get) as reads:
        together(engine, requests)
      assert engine.decoded == sum(map(len, together(self.subject.engine('float32'), requests)))
      agree = reads.call_count == engine.syncs
      counted = f'{engine.syncs} for {engine.decoded} tokens' if agree else f'counted {engine.syncs}, reads seen {reads.call_count}'
      share = engine.decoded / max(engine.syncs, reads.call_count)
      details = {'syncs': engine.syncs, 'reads': reads.call_count, 'decoded': engine.decoded, 'steps': engine.steps}
      value = f'1/{share:.0f}: {counted}, {engine.steps} steps'
      rows.append(self.row(2, f'synchronisations a token, {name}', value, agree and share >= 32, details))
    return rows

  def guidance(self) -> list[Row]:
    """3: seconds of text that could be interrupted by guided pictures over text that could not be guided."""
    v = self.subject.vocabulary
    base = SamplingOptions(max_new_tokens=self.n_new, greedy=True, stop_at_end_turn=False, banned_tokens=(v.end_sequence, v.begin_image))
    off = dataclasses.replace(base, guidance_text=1.0, guidance_image=1.0)
    rows = []
    for dtype, count in [(dtype, 8) for dtype in DTYPES] + [(DTYPES[-1], 1)]:
      what = f'text of {count} row{"s" * (count > 1)}, guidance on against off, {dtype}'
      engines = [self.subject.engine(dtype) for _ in range(2)]
      asked = [[(start, options) for start in self.subject.starts[:count]] for options in (off, base)]
      written = [together(engine, requests) for engine, requests in zip(engines, asked)]
      if n_equal(*written) < len(written[0]):
        rows.append(self.row(3, what, 'not timed: the tokens differ', False))
        continue
      runs = [functools.partial(together, engine, requests) for engine, requests in zip(engines, asked)]
      pairs = alternate(runs[0], runs[1], self.protocol, self.clock)
      rows.append(self.row(3, what, spread(pairs.ratios, 3), statistics.median(pairs.ratios) <= 1.05, pairs.record() | {'dtype': dtype}))
    return rows

  def peer(self) -> list[Row]:
    """4: seconds of Hugging Face's greedy text over ours, one row."""
    what = 'one row of text against Hugging Face'
    absent = benchmark_peer.missing()
    if absent:
      return [self.row(4, what, f'not measured: {absent} is not installed', None)]
    subject, v = self.subject, self.subject.vocabulary
    allowed = v.is_text & ~v.is_barred
    prompt = np.resize(np.concatenate([start[1:] for start in subject.starts]), self.n_new).astype(np.int32)  # as long as what follows it
    prompt[0] = v.begin_sequence
    options = SamplingOptions('text', max_new_tokens=self.n_new, greedy=True, repetition_penalty=1.0, stop_at_end_turn=False)
    options = dataclasses.replace(options, banned_tokens=(v.end_sequence,))
    with tempfile.TemporaryDirectory() as folder:
      benchmark_peer.write(pathlib.Path(folder), subject.config, subject.params, v.config)
      peer = benchmark_peer.Peer(pathlib.Path(folder), allowed)
      ours, theirs = subject.engine('float32').generate_tokens([prompt], options)[0][:32], peer(prompt, 32)
      if not np.array_equal(ours, theirs):
        same = int(np.argmin(ours == theirs))
        return [self.row(4, what, f'not timed: greedy tokens differ from the {same + 1}. on', False)]
      settings = peer.choose(prompt, self.n_new)
      rows = []
      for dtype, int8, aim in (*((dtype, False, 1.3) for dtype in DTYPES), ('bfloat16', True, 2.0)):
        engine = subject.engine(dtype, int8=int8)
        run = functools.partial(engine.generate_tokens, [prompt], options)
        pairs = alternate(run, functools.partial(peer, prompt, self.n_new), self.protocol, self.clock)
        rates = [self.n_new / statistics.median(times) for times in (pairs.first, pairs.second)]
        value = f'{spread(pairs.ratios)}: {rates[0]:,.0f} against {rates[1]:,.0f} tokens/s ({peer.dtype}, {peer.cache} cache)'
        details = pairs.record() | {'dtype': dtype, 'int8': int8, 'peer_settings_s': settings, 'prompt': len(prompt), 'new': self.n_new}
        which = f'{what}, ours in {dtype}' + ' with int8 weights' * int8
        rows.append(Row(4, subject.name, which, f'>= {aim:g}', value, statistics.median(pairs.ratios) >= aim, details))
    return rows

  def independence(self) -> list[Row]:
    """5: what every third of the requests writes with and without troublesome ones among them."""
    rows = []
    v, well = self.subject.vocabulary, self.requests[::3]
    start, context = self.subject.starts[0], self.subject.config.max_seq_len
    malformed = {
      'empty': np.zeros(0, np.int32),
      'unknown id': np.array([0, v.size]),
      'over-long': np.resize(start, context + 1),
      'picture in a picture': np.array([0, v.begin_image, v.token_of_code[0], v.begin_image]),
    }
    for dtype in DTYPES:
      expected = [row.tolist() for row in one_by_one(self.subject.engine(dtype), well)]
      engine = self.subject.engine(dtype)
      tickets, doomed, refused = [], [], []
      for place, (prompt, options) in enumerate(well):
        tickets.append(engine.submit(prompt, options))
        doomed.append(engine.submit(start, dataclasses.replace(self.requests[-1][1], seed=100 + place)))
        name, bad = list(malformed.items())[place % len(malformed)]
        try:
          engine.submit(bad, options)
        except PromptError:
          refused.append(name)
      written: dict[int, list[int]] = {ticket: [] for ticket in tickets + doomed}
      ended = {}
      while engine.pending:
        for progress in engine.advance(8):
          written[progress.ticket] += progress.tokens.tolist()
          ended[progress.ticket] = progress.finished
        live = [ticket for ticket in doomed if ended.get(ticket) is None]
        if live:
          engine.cancel(live[0])
      cancelled = sum(ended[ticket] == 'cancelled' for ticket in doomed)
      same = sum(written[ticket] == row for ticket, row in zip(tickets, expected))
      ok = same == len(well) and cancelled > 0 and len(refused) == len(well)
      value = f'{"yes" if ok else "no"}: {same} of {len(well)} rows the same beside {cancelled} cancelled and {len(refused)} refused'
      rows.append(self.row(5, f'other requests unchanged, {dtype}', value, ok, {'refused': refused, 'dtype': dtype}))
    return rows


def random_requests() -> Row:
  """6: no clock; a test holds it."""
  what = '10,000 random requests: grammar broken, rows starved'
  return Row(6, 'scripted logits', what, AIMS[6], 'held by tests/sampling/test_many_requests.py', None)


def measure(names: Sequence[str], only: Sequence[int], protocol: Protocol, *, n_new: int) -> list[Row]:
  """The rows of the table, by figure."""
  rows = [random_requests()] if 6 in only else []
  clock = CompileClock()
  for name in names:
    bench = Benchmark(SUBJECTS[name](), protocol, clock, n_new=n_new)
    figures = {1: bench.batching, 2: bench.synchronisations, 3: bench.guidance, 4: bench.peer, 5: bench.independence}
    for figure, run in figures.items():
      if figure in only:
        for row in run():
          rows.append(row)
          print(f'figure {row.figure}, {row.model}: {row.what}: {row.value}', file=sys.stderr, flush=True)
  return sorted(rows, key=lambda row: row.figure)


def main(argv: Sequence[str]) -> None:
  only, protocol = asked(argv, AIMS)
  where = machine()
  rows = measure(['tiny'] if FLAGS.quick else FLAGS.models, only, protocol, n_new=32 if FLAGS.quick else 64)
  table = markdown(rows, where, shlex.join(['python', 'tools/benchmark_sampling.py', *sys.argv[1:]]))
  print(table)
  if FLAGS.output:
    write_json(pathlib.Path(FLAGS.output), rows, where)
  if FLAGS.page:
    write_page(pathlib.Path(FLAGS.page), table)


if __name__ == '__main__':
  define_flags(AIMS)
  flags.DEFINE_list('models', ['emoji', 'random'], f'Models to measure: {", ".join(SUBJECTS)}.')
  flags.DEFINE_string('page', None, 'Page whose results section is rewritten.')
  app.run(main)
