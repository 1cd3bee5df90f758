"""Checksums of the files of a model folder: Orbax keeps none, and a flipped bit in a weight would go unseen.

    DIR/checksums.json   {"crc32": {"transformer/layers_0/d/0123": 2774153425, ...}}

The table covers the trees, the text tokenizer and `origin/`, not config.json, which people edit. Each tree is checked when it is
read, at the cost of reading its files twice. A folder without the file (one written by hand, or by version 1) is read unchecked.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping

from chameleon_jax.errors import CheckpointError
from chameleon_jax.training.integrity import crc32

FILE = 'checksums.json'
_UNCHECKED = (FILE, 'config.json')


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  return (path for path in sorted(folder.rglob('*')) if path.is_file())


def write_checksums(folder: pathlib.Path) -> None:
  """Writes the table of every file that is in `folder` now.

  Raises:
    OSError: a file cannot be read or written.
  """
  files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
  values = {name: crc32(path) for name, path in files.items() if name not in _UNCHECKED}
  (folder / FILE).write_text(json.dumps({'crc32': values}, indent=1) + '\n')


def read_checksums(folder: pathlib.Path) -> dict[str, int] | None:
  """The table of a model folder, None where it has none.

  Raises:
    CheckpointError: the file is damaged.
  """
  path = folder / FILE
  try:
    text = path.read_text(encoding='utf-8')
  except FileNotFoundError:
    return None
  except (OSError, UnicodeDecodeError) as error:
    raise CheckpointError(f'{path} cannot be read: {error}; copy the folder again') from error
  try:
    values = json.loads(text)['crc32']
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f'{path} is damaged; copy the folder again') from error
  if not isinstance(values, dict) or not all(type(value) is int for value in values.values()):
    raise CheckpointError(f'{path} is damaged; copy the folder again')
  return values


def check_files(folder: pathlib.Path, inside: str, checksums: Mapping[str, int] | None) -> None:
  """Compares the files of `folder / inside`, a file or a folder, with the table; None is no table.

  Raises:
    CheckpointError: a file is missing, unknown or differs.
  """
  if checksums is None:
    return
  place = folder / inside
  found = {path.relative_to(folder).as_posix(): path for path in (_files(place) if place.is_dir() else [place] if place.is_file() else [])}
  listed = {name for name in checksums if name == inside or name.startswith(f'{inside}/')}
  for name in sorted(listed - set(found)):
    raise CheckpointError(f'{folder / name} is missing; copy the folder again')
  for name in sorted(set(found) - listed):
    raise CheckpointError(f'{folder / name} is not among the files this folder was written with ({FILE})')
  for name, path in found.items():
    try:
      value = crc32(path)
    except OSError as error:
      raise CheckpointError(f'{path} cannot be read: {error.strerror or error}') from error
    if value != checksums[name]:
      raise CheckpointError(f'{path} is damaged: its checksum differs from that in {FILE}; copy the folder again')
