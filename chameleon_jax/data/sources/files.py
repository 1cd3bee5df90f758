"""Which files a source reads, and which of their records belong to which split.

A folder stands for the files of the right suffix below it, a pattern for what it matches, a file for itself. Validation:

    1  ?validation=0.05 in the name: this share of the records, picked by a hash of file name and number of the record
    2  DIR/train and DIR/validation (or DIR/val), or the name with `validation` (or `val`) in place of its last `train`, where it exists
    3  else a share of 0.01, as in 1

A hash and not a random draw: records that are appended later leave the others where they were. Knows no format.
"""

import glob
import os
import pathlib
import zlib
from collections.abc import Callable, Collection, Sequence

import numpy as np

from chameleon_jax.data.sources.naming import SourceName
from chameleon_jax.errors import DataError

VALIDATION_SHARE = 0.01
_HELD_OUT_NAMES = ('validation', 'val')
_PACKED = ('.gz', '.bz2', '.xz', '.zst', '.zip')


def is_pattern(argument: str) -> bool:
  """Whether this is a pattern and no name of a file."""
  return glob.has_magic(argument) and not os.path.exists(argument)


def find_files(argument: str, suffixes: Collection[str], *, name: str) -> list[pathlib.Path]:
  """The files of an argument, sorted; hidden files and folders are left out.

  Args:
    argument: file, folder or pattern (`**` goes down).
    suffixes: what counts in a folder, lower case; empty counts everything.
    name: of the source, for messages.

  Raises:
    DataError: there are none, one is packed, or a folder cannot be read.
  """
  path = pathlib.Path(argument)
  try:
    if is_pattern(argument):
      found = [pathlib.Path(file) for file in glob.glob(argument, recursive=True) if os.path.isfile(file)]
    elif path.is_dir():
      found = [path / file for file in _below(path) if not suffixes or pathlib.Path(file).suffix.lower() in suffixes]
    elif path.exists():
      found = [path]
    else:
      raise DataError(f'source {name!r}: {argument} does not exist')
  except OSError as error:
    raise DataError(f'source {name!r}: {argument} cannot be read: {error.strerror or error}') from error
  if not found:
    raise DataError(f'source {name!r}: no files {"/".join(sorted(suffixes)) + " " if suffixes else ""}in {argument}')
  for file in found:
    if file.suffix.lower() in _PACKED:
      raise DataError(f'source {name!r}: {file} is compressed, and records are read out of order; unpack it first')
  return sorted(found)


def _below(folder: pathlib.Path) -> list[str]:
  """Files below a folder, as paths in it, without hidden ones; links to folders are followed once."""
  found = []
  seen: set[str] = set()
  for above, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
    real = os.path.realpath(above)
    folders[:] = [] if real in seen else sorted(inner for inner in folders if not inner.startswith('.'))
    if real not in seen:
      found += [os.path.relpath(os.path.join(above, file), folder) for file in files if not file.startswith('.')]
    seen.add(real)
  return found


def _raise(error: OSError) -> None:
  raise error


def split_argument(source: SourceName, split: str, exists: Callable[[str], bool] | None = None) -> tuple[str | None, float]:
  """Where a split's files are and what share of them is held out for validation.

  Args:
    source: the name.
    split: 'train' | 'validation'.
    exists: whether there is something at an argument; files, folders and patterns by default.

  Returns:
    (argument, share); a share of 0 where the files are the split's alone. The argument is None where the split has no files.
  """
  exists = exists or (lambda argument: bool(glob.glob(argument)) if is_pattern(argument) else os.path.exists(argument))
  argument = source.argument
  training = os.path.join(argument, 'train')
  inside = os.path.isdir(training)
  if 'validation' in source.options:
    share = source.share('validation', 0.0)
    if share == 0:
      return (None if split == 'validation' else (training if inside else argument)), 0.0
    return (training if inside else argument), share
  if inside:
    held_out = [os.path.join(argument, name) for name in _HELD_OUT_NAMES]
  else:
    before, word, after = argument.rpartition('train')
    held_out = [before + name + after for name in _HELD_OUT_NAMES] if word else []
    training = argument
  for other in held_out:
    if exists(other):
      return (other if split == 'validation' else training), 0.0
  return training, VALIDATION_SHARE


def held_out(salt: str, n: int, share: float) -> np.ndarray:
  """bool [n]: which records of a file are for validation; a function of the file's name and of each record's number alone."""
  if share == 0:
    return np.zeros(n, bool)
  with np.errstate(over='ignore'):  # SplitMix64 (Steele, Lea, Flood 2014): the wrap-around is part of it
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(zlib.crc32(salt.encode()))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
  return x < np.uint64(round(share * 2**64))


class SplitRecords:
  """The records of several files in one order, those of one split: number in the split -> file and number in the file.

      files of 3 and 2 records, record 1 of the first held out
      train        0 -> (0, 0)   1 -> (0, 2)   2 -> (1, 0)   3 -> (1, 1)
      validation   0 -> (0, 1)
  """

  def __init__(self, counts: Sequence[int], salts: Sequence[str], *, split: str, share: float):
    self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    self._rows: np.ndarray | None = None
    if share > 0:
      masks = [held_out(salt, count, share) for salt, count in zip(salts, counts, strict=True)]
      mask = np.concatenate(masks) if masks else np.zeros(0, bool)
      self._rows = np.flatnonzero(mask == (split == 'validation'))

  def __len__(self) -> int:
    return int(self._starts[-1]) if self._rows is None else len(self._rows)

  def place(self, index: int) -> tuple[int, int]:
    """(number of the file, number of the record in it)."""
    row = int(index) if self._rows is None else int(self._rows[index])
    file = int(np.searchsorted(self._starts, row, side='right')) - 1
    return file, row - int(self._starts[file])


def read_bytes(path: str | os.PathLike[str], offset: int, size: int) -> bytes:
  """A piece of a file. Opened for each read, so that a source travels to worker processes and threads share nothing.

  Raises:
    DataError: the file cannot be read or ends before.
  """
  try:
    with open(path, 'rb', buffering=0) as file:
      file.seek(offset)
      data = b''
      while len(data) < size:
        piece = file.read(size - len(data))
        if not piece:
          raise DataError(f'{path} ends at byte {offset + len(data):,}, before {offset + size:,}: it was cut off since the run began')
        data += piece
      return data
  except OSError as error:
    raise DataError(f'{path} cannot be read: {error.strerror or error}') from error
