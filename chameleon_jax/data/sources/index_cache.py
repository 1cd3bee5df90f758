"""Indices of large files, built once: places of lines or members, kept in the user's cache folder between runs.

    $XDG_CACHE_HOME/chameleon_jax/index/lines-<hash of path>.npz      (~/.cache by default)

An index counts only for the size and the time of change that its file had. A cache that cannot be read or written is as none:
the index is built again. Nothing is written beside the data, which may be read-only.
"""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from chameleon_jax.errors import DataError

Index = dict[str, np.ndarray]
LEAST_BYTES = 64 << 20  # smaller files are indexed in less than a tenth of a second


def cached_index(path: pathlib.Path, kind: str, build: Callable[[pathlib.Path], Mapping[str, np.ndarray]]) -> Index:
  """The index of a file, from the cache where it still holds.

  Args:
    path: the file.
    kind: what is in the index and how, changed whenever that changes.
    build: makes it.

  Raises:
    DataError: the file cannot be read, or `build` finds it damaged.
  """
  try:
    status = path.stat()
    if status.st_size < LEAST_BYTES:
      return dict(build(path))
    stamp = np.array([status.st_size, status.st_mtime_ns], np.int64)
    place = _folder() / f'{kind}-{hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32]}.npz'
    found = _read(place, stamp)
    if found is None:
      found = dict(build(path))
      _write(place, {**found, 'stamp': stamp})
    return found
  except OSError as error:
    raise DataError(f'{path} cannot be read: {error.strerror or error}') from error


def _folder() -> pathlib.Path:
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'chameleon_jax' / 'index'


def _read(place: pathlib.Path, stamp: np.ndarray) -> Index | None:
  try:
    with np.load(place, allow_pickle=False) as stored:
      index = {name: stored[name] for name in stored.files}
  except Exception:  # missing, cut off, foreign: zipfile and numpy raise many kinds
    return None
  return index if np.array_equal(index.pop('stamp', np.zeros(0)), stamp) else None


def _write(place: pathlib.Path, index: Index) -> None:
  aside = place.with_name(f'{place.name}.{os.getpid()}.part')
  try:
    place.parent.mkdir(parents=True, exist_ok=True)
    with aside.open('wb') as file:
      np.savez(file, **index)  # type: ignore[arg-type]
    os.replace(aside, place)
  except OSError:  # no room, no right: the run goes on without
    with contextlib.suppress(OSError):
      aside.unlink()
