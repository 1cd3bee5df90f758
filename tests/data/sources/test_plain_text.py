"""Text files in pieces that are the file again when they are joined."""

import numpy as np
import pytest

from chameleon_jax.data.sources.fingerprint import fingerprint
from chameleon_jax.data.sources.source import make_source
from chameleon_jax.errors import DataError

RNG = np.random.default_rng(0)


def _source(path, options='?validation=0', split='train'):
  return make_source(f'text:{path}{options}', split)


def _texts(source):
  return [source.document(i, RNG).text for i in range(len(source))]


def test_the_drawn_example(tmp_path):
  (tmp_path / 'a.txt').write_text('aaa\n\nbbb\nccc')
  assert _texts(_source(tmp_path / 'a.txt', '?validation=0&max_bytes=12')) == ['aaa\n\n', 'bbb\nccc']


@pytest.mark.parametrize('alphabet', ['ab\n', 'a\n\n ', 'é\n', '\U0001f600a', '漢字', 'xyz'])
@pytest.mark.parametrize('max_bytes', [12, 50])
def test_pieces_join_to_the_file(tmp_path, alphabet, max_bytes):
  rng = np.random.default_rng(1)
  for n in (1, 7, 8, 9, 200):
    text = ''.join(rng.choice(list(alphabet), n))
    (tmp_path / 'a.txt').write_bytes(text.encode())
    pieces = _texts(_source(tmp_path / 'a.txt', f'?validation=0&max_bytes={max_bytes}'))
    assert ''.join(pieces) == text
    assert all(0 < len(piece.encode()) <= max_bytes for piece in pieces)


def test_a_cut_stands_behind_a_line_where_there_is_one(tmp_path):
  (tmp_path / 'a.py').write_text('x = 1\n' * 500)
  pieces = _texts(_source(tmp_path / 'a.py', '?validation=0&max_bytes=300'))
  assert len(pieces) == 15
  assert all(piece.endswith('x = 1\n') and piece.startswith('x') for piece in pieces)


def test_files_of_a_folder(tmp_path):
  (tmp_path / 'src').mkdir()
  for name, text in (('src/a.py', 'code'), ('b.md', 'words'), ('c.bin', 'no'), ('empty.txt', '')):
    (tmp_path / name).write_text(text)
  source = _source(tmp_path)
  assert sorted(_texts(source)) == ['code', 'words']
  assert source.where(0).startswith(str(tmp_path))
  before = fingerprint(source)
  (tmp_path / 'b.md').write_text('wordy')
  assert fingerprint(_source(tmp_path)) != before


def test_what_is_no_text(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'good\n' * 10 + b'\xff' + b'good\n' * 10)
  source = _source(tmp_path / 'a.txt', '?validation=0&max_bytes=30')
  with pytest.raises(DataError, match='a.txt: not UTF-8 at byte 50'):
    _texts(source)
  with pytest.raises(DataError, match='max_bytes=3 is less than 12'):
    _source(tmp_path / 'a.txt', '?max_bytes=3')
