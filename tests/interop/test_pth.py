"""PyTorch checkpoints without PyTorch: every value against numpy, and every file that is hostile or damaged refused in one line.

The files are made here: a zip written byte by byte as torch lays it out (stored, padded to 64 bytes in the local header alone, zip64 where
it is needed) and pickles of the standard pickler, with stand-ins that go under torch's names.
"""

import collections
import io
import os
import pickle
import pickletools
import resource
import struct
import tracemalloc
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import pickle_reader, pth
from chameleon_jax.interop.pth import open_pth

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


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_values_of_every_type(tmp_path, protocol):
  arrays = {name: sample(dtype, (3, 5), seed) for seed, (name, dtype) in enumerate(TYPES.items())}
  value = collections.OrderedDict((name, whole(str(i), array)) for i, (name, array) in enumerate(arrays.items()))
  save(tmp_path / 'a.pth', value, {str(i): array for i, array in enumerate(arrays.values())}, protocol=protocol)
  with open_pth(tmp_path / 'a.pth', verify=True) as file:
    lazy = file.tensors()
    assert list(lazy) == list(arrays)
    read = {name: one.read() for name, one in lazy.items()}
  for name, array in arrays.items():
    assert read[name].dtype == array.dtype == lazy[name].dtype
    assert read[name].tobytes() == array.tobytes()
    assert not read[name].flags.writeable and read[name].flags.c_contiguous and not read[name].flags.owndata


def test_bfloat16_is_the_upper_half_of_float32(tmp_path):
  exact = np.array([1.0, -2.5, 3.140625, 0.0, -0.0, np.inf, 2.0**-130], np.float32)
  data = (exact.view(np.uint32) >> 16).astype('<u2').tobytes()
  save(tmp_path / 'a.pth', [tensor(Store('0', 'BFloat16Storage', 7), 0, (7,), (1,))], {'0': data})
  with open_pth(tmp_path / 'a.pth') as file:
    read = file.tensors()['0'].read()
  assert read.dtype == BFLOAT16
  np.testing.assert_array_equal(read.astype(np.float32), exact)


def test_shared_storages_offsets_and_strides(tmp_path):
  data = np.arange(100, dtype='<i4') * 7 - 50
  store = Store('k', 'IntStorage', 100)
  cases = {
      'whole': (tensor(store, 0, (100,), (1,)), data),
      'offset': (tensor(store, 10, (4, 5), (5, 1)), data[10:30].reshape(4, 5)),
      'transposed': (tensor(store, 20, (6, 8), (1, 6)), data[20:68].reshape(8, 6).T),
      'step': (tensor(store, 3, (5, 2), (20, 3)), data[[[3, 6], [23, 26], [43, 46], [63, 66], [83, 86]]]),
      'expanded': (tensor(store, 99, (2, 3), (0, 0)), np.full((2, 3), data[99])),
      'scalar': (tensor(store, 42, (), ()), np.array(data[42])),
      'empty': (tensor(store, 0, (0, 3), (3, 1)), np.zeros((0, 3), 'i4')),
      'one': (tensor(store, 99, (1, 1), (2**62, 77)), data[99:].reshape(1, 1)),
      'permuted': (tensor(store, 0, (4, 2, 3), (1, 12, 4)), data[:24].reshape(2, 3, 4).transpose(2, 0, 1)),
  }
  save(tmp_path / 'a.pth', {name: value for name, (value, _) in cases.items()}, {'k': data})
  with open_pth(tmp_path / 'a.pth') as file:
    for name, (_, expected) in cases.items():
      read = file.tensors(name)[''].read()
      assert read.shape == expected.shape and not read.flags.writeable, name
      np.testing.assert_array_equal(read, expected, err_msg=name)


