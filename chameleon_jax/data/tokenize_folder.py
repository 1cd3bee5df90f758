"""The folder of a tokenize job: what it was begun with, its shards and their reports, the table that ends it.

    OUTPUT/shard-00000-of-00008.array_record   records of `sources/record.py`
    OUTPUT/rejects-00000-of-00008.jsonl        {"document", "where", "reason"} of each that could not be used; none without any
    OUTPUT/shard-00000-of-00008.json           its report, written last: a shard with a report whose checksum holds is finished
    OUTPUT/job.json                            what the folder was begun with; another job is refused
    OUTPUT/tokenized.json                      written at the end, in place of job.json and of the reports

Every file is written aside and renamed. Does not know how documents become codes, processes or Beam.
"""

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

from chameleon_jax.data.encode import PREPROCESSINGS, Preprocessing
from chameleon_jax.data.sources.tokenized import FORMAT, SUFFIX, TABLE, read_table
from chameleon_jax.errors import ConfigError, DataError

JOB = 'job.json'
_PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class TokenizeJob:
  """One split of one source, into one folder.

  Attributes:
    source, split: as in `make_source`.
    output: folder of the shards.
    n_shards: units of work; more than there are documents leaves some empty.
    batch_size: pictures encoded at once.
    preprocessing: how pictures become square and their values floats, see `tokens.images`.
    seed: of what documents draw (order, wording, captions).
    max_rejects: the job stops when more than this share of all documents was rejected.
    threads: that read and decode pictures beside the encoder.
  """

  source: str
  split: str
  output: str
  n_shards: int
  batch_size: int = 64
  preprocessing: Preprocessing = 'meta'
  seed: int = 0
  max_rejects: float = 0.01
  threads: int = 2

  def __post_init__(self) -> None:
    for name in ('n_shards', 'batch_size', 'threads'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name} must be at least 1, got {getattr(self, name)}')
    if not 0 <= self.max_rejects <= 1:
      raise ConfigError(f'max_rejects must be a share in [0, 1], got {self.max_rejects}')
    if self.preprocessing not in PREPROCESSINGS:
      raise ConfigError(f'preprocessing must be one of {", ".join(PREPROCESSINGS)}, got {self.preprocessing!r}')

  def path(self, stem: str, shard: int, suffix: str) -> pathlib.Path:
    """File of a shard."""
    return pathlib.Path(self.output) / f'{stem}-{shard:05d}-of-{self.n_shards:05d}{suffix}'


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of one shard; sizes and counts of what is in it."""

  shard: int
  file: str
  records: int
  bytes: int
  crc32: int
  rejected: int
  pictures: int
  text_bytes: int
  pieces: int


@dataclasses.dataclass(frozen=True)
class Progress:
  """Documents and pictures of the current shard so far."""

  documents: int
  pictures: int
  rejected: int


class TooManyRejects(DataError):
  """More documents than allowed could not be used."""


def finished(job: TokenizeJob, number: int) -> Report | None:
  """The report of a finished shard; None where there is none, or the shard is not the one it speaks of."""
  try:
    report = Report(**json.loads(job.path('shard', number, '.json').read_text(encoding='utf-8')))
    path = job.path('shard', number, SUFFIX)
    whole = path.stat().st_size == report.bytes and crc32(path) == report.crc32
  except (OSError, ValueError, TypeError):  # missing, cut off, of another version
    return None
  return report if whole else None


def complete(job: TokenizeJob) -> dict[str, Any] | None:
  """The table of a job that has ended, None where it has not."""
  folder = pathlib.Path(job.output)
  return read_table(folder) if (folder / TABLE).is_file() else None


def write_table(job: TokenizeJob, reports: Sequence[Report]) -> dict[str, Any]:
  """Ends a job: writes `tokenized.json` and removes the reports.

  Raises:
    TooManyRejects: all shards together rejected more than allowed.
    DataError: a shard is missing.
  """
  folder = pathlib.Path(job.output)
  identity = json.loads((folder / JOB).read_text(encoding='utf-8'))
  by_number = {report.shard: report for report in reports}
  missing = [number for number in range(job.n_shards) if number not in by_number]
  if missing:
    raise DataError(f'{folder}: shards {missing[:8]} are missing; run the same command again')
  ordered = [by_number[number] for number in range(job.n_shards)]
  rejected, n_documents = sum(report.rejected for report in ordered), identity['data']['documents']
  if rejected > job.max_rejects * n_documents:
    share = f'{rejected:,} of {n_documents:,} documents rejected, more than max_rejects {job.max_rejects:g}'
    raise TooManyRejects(f'{share}; see {folder}/rejects-*.jsonl')
  counts = {name: sum(getattr(report, name) for report in ordered) for name in ('records', 'rejected', 'pictures', 'text_bytes', 'pieces')}
  table = {
      'format': FORMAT,
      **identity,
      'counts': counts,
      'shards': [{name: getattr(report, name) for name in ('file', 'records', 'bytes', 'crc32')} for report in ordered],
  }
  write_json(folder / TABLE, table)
  for number in range(job.n_shards):
    job.path('shard', number, '.json').unlink(missing_ok=True)
  (folder / JOB).unlink(missing_ok=True)
  return table


def claim(folder: pathlib.Path, identity: dict[str, Any]) -> None:
  """Writes the job down, or compares it with what is there.

  Raises:
    DataError: the folder holds another job.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    begun = json.loads((folder / (TABLE if (folder / TABLE).is_file() else JOB)).read_text(encoding='utf-8'))
  except FileNotFoundError:
    write_json(folder / JOB, identity)
    return
  except (OSError, ValueError) as error:
    raise DataError(f'{folder} cannot be used: {" ".join(str(error).split())}') from error
  for name, value in json.loads(json.dumps(identity)).items():
    if begun.get(name) != value:
      both = f'{_short(begun.get(name))}, now {_short(value)}'
      raise DataError(f'{folder} was begun with another {name} ({both}): give the same as before, or another --output')


def _short(value: Any) -> str:
  text = value.get('fingerprint') or value.get('content') if isinstance(value, dict) else None
  return text or repr(value)[:60]


def open_writer(path: pathlib.Path) -> Any:
  """An ArrayRecord file whose records can be read one by one."""
  from array_record.python import array_record_module

  return array_record_module.ArrayRecordWriter(str(path), 'group_size:1')  # read one by one


def write_rejects(path: pathlib.Path, rejects: Sequence[dict[str, Any]]) -> None:
  """Writes the reject file of a shard, or removes the one of an earlier try where there is nothing to say."""
  if rejects:
    _write(path, ''.join(json.dumps(reject, ensure_ascii=False) + '\n' for reject in rejects))
  else:
    path.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file whole or not at all."""
  _write(path, json.dumps(value, indent=1) + '\n')


def _write(path: pathlib.Path, text: str) -> None:
  aside = path.with_name(f'.{path.name}.{os.getpid()}.part')
  try:
    aside.write_text(text, encoding='utf-8', errors='backslashreplace')
    os.replace(aside, path)
  finally:
    aside.unlink(missing_ok=True)


def crc32(path: pathlib.Path) -> int:
  """Of a file, read piece by piece."""
  value = 0
  with path.open('rb') as file:
    while piece := file.read(_PIECE):
      value = zlib.crc32(piece, value)
  return value
