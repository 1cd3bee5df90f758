"""Writes PyTorch checkpoints (`.pth`, `.ckpt`) without PyTorch, one tensor in memory at a time.

    tree = {'state_dict': {'a.weight': TensorSpec((2, 3), np.dtype('f4'))}, 'epoch': 3}
    with PthWriter('a.ckpt', tree) as writer:
      writer.write('state_dict.a.weight', array)

What is to come is declared first, so that the pickle of the containers can go before the values, as `torch.save` has it: a zip of
stored entries `archive/data.pkl`, `archive/byteorder`, `archive/data/KEY` for each tensor, `archive/version`. Values start at multiples
of 64 bytes, which `torch.load(mmap=True)` needs. Every tensor has its storage to itself and is contiguous. `torch.load` reads the file
with `weights_only=True`, `pth.open_pth` reads it here. The file appears under its name only when it is whole.
"""

import hashlib
import os
import pathlib
import struct
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.pth import MAX_DEPTH, MAX_RANK, STORAGES
from chameleon_jax.interop.lazy import TensorSpec

_ALIGNMENT = 64  # bytes, as torch aligns storages
_FULL = 0xFFFFFFFF  # in a 32-bit field of a zip: see its 64-bit twin
_FULL_COUNT = 0xFFFF
_LARGE = _FULL  # sizes and places from here on need that twin; tests lower it
_DOS_DATE = 33  # the first day a zip can name, so that equal tensors give equal files
_ROOT = 'archive'
_KINDS = {dtype: name for name, dtype in STORAGES.items()}


def tensor_specs(tree: Any) -> dict[str, TensorSpec]:
  """Every tensor of a declared tree by name, as `PthFile.tensors()` names it: the keys that lead to it, joined by dots.

  Raises:
    CheckpointError: two tensors have one name, or the tree is too deep.
  """
  found: dict[str, TensorSpec] = {}

  def walk(node: Any, name: str, depth: int) -> None:
    if depth > MAX_DEPTH:
      raise CheckpointError(f'a checkpoint with {depth} containers inside each other (at {name[:80]!r}) cannot be written')
    if isinstance(node, TensorSpec):
      if name in found:
        raise CheckpointError(f'a checkpoint with two tensors named {name[:80]!r} cannot be written')
      found[name] = node
    elif isinstance(node, (Mapping, list, tuple)):
      for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        label = key if isinstance(key, str) else repr(key)
        walk(value, f'{name}.{label}' if depth else label, depth + 1)

  walk(tree, '', 0)
  return found


