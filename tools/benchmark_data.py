"""Measures the data path: tokenizing against the bare encoder, packed rows from shards, and how long a step waits for its data.

    python tools/benchmark_data.py --output=data.json
    python tools/benchmark_data.py --quick          # small sizes, in seconds: says that the tool works, nothing else

1  pictures per second of `chameleon tokenize`, one process, over those of its encoder alone on the same pictures, prepared and in memory;
   in turn, in one run. The encoder alone takes one batch after the other; `chameleon tokenize` runs two small ones side by side on a CPU,
   and cores that wait in one work on the other: the ratio says what a user gets, not how little the rest costs. Behind a gate: the codes
   in the shard are those of the bare encoder. `emoji` is the shipped tokenizer on PNG files of 96 pixels; `released` is the released
   encoder's size with random weights on JPEG files of 640 x 480.
2  tokens per second of packed 4,096-token rows from tokenized shards (a third pairs of a picture and a caption, a third text, a third
   interleaved with two pictures), over what one H200 eats when it trains 7B at 50 % of its peak: 11,400 tokens/s (989 TFLOP/s * 0.5
   over 6 * 7.04e9 + attention, 4.34e10 FLOP a token). Behind a gate: the rows hold documents as `render` makes them.
3  share of the time of a step that the emoji pre-training waits for its data, from the run's own metrics: its steps 20 to 60.
"""

import dataclasses
import functools
import io
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from benchmark_protocol import CompileClock, Protocol, Row, alternate, asked, define_flags, machine, markdown, spread, write_json

from chameleon_jax import presets
from chameleon_jax.chameleon import shipped_path
from chameleon_jax.config import DataConfig, StageConfig
from chameleon_jax.data.encode import prepared
from chameleon_jax.data.pipeline import make_batches
from chameleon_jax.data.sources import source as registry
from chameleon_jax.data.sources.source import make_source
from chameleon_jax.data.tokenize import Tokenization
from chameleon_jax.data.tokenize_folder import TokenizeJob
from chameleon_jax.data.tokenize_run import run as tokenize
from chameleon_jax.interop.native import ModelParts, abstract_vqgan
from chameleon_jax.interop.opening import load_tokenizers
from chameleon_jax.tokens.document import Codes, Document
from chameleon_jax.tokens.render import render
from chameleon_jax.tokens.vocabulary import Vocabulary
from chameleon_jax.training.state import unboxed

FLAGS = flags.FLAGS
AIMS = {1: '>= 0.9', 2: '>= 50', 3: '< 1 %'}
EATEN = 11_400  # tokens a second: 7B, 50 % of an H200
ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much is measured."""

  emoji_pictures: int = 1024
  released_pictures: int = 8
  documents: int = 6000
  rows: int = 800
  steps: int = 60


QUICK = Sizes(emoji_pictures=32, released_pictures=0, documents=60, rows=16, steps=0)


def _pictures(folder: pathlib.Path, n: int, size: tuple[int, int], suffix: str) -> None:
  """Smooth pictures with some noise: they compress as photographs do."""
  rng = np.random.default_rng(0)
  width, height = size
  folder.mkdir()
  for i in range(n):
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height), PIL.Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(coarse, np.int16) + rng.integers(-8, 9, (height, width, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noisy).save(buffer, format='PNG' if suffix == 'png' else 'JPEG', quality=90)
    (folder / f'{i:05d}.{suffix}').write_bytes(buffer.getvalue())
    (folder / f'{i:05d}.txt').write_text(f'a picture, number {i}')


def _released() -> ModelParts:
  """The released encoder's size with random weights."""
  config = presets.vqgan_512()
  rng = np.random.default_rng(0)
  shapes = unboxed(abstract_vqgan(config))
  encoder = {name: part for name, part in shapes.items() if name != 'decoder'}
  params = jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), encoder)
  return ModelParts(vqgan_config=config, vqgan_params=params)


