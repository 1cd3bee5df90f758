"""Tar archives by index, against tarfile itself."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from chameleon_jax.data.sources.fingerprint import fingerprint
from chameleon_jax.data.sources.source import make_source
from chameleon_jax.data.sources.webdataset import key_of
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document, Image
from chameleon_jax.tokens.images import png_bytes

PIXELS = [np.full((3, 2, 3), i, np.uint8) for i in range(8)]
RNG = np.random.default_rng(0)


def _write(path, members, form=tarfile.GNU_FORMAT):
  with tarfile.open(path, 'w', format=form) as archive:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  return path


def _pairs(first, n):
  found = []
  for i in range(first, first + n):
    found += [(f'd/{i:03d}.png', png_bytes(PIXELS[i])), (f'd/{i:03d}.txt', f'caption {i}\n'.encode())]
  return found


def _source(path, options='?validation=0&order=text_first', split='train'):
  return make_source(f'webdataset:{path}{options}', split)


@pytest.mark.parametrize('form', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_several_archives(tmp_path, form):
  _write(tmp_path / 'b.tar', _pairs(3, 4), form)
  _write(tmp_path / 'a.tar', _pairs(0, 3), form)
  source = _source(f'{tmp_path}/*.tar')
  assert len(source) == 7
  for i in range(7):
    assert source.document(i, RNG) == Document.plain(f'caption {i}', Image(PIXELS[i]))
  assert source.where(4) == f'{tmp_path}/b.tar, sample d/004'
  assert pickle.loads(pickle.dumps(source)).document(6, RNG) == source.document(6, RNG)
  assert fingerprint(source) == fingerprint(_source(tmp_path))


def test_other_members(tmp_path):
  record = {'segments': ['x ', {'image': '0.png'}, ' y ', {'image': 'shared/s.png'}]}
  members = [
      *(('1.json', json.dumps(record).encode()), ('1.0.png', png_bytes(PIXELS[1]))),
      *(('2.png', png_bytes(PIXELS[2])), ('2.json', b'{"caption": "two", "width": 3}')),
      ('3.txt', b'text alone'),
      *(('4.jpg', b'broken'), ('4.cls', b'7')),
      ('5.png', png_bytes(PIXELS[5])),
      ('6.txt', b'\xff'),
      ('shared/s.png', png_bytes(PIXELS[7])),
  ]
  source = _source(_write(tmp_path / 'a.tar', members))
  assert len(source) == 7
  assert source.document(0, RNG) == Document.plain('x ', Image(PIXELS[1]), ' y ', Image(PIXELS[7]))
  assert source.document(1, RNG) == Document.plain('two', Image(PIXELS[2]))
  assert source.document(2, RNG) == Document.plain('text alone')
  for index, message in ((3, 'sample 4: .*picture'), (4, 'sample 5: no caption among its members'), (5, 'sample 6: .*not UTF-8')):
    with pytest.raises(DataError, match=f'a.tar, {message}'):
      source.document(index, RNG)


def test_an_archive_that_is_cut_off_or_none(tmp_path):
  data = _write(tmp_path / 'a.tar', _pairs(0, 4)).read_bytes()
  place = data.index(b'caption 3')
  for length in (place + 3, place - 400, 700):
    (tmp_path / 'a.tar').write_bytes(data[:length])
    with pytest.raises(DataError, match='a.tar is .*cut off'):
      _source(tmp_path / 'a.tar')
  (tmp_path / 'a.tar').write_bytes(b'x' * 2000)
  with pytest.raises(DataError, match='no tar archive'):
    _source(tmp_path / 'a.tar')
  with tarfile.open(tmp_path / 'b.tar', 'w:gz') as archive:
    archive.addfile(tarfile.TarInfo('a.txt'), io.BytesIO(b''))
  with pytest.raises(DataError, match='no tar archive'):
    _source(tmp_path / 'b.tar')


def test_splits_and_fingerprints(tmp_path):
  _write(tmp_path / 'a.tar', [(f'{i}.txt', b'x') for i in range(200)])
  sizes = [len(_source(tmp_path / 'a.tar', '?validation=0.1', split)) for split in ('train', 'validation')]
  assert sum(sizes) == 200
  assert 5 < sizes[1] < 40
  before = fingerprint(_source(tmp_path / 'a.tar'))
  _write(tmp_path / 'a.tar', [(f'{i}.txt', b'x' * (1 + (i == 7))) for i in range(200)])
  assert fingerprint(_source(tmp_path / 'a.tar')) != before


def test_keys():
  assert key_of('a/0012.seg.png') == ('a/0012', 'seg.png')
  assert key_of('x') == ('x', '')
  assert key_of('v1.2/3.txt') == ('v1.2/3', 'txt')
