"""An index is built once and again only where the file changed."""

import os

import numpy as np
import pytest

from chameleon_jax.data.sources import index_cache
from chameleon_jax.errors import DataError


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(index_cache, 'LEAST_BYTES', 4)
  return tmp_path / 'cache' / 'chameleon_jax' / 'index'


def _counting(calls):
  def build(path):
    calls.append(path.name)
    return {'size': np.array([path.stat().st_size])}

  return build


def test_built_once_for_a_file_as_it_is(tmp_path, cache):
  path, calls = tmp_path / 'data', []
  path.write_bytes(b'12345')
  for _ in range(3):
    assert index_cache.cached_index(path, 'k', _counting(calls))['size'] == 5
  assert len(calls) == 1
  os.utime(path, ns=(1, 1))
  index_cache.cached_index(path, 'k', _counting(calls))
  path.write_bytes(b'123456')
  assert index_cache.cached_index(path, 'k', _counting(calls))['size'] == 6
  index_cache.cached_index(path, 'other', _counting(calls))
  assert len(calls) == 4
  assert sorted(file.suffix for file in cache.iterdir()) == ['.npz', '.npz']


def test_a_damaged_or_forbidden_cache_is_none(tmp_path, cache, monkeypatch):
  path, calls = tmp_path / 'data', []
  path.write_bytes(b'12345')
  index_cache.cached_index(path, 'k', _counting(calls))
  (file,) = cache.iterdir()
  file.write_bytes(file.read_bytes()[:50])
  assert index_cache.cached_index(path, 'k', _counting(calls))['size'] == 5
  monkeypatch.setenv('XDG_CACHE_HOME', str(path))  # a file: nothing can be made below it
  assert index_cache.cached_index(path, 'k', _counting(calls))['size'] == 5
  assert len(calls) == 3
  with pytest.raises(DataError, match='none cannot be read'):
    index_cache.cached_index(tmp_path / 'none', 'k', _counting(calls))


def test_small_files_are_not_kept(tmp_path, cache):
  path = tmp_path / 'data'
  path.write_bytes(b'123')
  index_cache.cached_index(path, 'k', _counting([]))
  assert not cache.exists()