class PthWriter:
  """A checkpoint under way; use it in a `with`, which ends in `close`, or in `abort` where an error leaves it.

  Attributes:
    path: the file to be.
    specs: name -> shape and type of every declared tensor.
  """

  def __init__(self, path: str | os.PathLike[str], tree: Any):
    """Writes what stands before the values.

    Args:
      path: the file to be; one that is there is replaced in the end.
      tree: dicts, lists and tuples of None, bool, int, float, str and, for each tensor, its TensorSpec.

    Raises:
      CheckpointError: the tree holds something else, or a type of number that torch does not have; the file cannot be written.
    """
    self.path = pathlib.Path(path)
    self.specs = tensor_specs(tree)
    self._keys = {name: str(index) for index, name in enumerate(self.specs)}
    pickled = b'\x80\x02' + b''.join(_pickle(tree, iter(self._keys.items()), str(self.path))) + b'.'
    self._aside = self.path.with_name(f'.{self.path.name}.{os.getpid()}.part')
    self._left = set(self.specs)
    self._directory: list[bytes] = []
    self._position = 0
    self._md5 = hashlib.md5(usedforsecurity=False)
    try:
      self._file = self._aside.open('xb')
    except OSError as error:
      raise self._failed(error) from error
    try:
      self._entry('data.pkl', memoryview(pickled))
      self._entry('byteorder', memoryview(b'little'))
    except BaseException:
      self.abort()
      raise

  def __enter__(self) -> 'PthWriter':
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
    if kind is None:
      self.close()
    else:
      self.abort()

  @property
  def md5(self) -> str:
    """Of the file once it is closed."""
    return self._md5.hexdigest()

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes the values of a declared tensor, in any order of names but each once.

    Raises:
      CheckpointError: the name was not declared or is there already, the array is not as declared, or the disk refuses; the
        file is given up.
    """
    try:
      spec = self.specs.get(name)
      if spec is None or name not in self._left:
        what = 'was not declared' if spec is None else 'is written already'
        raise CheckpointError(f'{self.path}: tensor {name[:80]!r} {what}')
      if array.shape != spec.shape or array.dtype != spec.dtype:
        got = f'{array.dtype} {list(array.shape)}'
        raise CheckpointError(f'{self.path}: tensor {name[:80]!r} was declared as {spec.dtype} {list(spec.shape)}, its values are {got}')
      self._entry(f'data/{self._keys[name]}', np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
      self._left.discard(name)
    except BaseException:
      self.abort()
      raise

  def close(self) -> None:
    """Ends the file and gives it its name.

    Raises:
      CheckpointError: declared tensors are missing, or the disk refuses; nothing is left behind.
    """
    try:
      if self._file.closed:
        raise CheckpointError(f'{self.path} was given up or closed before')
      if self._left:
        first = next(name for name in self.specs if name in self._left)
        raise CheckpointError(f'{self.path}: {len(self._left)} declared tensors were not written, the first is {first[:80]!r}')
      self._entry('version', memoryview(b'3\n'))
      self._put(memoryview(self._end()))
      self._file.close()
      os.replace(self._aside, self.path)
    except OSError as error:
      self.abort()
      raise self._failed(error) from error
    except BaseException:
      self.abort()
      raise

  def abort(self) -> None:
    """Gives the file up and removes what was written; without effect on one that is closed."""
    if not self._file.closed:
      try:
        self._file.close()
      except OSError:  # the last bytes did not fit on the disk: they go anyway
        pass
      finally:
        self._aside.unlink(missing_ok=True)
    elif self._aside.exists():
      self._aside.unlink(missing_ok=True)

  def _failed(self, error: OSError) -> CheckpointError:
    return CheckpointError(f'{self.path} cannot be written: {error.strerror or error}')

  def _put(self, data: memoryview) -> None:
    if self._file.closed:
      raise CheckpointError(f'{self.path} was given up or closed before')
    try:
      self._file.write(data)
    except OSError as error:
      raise self._failed(error) from error
    self._md5.update(data)
    self._position += len(data)

  def _entry(self, label: str, data: memoryview) -> None:
    """One stored entry; the local header is padded by an extra field so that the data starts at a multiple of 64."""
    name, at, size, crc = f'{_ROOT}/{label}'.encode(), self._position, len(data), zlib.crc32(data)
    big = size >= _LARGE
    extra = struct.pack('<HHQQ', 1, 16, size, size) if big else b''
    padding = -(at + 30 + len(name) + len(extra) + 4) % _ALIGNMENT
    extra += struct.pack('<2sH', b'FB', padding) + b'Z' * padding
    small, version = (_FULL, 45) if big else (size, 20)
    head = struct.pack('<4s5H3I2H', b'PK\x03\x04', version, 0, 0, 0, _DOS_DATE, crc, small, small, len(name), len(extra))
    self._put(memoryview(head + name + extra))
    self._put(data)

    twins = [size, size] * big + [at] * (at >= _LARGE)
    extra = struct.pack(f'<HH{len(twins)}Q', 1, 8 * len(twins), *twins) if twins else b''
    version = 45 if twins else 20
    fields = (version, version, 0, 0, 0, _DOS_DATE, crc, small, small, len(name), len(extra), 0, 0, 0, 0, _FULL if at >= _LARGE else at)
    self._directory.append(struct.pack('<4s6H3I5H2I', b'PK\x01\x02', *fields) + name + extra)

  def _end(self) -> bytes:
    """The zip's directory and what closes it."""
    at, count, body = self._position, len(self._directory), b''.join(self._directory)
    end = body
    large = at >= _LARGE or len(body) >= _LARGE or count >= _FULL_COUNT
    if large:
      end += struct.pack('<4sQ2H2I4Q', b'PK\x06\x06', 44, 45, 45, 0, 0, count, count, len(body), at)
      end += struct.pack('<4sIQI', b'PK\x06\x07', 0, at + len(body), 1)
    counts, sizes = (_FULL_COUNT, _FULL_COUNT) if large else (count, count), (_FULL, _FULL) if large else (len(body), at)
    return end + struct.pack('<4s4H2IH', b'PK\x05\x06', 0, 0, *counts, *sizes, 0)


