"""What a user does from end to end, for `benchmark.py`: one picture, an interleaved batch, the input pipeline, the start of a command.

The picture and the batch are of the shipped weights. The pipeline's tokens per second stand beside what the training step of this run
eats. The commands are started as a user starts them, with an empty cache folder first, and timed to the first text on stdout.
"""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

import benchmark_data
import benchmark_sampling
import numpy as np
from benchmark_protocol import Contestant, Protocol, Row, race
from benchmark_torch_plain import PlainDecoder
from benchmark_transformer import Bench

import chameleon_jax
from chameleon_jax.chameleon import Chameleon
from chameleon_jax.config import Dtype, SamplingOptions
from chameleon_jax.tokens.document import Document

PROMPT = 'Draw a red apple.'
EMOJI = 'emoji, 6.4M'
START = 8.0  # seconds to the first token, second run
ROOT = pathlib.Path(__file__).resolve().parents[1]


# ----------------------------------------------------------------------------------------------------------------------- pictures


@functools.cache
def _emoji(dtype: Dtype) -> Chameleon:
  return chameleon_jax.load('emoji', dtype=dtype)


def picture(bench: Bench) -> list[Row]:
  """One guided picture of the shipped weights, greedy; its codes against plain torch, and with prompt and pixels on our side."""
  options = SamplingOptions('image', image_greedy=True, max_new_tokens=128)
  model = _emoji('float32')
  v, n = model.vocabulary, model.n_image_tokens
  prompt = model.prompt_tokens(Document.chat(PROMPT))
  ours = [Contestant(f'ours {dtype}', lambda _, m=_emoji(dtype): m.generate_tokens([prompt], options)) for dtype in ('float32', 'bfloat16')]
  ours.append(Contestant('ours bfloat16, whole', lambda _: _emoji('bfloat16').generate([Document.chat(PROMPT)], options)))

  def row(what: str, value: str, reached: bool | None = None, details: dict | None = None) -> Row:
    return Row('picture', EMOJI, what, '-', value, reached, details or {})

  peers = []
  if bench.peers:
    streams = np.append(prompt, v.begin_image), np.array([v.begin_sequence, v.begin_image])
    for dtype in ('float32', 'bfloat16'):
      slots = len(prompt) + 1 + n
      peer = PlainDecoder(model.parts.transformer_params, model.config, v.is_image, dtype=dtype, slots=slots)
      run = functools.partial(peer.guided, streams, n, options.guidance_text)
      if dtype == 'float32':
        expected, found = model.generate_tokens([prompt], options)[0], run()
        if not np.array_equal(expected, found):
          return [row('gate', f'not timed: {int(np.sum(expected != found))} of {n} codes differ from those of plain torch', False)]
      peers.append(Contestant(f'plain torch {dtype}', lambda _, run=run: run()))
  seen = race([*ours, *peers], bench.protocol, bench.clock)
  whole = seen.median('ours bfloat16, whole')
  rows = [row(f'{n} codes, guided, from text to pixels, ours bfloat16', f'{1e3 * whole:,.0f} ms', None, seen.record())]
  if not peers:
    return [*rows, row('against plain torch', 'left out: torch and transformers are not installed (extra `parity`)')]
  fast = seen.fastest(peer.name for peer in peers)
  for contestant in ours[:2]:
    made = bench.ratio('picture', f'its codes alone, {contestant.name} against {fast}', seen, contestant.name, fast, each=n)
    rows.append(dataclasses.replace(made, model=EMOJI))
  return rows


def interleaved(bench: Bench) -> list[Row]:
  """Sixteen mixed requests as one batch against one by one: figure 1 of the sampler's benchmark, in float32."""
  sampler = benchmark_sampling.Benchmark(benchmark_sampling.emoji(), bench.protocol, bench.clock, n_new=64)
  sampler.equal = {'float32': benchmark_sampling.n_equal(*_greedy_both_ways(sampler))}
  dtypes, benchmark_sampling.DTYPES = benchmark_sampling.DTYPES, ('float32',)
  try:
    return [dataclasses.replace(row, figure='interleaved batch', aim='-', reached=None) for row in sampler.batching()]
  finally:
    benchmark_sampling.DTYPES = dtypes


def _greedy_both_ways(sampler: benchmark_sampling.Benchmark) -> tuple[list[np.ndarray], list[np.ndarray]]:
  engine, requests = sampler.subject.engine('float32'), benchmark_sampling.greedy(sampler.requests)
  return benchmark_sampling.together(engine, requests), benchmark_sampling.one_by_one(engine, requests)


# ----------------------------------------------------------------------------------------------------------------- input pipeline


