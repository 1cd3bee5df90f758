"""Measures on one GPU, behind gates, what the project promises for an H200; never more than the budget.

    python tools/benchmark_gpu.py --output=h200.json
    python tools/benchmark_gpu.py --size=tiny --budget=120          # on a CPU, in a minute: says that the script works, nothing else

Cases: training of the 7B, sampling (decoding of one row in bfloat16 and int8 and of 32 at 2,048 tokens in bfloat16 and with int8 weights
and cache, prefill, one guided picture, the plain torch loop), the image tokenizer. Each runs in a process of its own, so that one that runs
out of memory or of time takes nothing with it; its rows are written as they come. A case for which no time is left says so. Programs are
kept in --cache: a second run compiles less.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

FLAGS = flags.FLAGS
LIMITS = {'train': 200.0, 'sample': 230.0, 'image_tokenizer': 120.0}  # seconds that a case may take
LEAST = 45.0  # seconds without which no case is begun
SPARE = 5.0  # seconds kept for the table
MEMORY = {'sample': '0.75'}  # of the GPU that jax takes, elsewhere 0.92; torch needs room for weights of its own


def child_command(case: str, size: str, seconds: float, rows: pathlib.Path) -> list[str]:
  """The process of one case, which writes a JSON line for each row."""
  return [
    sys.executable,
    str(pathlib.Path(__file__).resolve()),
    f'--child={case}',
    f'--size={size}',
    f'--budget={seconds:.0f}',
    f'--output={rows}',
  ]


def orchestrate(
  cases: Sequence[str],
  budget: float,
  folder: pathlib.Path,
  command: Callable[[str, float, pathlib.Path], list[str]],
  environment: dict[str, str],
) -> Iterator[dict[str, Any]]:
  """Rows of the cases, in order, each case in a process that is ended when its time is over.

  Args:
    cases: names.
    budget: seconds for all of them.
    folder: for the rows.
    command: (case, seconds, file for its rows) -> what to run.
    environment: of the processes.
  """
  ends = time.monotonic() + budget
  for case in cases:
    left = ends - time.monotonic() - SPARE
    if left < min(LEAST, budget / 3):
      yield told(case, f'not measured: {left:.0f} s left of the budget')
      continue
    seconds = min(LIMITS.get(case, left), left)
    rows = folder / f'{case}.jsonl'
    rows.touch()
    begun, problem = time.monotonic(), ''
    given = {'XLA_PYTHON_CLIENT_MEM_FRACTION': MEMORY.get(case, '0.92'), **environment}
    process = subprocess.Popen(
      command(case, seconds - SPARE, rows), env=given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
      _, complaint = process.communicate(timeout=seconds)
      if process.returncode:
        problem = f'ended with {process.returncode}: {" ".join(complaint[-300:].split())}'
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      problem = f'ended after {seconds:.0f} s; what it had measured is above'
    yield from (json.loads(line) for line in rows.read_text().splitlines())
    if problem:
      yield told(case, problem)
    print(f'{case} took {time.monotonic() - begun:.0f} s', file=sys.stderr, flush=True)


def told(case: str, value: str) -> dict[str, Any]:
  """A row without a figure."""
  return {'figure': case, 'model': '-', 'what': 'the case', 'aim': '-', 'value': value, 'reached': None, 'details': {}}


def run_case(case: str, size: str, seconds: float, output: pathlib.Path) -> None:
  """One case in this process; a line for each row."""
  deadline = time.monotonic() + seconds
  import benchmark_gpu_cases
  import benchmark_gpu_sampling
  import benchmark_machine
  from benchmark_protocol import machine

  tiny = size == 'tiny'
  given: dict[str, Any] = (
    {'shape': (64, 64, 64), 'n_bytes': 1 << 20, 'turns': 2} if tiny else {'shape': (8192, 8192, 8192), 'n_bytes': 1 << 31}
  )
  sizes = benchmark_gpu_cases.sizes_tiny() if tiny else benchmark_gpu_cases.sizes_7b()
  work = benchmark_gpu_cases.Work(sizes, benchmark_machine.measure(torch=False, **given), deadline)
  runs = {
    'train': benchmark_gpu_cases.train,
    'sample': benchmark_gpu_sampling.sample,
    'image_tokenizer': benchmark_gpu_cases.image_tokenizer,
  }
  where = {'machine': machine(), 'ceilings': work.ceilings.details}
  with output.open('a') as file:
    for row in runs[case](work):
      line = dataclasses.asdict(row)
      line['details'] |= where
      print(json.dumps(line), file=file, flush=True)


def table(rows: Sequence[dict[str, Any]], command: str, seconds: float) -> str:
  """The rows, and under them the machine they were measured on."""
  from benchmark_protocol import Row, markdown

  where = next((row['details']['machine'] for row in rows if 'machine' in row['details']), None)
  if where is None:
    return '\n'.join(f'{row["figure"]}: {row["value"]}' for row in rows) + '\n'
  ceilings = next(row['details']['ceilings'] for row in rows if 'ceilings' in row['details'])
  rates = ', '.join(f'{name} {rate / 1e12:,.2f}e12/s' for name, rate in ceilings.items())
  return markdown([Row(**row) for row in rows], where, command) + f'Ceilings of the first case: {rates}. The whole took {seconds:.0f} s.\n'


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1 or not set(FLAGS.cases) <= set(LIMITS):
    raise app.UsageError(f'--cases takes names out of {", ".join(LIMITS)}; there are no further arguments')
  if FLAGS.child:
    run_case(FLAGS.child, FLAGS.size, FLAGS.budget, pathlib.Path(FLAGS.output))
    return
  begun = time.monotonic()
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': FLAGS.cache, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1'}
  paths = [str(pathlib.Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get('PYTHONPATH')])]
  environment['PYTHONPATH'] = os.pathsep.join(paths)
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    given = lambda case, seconds, path: child_command(case, FLAGS.size, seconds, path)
    for row in orchestrate(FLAGS.cases, FLAGS.budget, pathlib.Path(folder), given, environment):
      rows.append(row)
      print(f'{row["figure"]}, {row["model"]}: {row["what"]}: {row["value"]}', file=sys.stderr, flush=True)
      if FLAGS.output:  # after every row: what is measured is kept
        pathlib.Path(FLAGS.output).write_text(json.dumps({'rows': rows}, indent=2) + '\n')
  print(table(rows, shlex.join(['python', 'tools/benchmark_gpu.py', *sys.argv[1:]]), time.monotonic() - begun))


if __name__ == '__main__':
  flags.DEFINE_list('cases', list(LIMITS), f'Cases to measure: {", ".join(LIMITS)}.')
  flags.DEFINE_enum('size', '7b', ['7b', 'tiny'], 'Size of the models.')
  flags.DEFINE_float('budget', 530, 'Seconds that the whole may take.', lower_bound=5)
  flags.DEFINE_string('output', None, 'JSON file for every reading.')
  flags.DEFINE_string('cache', str(pathlib.Path(tempfile.gettempdir()) / 'chameleon_jax_benchmark_gpu'), 'Folder of compiled programs.')
  flags.DEFINE_string('child', None, 'For this script itself: the case to run in this process.')
  app.run(main)