def test_the_tree_and_its_names(tmp_path):
  x, y = np.arange(6, dtype='f4').reshape(2, 3), np.arange(4, dtype='f8')
  bias = Call('torch._utils', '_rebuild_parameter', whole('1', y), True, {})
  inner = collections.OrderedDict([('a.weight', whole('0', x)), ('a.bias', bias)])
  inner._metadata = collections.OrderedDict([('', {'version': 1})])
  value = {
      'state_dict': inner,
      'epoch': 3,
      'lr': 1.5e-4,
      'note': 'größe',
      'none': None,
      'flags': (True, False),
      'raw': b'\x00\xff',
      'big': -(2**70),
      'size': Call('torch', 'Size', (2, 3)),
      'dtype': Name('torch', 'bfloat16'),
      'history': [whole('1', y), {7: whole('0', x)}],
  }
  for protocol in (3, 4):  # with 2, bytes become a call of _codecs.encode
    save(tmp_path / 'a.ckpt', value, {'0': x, '1': y}, protocol=protocol, root='some name')
    with open_pth(tmp_path / 'a.ckpt') as file:
      tree = file.tree
      plain = {k: v for k, v in tree.items() if k not in ('state_dict', 'history', 'dtype')}
      assert plain == {k: value[k] for k in ('epoch', 'lr', 'note', 'none', 'flags', 'raw', 'big')} | {'size': (2, 3)}
      assert tree['dtype'] == BFLOAT16
      assert list(tree) == list(value) and list(tree['state_dict']) == ['a.weight', 'a.bias']
      assert list(file.tensors()) == ['state_dict.a.weight', 'state_dict.a.bias', 'history.0', 'history.1.7']
      assert list(file.tensors('state_dict')) == ['a.weight', 'a.bias']
      np.testing.assert_array_equal(file.tensors('history', 1, 7)[''].read(), x)
      np.testing.assert_array_equal(file.tensors('state_dict')['a.bias'].read(), y)
      assert file.tensors('epoch') == {}
      with pytest.raises(CheckpointError, match="has no 'model' there; it has 'state_dict', 'epoch'"):
        file.tensors('model')
      with pytest.raises(CheckpointError, match='has no 2 there'):
        file.tensors('history', 2)


def test_two_tensors_of_one_name_are_not_merged(tmp_path):
  x = np.zeros(2, 'f4')
  save(tmp_path / 'a.pth', {'a.b': whole('0', x), 'a': {'b': whole('0', x)}}, {'0': x})
  with open_pth(tmp_path / 'a.pth') as file:
    assert list(file.tensors('a')) == ['b']
    with pytest.raises(CheckpointError, match="two tensors named 'a.b'"):
      file.tensors()


def test_zipfile_reads_what_these_tests_write(tmp_path):
  """The writer above against the standard library, and the reader on what the standard library writes (no padding)."""
  x = sample(np.dtype('f4'), 9)
  starts = save(tmp_path / 'a.pth', [whole('0', x)], {'0': x})
  assert all(start % 64 == 0 for start in starts.values())
  with zipfile.ZipFile(tmp_path / 'a.pth') as ours, zipfile.ZipFile(tmp_path / 'b.pth', 'w') as theirs:
    assert ours.testzip() is None and ours.read('archive/data/0') == x.tobytes()
    for name in ours.namelist():
      theirs.writestr(name, ours.read(name))
  with open_pth(tmp_path / 'b.pth', verify=True) as file:
    np.testing.assert_array_equal(file.tensors()['0'].read(), x)


def test_after_closing(tmp_path):
  x = sample(np.dtype('f4'), 9)
  save(tmp_path / 'a.pth', [whole('0', x)], {'0': x})
  with open_pth(tmp_path / 'a.pth') as file:
    lazy = file.tensors()['0']
    read = lazy.read()
  np.testing.assert_array_equal(read, x)
  with pytest.raises(CheckpointError, match='is closed'):
    lazy.read()
  with pytest.raises(CheckpointError, match='is closed'):
    file.verify()


# Hostile pickles.


