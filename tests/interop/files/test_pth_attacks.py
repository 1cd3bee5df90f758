"""Pickles that call, ask for too much or point outside, and files of another kind: each refused in one line, and nothing run."""

import pickle
import struct
import zipfile

import numpy as np
import pytest

from chameleon_jax.interop.files import pickle_reader, pth
from chameleon_jax.interop.files.pth import open_pth
from tests.interop.pth_files import Store, dumps, refused, save, tensor, whole, write_zip

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
