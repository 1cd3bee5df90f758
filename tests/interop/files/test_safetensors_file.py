"""Safetensors files: written here and read by the library, written by the library and read here, and every damage told in one line."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files import safetensors_file
from chameleon_jax.interop.files.safetensors_file import DTYPES, SafetensorsFile, SafetensorsWriter, open_safetensors
from chameleon_jax.interop.lazy import TensorSpec

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def values(dtype, shape=(3, 4)):
  x = np.arange(-5.0, np.prod(shape) - 5).reshape(shape)
  return np.asarray(np.abs(x) if np.dtype(dtype).kind in 'ub' else x).astype(dtype)


def specs_of(arrays):
  return {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}


def write(folder, arrays, **options):
  folder.mkdir(exist_ok=True)
  with SafetensorsWriter(folder, specs_of(arrays), **options) as writer:
    for name, array in arrays.items():
      writer.write(name, array)
  return folder


def assert_same(file, arrays):
  assert set(file.specs) == set(arrays)
  for name, expected in arrays.items():
    found = file.read(name)
    assert found.dtype == expected.dtype and found.shape == expected.shape == file.specs[name].shape, name
    assert not found.flags.writeable
    assert found.tobytes() == expected.tobytes(), name


def raw(path, header, data=b''):
  """A file with any header: bytes, or what becomes JSON."""
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(header)) + header + data)
  return path


def refused(path, message, opener=SafetensorsFile):
  with pytest.raises(CheckpointError) as caught:
    opener(path)
  text = str(caught.value)
  assert message in text and '\n' not in text and str(path) in text, text
  return text


ALL = {name: values(dtype) for name, dtype in DTYPES.items()}
SMALL = {'a': values('f4'), 'b.weight': values(BFLOAT16, (5,)), 'c': values('i8', (2, 2))}


def test_every_type_goes_there_and_back(tmp_path):
  arrays = ALL | {'scalar': values('f4', ()), 'empty': values('f8', (0, 3)), 'odd': values('u1', (3,)), 'näme "quoted"\n': values('f2')}
  file = open_safetensors(write(tmp_path / 'x', arrays))
  assert_same(file, arrays)
  kept = file.read('F32')
  file.close()
  np.testing.assert_array_equal(kept, arrays['F32'], 'arrays outlive the file')
  with pytest.raises(CheckpointError, match='is closed'):
    file.read('F32')
  with pytest.raises(CheckpointError, match='is closed'):
    file.read('empty')


def test_strided_and_big_arrays_are_written_as_their_values(tmp_path):
  base = values('f4', (6, 8))
  arrays = {'t': base.T, 's': base[::2, 1::3], 'b': values(BFLOAT16, (4, 6)).T}
  assert_same(open_safetensors(write(tmp_path / 'x', arrays)), {name: np.ascontiguousarray(array) for name, array in arrays.items()})


def test_the_library_reads_what_is_written(tmp_path):
  safetensors = pytest.importorskip('safetensors')
  arrays = {name: array for name, array in ALL.items() if not name.startswith(('BF', 'F8'))} | {'empty': values('f4', (0, 2))}
  folder = write(tmp_path / 'x', arrays)
  with safetensors.safe_open(folder / 'model.safetensors', framework='numpy') as file:
    assert set(file.keys()) == set(arrays) and file.metadata() == {'format': 'pt'}
    for name, array in arrays.items():
      np.testing.assert_array_equal(file.get_tensor(name), array)


def test_what_the_library_writes_is_read(tmp_path):
  numpy = pytest.importorskip('safetensors.numpy')
  arrays = {name: array for name, array in ALL.items() if not name.startswith(('BF', 'F8'))} | {'scalar': values('f8', ())}
  numpy.save_file(arrays, tmp_path / 'model.safetensors', metadata={'a': 'b'})
  assert_same(open_safetensors(tmp_path), arrays)


def test_torch_reads_bfloat16_and_eight_bit_floats(tmp_path):
  torch = pytest.importorskip('torch')
  library = pytest.importorskip('safetensors.torch')
  arrays = {name: ALL[name] for name in ('BF16', 'F8_E4M3', 'F8_E5M2', 'F16')}
  found = library.load_file(write(tmp_path / 'x', arrays) / 'model.safetensors')
  for name, tensor in found.items():
    np.testing.assert_array_equal(tensor.to(torch.float32).numpy(), arrays[name].astype('f4'), name)
  library.save_file(found, tmp_path / 'model.safetensors')
  assert_same(open_safetensors(tmp_path), arrays)


# Shards.


def test_shards_are_filled_in_order(tmp_path):
  arrays = {f't{i}': values('f4', (4,)) + i for i in range(7)}  # 16 bytes each
  folder = write(tmp_path / 'x', arrays, max_shard_bytes=40)
  names = [f'model-0000{i}-of-00004.safetensors' for i in range(1, 5)]
  assert sorted(path.name for path in folder.iterdir()) == [*names, 'model.safetensors.index.json']
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  assert index == {'metadata': {'total_size': 112}, 'weight_map': {f't{i}': names[i // 2] for i in range(7)}}
  assert_same(open_safetensors(folder), arrays)
  folder = write(tmp_path / 'y', {'large': values('f4', (99,)), 'small': values('f4', (1,))}, max_shard_bytes=40)
  assert len(list(folder.glob('*.safetensors'))) == 2, 'one larger than a shard has one to itself'


def test_the_library_reads_the_shards(tmp_path):
  safetensors = pytest.importorskip('safetensors')
  arrays = {f't{i}': values('f4', (4,)) + i for i in range(3)}
  folder = write(tmp_path / 'x', arrays, max_shard_bytes=16)
  for name, file in json.loads((folder / 'model.safetensors.index.json').read_text())['weight_map'].items():
    with safetensors.safe_open(folder / file, framework='numpy') as opened:
      np.testing.assert_array_equal(opened.get_tensor(name), arrays[name])


def test_index_and_shards_that_disagree(tmp_path):
  arrays = {f't{i}': values('f4', (4,)) + i for i in range(3)}
  folder = write(tmp_path / 'x', arrays, max_shard_bytes=16)
  path = folder / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  files = index['weight_map']

  def with_map(weight_map):
    path.write_text(json.dumps({'weight_map': weight_map}))
    return path

  def fails(message):
    with pytest.raises(CheckpointError) as caught:
      open_safetensors(folder)
    assert message in str(caught.value) and '\n' not in str(caught.value), str(caught.value)

  with_map(files | {'absent': files['t0']})
  fails("lacks the tensor 'absent', which model.safetensors.index.json places there")
  with_map({name: file for name, file in files.items() if name != 't1'} | {'t0': files['t1']})
  fails("holds the tensor 't1', which model.safetensors.index.json does not name")
  with_map(files | {'t0': files['t1']})
  fails("lacks the tensor 't0'")
  with_map(files | {'t0': files['t1'], 'x': files['t0']})
  fails("holds the tensor 't0', which model.safetensors.index.json places in 'model-00002-of-00003.safetensors'")
  with_map(files | {'t0': 'model-00009-of-00003.safetensors'})
  fails("names the file 'model-00009-of-00003.safetensors', which is not beside it")
  for name in ('../a.safetensors', '/etc/passwd', '', '.', '..', 'a\0b', 'a\\b', 'a/b'):
    with_map(files | {'t0': name})
    fails('is not beside it' if name == '..' else 'is no plain file name')
  for content, message in (
      (b'', 'is not valid JSON'),
      (b'[]', 'is no JSON object'),
      (b'{}', 'has no weight_map'),
      (b'{"weight_map": {}}', 'has no weight_map'),
      (b'{"weight_map": {"a": 1}}', 'has no weight_map'),
      (b'{"weight_map": {"a": "b", "a": "c"}}', "has the name 'a' twice"),
  ):
    path.write_bytes(content)
    fails(message)
  path.write_text(json.dumps(index))
  (folder / files['t1']).unlink()
  fails("names the file 'model-00002-of-00003.safetensors', which is not beside it; download it too")


def test_which_file_is_opened(tmp_path):
  refused(tmp_path, 'holds no *.safetensors file', open_safetensors)
  write(tmp_path, SMALL)
  (tmp_path / 'model.safetensors').rename(tmp_path / 'other.safetensors')
  assert_same(open_safetensors(tmp_path), SMALL)
  (tmp_path / 'more.safetensors').write_bytes(b'')
  refused(tmp_path, 'holds 2 *.safetensors files but no model.safetensors.index.json', open_safetensors)
  write(tmp_path, {'only': SMALL['a']})
  assert set(open_safetensors(tmp_path).specs) == {'only'}, 'model.safetensors goes first'


# Damage.


def test_headers_that_lie(tmp_path):
  path = tmp_path / 'a.safetensors'
  entry = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}
  refused(path, 'cannot be opened: No such file')
  refused(tmp_path, 'cannot be opened')
  lengths = [struct.pack('<Q', length) + b'{}' for length in (0, 1, 3, 100, 2**63, 2**64 - 1)]
  for content in (b'', b'1234567', b'<html>not found', *lengths):
    path.write_bytes(content)
    refused(path, 'is no safetensors file or cut short')
  for header, message in (
      (b'{]', 'is not valid JSON'),
      (b'\xff\xfe{}', 'is not valid JSON'),
      (b'[' * 100_000, 'is not valid JSON'),
      (b'{"a": ' + b'9' * 5000 + b'}', 'is not valid JSON'),
      (b'[1]', 'is no JSON object'),
      (b'{"a": 1}', 'is not described by'),
      (b'{"a": {"dtype": "F32", "shape": [], "shape": [], "data_offsets": [0, 4]}}', "has the name 'shape' twice"),
      (b'{"a": {}, "a": {}}', "has the name 'a' twice"),
      ({'a': entry | {'extra': 1}}, 'is not described by'),
      ({'a': entry | {'dtype': 'F4'}}, "has the type 'F4', which is not read"),
      ({'a': entry | {'dtype': 7}}, 'has the type 7'),
      ({'a': entry | {'dtype': ['F32']}}, 'which is not read'),
      ({'a': entry | {'shape': [-2]}}, 'that are no sizes'),
      ({'a': entry | {'shape': [2.0]}}, 'that are no sizes'),
      ({'a': entry | {'shape': [True, 2]}}, 'that are no sizes'),
      ({'a': entry | {'shape': '2'}}, 'that are no sizes'),
      ({'a': entry | {'shape': [10**30]}}, 'that are no sizes'),
      ({'a': entry | {'shape': [2**61, 2**61, 2**61]}}, 'does not fit its place'),
      ({'a': entry | {'shape': [1] * 40}}, 'does not fit its place'),
      ({'a': entry | {'shape': [3]}}, 'does not fit its place'),
      ({'a': entry | {'data_offsets': [0]}}, 'does not fit its place'),
      ({'a': entry | {'data_offsets': [8, 0]}}, 'does not fit its place'),
      ({'a': entry | {'data_offsets': [8, 16]}}, 'leaves 8 bytes before it unused'),
      ({'a': entry, 'b': entry}, 'overlaps the tensor before it'),
      ({'a': entry, 'b': entry | {'data_offsets': [4, 12]}}, 'overlaps the tensor before it'),
      ({'a': entry, 'b': entry | {'data_offsets': [8, 16]}}, 'the tensors need 16 bytes, the file holds 8'),
      ({}, 'the tensors need 0 bytes, the file holds 8'),
      ({'a': entry, '__metadata__': {'format': 1}}, 'that are no strings'),
      ({'a': entry, '__metadata__': []}, 'that are no strings'),
  ):
    raw(path, header, b'12345678')
    assert len(refused(path, message)) < 600
  raw(path, {'a': entry}, b'12345678')
  assert SafetensorsFile(path).read('a').tobytes() == b'12345678'


def test_a_header_over_the_limit_is_not_read(tmp_path):
  path = tmp_path / 'a.safetensors'
  with open(path, 'wb') as file:
    file.write(struct.pack('<Q', safetensors_file.MAX_HEADER + 1))
    file.truncate(safetensors_file.MAX_HEADER + 100)
  tracemalloc.start()
  refused(path, 'is no safetensors file or cut short')
  assert tracemalloc.get_traced_memory()[1] < 1 << 20
  tracemalloc.stop()


def test_hundreds_of_damaged_files(tmp_path):
  """Truncated or with a flipped bit: refused, or the same header around other values, or with another name in it."""
  whole = (write(tmp_path / 'x', SMALL) / 'model.safetensors').read_bytes()
  path = tmp_path / 'a.safetensors'
  rng = np.random.default_rng(0)
  data_starts = 8 + struct.unpack('<Q', whole[:8])[0]
  expected = [(spec.shape, spec.dtype) for spec in SafetensorsFile(tmp_path / 'x' / 'model.safetensors').specs.values()]
  counts = {'refused': 0, 'values': 0, 'name': 0}
  for i in range(900):
    at = int(rng.integers(len(whole))) if i % 3 else i // 3 * len(whole) // 300
    path.write_bytes(whole[:at] if i % 3 == 0 else whole[:at] + bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1 :])
    try:
      file = SafetensorsFile(path)
    except CheckpointError as error:
      assert '\n' not in str(error) and str(path) in str(error)
      assert at < data_starts or i % 3 == 0
      counts['refused'] += 1
      continue
    assert i % 3, 'a truncated file cannot be whole'
    assert [(spec.shape, spec.dtype) for spec in file.specs.values()] == expected
    differ = set(file.specs) ^ set(SMALL)
    assert len(differ) in (0, 2) and (at < data_starts or not differ)
    for name in file.specs:
      file.read(name)
    counts['name' if at < data_starts else 'values'] += 1
  assert counts['refused'] > 400 and counts['values'] > 80 and counts['name'] > 5, counts


# Writing.


def test_the_writer_wants_what_was_declared(tmp_path):
  def writing(action, message, arrays=SMALL):
    with pytest.raises(CheckpointError, match=message), SafetensorsWriter(tmp_path, specs_of(arrays), max_shard_bytes=40) as writer:
      action(writer)
    assert not list(tmp_path.iterdir()), 'nothing half-written stays'

  writing(lambda writer: writer.write('a', SMALL['a']), "tensor 'b.weight' was declared but not written")
  writing(lambda writer: writer.write('d', SMALL['a']), "tensor 'd' was not declared")
  writing(lambda writer: [writer.write('a', SMALL['a']) for _ in range(2)], "tensor 'a' was written before")
  writing(lambda writer: writer.write('a', SMALL['a'].T), r'declared as float32 \[3, 4\], the values are float32 \[4, 3\]')
  writing(lambda writer: writer.write('a', SMALL['a'].astype('f8')), 'the values are float64')
  for arrays in ({'a': np.zeros(2, 'c8')}, {'a': np.zeros(2, '>f4')}, {'__metadata__': SMALL['a']}, {'\ud800': SMALL['a']}):
    with pytest.raises(CheckpointError, match='cannot be stored in a safetensors file'):
      SafetensorsWriter(tmp_path, specs_of(arrays))
  with pytest.raises(CheckpointError, match='could not be written: No such file'):
    SafetensorsWriter(tmp_path / 'absent', specs_of(SMALL))
  with pytest.raises(KeyError), SafetensorsWriter(tmp_path, specs_of(SMALL)):
    raise KeyError('what the caller raises is passed on')
  assert not list(tmp_path.iterdir())


def test_tensors_in_any_order_one_in_memory(tmp_path):
  n, count = 1 << 20, 12
  specs = {f't{i}': TensorSpec((n,), np.dtype('f4')) for i in range(count)}
  tracemalloc.start()
  with SafetensorsWriter(tmp_path, specs, max_shard_bytes=5 * 4 * n) as writer:
    for i in reversed(range(count)):
      writer.write(f't{i}', np.full(n, i, 'f4'))
  file = open_safetensors(tmp_path)
  for i in range(count):
    assert file.read(f't{i}')[-1] == i
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 3 * 4 * n


def test_tensors_lie_at_multiples_of_their_size(tmp_path):
  arrays = {'a': values('u1', (3,)), 'b': values(BFLOAT16, (5,)), 'c': values('f8', (2,)), 'd': values('f4', (1,))}
  file = open_safetensors(write(tmp_path / 'x', arrays))
  for name in arrays:
    found = file.read(name)
    assert found.ctypes.data % found.itemsize == 0, name