def _text(value):
  return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def _system(flag):
  return _text(f'echo x > {flag}') + b'\x85R.'


ATTACKS = {
    'os.system': lambda flag: b'\x80\x02cos\nsystem\n' + _system(flag),
    'posix.system': lambda flag: b'\x80\x02cposix\nsystem\n' + _system(flag),
    'builtins.eval': lambda flag: b'\x80\x02cbuiltins\neval\n' + _text(f"open('{flag}', 'w')") + b'\x85R.',
    'builtins.exec': lambda flag: b'\x80\x02cbuiltins\nexec\n' + _text(f"open('{flag}', 'w')") + b'\x85R.',
    'subprocess.call': lambda flag: b'\x80\x02csubprocess\ncall\n](' + _text('touch') + _text(str(flag)) + b'e\x85R.',
    'os.system by stack': lambda flag: b'\x80\x04' + _text('os') + _text('system') + b'\x93' + _system(flag),
    'os.system by memo': lambda flag: b'\x80\x04' + _text('system') + b'q\x050' + _text('os') + b'h\x05\x93' + _system(flag),
    'os.system after pops': lambda flag: b'\x80\x04(]}N1' + _text('os') + b'2' + b'0' + _text('system') + b'\x93' + _system(flag),
    'os.system as instance': lambda flag: b'\x80\x02(' + _text(f'echo x > {flag}') + b'ios\nsystem\n.',
    'os.system as object': lambda flag: b'\x80\x02(cos\nsystem\n' + _text(f'echo x > {flag}') + b'o.',
}


@pytest.mark.parametrize('name', ATTACKS)
def test_an_attack_works_on_the_standard_unpickler_and_not_here(tmp_path, name):
  flag = tmp_path / 'flag'
  attack = ATTACKS[name](flag)
  pickle.loads(attack)
  assert flag.exists(), 'the attack itself is broken'
  flag.unlink()
  save(tmp_path / 'a.pth', attack)
  message = refused(tmp_path / 'a.pth', 'the pickle (asks for|uses opcode (INST|OBJ))')
  if 'asks for' in message:
    assert repr(name.split(' ')[0]) in message
  assert not flag.exists()


T = b'ctorch._utils\n_rebuild_tensor_v2\n'
O = b'ccollections\nOrderedDict\n'  # noqa: E741
STORE = b'(' + _text('storage') + b'ctorch\nFloatStorage\n' + _text('0') + _text('cpu') + b'K\x04tQ'


