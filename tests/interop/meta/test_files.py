"""checklist.chk: the small files are compared with it on opening, all files on request."""

import hashlib

import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.meta.reader import open_meta, verify_checklist
from tests.interop.meta.test_reader import refused, release, text

__all__ = ['text']  # a fixture


def test_a_checklist(tmp_path):
  for name in ('a', 'b', 'c'):
    (tmp_path / name).write_bytes(name.encode())
  lines = [f'{hashlib.md5(name.encode()).hexdigest()}  {name}' for name in 'abcd']
  (tmp_path / 'checklist.chk').write_text('\n'.join([*lines, '']))
  assert verify_checklist(tmp_path) == ['d']
  (tmp_path / 'b').write_bytes(b'other')
  assert verify_checklist(tmp_path) == ['b', 'd']
  for bad in ('0123  a', f'{lines[0][:32]}  ../a', 'nonsense'):
    (tmp_path / 'checklist.chk').write_text(bad)
    with pytest.raises(CheckpointError, match='has a line'):
      verify_checklist(tmp_path)
  (tmp_path / 'checklist.chk').unlink()
  with pytest.raises(CheckpointError, match='cannot be read'):
    verify_checklist(tmp_path)


def with_checklists(data):
  for folder in (data / 'models' / '7b', data / 'tokenizer'):
    files = sorted(folder.iterdir())
    (folder / 'checklist.chk').write_text(''.join(f'{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n' for path in files))
  return data


SMALL = ['models/7b/params.json', 'models/7b/consolidate_params.json', 'tokenizer/vqgan.yaml', 'tokenizer/text_tokenizer.json']


@pytest.mark.parametrize('name', SMALL)
def test_small_files_are_compared_with_the_checklist_on_opening(tmp_path, text, name):
  data = with_checklists(release(tmp_path, text))
  for everything in (False, True):
    open_meta(data, verify_checklist=everything).close()
  path = data / name
  path.write_bytes(path.read_bytes() + b'\n')  # the same content to every parser
  message = refused('is not the file that checklist.chk lists; download it again, or delete checklist.chk', data)
  assert str(path) in message
  (path.parent / 'checklist.chk').unlink()
  open_meta(data).close()


def test_weights_are_compared_with_the_checklist_on_request(tmp_path, text):
  data = with_checklists(release(tmp_path, text))
  for path in (data / 'tokenizer' / 'vqgan.ckpt', data / 'models' / '7b' / 'consolidated.pth'):
    content = path.read_bytes()
    path.write_bytes(content + b'\0')
    refused(f'{path.name} is not the file that checklist.chk lists', data, verify_checklist=True)
    path.write_bytes(content)
  (data / 'tokenizer' / 'vqgan.yaml').unlink()
  refused('vqgan.yaml is missing, and checklist.chk lists it', data, verify_checklist=True)
  open_meta(data).close()
  for folder in (data / 'tokenizer', data / 'models' / '7b'):
    (folder / 'checklist.chk').unlink()
  refused('there is no checklist.chk in .*7b or .*tokenizer to compare the files with', data, verify_checklist=True)
