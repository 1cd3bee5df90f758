"""Adapter folders: written and read, damaged ones refused, fingerprints that see values and not how they are stored."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.native.adapter import Adapter, Base, fingerprint, load_adapter, save_adapter, unrolled

RNG = np.random.default_rng(0)
PAIRS = {
    'layers_0/attention/o_proj': (RNG.normal(size=(2, 4, 3)).astype(np.float32), RNG.normal(size=(3, 8)).astype(np.float32)),
    'lm_head': (RNG.normal(size=(8, 3)).astype(np.float32), RNG.normal(size=(3, 16)).astype(np.float32)),
}
ADAPTER = Adapter(3, 1.5, PAIRS, Base('weights/7b', {'lm_head': 17, 'embedding': 4}))


def test_round_trip(tmp_path):
  save_adapter(tmp_path / 'a', ADAPTER)
  save_adapter(tmp_path / 'a', ADAPTER)  # replaces an adapter
  found = load_adapter(tmp_path / 'a')
  assert (found.rank, found.alpha, found.base) == (3, 1.5, ADAPTER.base)
  assert found.pairs.keys() == PAIRS.keys()
  for name, pair in PAIRS.items():
    for ours, theirs in zip(found.pairs[name], pair):
      np.testing.assert_array_equal(ours, theirs)


def _without_file(folder: pathlib.Path):
  (folder / 'adapter.json').unlink()


def _cut(folder: pathlib.Path):
  (folder / 'adapter.json').write_text((folder / 'adapter.json').read_text()[:40])


def _of_the_future(folder: pathlib.Path):
  (folder / 'adapter.json').write_text(json.dumps({'format': 'chameleon_jax.adapter', 'version': 9}))


def _changed_value(folder: pathlib.Path):
  header = json.loads((folder / 'adapter.json').read_text()) | {'alpha': 3.0}
  (folder / 'adapter.json').write_text(json.dumps(header))


def _changed_tensor(folder: pathlib.Path):
  largest = max((path for path in (folder / 'tensors').rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (_without_file, 'is no adapter: it holds neither'),
        (_cut, 'adapter.json is damaged'),
        (_of_the_future, 'version 9; this program reads'),
        (_changed_value, 'adapter.json is damaged: its checksum differs'),
        (_changed_tensor, 'is damaged: its checksum differs'),
    ],
)
def test_damage_is_one_line(tmp_path, damage, message):
  save_adapter(tmp_path / 'a', ADAPTER)
  damage(tmp_path / 'a')
  with pytest.raises(CheckpointError, match=message) as raised:
    load_adapter(tmp_path / 'a')
  assert '\n' not in str(raised.value)


def test_it_replaces_nothing_but_adapters(tmp_path):
  (tmp_path / 'notes').mkdir()
  (tmp_path / 'notes' / 'diary.txt').write_text('dear diary')
  with pytest.raises(CheckpointError, match='is no adapter folder; choose another path'):
    save_adapter(tmp_path / 'notes', ADAPTER)
  assert [path.name for path in tmp_path.iterdir()] == ['notes']


def test_fingerprints_see_values_shapes_and_a_changed_share_of_a_table():
  values = RNG.normal(size=(32, 40)).astype(ml_dtypes.bfloat16)
  assert fingerprint(values) == fingerprint(values.astype(np.float32)) != fingerprint(values.reshape(40, 32))
  changed = values.copy()
  changed[31, 39] += 1
  assert fingerprint(changed) != fingerprint(values)
  table = np.zeros((512, 1024), np.float32)
  rows = table.copy()
  rows[:, 4:132] = 1e-3  # what a run on the image rows changes, an eighth
  assert fingerprint(rows) != fingerprint(table)


def test_stacked_layers_are_unrolled():
  a, b = RNG.normal(size=(2, 8, 3)).astype(np.float32), RNG.normal(size=(2, 3, 5)).astype(np.float32)
  found = unrolled({'layers': {'feed_forward': {'up_proj': {'a': a, 'b': b}}}, 'lm_head': {'a': a[0], 'b': b[0]}})
  assert sorted(found) == ['layers_0/feed_forward/up_proj', 'layers_1/feed_forward/up_proj', 'lm_head']
  np.testing.assert_array_equal(found['layers_1/feed_forward/up_proj'][1], b[1])