def _pickle(node: Any, keys: Iterator[tuple[str, str]], where: str) -> Iterator[bytes]:
  """The opcodes (protocol 2) that build a value. `keys` gives the storages in the order in which the tensors come."""
  if isinstance(node, TensorSpec):
    yield _tensor(node, *next(keys), where)
  elif node is None:
    yield b'N'
  elif isinstance(node, bool):
    yield b'\x88' if node else b'\x89'
  elif isinstance(node, int):
    yield _integer(node, where)
  elif isinstance(node, float):
    yield b'G' + struct.pack('>d', node)
  elif isinstance(node, str):
    yield _text(node, where)
  elif isinstance(node, tuple):
    yield b'('
    for value in node:
      yield from _pickle(value, keys, where)
    yield b't'
  elif isinstance(node, list):
    yield b']('
    for value in node:
      yield from _pickle(value, keys, where)
    yield b'e'
  elif isinstance(node, Mapping):
    yield b'}('
    for key, value in node.items():
      if not isinstance(key, (str, int, float, type(None))):
        raise CheckpointError(f'{where}: a {type(key).__name__} as a key of a dict cannot be written')
      yield from _pickle(key, keys, where)
      yield from _pickle(value, keys, where)
    yield b'u'
  else:
    raise CheckpointError(f'{where}: a {type(node).__name__} cannot be written; keep to tensors, plain values and containers of them')


def _text(value: str, where: str) -> bytes:
  try:
    data = value.encode()
  except UnicodeEncodeError as error:
    raise CheckpointError(f'{where}: text that is no Unicode cannot be written') from error
  return b'X' + struct.pack('<I', len(data)) + data


def _integer(value: int, where: str) -> bytes:
  if 0 <= value < 256:
    return b'K' + bytes([value])
  if -(2**31) <= value < 2**31:
    return b'J' + struct.pack('<i', value)
  size = value.bit_length() // 8 + 1
  if size > 255:
    raise CheckpointError(f'{where}: an integer of {size} bytes cannot be written')
  return b'\x8a' + bytes([size]) + value.to_bytes(size, 'little', signed=True)


def _tensor(spec: TensorSpec, name: str, key: str, where: str) -> bytes:
  """The call torch rebuilds a tensor by: (storage, offset 0, shape, strides, no gradient, no hooks)."""
  kind = _KINDS.get(spec.dtype)
  if kind is None:
    raise CheckpointError(f'{where}: tensor {name[:80]!r} has type {spec.dtype}, which these files are not written with')
  if len(spec.shape) > MAX_RANK or any(n < 0 for n in spec.shape):
    raise CheckpointError(f'{where}: tensor {name[:80]!r} has shape {list(spec.shape)[:8]}, which cannot be written')
  strides, step = [], 1
  for n in reversed(spec.shape):
    strides.append(step)
    step *= max(n, 1)
  numel = spec.nbytes // spec.dtype.itemsize
  sizes = [b'(' + b''.join(_integer(n, where) for n in axes) + b't' for axes in (spec.shape, strides[::-1])]
  storage = b'(' + _text('storage', where) + f'ctorch\n{kind}Storage\n'.encode() + _text(key, where) + _text('cpu', where)
  storage += _integer(numel, where) + b'tQ'
  call = b'ctorch._utils\n_rebuild_tensor_v2\n('
  return call + storage + b'K\x00' + sizes[0] + sizes[1] + b'\x89' + b'ccollections\nOrderedDict\n)R' + b'tR'
