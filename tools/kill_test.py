"""Kills a small run at random moments, over and over, and compares what comes out with a run that nobody disturbed.

  python tools/kill_test.py --kills=100 --seed=0

Every life of the run is a process that trains with an asynchronous checkpoint every second step, until it gets SIGKILL: half of
them at a random moment of their life, starting up and resuming included, half at a random moment of a save, seen by the
temporary folder that it writes into. The next life goes on from what it finds; a run that reaches its last step is compared and
the next one starts, until all kills are used up. Compared with the undisturbed run, bit for bit:

  - the loss of every step and the hash of its batch, in every life that came to that step, so that no record is lost or repeated
  - every line of metrics.jsonl but for the clock
  - all arrays of the last state

The lives are forked from one process that has imported everything and started nothing, which spares each the imports; the
compiled programs are kept in a cache. Exit code 0 if all is equal. The run itself is that of tests/training/tiny_run.py.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
AIMED_SHARE = 0.5  # of the kills that wait for a save
AIMED_SAVES = 8  # the kill comes in one of the first saves of a life
AIMED_SECONDS = 0.1  # after the temporary folder appeared
POLL_SECONDS = 0.001
CLOCK = ('time', 'train/tokens_per_second', 'train/data_wait_ms', 'train/data_wait_fraction')


@dataclasses.dataclass
class Life:
  """How one process ended."""

  killed: bool
  exit_code: int
  in_save: bool = False  # a save was being written


def records(path: pathlib.Path) -> list[dict[str, Any]]:
  """The whole lines of a file of JSON lines; the last one may be cut off by a kill."""
  found = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      found.append(json.loads(line))
    except ValueError:
      continue
  return found


def differences(whole: pathlib.Path, other: pathlib.Path, n_steps: int) -> list[str]:
  """What differs between two finished runs, one line each; none if they are equal."""
  found = []
  expected = {record['step']: record for record in records(whole / 'steps.jsonl')}
  seen = records(other / 'steps.jsonl')
  missing = sorted(set(range(1, n_steps + 1)) - {record['step'] for record in seen})
  if missing:
    found.append(f'no life did step {missing[0]}')
  for record in seen:
    for name in ('batch', 'loss'):
      if record[name] != expected[record['step']][name]:
        found.append(f'step {record["step"]}: another {name} ({record[name]}, undisturbed {expected[record["step"]][name]})')
  mine, theirs = ([{k: v for k, v in line.items() if k not in CLOCK} for line in records(run / 'metrics.jsonl')] for run in (other, whole))
  if mine != theirs:
    place = next((number for number, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
    found.append(f'metrics.jsonl differs from line {place + 1} on ({len(mine)} lines, undisturbed {len(theirs)})')
  if (other / 'state.sha256').read_text() != (whole / 'state.sha256').read_text():
    found.append('the last state differs')
  return found


def start_life(workdir: pathlib.Path, train: Callable[[pathlib.Path], None]) -> int:
  """Forks a process that trains in `workdir` and writes what it says to its life.log; returns its id."""
  workdir.mkdir(parents=True, exist_ok=True)
  pid = os.fork()
  if pid:
    return pid
  code = 1
  try:
    log = os.open(workdir / 'life.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train(workdir)
    code = 0
  except BaseException as error:  # noqa: BLE001  the process ends here, whatever it was
    print(f'{type(error).__name__}: {error}', file=sys.stderr, flush=True)
  finally:
    os._exit(code)


def saves_in(workdir: pathlib.Path) -> set[str]:
  """Temporary folders of saves that are being written, or were when their process was killed."""
  found = set()
  for path in (workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp'):
    with contextlib.suppress(FileNotFoundError):  # renamed while we looked
      found.add(f'{path.name} {path.stat().st_ino}')
  return found


def live(pid: int, workdir: pathlib.Path, rng: random.Random | None, seconds: float) -> Life:
  """Waits for the process, or kills it at a moment that `rng` chooses (None: never)."""
  began, aimed = time.monotonic(), rng is not None and rng.random() < AIMED_SHARE
  at = None if rng is None or aimed else began + rng.uniform(0, seconds)
  n_saves, delay = (rng.randint(1, AIMED_SAVES), rng.uniform(0, AIMED_SECONDS)) if rng is not None else (0, 0.0)
  leftovers = saves_in(workdir)
  seen: set[str] = set()
  while True:
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
      return Life(killed=False, exit_code=os.waitstatus_to_exitcode(status))
    if aimed and at is None:
      seen |= saves_in(workdir) - leftovers
      if len(seen) >= n_saves:
        at = time.monotonic() + delay
    if at is not None and time.monotonic() >= at:
      os.kill(pid, signal.SIGKILL)
      code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
      return Life(killed=code == -signal.SIGKILL, exit_code=code, in_save=bool(saves_in(workdir) - leftovers))
    time.sleep(POLL_SECONDS)


def make_train(optimizer: str, n_steps: int) -> Callable[[pathlib.Path], None]:
  """Imports everything; returns what a life does."""
  os.environ.update(JAX_PLATFORMS='cpu', XLA_FLAGS='', OPENBLAS_NUM_THREADS='1', JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')
  sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'training')]
  import tiny_run

  from chameleon_jax.config import CheckpointConfig
  from chameleon_jax.data.sources import source as registry
  from chameleon_jax.training import loop

  registry.SOURCES.update(tiny_run.SOURCES)
  parts = tiny_run.tokenizers()
  checkpoint = CheckpointConfig(every_steps=2, keep_last=2)
  config = tiny_run.with_optimizer(tiny_run.config(n_steps=n_steps, checkpoint=checkpoint), optimizer)

  def train(workdir: pathlib.Path) -> None:
    tiny_run.record_steps(workdir / 'steps.jsonl')
    state = loop.train(config, workdir, tokenizers=parts)
    (workdir / 'state.sha256').write_text(tiny_run.state_hash(state))

  if len(os.listdir('/proc/self/task')) != 1:
    raise RuntimeError('something started a thread before the fork')
  return train


def run(folder: pathlib.Path, *, kills: int, seed: int, n_steps: int, optimizer: str) -> int:
  """The whole test in `folder`; prints as it goes and returns the exit code."""
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'compiled')
  train, rng, began = make_train(optimizer, n_steps), random.Random(seed), time.monotonic()
  for name in ('warm', 'whole'):  # the first fills the cache of compiled programs, so the time of the second is that of a life
    started = time.monotonic()
    life = live(start_life(folder / name, train), folder / name, None, 0.0)
    if life.exit_code:
      print(f'the undisturbed run failed; see {folder / name / "life.log"}')
      return 1
  seconds = time.monotonic() - started
  found = differences(folder / 'whole', folder / 'warm', n_steps)
  done, in_save, n_runs, resumed = 0, 0, 0, 0
  while not found:
    workdir = folder / f'run{n_runs}'
    life = live(start_life(workdir, train), workdir, rng if done < kills else None, seconds)
    if life.killed:
      done, in_save = done + 1, in_save + life.in_save
      print(f'kill {done}: {workdir.name}, {"inside a save" if life.in_save else "elsewhere"}', flush=True)
      continue
    n_runs += 1
    log = (workdir / 'life.log').read_text()
    if life.exit_code:
      found.append(f'{workdir.name} did not go on: {log.splitlines()[-1]}')
      break
    resumed += log.count('resumed after step')
    found += [f'{workdir.name}: {line}' for line in differences(folder / 'whole', workdir, n_steps)]
    if done >= kills:
      break
  for line in found:
    print(f'DIFFERENT: {line}')
  verdict = 'all went on; losses, batches, metrics and last states are bit-identical' if not found else f'{len(found)} differences'
  print(
      f'{done} kills ({in_save} inside a save), {n_runs} runs of {n_steps} steps, {optimizer}, seed {seed}: '
      f'{resumed} lives began from a checkpoint; {verdict}; {time.monotonic() - began:.0f} s'
  )
  return 1 if found else 0


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--n_steps', type=int, default=60)
  parser.add_argument('--optimizer', choices=('adamw', 'muon'), default='adamw')
  parser.add_argument('--folder', type=pathlib.Path, help='where the runs are kept; a temporary one by default')
  arguments = parser.parse_args(argv)
  options = {name: getattr(arguments, name) for name in ('kills', 'seed', 'n_steps', 'optimizer')}
  if arguments.folder is not None:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    return run(arguments.folder.resolve(), **options)
  with tempfile.TemporaryDirectory() as scratch:
    return run(pathlib.Path(scratch), **options)


if __name__ == '__main__':
  sys.exit(main())
