"""Source `jsonl:FILE | FOLDER | PATTERN`: one JSON object a line, with pictures by path or in base64.

The layouts are those of `layouts.py`. A file `.json` that holds a list of objects is read too (Lumina-mGPT's input) and kept in
memory; of a `.jsonl` only the places of its lines are. Paths of pictures are meant from the folder of the file, or from ?images=DIR.

    ?images=DIR   ?validation=SHARE (see files.py)
"""

import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from chameleon_jax.data.sources.files import SplitRecords, find_files, read_bytes, split_argument
from chameleon_jax.data.sources.index_cache import cached_index
from chameleon_jax.data.sources.layouts import document_of
from chameleon_jax.data.sources.naming import SourceName
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document
from chameleon_jax.tokens.images import load_image

_PIECE = 1 << 24  # bytes read at once while lines are sought


def index_lines(path: pathlib.Path) -> Mapping[str, np.ndarray]:
  r"""Places of the lines of a file that are not blank.

      '{}\n\n[]'  ->  starts 0 4, sizes 2 2, numbers 1 3

  Returns:
    starts int64, sizes int64, numbers int64 (of the line, from 1), crc32 of the whole file.
  """
  ends, crc, size = [], 0, 0
  with path.open('rb', buffering=0) as file:
    while piece := file.read(_PIECE):
      ends.append(np.flatnonzero(np.frombuffer(piece, np.uint8) == ord('\n')) + size)
      crc = zlib.crc32(piece, crc)
      size += len(piece)
    stops = np.concatenate([*ends, [size]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1])
    sizes = stops - starts
    kept = sizes > 0
    for line in np.flatnonzero(kept & (sizes <= 4)).tolist():  # a blank line of Windows, or a few spaces
      file.seek(int(starts[line]))
      kept[line] = bool(file.read(int(sizes[line])).strip())
  return {'starts': starts[kept], 'sizes': sizes[kept], 'numbers': np.flatnonzero(kept) + 1, 'crc32': np.array([crc], np.uint32)}


class _Lines:
  """The records of a .jsonl file."""

  def __init__(self, path: pathlib.Path):
    index = cached_index(path, 'lines-1', index_lines)
    self._path, self._starts, self._sizes, self._numbers = path, index['starts'], index['sizes'], index['numbers']
    self.crc32 = int(index['crc32'][0])
    if len(self):
      self.record(len(self) - 1)  # a file that was cut off shows it here, before the first step

  def __len__(self) -> int:
    return len(self._starts)

  def where(self, record: int) -> str:
    return f'{self._path}, line {self._numbers[record]}'

  def record(self, record: int) -> Any:
    line = read_bytes(self._path, int(self._starts[record]), int(self._sizes[record]))
    try:
      return json.loads(line.decode('utf-8'))
    except UnicodeDecodeError as error:
      raise DataError(f'{self.where(record)}: not UTF-8 ({error.reason} at byte {error.start})') from error
    except ValueError as error:
      last = ' (the last line: was the file cut off?)' if record == len(self) - 1 else ''
      raise DataError(f'{self.where(record)}: not JSON: {error}{last}') from error


class _Listed:
  """The records of a .json file that holds a list."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    try:
      data = path.read_bytes()
      records = json.loads(data.decode('utf-8'))
    except OSError as error:
      raise DataError(f'{path} cannot be read: {error.strerror or error}') from error
    except ValueError as error:
      raise DataError(f'{path}: not JSON: {" ".join(str(error).split())}; one object a line belongs into a .jsonl') from error
    if not isinstance(records, list):
      raise DataError(f'{path}: a .json file holds a list of records, this one holds a {type(records).__name__}')
    self._records = records
    self.crc32 = zlib.crc32(data)

  def __len__(self) -> int:
    return len(self._records)

  def where(self, record: int) -> str:
    return f'{self._path}, record {record + 1}'

  def record(self, record: int) -> Any:
    return self._records[record]


class JsonLines:
  """Documents of JSON files, see the head of this file.

  Raises:
    DataError: no files, a file that cannot be read, an unknown option, or a last line that is cut off.
  """

  def __init__(self, name: SourceName, split: str):
    name.allow('images', 'validation')
    argument, share = split_argument(name, split)
    paths = [] if argument is None else find_files(argument, ('.jsonl', '.json', '.ndjson'), name=name.name)
    self._files = [_Listed(path) if path.suffix.lower() == '.json' else _Lines(path) for path in paths]
    self._folders = [pathlib.Path(name.options.get('images', path.parent)) for path in paths]
    self._names = [path.name for path in paths]
    self._records = SplitRecords([len(file) for file in self._files], self._names, split=split, share=share)

  def __len__(self) -> int:
    return len(self._records)

  def where(self, index: int) -> str:
    """File and line of a document."""
    file, record = self._records.place(index)
    return self._files[file].where(record)

  def fingerprint(self) -> str:
    """Of the names and the contents of the files; the pictures they name are not looked at."""
    return repr([(name, len(file), file.crc32) for name, file in zip(self._names, self._files)])

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """The document of one record; draws nothing from `rng`."""
    del rng
    file, number = self._records.place(index)
    record = self._files[file].record(number)
    try:
      return document_of(record, lambda picture: load_image(os.path.join(self._folders[file], picture)))
    except DataError as error:
      raise DataError(f'{self._files[file].where(number)}: {error}') from error
