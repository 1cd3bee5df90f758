"""Documents of a source -> one shard of codes and text. A shard is the unit of work, the same wherever and however often it is done.

    shard s of n holds the documents s, s + n, s + 2n, ... of the split, in this order; what document i draws comes from (seed, i)

`tokenize_folder.py` says what lies in the folder of a job. Codes are computed in batches of one size, filled in the order of the
documents, so they do not depend on how shards are spread over processes or hosts of one kind. Does not know processes, Beam or
model folders.
"""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np

from chameleon_jax.array_types import AnyArray, Params
from chameleon_jax.config import VQGANConfig
from chameleon_jax.data.encode import encoder_fingerprint, make_batch_encoder, prepared
from chameleon_jax.data.sources.fingerprint import fingerprint
from chameleon_jax.data.sources.record import pack
from chameleon_jax.data.sources.source import DocumentSource, make_source
from chameleon_jax.data.sources.tokenized import SUFFIX, text_fingerprint
from chameleon_jax.data.tokenize_folder import (
    Progress,
    Report,
    TokenizeJob,
    TooManyRejects,
    claim,
    crc32,
    finished,
    open_writer,
    write_json,
    write_rejects,
)
from chameleon_jax.errors import ChameleonError, DataError
from chameleon_jax.partitioning import on_one_cpu
from chameleon_jax.tokens.document import Codes, Document, Image, Segment, Turn
from chameleon_jax.tokens.text import TextTokenizer


@runtime_checkable
class Tokenizers(Protocol):
  """What of a model is needed; parts that are None are not used."""

  @property
  def vqgan_config(self) -> VQGANConfig | None: ...
  @property
  def vqgan_params(self) -> Params | None: ...
  @property
  def text_tokenizer(self) -> TextTokenizer | None: ...


def _batches_at_once(config: VQGANConfig, batch_size: int) -> int:
  """Batches that are encoded side by side: two on a CPU, where one leaves cores idle between its operations, if they are small.

  Small is at most 256 MiB for a layer of the first width in full resolution; a few of these are what an encoder holds.
  """
  layer = batch_size * config.resolution**2 * config.base_channels * np.dtype(np.float32).itemsize
  return 2 if on_one_cpu() and layer <= 1 << 28 else 1


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
    self._encode: Callable[[np.ndarray], AnyArray] | None = None
    self._at_once = 1
    images = text = None
    if self.config is not None:
      self._encode = make_batch_encoder(self.config, tokenizers.vqgan_params, job.preprocessing)
      self._at_once = _batches_at_once(self.config, job.batch_size)
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
    claim(pathlib.Path(job.output), self.identity)

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
    writer = open_writer(aside)
    try:
      for index, result in self._coded(number, lambda: on_progress and on_progress(_progress(counts, rejects))):
        counts['documents'] += 1
        if isinstance(result, ChameleonError):
          rejects.append({'document': index, 'where': where(self.source, self.job, index), 'reason': ' '.join(str(result).split())})
          if len(rejects) > limit:
            write_rejects(rejects_path, rejects)
            raise TooManyRejects(self._too_many(rejected_before + len(rejects), rejects[0], rejects_path))
          continue
        writer.write(result.data)
        counts.update(records=1, pictures=result.n_pictures, text_bytes=result.n_text_bytes, pieces=result.n_pieces)
      writer.close()
      write_rejects(rejects_path, rejects)
      os.replace(aside, path)
    finally:
      if writer.is_open():
        writer.close()
      aside.unlink(missing_ok=True)
    sizes = {name: counts[name] for name in ('records', 'pictures', 'text_bytes', 'pieces')}
    report = Report(number, path.name, bytes=path.stat().st_size, crc32=crc32(path), rejected=len(rejects), **sizes)
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
    flying: collections.deque[tuple[Future, int]] = collections.deque()
    batch: list[np.ndarray] = []
    at_once = self._at_once

    def launch() -> None:
      filled = np.stack(batch + batch[:1] * (self.job.batch_size - len(batch)))
      flying.append((encoders.submit(self._codes, filled), len(batch)))
      batch.clear()

    def land() -> None:
      codes, n = flying.popleft()
      rows.extend(np.asarray(codes.result())[:n])

    def whole() -> Iterator[tuple[int, Any]]:
      while waiting and waiting[0][2] <= len(rows):
        index, document, n = waiting.popleft()
        mine = [rows.popleft() for _ in range(n)]
        yield index, document if isinstance(document, ChameleonError) else self._packed(document, mine)

    with ThreadPoolExecutor(at_once) as encoders:
      try:
        for index, document in self._documents(range(number, len(self.source), self.job.n_shards)):
          pictures = [] if isinstance(document, ChameleonError) else [s.pixels for s in document.segments if isinstance(s, Image)]
          waiting.append((index, document, len(pictures)))
          for pixels in pictures:
            batch.append(pixels)
            if len(batch) == self.job.batch_size:
              launch()
              if len(flying) > at_once:  # one more than run is prepared meanwhile
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
      finally:
        for codes, _ in flying:
          codes.cancel()
    assert not waiting and not rows

  def _codes(self, pictures: np.ndarray) -> AnyArray:
    assert self._encode is not None
    codes = self._encode(pictures)
    return np.asarray(codes) if self._at_once > 1 else codes  # waits for them; a device keeps the order of what it is given

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


def _progress(counts: collections.Counter, rejects: Sequence[Any]) -> Progress:
  return Progress(counts['documents'], counts['pictures'], len(rejects))
