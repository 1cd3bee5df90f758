"""Torch's files made without torch: a zip written byte by byte as torch lays it out (stored, padded to 64 bytes in the local header alone,
zip64 where it is needed) and pickles of the standard pickler, with stand-ins that go under torch's names.
"""

import collections
import io
import os
import pickle
import struct
import zlib

import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.pth import open_pth

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TYPES = {
    'FloatStorage': np.dtype('f4'),
    'DoubleStorage': np.dtype('f8'),
    'HalfStorage': np.dtype('f2'),
    'BFloat16Storage': BFLOAT16,
    'CharStorage': np.dtype('i1'),
    'ShortStorage': np.dtype('i2'),
    'IntStorage': np.dtype('i4'),
    'LongStorage': np.dtype('i8'),
    'ByteStorage': np.dtype('u1'),
    'BoolStorage': np.dtype('?'),
}


class Name:
  """A global of a module that is not here."""

  def __init__(self, module, name):
    self.module, self.name = module, name

  def __call__(self):
    raise AssertionError('only its name is pickled')


class Call:
  """Pickled as a call of a global."""

  def __init__(self, module, name, *args):
    self.rest = (Name(module, name), args)

  def __reduce_ex__(self, protocol):
    return self.rest


class Store:
  """A torch storage: goes into the pickle as a persistent id."""

  def __init__(self, key, kind, numel):
    self.pid = ('storage', Name('torch', kind), key, 'cpu', numel)


class Pickler(pickle._Pickler):
  dispatch = dict(pickle._Pickler.dispatch)

  def persistent_id(self, obj):
    return obj.pid if isinstance(obj, Store) else None

  def save_name(self, obj):
    if self.proto >= 4:
      self.save(obj.module)
      self.save(obj.name)
      self.write(pickle.STACK_GLOBAL)
    else:
      self.write(pickle.GLOBAL + f'{obj.module}\n{obj.name}\n'.encode())
    self.memoize(obj)

  dispatch[Name] = save_name


def dumps(value, protocol=2):
  out = io.BytesIO()
  Pickler(out, protocol).dump(value)
  return out.getvalue()


def tensor(store, offset, shape, stride, *more):
  return Call('torch._utils', '_rebuild_tensor_v2', store, offset, shape, stride, False, collections.OrderedDict(), *more)


def whole(key, array):
  """A contiguous tensor that has its storage to itself."""
  kind = next(name for name, dtype in TYPES.items() if dtype == array.dtype)
  stride = tuple(step // array.itemsize for step in np.empty(array.shape, array.dtype).strides)
  return tensor(Store(key, kind, array.size), 0, array.shape, stride)


def write_zip(path, entries, *, pad=True):
  """Writes stored entries (name -> bytes, or a number of zero bytes that are left a hole); returns where the data of each starts."""
  starts, directory = {}, []
  with open(path, 'wb') as file:
    for name, data in entries.items():
      size = data if isinstance(data, int) else len(data)
      crc = 0 if isinstance(data, int) else zlib.crc32(data)
      raw, at = name.encode(), file.tell()
      small = min(size, 0xFFFFFFFF)
      extra = struct.pack('<HHQQ', 1, 16, size, size) if small != size else b''
      if pad:
        n = -(at + 30 + len(raw) + len(extra) + 4) % 64
        extra += struct.pack('<HH', 0x4246, n) + b'Z' * n
      file.write(struct.pack('<4s5H3I2H', b'PK\x03\x04', 20, 0, 0, 0, 33, crc, small, small, len(raw), len(extra)) + raw + extra)
      starts[name] = file.tell()
      if isinstance(data, int):
        file.seek(size, os.SEEK_CUR)
      else:
        file.write(data)
      big = [size, size] * (small != size) + [at] * (at > 0xFFFFFFFE)
      extra = struct.pack(f'<HH{len(big)}Q', 1, 8 * len(big), *big) if big else b''
      head = (b'PK\x01\x02', 20, 20, 0, 0, 0, 33, crc, small, small, len(raw), len(extra), 0, 0, 0, 0, min(at, 0xFFFFFFFF))
      directory.append(struct.pack('<4s6H3I5H2I', *head) + raw + extra)
    at, body, count = file.tell(), b''.join(directory), len(entries)
    file.write(body)
    if at > 0xFFFFFFFE:
      file.write(struct.pack('<4sQ2H2I4Q', b'PK\x06\x06', 44, 45, 45, 0, 0, count, count, len(body), at))
      file.write(struct.pack('<4sIQI', b'PK\x06\x07', 0, at + len(body), 1))
    file.write(struct.pack('<4s4H2IH', b'PK\x05\x06', 0, 0, count, count, len(body), min(at, 0xFFFFFFFF), 0))
  return starts


def save(path, value, storages=None, *, protocol=2, root='archive', **more):
  """Writes a checkpoint; `value` may be the bytes of a pickle. Returns where each entry's data starts."""
  entries = {f'{root}/data.pkl': value if isinstance(value, bytes) else dumps(value, protocol), f'{root}/byteorder': b'little'}
  for key, data in (storages or {}).items():
    entries[f'{root}/data/{key}'] = data.tobytes() if isinstance(data, np.ndarray) else data
  entries[f'{root}/version'] = b'3\n'
  return write_zip(path, entries | more)


def refused(path, fragment, **kwargs):
  with pytest.raises(CheckpointError, match=fragment) as caught, open_pth(path, **kwargs) as file:
    for lazy in file.tensors().values():
      lazy.read()
  message = str(caught.value)
  assert '\n' not in message and str(path) in message and len(message) < 1000
  return message


def sample(dtype, shape, seed=0):
  rng = np.random.default_rng(seed)
  if dtype == np.bool_:
    return rng.integers(0, 2, shape).astype(bool)
  if dtype.kind in 'iu':
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
  return (100 * rng.normal(size=shape)).astype(dtype)
