"""A disk that is too small is told before the first step."""

import shutil

import jax
import jax.numpy as jnp
import pytest

from chameleon_jax.config import CheckpointConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.training.disk_space import check_disk_space

GIB = 2**30
STATE = {'params': jax.ShapeDtypeStruct((GIB // 4,), jnp.float32), 'mu': jax.ShapeDtypeStruct((2, GIB // 4), jnp.bfloat16)}  # 2 GiB


@pytest.mark.parametrize(
  ('free', 'n_kept', 'refused', 'said'),
  [
    (7 * GIB, 0, False, None),
    (5 * GIB, 0, False, 'checkpoint.keep_last 2 needs room for 3 more'),
    (5 * GIB, 2, False, None),
    (GIB // 16, 2, True, None),
  ],
)
def test_what_is_free_against_what_is_needed(monkeypatch, tmp_path, free, n_kept, refused, said):
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(100 * GIB, 100 * GIB - free, free))
  lines = []
  if refused:
    with pytest.raises(CheckpointError, match=r'a checkpoint takes up to 2.00 GiB, and 64.0 MiB are free in .*; make room, or name'):
      check_disk_space(tmp_path, STATE, CheckpointConfig(), n_kept=n_kept, say=lines.append)
  else:
    check_disk_space(tmp_path, STATE, CheckpointConfig(), n_kept=n_kept, say=lines.append)
  assert (said is None) == (not lines) and all(said in line for line in lines)


def test_a_file_system_that_does_not_tell(monkeypatch, tmp_path):
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(0, 0, 0))
  check_disk_space(tmp_path, STATE, CheckpointConfig(), n_kept=0, say=lambda line: pytest.fail(line))
