"""A checkpoint in several files behind an index `{"weight_map": {tensor: file}}` (spec model.md 3.2), and the JSON files around it.

Knows nothing of the files' own format: the caller says how one is opened.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.pickle_reader import brief
from chameleon_jax.interop.lazy import TensorSpec

MAX_INDEX = 256 << 20  # bytes of an index file
AGAIN = 'download or copy it again'


@runtime_checkable
class TensorFile(Protocol):
  """Tensors by name, as a single file or a whole checkpoint offers them."""

  specs: Mapping[str, TensorSpec]

  def read(self, name: str) -> np.ndarray:
    """The values of a tensor; raises CheckpointError where the file is closed or damaged."""
    ...

  def release(self) -> None:
    """Gives memory of what was read back to the system; arrays stay valid."""
    ...

  def close(self) -> None:
    """Closes the file."""
    ...


class ShardedTensors:
  """Several files behind one index; `open_file` opens one of them."""

  def __init__(self, index: pathlib.Path, open_file: Callable[[pathlib.Path], TensorFile]):
    self.path = index
    files = _read_index(index)
    self._files: dict[str, TensorFile] = {}
    self._last: TensorFile | None = None
    try:
      for file in sorted(set(files.values())):
        if not (index.parent / file).is_file():
          raise CheckpointError(f'{index} names the file {brief(file)}, which is not beside it; download it too')
        self._files[file] = open_file(index.parent / file)
        for name in self._files[file].specs:
          if files.get(name) != file:
            place = f'places in {brief(files[name])}' if name in files else 'does not name'
            raise CheckpointError(f'{index.parent / file} holds the tensor {brief(name)}, which {index.name} {place}; {AGAIN}')
      for name, file in files.items():
        if name not in self._files[file].specs:
          raise CheckpointError(f'{index.parent / file} lacks the tensor {brief(name)}, which {index.name} places there; {AGAIN}')
    except BaseException:
      self.close()
      raise
    self._file_of = files
    self.specs: Mapping[str, TensorSpec] = {name: self._files[file].specs[name] for name, file in files.items()}

  def read(self, name: str) -> np.ndarray:
    """The values of a tensor, read-only."""
    file = self._files[self._file_of[name]]
    if self._last is not None and self._last is not file:
      self._last.release()
    self._last = file
    return file.read(name)

  def release(self) -> None:
    """Gives memory of what was read back to the system."""
    if self._last is not None:
      self._last.release()

  def close(self) -> None:
    """Closes every file."""
    for file in self._files.values():
      file.close()


def _read_index(path: pathlib.Path) -> dict[str, str]:
  files = read_json(path, MAX_INDEX).get('weight_map')
  if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
    raise CheckpointError(f'{path} has no weight_map of tensor names and files; {AGAIN}')
  for file in files.values():
    if not file or '\0' in file or file != pathlib.PurePosixPath(file).name or '\\' in file:
      raise CheckpointError(f'{path} names the file {brief(file)}, which is no plain file name; {AGAIN}')
  return files


def read_json(path: pathlib.Path, limit: int) -> dict[str, Any]:
  """The JSON object in a file of at most `limit` bytes; raises CheckpointError where there is none."""
  try:
    size = path.stat().st_size
    if size > limit:
      raise CheckpointError(f'{path} has {size} bytes, more than the {limit} read here; {AGAIN}')
    data = path.read_bytes()
  except OSError as error:
    raise CheckpointError(f'{path} cannot be read: {error.strerror or error}') from error
  return parse_json(data, str(path))


def parse_json(data: bytes, what: str) -> dict[str, Any]:
  """The JSON object in `data`, in which no name may come twice; `what` opens the message of a CheckpointError."""

  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      seen: set[str] = set()
      name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
      raise CheckpointError(f'{what} has the name {brief(name)} twice; {AGAIN}')
    return found

  try:
    value = json.loads(data, object_pairs_hook=once)
  except CheckpointError:
    raise
  except (ValueError, RecursionError) as error:
    reason = ' '.join(str(error).split())[:120]
    raise CheckpointError(f'{what} is not valid JSON: {reason}; {AGAIN}') from error
  if not isinstance(value, dict):
    raise CheckpointError(f'{what} is no JSON object; {AGAIN}')
  return value
