"""Documents of a source -> one shard of codes and text. A shard is the unit of work, the same wherever and however often it is done.

    shard s of n holds the documents s, s + n, s + 2n, ... of the split, in this order; what document i draws comes from (seed, i)

    OUTPUT/shard-00000-of-00008.array_record   records of `sources/record.py`
    OUTPUT/rejects-00000-of-00008.jsonl        {"document", "where", "reason"} of each that could not be used; none without any
    OUTPUT/shard-00000-of-00008.json           its report, written last: a shard with a report whose checksum holds is finished
    OUTPUT/job.json                            what the folder was begun with; another job is refused
    OUTPUT/tokenized.json                      written at the end, in place of job.json and of the reports

Every file is written aside and renamed. Codes are computed in batches of one size, filled in the order of the documents, so they do not
depend on how shards are spread over processes or hosts of one kind. Does not know processes, Beam or model folders.
"""

import collections
import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np

from chameleon_jax.array_types import Array, Params
from chameleon_jax.config import VQGANConfig
from chameleon_jax.data.encode import PREPROCESSINGS, Preprocessing, encoder_fingerprint, make_batch_encoder, prepared
from chameleon_jax.data.sources.fingerprint import fingerprint
from chameleon_jax.data.sources.record import pack
from chameleon_jax.data.sources.source import DocumentSource, make_source
from chameleon_jax.data.sources.tokenized import FORMAT, SUFFIX, TABLE, read_table, text_fingerprint
from chameleon_jax.errors import ChameleonError, ConfigError, DataError
from chameleon_jax.tokens.document import Codes, Document, Image, Segment, Turn
from chameleon_jax.tokens.text import TextTokenizer

JOB = 'job.json'
_PIECE = 1 << 20


@runtime_checkable
class Tokenizers(Protocol):
  """What of a model is needed; parts that are None are not used."""

  @property
  def vqgan_config(self) -> VQGANConfig | None: ...
  @property
  def vqgan_params(self) -> Params | None: ...
  @property
  def text_tokenizer(self) -> TextTokenizer | None: ...


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


