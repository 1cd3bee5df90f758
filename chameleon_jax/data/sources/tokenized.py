"""Source `array_record:FOLDER | FILE | PATTERN`: documents as `chameleon tokenize` writes them, no network needed to read them.

    FOLDER/train/tokenized.json                      what the shards were made from and with, and a line for each shard
    FOLDER/train/shard-00000-of-00008.array_record   records of `record.py`
    FOLDER/validation/...                            the same

FOLDER may be the one with `train` and `validation`, or one split alone. Before the first step the size of each shard is compared with
the list, and vocabulary and tokenizers with those that made the records; each record has a checksum that is checked when it is read.
Where the text tokenizer is the one that made the shards, its pieces are taken from there; another one encodes the text anew.

    ?validation=SHARE (see files.py); without a folder for it, 0
"""

import json
import os
import pathlib
import tempfile
import threading
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from chameleon_jax.data.sources.files import SplitRecords, find_files, split_argument
from chameleon_jax.data.sources.naming import SourceName
from chameleon_jax.data.sources.record import Record
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document
from chameleon_jax.tokens.render import Rendered
from chameleon_jax.tokens.text import TextTokenizer
from chameleon_jax.tokens.vocabulary import Vocabulary

FORMAT = 'chameleon_jax tokenized 1'
TABLE = 'tokenized.json'
SUFFIX = '.array_record'


