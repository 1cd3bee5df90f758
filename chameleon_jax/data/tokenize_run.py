"""All shards of a job on one host: in this process, or spread over several.

    parent --pipe--> worker 0   loads the tokenizers, gets a shard whenever it is free
           --pipe--> worker 1   where the host has GPUs, worker k sees number k of them alone

A worker that dies stops the job with a line that names its shard; the same command goes on from the finished shards. A worker whose
parent died ends at its next batch.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import re
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from chameleon_jax.data.tokenize import Tokenization, Tokenizers
from chameleon_jax.data.tokenize_folder import Progress, Report, TokenizeJob, complete, finished, write_table
from chameleon_jax.errors import ChameleonError, DataError

LoadTokenizers = Callable[[], Tokenizers]


@dataclasses.dataclass(frozen=True)
class Total:
  """Where a whole job stands.

  Attributes:
    documents, pictures, rejected: so far, finished shards of earlier runs included.
    n_documents: of the split; 0 until the first worker has opened the source.
    new_pictures: encoded by this run.
    seconds: since its first document.
  """

  documents: int
  pictures: int
  rejected: int
  n_documents: int
  new_pictures: int
  seconds: float


class _Tally:
  """Adds up what shards report."""

  def __init__(self, job: TokenizeJob, on_progress: Callable[[Total], None] | None):
    self._job, self._on_progress = job, on_progress
    self._running: dict[int, Progress] = {}
    self.reports: dict[int, Report] = {}
    self._found: set[int] = set()
    self.n_documents = 0
    self._began: float | None = None

  @property
  def rejected(self) -> int:
    return sum(report.rejected for report in self.reports.values())

  def found(self, report: Report) -> None:
    """A shard that an earlier run finished."""
    self._found.add(report.shard)
    self.done(report)

  def done(self, report: Report) -> None:
    self.reports[report.shard] = report
    self._running.pop(report.shard, None)
    self.tell()

  def progress(self, number: int, progress: Progress) -> None:
    self._running[number] = progress
    self.tell()

  def ready(self, n_documents: int) -> None:
    self.n_documents = n_documents
    self._began = self._began or time.monotonic()

  def tell(self) -> None:
    if self._on_progress is None:
      return
    done, running = self.reports.values(), self._running.values()
    pictures = sum(r.pictures for r in done) + sum(r.pictures for r in running)
    old = sum(report.pictures for report in done if report.shard in self._found)
    documents = sum(r.records + r.rejected for r in done) + sum(r.documents for r in running)
    seconds = 0.0 if self._began is None else time.monotonic() - self._began
    rejected = self.rejected + sum(r.rejected for r in running)
    self._on_progress(Total(documents, pictures, rejected, self.n_documents, pictures - old, seconds))


def run(
    job: TokenizeJob, load: LoadTokenizers, *, processes: int = 1, on_progress: Callable[[Total], None] | None = None
) -> dict[str, Any]:
  """Makes the shards that are not finished, and the table.

  Args:
    job: what to do.
    load: loads the tokenizers; with several processes it is called in each and must be picklable.
    processes: workers. 1 works in this process.
    on_progress: called as the work goes on.

  Returns:
    `tokenized.json`. Of a job that has ended before, its table as it is.

  Raises:
    TooManyRejects, DataError: see `Tokenization`; a worker died.
  """
  done = complete(job)
  if done is not None:
    Tokenization(job, load())  # compares the two jobs
    return done
  tally = _Tally(job, on_progress)
  for number in range(job.n_shards):
    report = finished(job, number)
    if report is not None:
      tally.found(report)
  left = [number for number in range(job.n_shards) if number not in tally.reports]
  if processes == 1 or len(left) < 2:
    work = Tokenization(job, load())
    tally.ready(len(work.source))
    for number in left:
      tally.done(work.shard(number, rejected_before=tally.rejected, on_progress=lambda p, n=number: tally.progress(n, p)))  # type: ignore[misc]
  else:
    _spread(job, load, left, min(processes, len(left)), tally)
  return write_table(job, list(tally.reports.values()))


def _spread(job: TokenizeJob, load: LoadTokenizers, left: list[int], processes: int, tally: _Tally) -> None:
  context = multiprocessing.get_context('spawn')  # jax does not survive a fork
  workers: dict[Connection, Any] = {}
  working: dict[Connection, int] = {}
  gpus = _gpus()
  try:
    for number in range(processes):
      ours, theirs = context.Pipe()
      environment = {'CUDA_VISIBLE_DEVICES': gpus[number % len(gpus)]} if gpus else {}
      worker = context.Process(target=_work, args=(theirs, job, load, environment), daemon=True, name=f'tokenize-{number}')
      worker.start()
      theirs.close()
      workers[ours] = worker
    waiting = list(left)
    while workers:
      for pipe in wait(list(workers)):
        assert isinstance(pipe, Connection)
        try:
          kind, value = pipe.recv()
        except (EOFError, OSError) as error:
          worker = workers.pop(pipe)
          worker.join(10)
          at = f' at shard {working[pipe]}' if pipe in working else ''
          raise DataError(f'worker {worker.name} died{at} (exit code {worker.exitcode}); run the same command again to go on') from error
        if kind == 'error':
          raise value
        if kind == 'progress':
          tally.progress(working[pipe], value)
          continue
        if kind == 'ready':
          tally.ready(value)
        else:
          tally.done(value)
        if waiting:
          working[pipe] = waiting.pop(0)
          pipe.send((working[pipe], tally.rejected))
        else:
          pipe.send(None)
          workers.pop(pipe).join()
  finally:
    for worker in workers.values():
      worker.kill()
    for worker in workers.values():
      worker.join()


def _work(pipe: Connection, job: TokenizeJob, load: LoadTokenizers, environment: dict[str, str]) -> None:
  """A worker: makes the shards it is told to."""
  os.environ.update(environment)  # before jax looks for devices
  try:
    try:
      work = Tokenization(job, load())
      pipe.send(('ready', len(work.source)))
      while (task := pipe.recv()) is not None:
        number, rejected = task
        pipe.send(('done', work.shard(number, rejected_before=rejected, on_progress=lambda value: pipe.send(('progress', value)))))
    except ChameleonError as error:
      pipe.send(('error', error))
    except OSError as error:
      if isinstance(error, (BrokenPipeError, ConnectionError)):
        raise
      pipe.send(('error', OSError(error.errno, error.strerror, error.filename)))
    except (EOFError, KeyboardInterrupt):
      raise
    except Exception:
      pipe.send(('error', RuntimeError(traceback.format_exc())))
  except (EOFError, BrokenPipeError, ConnectionError, KeyboardInterrupt):
    pass  # the parent has gone, or stops us all


def _gpus() -> list[str]:
  """The NVIDIA GPUs that this process may use, as CUDA names them."""
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if os.environ.get('JAX_PLATFORMS', '') == 'cpu':
    return []
  if visible is not None:
    return [name for name in visible.split(',') if name]
  found = [re.fullmatch(r'nvidia([0-9]+)', path.name) for path in pathlib.Path('/dev').glob('nvidia[0-9]*')]
  return sorted((match[1] for match in found if match), key=int)
