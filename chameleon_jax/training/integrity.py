"""Whether the files of a checkpoint are those that were written: sizes and CRC-32, because Orbax would not see a flipped bit.

    STEP/checksums-0-of-2.json   {"files": {"state/d/0123": [4096, 2774153425], ...}}      written by process 0 of 2
    STEP/checksums-1-of-2.json   the other half of the files

A table appears under its name when it is whole, after the files it lists. A step without a table (of an older version, or of a
process killed between the last file and the table) counts as unchecked, not as damaged.

Does not know what the files hold.
"""

import json
import os
import pathlib
import threading
import time
import zlib
from collections.abc import Callable, Mapping

_POLL_SECONDS = 0.02
_PREFIX = 'checksums-'
_PIECE = 1 << 20  # bytes


def crc32(path: pathlib.Path) -> int:
  """CRC-32 of a file's bytes.

  Raises:
    OSError: it cannot be read.
  """
  value = 0
  with path.open('rb') as file:
    while piece := file.read(_PIECE):
      value = zlib.crc32(piece, value)
  return value


def write_table(folder: pathlib.Path, *, part: int = 0, n_parts: int = 1) -> None:
  """Writes the table of every `n_parts`-th file from file `part` on, in the order of their names.

  Raises:
    OSError: a file cannot be read, or the table not written.
  """
  names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob('*')) if path.is_file()]
  mine = [name for name in names if not name.startswith(_PREFIX)][part::n_parts]
  table = {name: [(folder / name).stat().st_size, crc32(folder / name)] for name in mine}
  path = folder / f'{_PREFIX}{part}-of-{n_parts}.json'
  aside = path.with_suffix('.writing')
  try:
    aside.write_text(json.dumps({'files': table}, indent=1) + '\n')
    os.replace(aside, path)
  finally:
    aside.unlink(missing_ok=True)


class TableWriter:
  """Writes the table of a folder in the background, once the folder is there."""

  def __init__(self) -> None:
    self._thread: threading.Thread | None = None
    self._error: OSError | None = None

  def start(self, folder: pathlib.Path, is_being_saved: Callable[[], bool], *, part: int, n_parts: int) -> None:
    """Waits in a thread until `folder` has its name and writes the table; ends where the save ended without it."""

    def work() -> None:
      while not folder.is_dir():
        if not is_being_saved() and not folder.is_dir():
          return
        time.sleep(_POLL_SECONDS)
      try:
        write_table(folder, part=part, n_parts=n_parts)
      except OSError as error:
        self._error = error

    self._thread = threading.Thread(target=work, name='checksums')
    self._thread.start()

  def finish(self) -> None:
    """Returns when the table is written.

    Raises:
      OSError: it could not be.
    """
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    error, self._error = self._error, None
    if error is not None:
      raise error


def find_damage(folder: pathlib.Path, *, part: int = 0, n_parts: int = 1) -> str | None:
  """Compares every `n_parts`-th listed file from file `part` on with the tables; one line on the first that differs.

  Each host of a run checks a part; sizes are compared before any file is read.
  """
  listed: dict[str, list[int]] = {}
  for path in sorted(folder.glob(f'{_PREFIX}*.json')):
    table = _read_table(path)
    if table is None:
      return f'{path.name} cannot be read'
    listed |= table
  mine = {name: listed[name] for name in sorted(listed)[part::n_parts]}
  for name, (size, _) in mine.items():
    try:
      now = (folder / name).stat().st_size
    except OSError:
      return f'{name} is missing'
    if now != size:
      return f'{name} has {now:,} bytes, {size:,} were written'
  for name, (_, value) in mine.items():
    try:
      if crc32(folder / name) != value:
        return f'{name} does not have the checksum it was written with'
    except OSError as error:
      return f'{name} cannot be read ({error.strerror or error})'
  return None


def _read_table(path: pathlib.Path) -> dict[str, list[int]] | None:
  try:
    table = json.loads(path.read_text(encoding='utf-8'))['files']
  except (OSError, ValueError, KeyError, TypeError):
    return None
  pairs = table.values() if isinstance(table, Mapping) else [None]
  is_pair = lambda value: isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
  return table if all(map(is_pair, pairs)) else None
