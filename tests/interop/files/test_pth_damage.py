"""Damaged files: each refused in one line, or read as the sound one."""

import collections
import pickletools

import numpy as np
import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.pth import open_pth
from tests.interop.pth_files import Store, dumps, refused, sample, save, tensor, whole


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