@pytest.mark.parametrize(
    'body, fragment',
    [
        (b'ctorch\nload\n' + _text('x') + b'\x85R', "'torch.load'"),
        (b'ctorch.hub\nload\n)R', "'torch.hub.load'"),
        (b'ctorch._utils\n_rebuild_tensor_v3\n)R', "'torch._utils._rebuild_tensor_v3'"),
        (b'ctorch._utils\n__builtins__\n', "'torch._utils.__builtins__'"),
        (b'ctorch\nComplexFloatStorage\n', "'torch.ComplexFloatStorage'"),
        (b'ctorch\nFloatStorage.__class__\n', "'torch.FloatStorage.__class__'"),
        (b'ccollections\nOrderedDict.__init__\n', "'collections.OrderedDict.__init__'"),
        (_text('torch') + _text('_utils.os.system') + b'\x93', "'torch._utils.os.system'"),
        (b'cnumpy.core.multiarray\nscalar\n', "'numpy.core.multiarray.scalar'"),
        (b'cpytorch_lightning.callbacks.early_stopping\nEarlyStopping\n', "'pytorch_lightning.callbacks.early_stopping.EarlyStopping'"),
        (_text('a\nb\u2028') + _text('c' * 500) + b'\x93', 'asks for'),
        (b'K\x01K\x02\x93', 'names a global by 1 and 2'),
        (O + b'K\x05R', 'calls a Function with 5'),
        (O + b']\x85R', 'OrderedDict from arguments'),
        (O + b'(K\x01K\x02tR', 'OrderedDict from arguments'),
        (b'ctorch\nFloatStorage\n)R', 'calls a StorageType'),
        (b'ctorch\nfloat32\n)\x81', 'calls a Float32DType'),
        (_text('x') + b')R', "calls 'x'"),
        (O + b')}\x92', 'opcode NEWOBJ_EX'),
        (O + b')RK\x01b', 'sets the attributes of a dict to 1'),
        (O + b')R}}\x86b', 'sets the attributes of a dict to a tuple'),
        (O + b'}' + _text('__class__') + O + b'sb', 'applies BUILD to a Function'),
        (T + b'}' + _text('call') + O + b'sb', 'applies BUILD to a Function'),
        (b'ctorch\nfloat32\n}b', 'applies BUILD to a Float32DType'),
        (STORE + b'}b', 'applies BUILD to a Storage'),
        (O + b'K\x01K\x02s', 'applies SETITEMS to a Function'),
        (O + b')RK\x01a', 'applies APPEND to a dict'),
        (b']K\x01K\x02s', 'applies SETITEMS to a list'),
        (b'}(K\x01u', 'a key without a value'),
        (b'})K\x01s', 'a tuple as a key'),
        (b'}]K\x01s', 'a list as a key'),
        (b'\x8f', 'opcode EMPTY_SET'),
        (b'\x82\x01', 'opcode EXT1'),
        (b'\x97', 'opcode NEXT_BUFFER'),
        (b'\x96' + struct.pack('<Q', 2**40), 'is damaged'),
        (b'X' + struct.pack('<I', 2**32 - 1) + b'x', 'is damaged'),
        (b'\x8d' + struct.pack('<Q', 2**62) + b'x', 'is damaged'),
        (b'X\x02\x00\x00\x00\xff\xff', 'is damaged'),
        (b'\x8b' + struct.pack('<i', -5), 'is damaged'),
        (b'\xff', 'is damaged'),
        (b'h\x09', 'recalls value 9'),
        (b'j\xff\xff\xff\xff', 'recalls value'),
        (b'0', 'a value that is not there'),
        (b'K\x01(0', 'a value that is not there'),
        (b't', 'a group that was not begun'),
        (b'', 'a value that is not there'),
        (_text('x') + b'Q', 'a persistent id that is no storage'),
        (b'(' + _text('storage') + O + _text('0') + _text('cpu') + b'K\x04tQ', 'a persistent id that is no storage'),
        (b'(' + _text('storage') + b'ctorch\nFloatStorage\nNNK\x04tQ', 'a storage None of 4 elements'),
        (b'(' + _text('storage') + b'ctorch\nFloatStorage\n' + _text('0') + b'NJ\xff\xff\xff\xfftQ', 'of -1 elements'),
        (T + b')R', 'builds a tensor from arguments'),
        (T + b'(NK\x00))\x89}tR', 'builds a tensor from arguments'),
        (T + b'(' + STORE + b'K\x00))\x89}K\x01\x85' + b'tR', 'hooks, or metadata'),
        (T + b'(' + STORE + b'K\x00]]\x89}tR', 'no fitting integers'),
        (T + b'(' + STORE + b'K\x00K\x02\x85)\x89}tR', 'no fitting integers'),
        (T + b'(' + STORE + b'\x88))\x89}tR', 'no fitting integers'),
        (b'ctorch\nSize\n' + _text('ab') + b'\x85R', 'torch.Size'),
        (b'ctorch._utils\n_rebuild_parameter\n(N\x88}tR', 'builds a parameter'),
    ],
)
def test_a_pickle_that_asks_for_more_is_refused(tmp_path, body, fragment):
  save(tmp_path / 'a.pth', b'\x80\x04' + body + b'.', {'0': np.zeros(4, 'f4')})
  refused(tmp_path / 'a.pth', fragment)