def tokenizing(name: str, n: int, protocol: Protocol, clock: CompileClock) -> Row:
  """1: the shard of a folder of pictures against the encoder alone."""
  what = f'tokenize {n} pictures against the bare encoder'
  parts = load_tokenizers(shipped_path('emoji') or '') if name == 'emoji' else _released()
  size, suffix, batch = ((96, 96), 'png', 64) if name == 'emoji' else ((640, 480), 'jpg', 4)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    _pictures(folder / 'pictures', n, size, suffix)
    source = f'image_folder:{folder}/pictures?validation=0&order=text_first'
    work = Tokenization(TokenizeJob(source, 'train', str(folder / 'out'), n_shards=1, batch_size=min(batch, n)), parts)
    assert work.config is not None
    rng = np.random.default_rng(0)
    pixels = [prepared(work.source.document(i, rng).pictures[0].pixels, work.config) for i in range(n)]  # type: ignore[union-attr]
    batches = [np.stack(pixels[i : i + work.job.batch_size]) for i in range(0, n - work.job.batch_size + 1, work.job.batch_size)]

    def whole() -> None:
      for path in (folder / 'out').glob('shard-*'):
        path.unlink()
      work.shard(0)

    def bare() -> np.ndarray:
      assert work._encode is not None
      flying, rows = [], []
      for pictures in batches:
        flying.append(work._encode(pictures))
        if len(flying) > 1:
          rows.append(np.asarray(flying.pop(0)))
      return np.concatenate(rows + [np.asarray(codes) for codes in flying])

    whole()
    tokenize(work.job, lambda: parts)  # ends the job: a table, so that the shard can be read
    shards = make_source(f'array_record:{folder}/out', 'train')
    found = [shards.document(i, rng).pictures[0].codes for i in range(n)]  # type: ignore[union-attr]
    equal = int(np.sum(np.all(np.stack(found) == bare(), axis=1)))
    if equal < n:
      return Row(1, name, what, AIMS[1], f'not timed: the codes of {n - equal} pictures differ', False, {})
    pairs = alternate(whole, bare, protocol, clock)
  rates = [n / statistics.median(times) for times in (pairs.first, pairs.second)]
  value = f'{spread(pairs.ratios)}: {rates[0]:,.1f} against {rates[1]:,.1f} pictures/s'
  return Row(1, name, what, AIMS[1], value, statistics.median(pairs.ratios) >= 0.9, pairs.record() | {'pictures': n})


def _documents(path: pathlib.Path, n: int) -> None:
  """JSON lines of the three kinds; pictures are named by number and are made as codes, not read."""
  rng = np.random.default_rng(0)
  words = ['picture', 'of', 'a', 'the', 'red', 'boat', 'on', 'water', 'tree', 'and', 'small', 'house', 'light', 'morning', 'field', 'bird']

  def text(least: int, most: int) -> str:
    return ' '.join(rng.choice(words, rng.integers(least, most)))

  with path.open('w') as file:
    for i in range(n):
      if i % 3 == 0:
        record: dict[str, Any] = {'segments': [text(8, 40), {'codes': 1}]}
      elif i % 3 == 1:
        record = {'segments': [text(100, 1200)]}
      else:
        record = {'segments': [text(20, 150), {'codes': 1}, text(20, 150), {'codes': 1}, text(8, 40)]}
      file.write(json.dumps(record) + '\n')


class _CodedSource:
  """Documents of such a file with random codes for pictures: what the released tokenizer would give, without its hours of work."""

  def __init__(self, path: pathlib.Path):
    self._records = [json.loads(line) for line in path.read_text().splitlines()]

  def __len__(self) -> int:
    return len(self._records)

  def document(self, index: int, rng: np.random.Generator) -> Document:
    segments = [part if isinstance(part, str) else Codes(rng.integers(0, 8192, 1024)) for part in self._records[index]['segments']]
    return Document.plain(*segments)


