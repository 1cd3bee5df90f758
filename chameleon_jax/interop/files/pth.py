"""PyTorch checkpoints (`.pth`, `.ckpt`: what `torch.save` writes since 1.6), read without PyTorch and without running what is in them.

    with open_pth('vqgan.ckpt') as file:
      kernel = file.tensors('state_dict')['encoder.conv_in.weight'].read()

Such a file is a zip of uncompressed entries: `NAME/data.pkl` is a pickle of the containers, in which each tensor names its storage, and
`NAME/data/KEY` are the bytes of a storage. Opening reads the zip's directory and the pickle (see `pickle_reader`) and checks every tensor
against its storage; arrays are views of the mapped file, so one larger than memory is no trouble. Do not change it while they are in use.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.pickle_reader import Function, PickleRefused, brief, read_pickle
from chameleon_jax.interop.files.stored_zip import AGAIN, StoredZip

MAX_PICKLE = 512 << 20  # bytes of data.pkl
MAX_DEPTH = 64  # containers inside each other
MAX_RANK = 64
MAX_REPEATED = 1 << 24  # elements of an expanded tensor, which may have more of them than its storage
_MAX_NAMES = 512 << 20  # characters of all names, every entry counted as 64 more
_LIMIT = 2**63

STORAGES = {
    'Float': np.dtype('<f4'),
    'Double': np.dtype('<f8'),
    'Half': np.dtype('<f2'),
    'BFloat16': np.dtype(ml_dtypes.bfloat16),
    'Char': np.dtype('i1'),
    'Short': np.dtype('<i2'),
    'Int': np.dtype('<i4'),
    'Long': np.dtype('<i8'),
    'Byte': np.dtype('u1'),
    'Bool': np.dtype('?'),
}


@dataclass(frozen=True)
class StorageType:
  """Stands for `torch.FloatStorage` and its kin."""

  dtype: np.dtype


@dataclass(frozen=True)
class Storage:
  """A run of `numel` elements, the zip entry `data/KEY`."""

  dtype: np.dtype
  key: str
  numel: int


@dataclass(frozen=True)
class LazyTensor:
  """A tensor that is still in the file; shape, stride and offset count elements."""

  dtype: np.dtype
  shape: tuple[int, ...]
  stride: tuple[int, ...]
  offset: int
  key: str
  storage_numel: int
  file: 'PthFile' = field(repr=False, compare=False)

  def read(self) -> np.ndarray:
    """The values, `shape` of `dtype`: a read-only view of the mapped file, strided where the tensor is.

    Raises:
      CheckpointError: the file is closed, or damaged where the tensor lies.
    """
    return self.file.read_tensor(self)


def open_pth(path: str | os.PathLike[str], *, verify: bool = False) -> 'PthFile':
  """Opens a checkpoint; use it in a `with`.

  Args:
    path: the file.
    verify: also compare the bytes of every storage with their checksums, which reads the whole file.

  Raises:
    CheckpointError: the file is missing, damaged, of another format, or holds more than tensors and plain containers.
  """
  file = PthFile(path)
  if verify:
    try:
      file.verify()
    except CheckpointError:
      file.close()
      raise
  return file


class PthFile:
  """An open checkpoint, see `open_pth`. Arrays read from it stay valid after it is closed."""

  def __init__(self, path: str | os.PathLike[str]):
    self._zip = StoredZip(path)
    self.path = self._zip.path
    try:
      self._root = self._find_root()
      self._check_byte_order()
      self._tree = self._read_tree()
      self._check_tensors()
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> 'PthFile':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file."""
    self._zip.close()

  @property
  def tree(self) -> Any:
    """What was saved: dicts (for OrderedDicts too), lists, tuples, scalars, text, None, and a `LazyTensor` for each tensor or parameter."""
    return self._tree

  def tensors(self, *path: str | int) -> dict[str, LazyTensor]:
    """Every tensor by name: the keys and positions that lead to it, joined by dots.

    Args:
      path: keys that lead to the part to look at, such as 'state_dict'; names then start below it. no key means the whole tree.

    Raises:
      CheckpointError: the path leads nowhere, or two tensors have one name ({'a.b': x} beside {'a': {'b': y}}).
    """
    node = self._tree
    for key in path:
      inside = key in node if isinstance(node, dict) else isinstance(node, (list, tuple)) and isinstance(key, int) and 0 <= key < len(node)
      if not inside:
        there = ', '.join(brief(name) for name in list(node)[:8]) if isinstance(node, dict) else brief(node)
        raise CheckpointError(f'{self.path} has no {brief(key)} there; it has {there or "nothing"}')
      node = node[key]
    found: dict[str, LazyTensor] = {}
    for name, tensor in self._walk(node):
      if name in found:
        raise CheckpointError(f'{self.path} has two tensors named {brief(name)}; give the path of the part you need')
      found[name] = tensor
    return found

  def verify(self) -> None:
    """Compares the bytes of every storage with their checksums.

    Raises:
      CheckpointError: a storage is damaged.
    """
    for name in self._zip.names:
      if name.startswith(f'{self._root}/data/'):
        self._zip.check(name)

  def read_tensor(self, tensor: LazyTensor) -> np.ndarray:
    """See `LazyTensor.read`."""
    if 0 in tensor.shape:
      empty = np.empty(tensor.shape, tensor.dtype)
      empty.flags.writeable = False
      return empty
    mapped, start = self._zip.map(f'{self._root}/data/{tensor.key}')
    size = tensor.dtype.itemsize
    strides = tuple(size * (step if n > 1 else 1) for n, step in zip(tensor.shape, tensor.stride))
    try:
      return np.ndarray(tensor.shape, tensor.dtype, mapped, start + size * tensor.offset, strides)
    except (TypeError, ValueError) as error:  # the bounds were checked on opening, see _check_tensors
      raise CheckpointError(f'{self.path} has changed since it was opened; open it again') from error

  def _find_root(self) -> str:
    roots = [name.removesuffix('/data.pkl') for name in self._zip.names if name.count('/') == 1 and name.endswith('/data.pkl')]
    if len(roots) != 1:
      raise CheckpointError(f'{self.path} is a zip with {len(roots)} entries NAME/data.pkl, not one; give a checkpoint of torch.save')
    return roots[0]

  def _check_byte_order(self) -> None:
    name = f'{self._root}/byteorder'
    order = self._zip.read(name, 64) if self._zip.size(name) is not None else b'little'
    if order != b'little' or sys.byteorder != 'little':
      raise CheckpointError(f'{self.path} has byte order {brief(order)}; only little-endian is read, re-save it on such a machine')

  def _read_tree(self) -> Any:
    admitted: dict[str, Any] = {f'torch {name}Storage': StorageType(dtype) for name, dtype in STORAGES.items()}
    admitted |= {f'{module} UntypedStorage': StorageType(np.dtype('u1')) for module in ('torch', 'torch.storage')}
    admitted |= {f'torch {dtype.name}': dtype for dtype in STORAGES.values()}
    for name, call in (
        ('collections OrderedDict', _ordered_dict),
        ('torch Size', _size),
        ('torch._utils _rebuild_parameter', _parameter),
        ('torch._utils _rebuild_tensor_v2', self._tensor),
    ):
      admitted[name] = Function(name.replace(' ', '.'), call)
    data = self._zip.read(f'{self._root}/data.pkl', MAX_PICKLE)
    try:
      return read_pickle(data, admitted, self._storage)
    except PickleRefused as error:
      advice = 'if you trust it, open it in PyTorch and torch.save its tensors alone, else download it again'
      raise CheckpointError(f'{self.path}: the pickle {error}; {advice}') from error

  def _storage(self, pid: Any) -> Storage:
    if type(pid) is not tuple or len(pid) != 5 or pid[0] != 'storage' or type(pid[1]) is not StorageType:
      raise PickleRefused('has a persistent id that is no storage')
    _, kind, key, _, numel = pid
    if type(key) is not str or type(numel) is not int or not 0 <= numel * kind.dtype.itemsize < _LIMIT:
      raise PickleRefused(f'has a storage {brief(key)} of {brief(numel)} elements')
    return Storage(kind.dtype, key, numel)

  def _tensor(self, args: tuple) -> LazyTensor:
    """torch._utils._rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, backward_hooks, metadata=None)."""
    if len(args) not in (6, 7) or type(args[0]) is not Storage or args[5] or (len(args) == 7 and args[6]):
      raise PickleRefused('builds a tensor from arguments that are not admitted (no storage, hooks, or metadata)')
    storage, offset, shape, stride = args[:4]
    sizes = (shape, stride, (offset,))
    if not all(type(part) is tuple and all(type(n) is int for n in part) for part in sizes) or len(shape) != len(stride):
      raise PickleRefused(f'builds a tensor of storage {brief(storage.key)} whose size, stride and offset are no fitting integers')
    if not all(0 <= n < _LIMIT for part in sizes for n in part):
      raise PickleRefused(f'builds a tensor of storage {brief(storage.key)} with a negative or overflowing size, stride or offset')
    if len(shape) > MAX_RANK or math.prod(n or 1 for n in shape) * storage.dtype.itemsize >= _LIMIT:
      raise PickleRefused(f'builds a tensor of storage {brief(storage.key)} that is too large for any array')
    return LazyTensor(storage.dtype, shape, stride, offset, storage.key, storage.numel, self)

  def _walk(self, tree: Any) -> Iterator[tuple[str, LazyTensor]]:
    """Names and tensors in order. Shared parts come once for each way to them, so the work and the depth are bounded."""
    left = _MAX_NAMES

    def walk(node: Any, name: str, depth: int) -> Iterator[tuple[str, LazyTensor]]:
      nonlocal left
      left -= 64 + len(name)
      if depth > MAX_DEPTH or left < 0:
        raise CheckpointError(f'{self.path}: the pickle holds itself or too much (at {brief(name)}); download it again, or do not trust it')
      if isinstance(node, LazyTensor):
        yield name, node
      elif isinstance(node, (dict, list, tuple)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
          label = key if isinstance(key, str) else repr(key)
          yield from walk(value, f'{name}.{label}' if depth else label, depth + 1)

    return walk(tree, '', 0)

  def _check_tensors(self) -> None:
    for name, tensor in self._walk(self._tree):
      what = f'{self.path}: tensor {brief(name)}'
      claimed = tensor.storage_numel * tensor.dtype.itemsize
      stored = self._zip.size(f'{self._root}/data/{tensor.key}')
      if claimed and (stored is None or stored < claimed):
        there = 'is not in the zip' if stored is None else f'has {stored}'
        raise CheckpointError(f'{what} needs storage {brief(tensor.key)} of {claimed} bytes, which {there}; {AGAIN}')
      if 0 in tensor.shape:
        continue
      end = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride)) + 1
      if end > tensor.storage_numel:
        raise CheckpointError(f'{what} reaches element {end} of a storage of {tensor.storage_numel}; {AGAIN}')
      if math.prod(tensor.shape) > max(tensor.storage_numel, MAX_REPEATED):
        raise CheckpointError(f'{what} of shape {tensor.shape} repeats a storage of {tensor.storage_numel} elements; save it contiguous')


def _ordered_dict(args: tuple) -> dict:
  if args:
    raise PickleRefused('builds an OrderedDict from arguments, which is not admitted')
  return {}


def _size(args: tuple) -> tuple:
  if len(args) != 1 or type(args[0]) is not tuple or not all(type(n) is int for n in args[0]):
    raise PickleRefused('builds a torch.Size from something else than a tuple of integers')
  return args[0]


def _parameter(args: tuple) -> LazyTensor:
  """torch._utils._rebuild_parameter(data, requires_grad, backward_hooks)."""
  if len(args) != 3 or type(args[0]) is not LazyTensor or args[2]:
    raise PickleRefused('builds a parameter from arguments that are not admitted (no tensor, or hooks)')
  return args[0]
