"""Checksums of a model folder: every change of a file is told, by its name."""

import json

import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.native.checksums import check_files, read_checksums, write_checksums


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'transformer' / 'lm_head').mkdir(parents=True)
  (tmp_path / 'transformer' / 'lm_head' / 'a').write_bytes(b'123456789')
  (tmp_path / 'transformer' / 'lm_head_2').write_bytes(b'')
  (tmp_path / 'config.json').write_text('{}')
  write_checksums(tmp_path)
  return tmp_path


def test_the_table(folder):
  # 0xCBF43926 is the check value of CRC-32 for '123456789'.
  assert read_checksums(folder) == {'transformer/lm_head/a': 0xCBF43926, 'transformer/lm_head_2': 0}
  for inside in ('transformer', 'transformer/lm_head', 'transformer/lm_head/a', 'origin'):
    check_files(folder, inside, read_checksums(folder))


def test_changes_are_told(folder):
  table = read_checksums(folder)
  (folder / 'config.json').write_text('{"a": 1}')  # people edit it
  check_files(folder, 'transformer', table)
  (folder / 'transformer' / 'lm_head' / 'a').write_bytes(b'123456788')
  check_files(folder, 'transformer/lm_head_2', table)
  with pytest.raises(CheckpointError, match=r'lm_head/a is damaged: its checksum differs'):
    check_files(folder, 'transformer/lm_head', table)
  (folder / 'transformer' / 'lm_head' / 'a').unlink()
  with pytest.raises(CheckpointError, match='lm_head/a is missing'):
    check_files(folder, 'transformer', table)
  (folder / 'transformer' / 'lm_head' / 'b').write_bytes(b'')
  with pytest.raises(CheckpointError, match='lm_head/b is not among the files'):
    check_files(folder, 'transformer/lm_head', {})


@pytest.mark.parametrize('text', ['', '[]', '{"crc32": []}', '{"crc32": {"a": "b"}}', '{"crc32": {"a"'])
def test_a_damaged_table(folder, text):
  (folder / 'checksums.json').write_text(text)
  with pytest.raises(CheckpointError, match='checksums.json is damaged'):
    read_checksums(folder)


def test_no_table_no_check(folder):
  (folder / 'checksums.json').unlink()
  assert read_checksums(folder) is None
  check_files(folder, 'transformer', None)
  assert json.loads((folder / 'config.json').read_text()) == {}
