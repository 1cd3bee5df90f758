"""PyTorch checkpoints without PyTorch: every value against numpy, and a torch that is there."""

import collections
import resource
import tracemalloc
import zipfile

import numpy as np
import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.pth import open_pth
from tests.interop.pth_files import BFLOAT16, TYPES, Call, Name, Store, sample, save, tensor, whole


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
