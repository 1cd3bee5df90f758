"""Checkpoints written without PyTorch: the reader here, the standard library and, where it is installed, PyTorch read them alike."""

import hashlib
import os
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files import pth_writer
from chameleon_jax.interop.files.pth import STORAGES, open_pth
from chameleon_jax.interop.files.pth_writer import PthWriter, tensor_specs
from chameleon_jax.interop.lazy import TensorSpec

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = [(3, 5), (7,), (), (0, 4), (2, 1, 3, 2)]


def spec(array):
  return TensorSpec(array.shape, array.dtype)


def sample(dtype, shape, seed=0):
  """Random bytes of a type: not-a-numbers of every kind are among them."""
  rng = np.random.default_rng(seed)
  if dtype == np.bool_:
    return rng.integers(0, 2, shape).astype(bool)
  return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def arrays_of_all_types():
  return {f'{kind}{i}': sample(dtype, shape, i) for kind, dtype in STORAGES.items() for i, shape in enumerate(SHAPES)}


def save(path, tree, arrays):
  """Writes a tree in which arrays stand for tensors; returns the writer."""

  def declared(node):
    if isinstance(node, np.ndarray):
      return spec(node)
    if isinstance(node, dict):
      return {key: declared(value) for key, value in node.items()}
    return type(node)(declared(value) for value in node) if isinstance(node, (list, tuple)) else node

  with PthWriter(path, declared(tree)) as writer:
    for name in reversed(list(writer.specs)):  # any order will do
      writer.write(name, arrays[name])
  return writer


TREE = {
    'epoch': 3,
    'lr': 1.5e-4,
    'note': 'größe\n\U0001f600',
    'none': None,
    'flags': (True, False, ()),
    'numbers': [0, 255, 256, -1, 2**31 - 1, -(2**31), 2**31, -(2**70), float('inf')],
    'empty': [{}, [], ''],
    7: {'deep': [[[1]]]},
}


def test_values_and_tree_come_back(tmp_path):
  arrays = arrays_of_all_types()
  tree = {'state_dict': arrays} | TREE
  save(tmp_path / 'a.ckpt', tree, {f'state_dict.{name}': array for name, array in arrays.items()})
  with open_pth(tmp_path / 'a.ckpt', verify=True) as file:
    assert list(file.tree) == list(tree)
    assert {key: file.tree[key] for key in TREE} == TREE
    read = {name: tensor.read() for name, tensor in file.tensors('state_dict').items()}
  assert list(read) == list(arrays)
  for name, array in arrays.items():
    assert read[name].dtype == array.dtype and read[name].shape == array.shape and read[name].tobytes() == array.tobytes(), name
  assert [path.name for path in tmp_path.iterdir()] == ['a.ckpt']


@pytest.mark.parametrize('large', [pth_writer._LARGE, 40, 0])
@pytest.mark.parametrize('mmap', [False, True])
def test_torch_reads_it(tmp_path, mmap, large, monkeypatch):
  torch = pytest.importorskip('torch')
  monkeypatch.setattr(pth_writer, '_LARGE', large)
  arrays = arrays_of_all_types()
  save(tmp_path / 'a.ckpt', {'state_dict': arrays} | TREE, {f'state_dict.{name}': array for name, array in arrays.items()})
  loaded = torch.load(tmp_path / 'a.ckpt', weights_only=True, mmap=mmap)
  assert {key: loaded[key] for key in TREE} == TREE
  for name, array in arrays.items():
    tensor = loaded['state_dict'][name]
    assert tuple(tensor.shape) == array.shape and tensor.is_contiguous() and not tensor.requires_grad, name
    assert tensor.dtype == getattr(torch, {'bool': 'bool'}.get(array.dtype.name, array.dtype.name)), name
    if array.size:
      assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes(), name


@pytest.mark.parametrize('large', [40, 0])
def test_a_zip_of_the_64_bit_form(tmp_path, large, monkeypatch):
  """As files beyond 4 GiB have it, here from 40 bytes on and throughout."""
  x, y = sample(np.dtype('f4'), 500), sample(BFLOAT16, 3)
  monkeypatch.setattr(pth_writer, '_LARGE', large)
  save(tmp_path / 'a.pth', {'x': x, 'y': y}, {'x': x, 'y': y})
  with open_pth(tmp_path / 'a.pth', verify=True) as file:
    np.testing.assert_array_equal(file.tensors()['x'].read().view('u4'), x.view('u4'))
  with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
    assert archive.testzip() is None and archive.read('archive/data/1') == y.tobytes()
  assert b'PK\x06\x06' in (tmp_path / 'a.pth').read_bytes()


def test_values_are_aligned_and_the_file_depends_on_nothing_else(tmp_path):
  arrays = arrays_of_all_types()
  writers = [save(tmp_path / name, arrays, arrays) for name in ('a.pth', 'b.pth')]
  data = (tmp_path / 'a.pth').read_bytes()
  assert data == (tmp_path / 'b.pth').read_bytes()
  assert [writer.md5 for writer in writers] == 2 * [hashlib.md5(data).hexdigest()]
  with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
    infos = archive.infolist()
    assert [info.filename for info in infos[:2]] == ['archive/data.pkl', 'archive/byteorder'] and infos[-1].filename == 'archive/version'
    assert len(infos) == len(arrays) + 3 and archive.read('archive/version') == b'3\n'
    for info in infos:
      name_length, extra_length = struct.unpack_from('<2H', data, info.header_offset + 26)
      assert (info.header_offset + 30 + name_length + extra_length) % 64 == 0, info.filename
      assert info.compress_type == zipfile.ZIP_STORED


