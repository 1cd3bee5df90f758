"""Which files are found, and which records are whose."""

import numpy as np
import pytest

from chameleon_jax.data.sources.files import SplitRecords, find_files, held_out, read_bytes, split_argument
from chameleon_jax.data.sources.naming import SourceName
from chameleon_jax.errors import DataError


def _touch(root, *names):
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'x')


def _found(argument, *suffixes):
  return find_files(str(argument), suffixes, name='n')


def test_files_of_folders_patterns_and_names(tmp_path):
  _touch(tmp_path, 'b.tar', 'a/c.tar', 'a/d.txt', '.hidden/e.tar', 'a/.f.tar', 'G.TAR')
  assert _found(tmp_path, '.tar') == sorted([tmp_path / 'b.tar', tmp_path / 'a/c.tar', tmp_path / 'G.TAR'])
  assert _found(tmp_path / '*.tar', '.tar') == [tmp_path / 'b.tar']
  assert _found(f'{tmp_path}/**/*.t*', '.tar') == sorted([tmp_path / 'b.tar', tmp_path / 'a/c.tar', tmp_path / 'a/d.txt'])
  assert _found(tmp_path / 'a/d.txt', '.tar') == [tmp_path / 'a/d.txt']
  _touch(tmp_path, 'odd[1].tar')
  assert _found(tmp_path / 'odd[1].tar') == [tmp_path / 'odd[1].tar']


def test_what_is_not_there(tmp_path):
  _touch(tmp_path, 'b.jsonl.gz')
  with pytest.raises(DataError, match='does not exist'):
    _found(tmp_path / 'none')
  with pytest.raises(DataError, match=r'no files .tar in'):
    _found(tmp_path, '.tar')
  with pytest.raises(DataError, match='unpack it first'):
    _found(tmp_path / '*.gz')


def _splits(argument):
  name = SourceName.parse(f'text:{argument}')
  return [split_argument(name, split) for split in ('train', 'validation')]


def test_the_three_rules_of_validation(tmp_path):
  at = str(tmp_path)
  _touch(tmp_path, 'two/train/a', 'two/validation/a', 'val/train/a', 'val/val/a', 'alone/train/a', 'train.x', 'validation.x', 'one.x')
  assert _splits(f'{at}/two') == [(f'{at}/two/train', 0.0), (f'{at}/two/validation', 0.0)]
  assert _splits(f'{at}/val') == [(f'{at}/val/train', 0.0), (f'{at}/val/val', 0.0)]
  assert _splits(f'{at}/alone') == [(f'{at}/alone/train', 0.01)] * 2
  assert _splits(f'{at}/train.x') == [(f'{at}/train.x', 0.0), (f'{at}/validation.x', 0.0)]
  assert _splits(f'{at}/trai*.x') == [(f'{at}/trai*.x', 0.01)] * 2
  assert _splits(f'{at}/train*.x') == [(f'{at}/train*.x', 0.0), (f'{at}/validation*.x', 0.0)]
  assert _splits(f'{at}/one.x') == [(f'{at}/one.x', 0.01)] * 2
  assert _splits(f'{at}/two?validation=0.2') == [(f'{at}/two/train', 0.2)] * 2
  assert _splits(f'{at}/one.x?validation=0') == [(f'{at}/one.x', 0.0), (None, 0.0)]


def test_the_held_out_share_is_of_the_name_and_the_number_alone():
  mask = held_out('a.jsonl', 200_000, 0.01)
  assert mask.mean() == pytest.approx(0.01, rel=0.1)
  np.testing.assert_array_equal(mask[:1000], held_out('a.jsonl', 1000, 0.01))  # what comes later moves nothing
  assert np.any(mask != held_out('b.jsonl', 200_000, 0.01))
  assert not np.any(mask & ~held_out('a.jsonl', 200_000, 0.05))  # a larger share only adds
  gaps = np.diff(np.flatnonzero(mask))
  assert gaps.std() == pytest.approx(100, rel=0.15)  # geometric with mean 100: no pattern
  assert not held_out('a', 10, 0.0).any()


def test_records_have_their_places():
  whole = SplitRecords([3, 0, 2], ['a', 'b', 'c'], split='train', share=0.0)
  assert [whole.place(i) for i in range(len(whole))] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
  counts, names = [300, 200], ['a', 'b']
  train, validation = (SplitRecords(counts, names, split=split, share=0.1) for split in ('train', 'validation'))
  places = [records.place(i) for records in (train, validation) for i in range(len(records))]
  assert sorted(places) == [(file, record) for file, count in enumerate(counts) for record in range(count)]
  expected = [(file, int(i)) for file, count in enumerate(counts) for i in np.flatnonzero(held_out(names[file], count, 0.1))]
  assert [validation.place(i) for i in range(len(validation))] == expected
  assert len(SplitRecords([], [], split='train', share=0.1)) == 0


def test_a_piece_of_a_file(tmp_path):
  path = tmp_path / 'f'
  path.write_bytes(b'0123456789')
  assert read_bytes(path, 3, 4) == b'3456'
  with pytest.raises(DataError, match='ends at byte 10, before 12'):
    read_bytes(path, 8, 4)
  with pytest.raises(DataError, match='cannot be read'):
    read_bytes(tmp_path / 'none', 0, 1)
