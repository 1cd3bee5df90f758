"""Which rows a host holds and which shards it runs for them; the batches themselves are in test_pipeline.py."""

import jax
import numpy as np
import pytest

from chameleon_jax.config import MeshConfig
from chameleon_jax.data.pipeline import to_devices
from chameleon_jax.data.shards import held_pieces, host_rows, rows_by_shard
from chameleon_jax.errors import ConfigError
from chameleon_jax.partitioning import make_mesh


@pytest.mark.parametrize(
    ('rows', 'expected'),
    [
        ([2, 3, 6], {1: [0, 1], 3: [0]}),
        (list(range(8)), {0: [0, 1], 1: [0, 1], 2: [0, 1], 3: [0, 1]}),
        ([5], {2: [1]}),
    ],
)
def test_rows_by_shard(rows, expected):
  found = rows_by_shard(np.array(rows), n_rows=8, n_shards=4)
  assert {shard: wanted.tolist() for shard, wanted in found.items()} == expected


@pytest.mark.parametrize(('mesh', 'n_pieces'), [((2, 2, 2), 4), ((8, 1, 1), 8), ((1, 1, 8), 1)])
def test_one_host_holds_all_rows(mesh, n_pieces):
  mesh = make_mesh(MeshConfig(*mesh))
  assert held_pieces(mesh) == tuple(range(n_pieces))
  np.testing.assert_array_equal(host_rows(mesh, 16), np.arange(16))


def test_rows_must_split_over_the_devices():
  with pytest.raises(ConfigError, match=r'data.batch_size 12 does not split over 8 devices \(data x fsdp\)'):
    host_rows(make_mesh(MeshConfig(data=4, fsdp=2)), 12)


@pytest.mark.parametrize('mesh', [(2, 2, 2), (1, 8, 1), (1, 2, 4), (1, 1, 8)])
def test_a_row_has_its_number_on_every_mesh(mesh):
  mesh = make_mesh(MeshConfig(*mesh))
  value = np.arange(16 * 3).reshape(16, 3)
  array = to_devices({'tokens': value}, mesh)['tokens']
  np.testing.assert_array_equal(array, value)
  for shard in array.addressable_shards:
    np.testing.assert_array_equal(shard.data, value[shard.index])
  assert len(array.addressable_shards) == len(jax.devices())