def _one(*args, numel=4):
  return [tensor(Store('0', 'FloatStorage', numel), *args)]


@pytest.mark.parametrize(
    'value, fragment',
    [
        (_one(0, (5,), (1,)), "tensor '0' reaches element 5 of a storage of 4"),
        (_one(1, (2, 2), (2, 1)), "tensor '0' reaches element 5"),
        (_one(0, (2, 2), (3, 1)), "tensor '0' reaches element 5"),
        (_one(5, (), ()), "tensor '0' reaches element 6"),
        (_one(0, (5,), (1,), numel=5), "tensor '0' needs storage '0' of 20 bytes, which has 16"),
        ({'a': {'w': tensor(Store('9', 'FloatStorage', 1), 0, (1,), (1,))}}, "tensor 'a.w' needs storage '9' of 4 bytes, which is not in"),
        ({'w': tensor(Store('../version', 'ByteStorage', 1), 0, (1,), (1,))}, 'is not in the zip'),
        (_one(-1, (1,), (1,)), 'negative or overflowing'),
        (_one(3, (2,), (-1,)), 'negative or overflowing'),
        (_one(0, (-1,), (1,)), 'negative or overflowing'),
        (_one(0, (2**63,), (0,)), 'negative or overflowing'),
        (_one(0, (2,), (2**63,)), 'negative or overflowing'),
        (_one(2**64, (2,), (1,)), 'negative or overflowing'),
        (_one(0, (2,), (2**63 - 1,)), 'reaches element'),
        (_one(0, (2**32, 2**32), (0, 0)), 'too large for any array'),
        (_one(0, (0, 2**62, 2), (0, 0, 0)), 'too large for any array'),
        (_one(0, (1,) * 65, (1,) * 65), 'too large for any array'),
        (_one(0, (2**40,), (0,)), 'repeats a storage of 4'),
        (_one(0, (1,), (1,), numel=2**62), 'of 4611686018427387904 elements'),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, value, fragment):
  save(tmp_path / 'a.pth', value, {'0': np.zeros(4, 'f4')})
  refused(tmp_path / 'a.pth', fragment)


def test_bombs_are_bounded(tmp_path, monkeypatch):
  path = tmp_path / 'a.pth'
  save(path, b'\x80\x02]q\x00h\x00a.')  # a list that holds itself
  refused(path, 'holds itself or too much')
  save(path, b'\x80\x02' + b']' * 1 + b'\x85' * 200_000 + b'.')  # tuples in tuples: recursion
  refused(path, 'holds itself or too much')
  save(path, b'\x80\x02]' + b'2\x86' * 50 + b'.')  # 2**50 ways to one list
  monkeypatch.setattr(pth, '_MAX_NAMES', 10_000_000)
  refused(path, 'holds itself or too much')
  save(path, b'\x80\x02N' + b'Nr\xff\xff\xff\xff0' * 3 + b'.')  # a memo of 2**32 places
  with open_pth(path) as file:
    assert file.tree is None
  monkeypatch.setattr(pickle_reader, 'MAX_OPS', 1000)
  save(path, b'\x80\x02' + b']' * 1000 + b'.')
  refused(path, 'is longer than 1000 opcodes')
  save(path, b'\x80\x02(' + b'N' * 500 + b't.', **{'archive/data.pkl': 600 << 20})  # a hole of 600 MiB
  refused(path, 'more than the 536870912 read')


# Files that are no checkpoints.


def test_files_of_another_kind(tmp_path):
  path = tmp_path / 'a.pth'
  refused(path, 'cannot be opened: No such file')
  refused(tmp_path, 'cannot be opened')
  for content in (b'', b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.', b'<html>not found</html>\n' * 99):
    path.write_bytes(content)
    message = refused(path, 'is no zip, as torch.save writes it since PyTorch 1.6')
    assert 'torch.save(torch.load(old), new)' in message
  write_zip(path, {'archive/version': b'3'})
  refused(path, 'with 0 entries NAME/data.pkl')
  write_zip(path, {'a/data.pkl': dumps(1), 'b/data.pkl': dumps(1)})
  refused(path, 'with 2 entries NAME/data.pkl')
  for protocol in (0, 1):
    save(path, pickle.dumps({'a': 1}, protocol))
    refused(path, 'does not start with a protocol from 2 to 5')
  save(path, 1, **{'archive/byteorder': b'big'})
  refused(path, "has byte order b'big'")
  x = np.zeros(64, 'f4')
  save(path, [whole('0', x)], {'0': x})
  content = path.read_bytes()
  path.write_bytes(content[:-30])
  refused(path, 'is a truncated or damaged zip')
  for packed in ('archive/data.pkl', 'archive/data/0'):
    with zipfile.ZipFile(path, 'w') as file:
      file.writestr('archive/data.pkl', dumps([whole('0', x)]), zipfile.ZIP_DEFLATED if packed.endswith('pkl') else None)
      file.writestr('archive/data/0', x.tobytes(), zipfile.ZIP_DEFLATED if packed.endswith('0') else None)
    refused(path, f"entry '{packed}' is compressed")


def test_damage_in_the_headers_is_found(tmp_path):
  x = np.arange(16, dtype='f4')
  path = tmp_path / 'a.pth'
  starts = save(path, [whole('0', x)], {'0': x})
  content = path.read_bytes()
  header = content.rindex(b'PK\x03\x04', 0, starts['archive/data/0'])
  for at in (header, header + 8, header + 26, header + 28, header + 30):  # signature, method, length of name and of extra field, name
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    refused(path, "the zip is damaged at entry 'archive/data/0'")
  at = starts['archive/data.pkl'] + 5
  path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
  refused(path, "entry 'archive/data.pkl' is damaged, its checksum does not match")
  at = starts['archive/data/0'] + 5
  path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
  with open_pth(path) as file:
    assert (file.tensors()['0'].read() != x).sum() == 1, 'not looked for without being asked'
  refused(path, "entry 'archive/data/0' is damaged", verify=True)


@pytest.fixture
def small(tmp_path):
  """A path to write to, the bytes of a checkpoint, its shapes, and where its entries start."""
  x, y = sample(np.dtype('f4'), (4, 6)), sample(np.dtype('i8'), 7)
  value = {'state_dict': collections.OrderedDict([('x', whole('0', x)), ('y', whole('1', y))]), 'step': 12}
  starts = save(tmp_path / 'whole.pth', value, {'0': x, '1': y})
  return tmp_path / 'a.pth', (tmp_path / 'whole.pth').read_bytes(), {'state_dict.x': (4, 6), 'state_dict.y': (7,)}, starts


def _read_or_refuse(path):
  """Shapes of what is read, or None where the file is refused as it should be."""
  try:
    with open_pth(path) as file:
      return {name: lazy.read().shape for name, lazy in file.tensors().items()}
  except CheckpointError as error:
    assert '\n' not in str(error) and str(path) in str(error)
    return None


def test_a_thousand_damaged_files(small):
  path, content, shapes, _ = small
  rng = np.random.default_rng(1)
  n_read = 0
  for i in range(1000):
    at = int(rng.integers(len(content)))
    if i % 3 == 0:
      damaged = content[:at]
    else:
      damaged = content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :]
    path.write_bytes(damaged)
    read = _read_or_refuse(path)
    assert read in (None, shapes), i
    assert i % 3 or read is None, 'a truncated file cannot be whole'
    n_read += read is not None
  assert 50 < n_read < 600


def test_verification_finds_every_flip_in_tensor_data(small):
  path, content, _, starts = small
  for name, size in (('archive/data/0', 96), ('archive/data/1', 56)):
    for at in range(starts[name], starts[name] + size):
      path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
      refused(path, f"entry '{name}' is damaged", verify=True)
  path.write_bytes(content)
  open_pth(path, verify=True).close()


@pytest.mark.parametrize('protocol', [2, 4])
def test_a_thousand_damaged_pickles_with_right_checksums(tmp_path, protocol):
  x = sample(np.dtype('f4'), (4, 6))
  shared = Store('0', 'FloatStorage', 24)
  state = collections.OrderedDict([('x', whole('0', x)), ('t', tensor(shared, 0, (6, 4), (1, 6)))])
  value = {'state_dict': state, 'l': [1, 2.5, 'text', None]}
  content = dumps(value, protocol)
  opcodes = [op.code.encode('latin-1') for op in pickletools.opcodes]
  rng = np.random.default_rng(protocol)
  n_read = 0
  for _ in range(1000):
    at = int(rng.integers(2, len(content)))
    kind = int(rng.integers(3))
    change = opcodes[int(rng.integers(len(opcodes)))] if kind == 0 else bytes([content[at] ^ (1 << int(rng.integers(8)))])
    save(tmp_path / 'a.pth', content[:at] if kind == 2 else content[:at] + change + content[at + 1 :], {'0': x})
    n_read += _read_or_refuse(tmp_path / 'a.pth') is not None
  assert 20 < n_read < 900


def test_a_small_tensor_of_a_huge_file_is_read_alone(tmp_path):
  """5 GiB of hole before it: offsets need zip64, and loading the hole would show in the memory of the process."""
  n = 5 << 28
  y = sample(np.dtype('f4'), (3, 4))
  value = {'huge': tensor(Store('0', 'FloatStorage', n), 0, (n // 4, 4), (4, 1)), 'small': whole('1', y)}
  save(tmp_path / 'a.pth', value, {'0': 4 * n, '1': y})
  if (tmp_path / 'a.pth').stat().st_blocks > 1 << 15:
    pytest.skip('this file system has no holes')
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  tracemalloc.start()
  with open_pth(tmp_path / 'a.pth') as file:
    lazy = file.tensors()
    np.testing.assert_array_equal(lazy['small'].read(), y)
    huge = lazy['huge'].read()
    assert huge.shape == (n // 4, 4) and huge[-1, -1] == 0
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 8 << 20
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # in KiB


def test_against_torch(tmp_path):
  torch = pytest.importorskip('torch')
  base = torch.arange(24, dtype=torch.float32)
  names = ('float64', 'float32', 'float16', 'bfloat16', 'int8', 'int16', 'int32', 'int64', 'uint8')
  state = collections.OrderedDict((name, torch.arange(12).reshape(3, 4).to(getattr(torch, name))) for name in names)
  state['bool'] = torch.tensor([True, False, True])
  state['transposed'] = base.reshape(4, 6).t()
  state['slice'] = base[5:20:3]
  state['expanded'] = base[3].expand(2, 5)
  state['scalar'] = base[7]
  state['empty'] = torch.zeros(0, 3)
  state['parameter'] = torch.nn.Parameter(base.reshape(2, 12))
  linear = torch.nn.Linear(3, 2)
  rest = {'epoch': 4, 'shape': base.shape, 'dtype': torch.bfloat16}
  torch.save({'state_dict': state, 'linear': linear.state_dict(), **rest}, tmp_path / 'a.pth')
  with open_pth(tmp_path / 'a.pth', verify=True) as file:
    assert file.tree['epoch'] == 4 and file.tree['shape'] == (24,) and file.tree['dtype'] == BFLOAT16
    found = file.tensors('state_dict')
    assert list(found) == list(state)
    for name, expected in state.items():
      read = found[name].read()
      assert str(expected.dtype) == f'torch.{read.dtype.name}' and read.shape == tuple(expected.shape), name
      np.testing.assert_array_equal(read.astype(np.float64), expected.detach().double().numpy(), err_msg=name)
    np.testing.assert_array_equal(file.tensors('linear')['weight'].read(), linear.weight.detach().numpy())
