"""Side by side: this project against what a user would pick instead, with the same weights, on this machine.

    python tools/benchmark.py --output=benchmark.json --page=experiments/benchmarks.md
    python tools/benchmark.py --cases=train,decode --repetitions=5
    python tools/benchmark.py --size=tiny --cases=train          # in seconds: says that the tool works, nothing else
    python tools/benchmark.py --cases= --curves=experiments/scaling.png     # tokens per second against size, context, batch, picture

Peers are Hugging Face's Chameleon on torch, a plain fast torch decode loop, and torch image tokenizers (extra `parity`; left out where it
is not installed). Every case has a gate: what the two compute is compared first, and nothing is timed where it differs. Contestants run
in turn, round after round; ratios are of one round. experiments/benchmarks.md says what each case is; tools/benchmark_gpu.py is for GPUs.
"""

import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import benchmark_curves
import benchmark_decoding
import benchmark_machine
import benchmark_pictures
import benchmark_transformer
import benchmark_whole
from benchmark_models import SIZES, Sizes, Subject
from benchmark_protocol import MAX_LOAD, CompileClock, Protocol, Row, machine, markdown, refuse_if_busy, write_json, write_page
from benchmark_transformer import Bench

FLAGS = flags.FLAGS
SECTION = 'side by side'
CASES = ('train', 'prefill', 'decode', 'encode', 'image_decode', 'picture', 'interleaved', 'pipeline', 'start')


def ceilings_of(sizes: Sizes) -> benchmark_machine.Ceilings:
  """Of this machine; a look only for the tiny size."""
  if sizes.name == 'tiny':
    return benchmark_machine.measure(shape=(64, 64, 64), n_bytes=1 << 20, turns=2)
  return benchmark_machine.measure()


def measure(cases: Sequence[str], bench: Bench, on_case: Callable[[list[Row]], None]) -> None:
  """Measures case by case; `on_case` gets all rows so far after each."""
  sizes = bench.subject.sizes
  rows: list[Row] = []
  given: list[benchmark_pictures.Pictures] = []

  def tokenizer() -> benchmark_pictures.Pictures:
    if not given:
      given.append(benchmark_pictures.Pictures.random(sizes.vqgan))
    return given[0]

  few = {'documents': 60, 'rows': 16} if sizes.name == 'tiny' else {}
  runs: dict[str, Callable[[], Sequence[Row]]] = {
    'train': lambda: benchmark_transformer.train(bench),
    'prefill': lambda: benchmark_transformer.prefill(bench),
    'decode': lambda: benchmark_decoding.decodes(bench),
    'encode': lambda: benchmark_pictures.encode(bench, tokenizer()),
    'image_decode': lambda: benchmark_pictures.decode(bench, tokenizer()),
    'picture': lambda: benchmark_whole.picture(bench),
    'interleaved': lambda: benchmark_whole.interleaved(bench),
    'pipeline': lambda: benchmark_whole.pipeline(bench, rows, **few),
    'start': lambda: benchmark_whole.start(bench),
  }
  for case in CASES:
    if case not in cases:
      continue
    begun = time.perf_counter()
    for row in runs[case]():
      rows.append(row)
      print(f'{row.figure}, {row.model}: {row.what}: {row.value}', file=sys.stderr, flush=True)
    print(f'  {case} took {time.perf_counter() - begun:.0f} s, load average {os.getloadavg()[0]:.2f}', file=sys.stderr, flush=True)
    on_case(rows)


def main(argv: Sequence[str]) -> None:
  cases = [case for case in FLAGS.cases if case]
  if len(argv) > 1 or not set(cases) <= set(CASES):
    raise app.UsageError(f'--cases takes names out of {", ".join(CASES)}; there are no further arguments')
  if FLAGS.size != 'tiny':
    refuse_if_busy(FLAGS.max_load)
  where, sizes = machine(), SIZES[FLAGS.size]()
  ceilings = ceilings_of(sizes)
  where['ceilings'] = ceilings.details
  protocol = Protocol(warm_ups=1, repetitions=FLAGS.repetitions)
  bench, folder = benchmark_transformer.bench_in(Subject.random(sizes), protocol, ceilings, CompileClock())

  def write(rows: list[Row]) -> str:
    """The table so far; a run that is stopped has recorded the cases before."""
    where['load_at_end'] = round(os.getloadavg()[0], 2)
    table = markdown(rows, where, shlex.join(['python', 'tools/benchmark.py', *sys.argv[1:]])) + ceilings.line() + '\n'
    table += f'Load average {where["load_at_end"]} at the end.\n'
    if FLAGS.output:
      write_json(pathlib.Path(FLAGS.output), rows, where)
    if FLAGS.page:
      write_page(pathlib.Path(FLAGS.page), table, SECTION)
    return table

  tables = ['']
  with folder:
    measure(cases, bench, lambda rows: tables.append(write(rows)))
    if FLAGS.curves:
      output = pathlib.Path(FLAGS.curves)
      print(benchmark_curves.write(bench.subject, ceilings, protocol, bench.clock, output=output, where=where))
  print(tables[-1])


if __name__ == '__main__':
  flags.DEFINE_list('cases', list(CASES), f'Cases to measure: {", ".join(CASES)}.')
  flags.DEFINE_enum('size', 'small', sorted(SIZES), 'Size of the models.')
  flags.DEFINE_integer('repetitions', 5, 'Rounds under the clock.', lower_bound=1)
  flags.DEFINE_float('max_load', MAX_LOAD, 'Load average above which nothing is timed.')
  flags.DEFINE_string('output', None, 'JSON file for every reading.')
  flags.DEFINE_string('curves', None, 'Picture of scaling curves to draw (PNG or SVG); their numbers go into the .json beside it.')
  flags.DEFINE_string('page', None, 'Page whose section is rewritten.')
  app.run(main)