def pipeline(bench: Bench, trained: Sequence[Row], *, documents: int = 3000, rows: int = 240) -> list[Row]:
  """Packed tokens per second of one process, over those that the training step of this run eats."""
  found = benchmark_data.packing(documents, rows, Protocol(1, min(3, bench.protocol.repetitions)))
  rates = found.details.get('tokens_per_second')
  if rates is None:
    return [dataclasses.replace(found, figure='input pipeline')]
  rate = statistics.median(rates)
  value = f'{rate:,.0f} tokens/s'
  eaten = [row.details for row in trained if 'median_s' in row.details and row.figure == 'train']
  if eaten:
    step = eaten[0]['tokens'] / eaten[0]['median_s']['ours bfloat16'] if 'tokens' in eaten[0] else None
    value += f', {rate / step:,.0f} x the training step of this run' if step else ''
  value += f', {rate / benchmark_data.EATEN:.0f} x what 7B eats on one H200 at half its peak'
  return [Row('input pipeline', found.model, f'{rows} packed rows of 4,096 tokens, one process', '-', value, None, found.details)]


# ------------------------------------------------------------------------------------------------------------------ cold starts

# The steps of `chameleon sample` one by one, each with the seconds since the process began.
_SPLIT = """
import json, os, time
stamps = {}
started = float(open('/proc/self/stat').read().rsplit(')', 1)[1].split()[19]) / os.sysconf('SC_CLK_TCK')
begun = time.clock_gettime(time.CLOCK_BOOTTIME) - started
start = time.perf_counter() - begun
def stamp(name): stamps[name] = time.perf_counter() - start
stamp('python')
import jax
stamp('import jax')
import chameleon_jax.cli.sample, chameleon_jax.cli.sample_run
stamp('import chameleon_jax')
jax.devices()
stamp('devices')
import sys
from chameleon_jax.chameleon import Chameleon
from chameleon_jax.config import SamplingOptions
from chameleon_jax.tokens.document import Document
model = Chameleon.load(sys.argv[1])
stamp('load')
prompt = model.prompt_tokens(Document.chat('What is this?'))
engine = model.engine()
engine.submit(prompt, SamplingOptions('text', max_new_tokens=16))
engine.advance(1)
stamp('first token')
print(json.dumps(stamps))
"""


def _environment(folder: str) -> Mapping[str, str]:
  """That of this process, with its caches in `folder` and the package of this tree."""
  kept = {name: value for name, value in os.environ.items() if not name.startswith(('JAX_COMPILATION', 'JAX_PERSISTENT', 'XLA_FLAGS'))}
  paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
  return {**kept, 'HOME': folder, 'XDG_CACHE_HOME': folder, 'PYTHONPATH': os.pathsep.join(paths), 'PYTHONUNBUFFERED': '1'}


def first_text(folder: str, *, model: str = 'emoji', timeout: float = 300) -> float:
  """Seconds from the start of `chameleon sample` to its first text on stdout.

  Raises:
    RuntimeError: it ended without a text.
  """
  flags = [f'--model={model}', '--prompt=What is this?', '--modalities=text', '--max_new_tokens=16', '--stream', '--noprogress']
  command = [sys.executable, '-m', 'chameleon_jax.cli.main', 'sample', *flags]
  start = time.perf_counter()
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(_environment(folder)), cwd=folder) as process:
    assert process.stdout is not None and process.stderr is not None
    first = process.stdout.read(1)
    seconds = time.perf_counter() - start
    _, complaint = process.communicate(timeout=timeout)
  if not first or process.returncode:
    raise RuntimeError(f'`chameleon sample` ended with {process.returncode}: {complaint.decode()[-500:]}')
  return seconds


def split(folder: str, *, model: str = 'emoji') -> dict[str, float]:
  """Seconds of each step on the way to the first token, in a process of its own."""
  command = [sys.executable, '-c', _SPLIT, model]
  done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(_environment(folder)), cwd=folder)
  stamps = json.loads(done.stdout.splitlines()[-1])
  return {name: after - before for (name, after), before in zip(stamps.items(), [0.0, *stamps.values()])}


def start(bench: Bench, *, model: str = 'emoji') -> list[Row]:
  """The first and the later runs of `chameleon sample`, from the shell to the first text."""
  case, what = 'cold start', '`chameleon sample`, from the shell to the first text'
  with tempfile.TemporaryDirectory() as folder:
    first = first_text(folder, model=model)
    later = [first_text(folder, model=model) for _ in range(min(3, bench.protocol.repetitions))]
    seconds, steps = statistics.median(later), split(folder, model=model)
  details = {'first_s': first, 'later_s': later, 'split_s': steps}
  parts = ', '.join(f'{name} {part:.1f}' for name, part in steps.items())
  value = f'{seconds:.1f} s ({min(later):.1f} to {max(later):.1f}), step by step: {parts}'
  return [
    Row(case, model, f'{what}, first run', '-', f'{first:.1f} s', None),
    Row(case, model, f'{what}, second run', f'<= {START:.0f} s', value, seconds <= START, details),
  ]