def packing(n_documents: int, n_rows: int, protocol: Protocol) -> Row:
  """2: packed rows of 4,096 tokens from shards, the released vocabulary, one process."""
  what = f'{n_rows} packed rows of 4,096 tokens from {n_documents} tokenized documents'
  text_tokenizer = load_tokenizers(shipped_path('emoji') or '').text_tokenizer
  assert text_tokenizer is not None
  vocabulary = Vocabulary(presets.released_vocabulary())
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    _documents(folder / 'a.jsonl', n_documents)
    given = _CodedSource(folder / 'a.jsonl')
    registry.SOURCES['benchmark'] = lambda split, codes: given
    tokenize(TokenizeJob('benchmark', 'train', str(folder / 'out'), n_shards=4), lambda: ModelParts(text_tokenizer=text_tokenizer))
    name = f'array_record:{folder}/out'
    source = make_source(name, 'train').fitted(vocabulary, text_tokenizer, None)  # type: ignore[attr-defined]
    for index in range(0, n_documents, max(1, n_documents // 50)):
      expected, found = render(source.document(index, np.random.default_rng(0)), vocabulary, text_tokenizer), source.rendered(index)
      if not np.array_equal(expected.tokens, found.tokens):
        return Row(2, '7B, released vocabulary', what, AIMS[2], f'not timed: document {index} is rendered otherwise', False, {})
    config = DataConfig(stages=(StageConfig(1.0, ((name, 1.0),)),), seq_len=4096, batch_size=8)
    batches = make_batches(config, vocabulary, text_tokenizer, n_steps=1 << 40)
    rates, fills = [], []
    try:
      for turn in range(protocol.warm_ups + protocol.repetitions):
        start, filled = time.perf_counter(), 0
        for _ in range(n_rows // 8):
          filled += int(np.count_nonzero(next(batches)['segment_ids']))
        if turn >= protocol.warm_ups:
          rates.append(filled / (time.perf_counter() - start))
          fills.append(filled / (n_rows * 4096))
    finally:
      batches.close()
  times = [rate / EATEN for rate in rates]
  per_second = f'{statistics.median(rates):,.0f} tokens/s without padding'
  value = f'{spread(times, 0)} x {EATEN:,}: {per_second}, rows {statistics.mean(fills):.0%} full'
  return Row(2, '7B, released vocabulary', what, AIMS[2], value, statistics.median(times) >= 50, {'tokens_per_second': rates})


def waiting(n_steps: int) -> Row:
  """3: what the emoji pre-training waits for its data."""
  what = f'wait for data, emoji pre-training, steps 21 to {n_steps}'
  if not n_steps:
    return Row(3, 'emoji', what, AIMS[3], 'not measured with --quick', None, {})
  changes = {'tokenizers': shipped_path('emoji'), 'log_every': 20, 'eval_every': 10**6}
  config = [f'--config={ROOT / "experiments" / "emoji_pretrain.py"}', *(f'--config.{key}={value}' for key, value in changes.items())]
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, '-m', 'chameleon_jax.cli.main', 'train', *config, f'--workdir={folder}', f'--stop_after={n_steps}']
    subprocess.run(command, check=True)
    lines = [json.loads(line) for line in (pathlib.Path(folder) / 'metrics.jsonl').read_text().splitlines()]
  found = {line['step']: line['train/data_wait_fraction'] for line in lines if 'train/data_wait_fraction' in line}
  shares = [share for step, share in found.items() if step > 20]  # the first line has compilation and the first filling in it
  value = f'{100 * max(shares):.2f} % at most, of {len(shares)} means over 20 steps'
  return Row(3, 'emoji', what, AIMS[3], value, max(shares) < 0.01, {'data_wait_fraction': found})


def measure(only: Sequence[int], sizes: Sizes, protocol: Protocol) -> list[Row]:
  """The rows of the table."""
  clock = CompileClock()
  runs: dict[int, list[Callable[[], Row]]] = {1: [functools.partial(tokenizing, 'emoji', sizes.emoji_pictures, protocol, clock)]}
  if sizes.released_pictures:
    few = dataclasses.replace(protocol, repetitions=min(3, protocol.repetitions))
    runs[1].append(functools.partial(tokenizing, 'released', sizes.released_pictures, few, clock))
  runs[2] = [functools.partial(packing, sizes.documents, sizes.rows, protocol)]
  runs[3] = [functools.partial(waiting, sizes.steps)]
  rows = []
  for figure, calls in runs.items():
    for call in calls if figure in only else ():
      rows.append(call())
      print(f'figure {figure}, {rows[-1].model}: {rows[-1].what}: {rows[-1].value}', file=sys.stderr, flush=True)
  return rows


def main(argv: Sequence[str]) -> None:
  only, protocol = asked(argv, AIMS)
  where = machine()
  rows = measure(only, QUICK if FLAGS.quick else Sizes(), protocol)
  print(markdown(rows, where, shlex.join(['python', 'tools/benchmark_data.py', *sys.argv[1:]])))
  if FLAGS.output:
    write_json(pathlib.Path(FLAGS.output), rows, where)


if __name__ == '__main__':
  define_flags(AIMS)
  app.run(main)