def test_strided_values_are_stored_in_order(tmp_path):
  x = np.arange(24, dtype='<i4').reshape(2, 3, 4)
  cases = {'turned': x.transpose(2, 0, 1), 'every_second': x[:, :, ::2], 'reversed': x[::-1]}
  cases['repeated'] = np.broadcast_to(x[0, 0, 1], (3, 2))
  save(tmp_path / 'a.pth', cases, cases)
  with open_pth(tmp_path / 'a.pth') as file:
    for name, tensor in file.tensors().items():
      assert tensor.read().flags.c_contiguous
      np.testing.assert_array_equal(tensor.read(), cases[name])


def test_names_are_those_of_the_reader(tmp_path):
  x = sample(np.dtype('f4'), 2)
  tree = {'model': {'a.weight': x}, 'history': [x, {7: x}], 'none': None}
  names = ['model.a.weight', 'history.0', 'history.1.7']
  assert list(save(tmp_path / 'a.pth', tree, dict.fromkeys(names, x)).specs) == names
  with open_pth(tmp_path / 'a.pth') as file:
    assert list(file.tensors()) == names
  with pytest.raises(CheckpointError, match="two tensors named 'a.b'"):
    tensor_specs({'a.b': spec(x), 'a': {'b': spec(x)}})


# What goes wrong leaves no file, and a file that was there stays.

X = np.arange(3, dtype='f4')


@pytest.mark.parametrize(
    'steps, fragment',
    [
        ([('y', X)], "tensor 'y' was not declared"),
        ([('x', X), ('x', X)], "tensor 'x' is written already"),
        ([('x', X[:2])], r"tensor 'x' was declared as float32 \[3\], its values are float32 \[2\]"),
        ([('x', X.astype('f8'))], 'declared as float32 .* its values are float64'),
        ([], "1 declared tensors were not written, the first is 'x'"),
    ],
)
def test_misuse(tmp_path, steps, fragment):
  path = tmp_path / 'a.pth'
  path.write_bytes(b'what was there')
  with pytest.raises(CheckpointError, match=fragment) as caught, PthWriter(path, {'x': spec(X)}) as writer:
    for name, array in steps:
      writer.write(name, array)
  assert '\n' not in str(caught.value) and str(path) in str(caught.value)
  assert path.read_bytes() == b'what was there' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    'tree, fragment',
    [
        ({'x': TensorSpec((2,), np.dtype('u2'))}, "tensor 'x' has type uint16"),
        ({'x': TensorSpec((2,), np.dtype('>f4'))}, "tensor 'x' has type >f4"),
        ({'x': TensorSpec((1,) * 65, np.dtype('f4'))}, "tensor 'x' has shape"),
        ({'x': TensorSpec((-1,), np.dtype('f4'))}, "tensor 'x' has shape"),
        ({'x': b'bytes'}, 'a bytes cannot be written'),
        ({'x': {1, 2}}, 'a set cannot be written'),
        ({'x': np.float32(1)}, 'a float32 cannot be written'),
        ({(1, 2): 3}, 'a tuple as a key of a dict'),
        ({'x': 1 << 3000}, 'an integer of 376 bytes'),
        ({'x': '\ud800'}, 'text that is no Unicode'),
    ],
)
def test_what_cannot_be_written(tmp_path, tree, fragment):
  with pytest.raises(CheckpointError, match=fragment) as caught:
    PthWriter(tmp_path / 'a.pth', tree)
  assert '\n' not in str(caught.value)
  assert list(tmp_path.iterdir()) == []


def test_a_tree_that_holds_itself(tmp_path):
  tree = {}
  tree['again'] = tree
  with pytest.raises(CheckpointError, match='containers inside each other'):
    PthWriter(tmp_path / 'a.pth', tree)


def test_an_error_of_the_caller(tmp_path):
  with pytest.raises(KeyboardInterrupt), PthWriter(tmp_path / 'a.pth', {'x': spec(X)}) as writer:
    writer.write('x', X)
    raise KeyboardInterrupt
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(CheckpointError, match='given up or closed'):
    writer.close()
  writer = PthWriter(tmp_path / 'b.pth', {'x': spec(X)})
  writer.abort()
  with pytest.raises(CheckpointError, match='given up or closed'):
    writer.write('x', X)
  assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses(tmp_path, monkeypatch):
  with pytest.raises(CheckpointError, match='a.pth cannot be written: No such file'):
    PthWriter(tmp_path / 'missing' / 'a.pth', {})
  writer = PthWriter(tmp_path / 'a.pth', {'x': spec(X)})

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(pth_writer.os, 'replace', full)
  writer.write('x', X)
  with pytest.raises(CheckpointError, match='a.pth cannot be written: No space left on device'):
    writer.close()
  assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_first_values(tmp_path):
  """/dev/full takes no byte."""
  if not os.path.exists('/dev/full'):
    pytest.skip('no /dev/full here')
  writer = PthWriter(tmp_path / 'a.pth', {'x': TensorSpec((1 << 16,), np.dtype('f4'))})
  writer._file.close()
  with open('/dev/full', 'wb', buffering=0) as full, pytest.raises(CheckpointError, match='No space left'):
    writer._file = full
    writer.write('x', np.zeros(1 << 16, 'f4'))
  assert list(tmp_path.iterdir()) == []


def test_one_tensor_at_a_time_in_memory(tmp_path):
  """Twelve tensors of 4 MB go through a peak of one."""
  values = np.ones(1 << 20, 'f4')
  tracemalloc.start()
  with PthWriter(tmp_path / 'a.pth', {str(i): spec(values) for i in range(12)}) as writer:
    for i in range(12):
      writer.write(str(i), values + np.float32(i))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert 4 << 20 < peak < 6 << 20
  assert (tmp_path / 'a.pth').stat().st_size > 48 << 20