def text_fingerprint(text_tokenizer: TextTokenizer) -> str:
  """CRC-32 of the tokenizer's file."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'tokenizer'
    text_tokenizer.save(path)
    return f'{zlib.crc32(path.read_bytes()):08x}'


def read_table(folder: pathlib.Path) -> dict[str, Any]:
  """The `tokenized.json` of a folder.

  Raises:
    DataError: missing, damaged, or of another version.
  """
  path = folder / TABLE
  try:
    table = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise DataError(f'{folder} holds no {TABLE}: name a folder that `chameleon tokenize` has finished (run it again to go on)') from error
  except (OSError, ValueError) as error:
    raise DataError(f'{path} cannot be read ({" ".join(str(error).split())}); run `chameleon tokenize` again') from error
  if not isinstance(table, dict) or table.get('format') != FORMAT:
    found = table.get('format') if isinstance(table, dict) else type(table).__name__
    raise DataError(f'{path} has the format {found!r}, this version reads {FORMAT!r}')
  return table


def check_shard(path: pathlib.Path, entry: Mapping[str, Any]) -> None:
  """Compares a shard with its line of the table, by its size.

  Raises:
    DataError: missing, cut off, or another file.
  """
  try:
    size = path.stat().st_size
  except OSError as error:
    raise DataError(f'{path} is missing, which {TABLE} lists; copy it again or run `chameleon tokenize` again') from error
  if size < entry['bytes']:
    raise DataError(f'{path} is cut off: {size:,} of {entry["bytes"]:,} bytes; copy it again or run `chameleon tokenize` again')
  if size > entry['bytes']:
    raise DataError(f'{path} is not the shard that {TABLE} lists: {size:,} bytes and not {entry["bytes"]:,}; copy it again')


class _Readers:
  """Open shards, one set a process and thread; a copy that travels to another process opens its own."""

  def __init__(self, paths: list[pathlib.Path]):
    self._paths = paths
    self._local = threading.local()

  def __reduce__(self) -> tuple[type['_Readers'], tuple[list[pathlib.Path]]]:
    return _Readers, (self._paths,)

  def __getitem__(self, file: int) -> Any:
    readers = self._local.__dict__.setdefault('readers', {})
    if file not in readers:
      from array_record.python import array_record_module

      try:
        readers[file] = array_record_module.ArrayRecordReader(str(self._paths[file]), 'readahead_buffer_size:0')
      except (RuntimeError, ValueError) as error:
        raise DataError(f'{self._paths[file]} cannot be read: {str(error).splitlines()[0]}') from error
    return readers[file]


class TokenizedDocuments:
  """Documents of codes and text, see the head of this file.

  Raises:
    DataError: no shards, a shard that is missing, cut off or replaced, or a table of another version.
  """

  def __init__(self, name: SourceName, split: str):
    name.allow('validation')
    argument, share = split_argument(name, split)
    share = share if 'validation' in name.options else 0.0
    if split == 'validation' and share == 0 and argument == split_argument(name, 'train')[0]:
      argument = None  # no folder of its own
    paths = [] if argument is None else find_files(argument, (SUFFIX,), name=name.name)
    self._tables = {folder: read_table(folder) for folder in dict.fromkeys(path.parent for path in paths)}
    entries = {folder / entry['file']: entry for folder, table in self._tables.items() for entry in table['shards']}
    for path in paths:
      if path not in entries:
        raise DataError(f'{path} is not listed in {path.parent / TABLE}: it belongs to another run; remove it')
    if argument is not None and os.path.isdir(argument):
      paths = sorted(entries)
    for path in paths:
      check_shard(path, entries[path])
    self._paths = [path for path in paths if entries[path]['records']]
    self._entries = [entries[path] for path in self._paths]
    self._records = SplitRecords([e['records'] for e in self._entries], [p.name for p in self._paths], split=split, share=share)
    self._readers = _Readers(self._paths)
    self._vocabulary: Vocabulary | None = None

  def __len__(self) -> int:
    return len(self._records)

  def where(self, index: int) -> str:
    """Shard and record of a document."""
    file, record = self._records.place(index)
    return f'{self._paths[file]}, record {record}'

  def fingerprint(self) -> str:
    """Of the shards' sizes and checksums as they were written."""
    return repr([(path.name, entry['records'], entry['bytes'], entry['crc32']) for path, entry in zip(self._paths, self._entries)])

  def _record(self, index: int) -> Record:
    file, record = self._records.place(index)
    try:
      return Record(self._readers[file].read([record])[0])
    except (DataError, RuntimeError, IndexError, ValueError) as error:
      reason = str(error).splitlines()[0]
      raise DataError(f'{self._paths[file]}, record {record}: {reason}; copy the shard again') from error

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """The document with its pictures as codes; draws nothing from `rng`."""
    del rng
    return self._record(index).document()

  def fitted(self, vocabulary: Vocabulary, text_tokenizer: TextTokenizer, image_fingerprint: str | None) -> 'TokenizedDocuments':
    """This source, checked against a run; with `rendered` where the stored pieces are those of its text tokenizer.

    Args:
      vocabulary: the token table of the run.
      text_tokenizer: of the run.
      image_fingerprint: `PictureEncoder.fingerprint` of the run's image tokenizer; None where it has none.

    Raises:
      DataError: codes of another image tokenizer or a larger codebook.
    """
    pieces_fit = bool(self._tables)
    for folder, table in self._tables.items():
      made_by = table['image_tokenizer']
      if made_by is not None and table['counts']['pictures']:
        if made_by['n_codes'] > vocabulary.n_codes:
          sizes = f'codes of a codebook of {made_by["n_codes"]}, the vocabulary has room for {vocabulary.n_codes}'
          raise DataError(f'{folder / TABLE}: {sizes}')
        if image_fingerprint is not None and image_fingerprint != made_by['fingerprint']:
          raise DataError(
              f'{folder / TABLE}: the codes are of another image tokenizer ({made_by["fingerprint"]}) than that of the run '
              f'({image_fingerprint}); run `chameleon tokenize` with the run\'s, or name the other in config.tokenizers'
          )
      text = table['text_tokenizer']
      pieces_fit = pieces_fit and text is not None and text['fingerprint'] == text_fingerprint(text_tokenizer)
    self._vocabulary = vocabulary if pieces_fit else None
    return self

  @property
  def has_pieces(self) -> bool:
    """Whether `rendered` may be called: `fitted` found the run's own pieces in the shards."""
    return self._vocabulary is not None

  def rendered(self, index: int) -> Rendered:
    """The document as tokens, without encoding text; equal to `render(document)`."""
    assert self._vocabulary is not None, 'call fitted first'
    record = self._record(index)
    if len(record.codes) and int(record.codes.max()) >= self._vocabulary.n_codes:
      raise DataError(f'{self.where(index)}: a code outside the codebook of {self._vocabulary.n_codes}')
    return record.render(self._vocabulary)