class Tokenization:
  """A job with its source open and its tokenizers loaded: what one process needs to make shards.

  Raises:
    DataError: the source is empty or at fault, or the output folder was begun by another job.
  """

  def __init__(self, job: TokenizeJob, tokenizers: Tokenizers):
    self.job = job
    self.source = make_source(job.source, job.split)
    if not len(self.source):
      raise DataError(f'source {job.source!r} has no documents in split {job.split!r}')
    self.config, self._text = tokenizers.vqgan_config, tokenizers.text_tokenizer
    self._encode: Callable[[np.ndarray], Array] | None = None
    images = text = None
    if self.config is not None:
      self._encode = make_batch_encoder(self.config, tokenizers.vqgan_params, job.preprocessing)
      found = encoder_fingerprint(self.config, tokenizers.vqgan_params)
      images = {'fingerprint': found, 'n_codes': self.config.n_codes, 'n_image_tokens': self.config.n_image_tokens}
      images['config'] = json.loads(json.dumps(dataclasses.asdict(self.config)))
    if self._text is not None:
      text = {'fingerprint': text_fingerprint(self._text), 'n_pieces': self._text.n_pieces}
    self.identity = {
        **{name: getattr(job, name) for name in ('source', 'split', 'n_shards', 'batch_size', 'preprocessing', 'seed')},
        'data': fingerprint(self.source),
        'image_tokenizer': images,
        'text_tokenizer': text,
    }
    _claim(pathlib.Path(job.output), self.identity)

  def shard(self, number: int, *, rejected_before: int = 0, on_progress: Callable[[Progress], None] | None = None) -> Report:
    """Makes one shard, or returns the report of one that is finished.

    Args:
      number: in [0, n_shards).
      rejected_before: documents that other shards rejected; the limit is of all of them.
      on_progress: called after each batch of pictures, and at the end.

    Raises:
      TooManyRejects: names the first, and the file with all of them.
      OSError: from the file system.
    """
    done = finished(self.job, number)
    if done is not None:
      return done
    path, rejects_path = self.job.path('shard', number, SUFFIX), self.job.path('rejects', number, '.jsonl')
    limit = self.job.max_rejects * len(self.source) - rejected_before
    rejects: list[dict[str, Any]] = []
    counts = collections.Counter({'pictures': 0, 'text_bytes': 0, 'pieces': 0, 'documents': 0, 'records': 0})
    aside = path.with_name(f'.{path.name}.{os.getpid()}.part')
    writer = _writer(aside)
    try:
      for index, result in self._coded(number, lambda: on_progress and on_progress(_progress(counts, rejects))):
        counts['documents'] += 1
        if isinstance(result, ChameleonError):
          rejects.append({'document': index, 'where': where(self.source, self.job, index), 'reason': ' '.join(str(result).split())})
          if len(rejects) > limit:
            _write_rejects(rejects_path, rejects)
            raise TooManyRejects(self._too_many(rejected_before + len(rejects), rejects[0], rejects_path))
          continue
        writer.write(result.data)
        counts.update(records=1, pictures=result.n_pictures, text_bytes=result.n_text_bytes, pieces=result.n_pieces)
      writer.close()
      _write_rejects(rejects_path, rejects)
      os.replace(aside, path)
    finally:
      if writer.is_open():
        writer.close()
      aside.unlink(missing_ok=True)
    sizes = {name: counts[name] for name in ('records', 'pictures', 'text_bytes', 'pieces')}
    report = Report(number, path.name, bytes=path.stat().st_size, crc32=_crc32(path), rejected=len(rejects), **sizes)
    write_json(self.job.path('shard', number, '.json'), dataclasses.asdict(report))
    if on_progress is not None:
      on_progress(_progress(counts, rejects))
    return report

  def _too_many(self, rejected: int, first: dict[str, Any], path: pathlib.Path) -> str:
    share = f'{rejected:,} of {len(self.source):,} documents of {self.job.source!r} rejected'
    return f'{share} (max_rejects {self.job.max_rejects:g}); the first: {first["reason"]}; see {path}; mend them or raise max_rejects'

  def _coded(self, number: int, on_batch: Callable[[], object]) -> Iterator[tuple[int, Any]]:
    """(index, `Packed`) of each document of the shard in order, or (index, error).

        pictures of documents  a a b | b b c | c . .     batches of three, the last one filled up
        documents that are whole   a       b       c     written when their last batch is back
    """
    waiting: collections.deque[tuple[int, Document | ChameleonError, int]] = collections.deque()  # and pictures it has
    rows: collections.deque[np.ndarray] = collections.deque()
    flying: collections.deque[tuple[Array, int]] = collections.deque()
    batch: list[np.ndarray] = []

    def launch() -> None:
      assert self._encode is not None
      filled = np.stack(batch + batch[:1] * (self.job.batch_size - len(batch)))
      flying.append((self._encode(filled), len(batch)))
      batch.clear()

    def land() -> None:
      codes, n = flying.popleft()
      rows.extend(np.asarray(codes)[:n])

    def whole() -> Iterator[tuple[int, Any]]:
      while waiting and waiting[0][2] <= len(rows):
        index, document, n = waiting.popleft()
        mine = [rows.popleft() for _ in range(n)]
        yield index, document if isinstance(document, ChameleonError) else self._packed(document, mine)

    for index, document in self._documents(range(number, len(self.source), self.job.n_shards)):
      pictures = [] if isinstance(document, ChameleonError) else [s.pixels for s in document.segments if isinstance(s, Image)]
      waiting.append((index, document, len(pictures)))
      for pixels in pictures:
        batch.append(pixels)
        if len(batch) == self.job.batch_size:
          launch()
          if len(flying) > 1:  # one batch on the device while the next is prepared
            land()
            yield from whole()
            on_batch()
      if not batch and not flying:
        yield from whole()
    if batch:
      launch()
    while flying:
      land()
    yield from whole()
    assert not waiting and not rows

  def _packed(self, document: Document, codes: Sequence[np.ndarray]) -> Any:
    waiting = iter(codes)
    try:
      coded = _mapped(document, lambda picture: Codes(np.array(next(waiting))))
      n_codes = 1 << 32 if self.config is None else self.config.n_codes
      if self._text is None:
        return pack(coded, n_codes=n_codes)
      return pack(coded, n_codes=n_codes, n_pieces=self._text.n_pieces, encode=self._text.encode)
    except ChameleonError as error:
      return error

  def _documents(self, indices: Sequence[int]) -> Iterator[tuple[int, Document | ChameleonError]]:
    """Documents in order with their pictures prepared, or why there is none; read ahead by the threads."""
    ahead = max(2 * self.job.batch_size, 4 * self.job.threads)
    with ThreadPoolExecutor(self.job.threads) as pool:
      reading: collections.deque[tuple[int, Future]] = collections.deque()
      try:
        for index in indices:
          reading.append((index, pool.submit(self._document, index)))
          if len(reading) > ahead:
            first, future = reading.popleft()
            yield first, future.result()
        while reading:
          first, future = reading.popleft()
          yield first, future.result()
      finally:
        for _, future in reading:
          future.cancel()

  def _document(self, index: int) -> Document | ChameleonError:
    try:
      document = self.source.document(index, np.random.default_rng((self.job.seed, index)))
      if all(not isinstance(segment, Image) for segment in document.segments):
        return document
      if self.config is None:
        return DataError('it holds a picture, and the model has no image tokenizer')
      config, how = self.config, self.job.preprocessing
      return _mapped(document, lambda picture: Image(prepared(picture.pixels, config, how)))
    except ChameleonError as error:
      return error


def _mapped(document: Document, change: Callable[[Image], Segment]) -> Document:
  """The document with each picture of pixels changed, in order."""
  turns = [Turn(tuple(change(s) if isinstance(s, Image) else s for s in turn.segments), turn.role) for turn in document.turns]
  return Document(tuple(turns))


def where(source: DocumentSource, job: TokenizeJob, index: int) -> str:
  """File and record of a document, as far as its source knows them."""
  own = getattr(source, 'where', None)
  return f'{job.source}, {job.split}, document {index}' if own is None else own(index)


def finished(job: TokenizeJob, number: int) -> Report | None:
  """The report of a finished shard; None where there is none, or the shard is not the one it speaks of."""
  try:
    report = Report(**json.loads(job.path('shard', number, '.json').read_text(encoding='utf-8')))
    path = job.path('shard', number, SUFFIX)
    whole = path.stat().st_size == report.bytes and _crc32(path) == report.crc32
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


def _claim(folder: pathlib.Path, identity: dict[str, Any]) -> None:
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


def _progress(counts: collections.Counter, rejects: Sequence[Any]) -> Progress:
  return Progress(counts['documents'], counts['pictures'], len(rejects))


def _writer(path: pathlib.Path) -> Any:
  from array_record.python import array_record_module

  return array_record_module.ArrayRecordWriter(str(path), 'group_size:1')  # read one by one


def _write_rejects(path: pathlib.Path, rejects: Sequence[dict[str, Any]]) -> None:
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


def _crc32(path: pathlib.Path) -> int:
  value = 0
  with path.open('rb') as file:
    while piece := file.read(_PIECE):
      value = zlib.crc32(piece, value)
  return value
