"""Tables of checksums: known values, every kind of damage found, parts of several hosts."""

import json

import pytest

from chameleon_jax.training.integrity import crc32, find_damage, write_table


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'state' / 'd').mkdir(parents=True)
  for number in range(5):
    (tmp_path / 'state' / 'd' / f'{number}').write_bytes(bytes([number]) * (1000 + number))
  (tmp_path / 'config').write_text('{}')
  return tmp_path


def test_crc32_of_the_check_word(tmp_path):
  (tmp_path / 'word').write_bytes(b'123456789')
  assert crc32(tmp_path / 'word') == 0xCBF43926  # the check value of CRC-32/ISO-HDLC


def test_the_table_lists_every_file_with_its_size(folder):
  write_table(folder)
  table = json.loads((folder / 'checksums-0-of-1.json').read_text())['files']
  assert {name: size for name, (size, _) in table.items()} == {'config': 2, **{f'state/d/{number}': 1000 + number for number in range(5)}}
  assert find_damage(folder) is None


def _flip(path):
  data = bytearray(path.read_bytes())
  data[500] ^= 1
  path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda folder: _flip(folder / 'state/d/3'), 'state/d/3 does not have the checksum it was written with'),
        (lambda folder: (folder / 'state/d/3').write_bytes(b'x'), 'state/d/3 has 1 bytes, 1,003 were written'),
        (lambda folder: (folder / 'state/d/3').unlink(), 'state/d/3 is missing'),
        (lambda folder: (folder / 'checksums-0-of-1.json').write_text('{"files": {"a": 3}}'), 'checksums-0-of-1.json cannot be read'),
        (lambda folder: (folder / 'checksums-0-of-1.json').write_bytes(b'\xff'), 'checksums-0-of-1.json cannot be read'),
    ],
)
def test_damage_is_found(folder, damage, message):
  write_table(folder)
  damage(folder)
  assert find_damage(folder) == message


def test_hosts_write_and_check_a_part_each(folder):
  for part in range(3):
    write_table(folder, part=part, n_parts=3)
  listed = [json.loads(path.read_text())['files'] for path in sorted(folder.glob('checksums-*-of-3.json'))]
  assert sorted(name for table in listed for name in table) == ['config', *(f'state/d/{number}' for number in range(5))]
  assert [len(table) for table in listed] == [2, 2, 2]
  _flip(folder / 'state/d/1')
  found = [find_damage(folder, part=part, n_parts=2) for part in range(2)]  # by another number of hosts
  assert [text for text in found if text] == ['state/d/1 does not have the checksum it was written with']


def test_a_folder_without_a_table_is_unchecked(folder):
  assert find_damage(folder) is None
