"""Files of the safetensors format, read as views of the mapped file and written one tensor at a time.

    8 bytes      length of the header, little-endian
    header       JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {...}}
    the rest     the values; offsets count from here, without gaps or overlaps

Reading takes nothing on trust: every header is compared with its file before a value is looked at. The format is parsed here because
the `safetensors` library writes a file only with all tensors in memory, and takes more kinds of files than it can name in an error.
Source: the format's public description; file names: spec model.md 3.2.
"""

import json
import mmap
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.pickle_reader import brief
from chameleon_jax.interop.files.shards import AGAIN, ShardedTensors, TensorFile, parse_json
from chameleon_jax.interop.lazy import TensorSpec

MAX_HEADER = 100_000_000  # bytes; the format's own limit
_METADATA = '__metadata__'
_LIMIT = 2**62

DTYPES = {
    'F64': np.dtype('<f8'),
    'F32': np.dtype('<f4'),
    'F16': np.dtype('<f2'),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
    'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
    'I64': np.dtype('<i8'),
    'I32': np.dtype('<i4'),
    'I16': np.dtype('<i2'),
    'I8': np.dtype('i1'),
    'U64': np.dtype('<u8'),
    'U32': np.dtype('<u4'),
    'U16': np.dtype('<u2'),
    'U8': np.dtype('u1'),
    'BOOL': np.dtype('?'),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ------------------------------------------------------------------------------------------------ reading


def open_safetensors(folder: str | os.PathLike[str]) -> TensorFile:
  """Opens `model.safetensors` of a folder, or the shards of `model.safetensors.index.json`.

  As the library that writes such folders does, a single file goes before an index. Where neither name is there, the only
  *.safetensors of the folder is taken.

  Raises:
    CheckpointError: nothing to open, a file is missing or damaged, or index and shards disagree.
  """
  folder = pathlib.Path(folder)
  if (folder / 'model.safetensors').exists():
    return SafetensorsFile(folder / 'model.safetensors')
  if (folder / 'model.safetensors.index.json').exists():
    return ShardedTensors(folder / 'model.safetensors.index.json', SafetensorsFile)
  found = sorted(path for path in folder.glob('*.safetensors'))
  if len(found) == 1:
    return SafetensorsFile(found[0])
  if found:
    raise CheckpointError(f'{folder} holds {len(found)} *.safetensors files but no model.safetensors.index.json; download the index too')
  raise CheckpointError(f'{folder} holds no *.safetensors file')


class SafetensorsFile:
  """One file; arrays read from it are views that stay valid after it is closed. Do not change it while they are in use."""

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    self._map: mmap.mmap | None = None
    try:
      with open(self.path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        header, self._start = self._read_header(file, size)
        if size > self._start:
          self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
      if isinstance(error, CheckpointError):
        raise
      raise CheckpointError(f'{self.path} cannot be opened: {getattr(error, "strerror", None) or error}') from error
    self._offsets: dict[str, int] = {}
    self.specs: Mapping[str, TensorSpec] = self._check(header, size - self._start)
    self._open = True

  def read(self, name: str) -> np.ndarray:
    """The values of a tensor, a read-only view of the mapped file."""
    if not self._open:
      raise CheckpointError(f'{self.path} is closed')
    spec = self.specs[name]
    if self._map is None or spec.nbytes == 0:
      empty = np.empty(spec.shape, spec.dtype)
      empty.flags.writeable = False
      return empty
    self.release()
    return np.ndarray(spec.shape, spec.dtype, self._map, self._start + self._offsets[name])

  def release(self) -> None:
    """Gives the memory of what was read back to the system; arrays stay valid, using them fetches their pages again."""
    if self._map is not None and hasattr(mmap, 'MADV_DONTNEED'):
      self._map.madvise(mmap.MADV_DONTNEED)

  def close(self) -> None:
    """Closes the file; the map goes with the last array that views it."""
    self._map, self._open = None, False

  def _read_header(self, file: Any, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
      raise CheckpointError(f'{self.path} is no safetensors file or cut short: {size} bytes cannot hold a header of {length}; {AGAIN}')
    data = file.read(length)
    return parse_json(data, f'{self.path}: the header'), 8 + length

  def _check(self, header: dict[str, Any], size: int) -> dict[str, TensorSpec]:
    """Specs in the order of the bytes; every byte belongs to one tensor."""
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
      raise CheckpointError(f'{self.path}: the header has {_METADATA} that are no strings; {AGAIN}')
    spans = {name: self._entry(name, entry) for name, entry in header.items()}
    specs, end = {}, 0
    for name, (spec, start, stop) in sorted(spans.items(), key=lambda item: (item[1][1], item[1][2])):
      if start != end:
        what = 'overlaps the tensor before it' if start < end else f'leaves {start - end} bytes before it unused'
        raise CheckpointError(f'{self.path}: tensor {brief(name)} {what}; {AGAIN}')
      specs[name], self._offsets[name], end = spec, start, stop
    if end != size:
      raise CheckpointError(f'{self.path}: the tensors need {end} bytes, the file holds {size}; {AGAIN}')
    return specs

  def _entry(self, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    what = f'{self.path}: tensor {brief(name)}'
    if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
      raise CheckpointError(f'{what} is not described by dtype, shape and data_offsets; {AGAIN}')
    kind, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
    if not isinstance(kind, str) or kind not in DTYPES:
      raise CheckpointError(f'{what} has the type {brief(kind)}, which is not read; known are {", ".join(DTYPES)}')
    for numbers in (shape, offsets):
      if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < _LIMIT for n in numbers):
        raise CheckpointError(f'{what} has a shape or data_offsets that are no sizes; {AGAIN}')
    n_bytes = DTYPES[kind].itemsize
    for n in shape:
      n_bytes = min(n_bytes * n, _LIMIT)
    if len(shape) > 32 or len(offsets) != 2 or offsets[1] - offsets[0] != n_bytes:
      raise CheckpointError(f'{what} of shape {brief(str(shape))} and type {kind} does not fit its place {brief(str(offsets))}; {AGAIN}')
    return TensorSpec(tuple(shape), DTYPES[kind]), offsets[0], offsets[1]


# ------------------------------------------------------------------------------------------------ writing


class SafetensorsWriter:
  """Writes a checkpoint into an existing folder; use it in a `with`.

      with SafetensorsWriter(folder, specs) as writer:
        for name in specs:
          writer.write(name, values(name))

  Shapes and types come first, so every tensor goes straight to its place, in any order, one in memory at a time. One file is
  `model.safetensors`; more are `model-00001-of-0000n.safetensors` with their index, filled in the order of `specs` up to
  `max_shard_bytes` of values each. Left without an error the writer demands that every tensor came; left by an error it
  removes what it wrote.

  Raises:
    CheckpointError: a type has no name in the format, the disk is full, or a tensor is missing, foreign, repeated or of another shape.
  """

  def __init__(
      self,
      folder: str | os.PathLike[str],
      specs: Mapping[str, TensorSpec],
      *,
      max_shard_bytes: int = 5_000_000_000,
      metadata: Mapping[str, str] = {'format': 'pt'},  # noqa: B006  (only read; some readers insist on this entry)
  ):
    self._folder = pathlib.Path(folder)
    self._specs = dict(specs)
    self._places: dict[str, tuple[str, int]] = {}
    self._written: set[str] = set()
    self._handles: dict[str, Any] = {}
    self._created: list[pathlib.Path] = []
    for name, spec in self._specs.items():
      if spec.dtype not in _NAMES or name == _METADATA or not _is_unicode(name):
        what = f'tensor {brief(name)} of type {spec.dtype}'
        raise CheckpointError(f'{what} cannot be stored in a safetensors file; convert or rename it first')
    shards = self._plan(max_shard_bytes)
    try:
      for number, names in enumerate(shards, start=1):
        file = 'model.safetensors' if len(shards) == 1 else f'model-{number:05d}-of-{len(shards):05d}.safetensors'
        self._start_file(file, names, metadata)
      if len(shards) > 1:
        self._write_index()
    except OSError as error:
      self._discard()
      raise self._failed(error) from error

  def __enter__(self) -> 'SafetensorsWriter':
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if kind is not None:
      self._discard()
    else:
      self.close()

  def write(self, name: str, values: np.ndarray) -> None:
    """Puts the values of one tensor into its place."""
    spec = self._specs.get(name)
    if spec is None or name in self._written:
      raise CheckpointError(f'tensor {brief(name)} was {"written before" if spec else "not declared"}')
    if values.shape != spec.shape or values.dtype != spec.dtype:
      got, asked = f'{values.dtype} {list(values.shape)}', f'{spec.dtype} {list(spec.shape)}'
      raise CheckpointError(f'tensor {brief(name)} was declared as {asked}, the values are {got}')
    file, offset = self._places[name]
    try:
      self._handles[file].seek(offset)
      self._handles[file].write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    except OSError as error:
      raise self._failed(error) from error
    self._written.add(name)

  def close(self) -> None:
    """Ends the files; raises CheckpointError, and removes them, where a tensor is missing."""
    missing = next((name for name in self._specs if name not in self._written), None)
    if missing is not None:
      self._discard()
      raise CheckpointError(f'tensor {brief(missing)} was declared but not written')
    try:
      while self._handles:
        self._handles.popitem()[1].close()
    except OSError as error:
      self._discard()
      raise self._failed(error) from error

  def _plan(self, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in self._specs.items():
      if shards[-1] and filled + spec.nbytes > max_shard_bytes:
        shards.append([])
        filled = 0
      shards[-1].append(name)
      filled += spec.nbytes
    return shards

  def _start_file(self, file: str, names: list[str], metadata: Mapping[str, str]) -> None:
    """Writes the header and gives every tensor its place, wide types first: so each lies at a multiple of its size."""
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name in sorted(names, key=lambda name: -self._specs[name].dtype.itemsize):
      spec = self._specs[name]
      header[name] = {'dtype': _NAMES[spec.dtype], 'shape': list(spec.shape), 'data_offsets': [end, end + spec.nbytes]}
      end += spec.nbytes
    data = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    data += b' ' * (-len(data) % 8)
    if len(data) > MAX_HEADER:
      raise CheckpointError(f'{self._folder / file} would need a header of {len(data)} bytes; the format allows {MAX_HEADER}')
    path = self._folder / file
    self._created.append(path)
    self._handles[file] = handle = open(path, 'wb')  # noqa: SIM115  (stays open until close)
    handle.write(len(data).to_bytes(8, 'little') + data)
    handle.truncate(8 + len(data) + end)
    for name in names:
      self._places[name] = (file, 8 + len(data) + header[name]['data_offsets'][0])

  def _write_index(self) -> None:
    total = sum(spec.nbytes for spec in self._specs.values())
    index = {'metadata': {'total_size': total}, 'weight_map': {name: self._places[name][0] for name in self._specs}}
    self._created.append(self._folder / 'model.safetensors.index.json')
    self._created[-1].write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')

  def _failed(self, error: OSError) -> CheckpointError:
    return CheckpointError(f'{self._folder} could not be written: {error.strerror or error}')

  def _discard(self) -> None:
    for handle in self._handles.values():
      try:
        handle.close()
      except OSError:
        continue  # flushing to a full disk; the file goes anyway
    self._handles.clear()
    for path in self._created:
      path.unlink(missing_ok=True)


def _is_unicode(name: str) -> bool:
  """Names in a pickle may hold half a surrogate pair, which UTF-8 cannot."""
  try:
    name.encode()
  except UnicodeEncodeError:
    return False
  return True
