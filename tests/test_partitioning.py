"""The mesh and the sharding table."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from chameleon_jax import partitioning
from chameleon_jax.config import MeshConfig
from chameleon_jax.errors import ConfigError


@pytest.mark.parametrize(
    'config, shape',
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=-1, fsdp=2), (4, 2, 1)),
    ],
)
def test_minus_one_takes_what_is_left(config, shape):
  mesh = partitioning.make_mesh(config, jax.devices()[:8])
  assert tuple(mesh.devices.shape) == shape and mesh.axis_names == partitioning.AXES


def test_a_mesh_that_does_not_fit_is_refused():
  with pytest.raises(ConfigError, match='needs 6 devices, 8 are here'):
    partitioning.make_mesh(MeshConfig(data=3, fsdp=2), jax.devices()[:8])


def _boxed(*names):
  return nn.LogicallyPartitioned(jax.ShapeDtypeStruct((8, 8), jnp.float32), names=names)


def test_logical_names_become_mesh_axes():
  mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
  specs = {
      name: sharding.spec
      for name, sharding in partitioning.shardings_of(
          {'mlp': _boxed('embed', 'mlp'), 'table': _boxed('vocab_in', 'embed_in'), 'bare': jax.ShapeDtypeStruct((), jnp.int32)}, mesh
      ).items()
  }
  assert specs['mlp'] == PartitionSpec('fsdp', 'tensor')
  assert specs['table'] in (PartitionSpec(('tensor', 'fsdp')), PartitionSpec(('tensor', 'fsdp'), None))
  assert specs['bare'] == PartitionSpec()


def test_a_misspelt_axis_name_raises():
  mesh = partitioning.make_mesh(MeshConfig(), jax.devices()[:8])
  with pytest.raises(ConfigError, match="has axis 'embedd'"):
    partitioning.shardings_of({'w': _boxed('embedd', 'mlp')}, mesh)
  with jax.set_mesh(mesh), pytest.raises(Exception, match='act_embedd'):
    jax.jit(lambda x: partitioning.constrain(x, 'batch', 'act_embedd'))(jnp.zeros((8, 8)))


def test_constrain_applies_the_table_inside_a_mesh_and_nothing_outside():
  x = jnp.zeros((8, 4))
  assert partitioning.constrain(x, 'batch', None) is x
  mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=4), jax.devices()[:8])
  with jax.set_mesh(mesh):
    y = jax.jit(lambda x: partitioning.constrain(x, 'batch', None))(x)
  assert y.sharding.is_equivalent_to(partitioning.batch_sharding(mesh), 2)


@pytest.mark.parametrize(
    ('sizes', 'advice'),
    [
        ((3, 2, 1), 'set config.mesh.data=4'),
        ((4, 3, 1), 'set config.mesh.fsdp=2'),
        ((2, 2, 3), 'set config.mesh.tensor=2'),
        ((3, 3, 3), 'set config.mesh'),
    ],
)
def test_the_message_says_which_size_would_fit(sizes, advice):
  with pytest.raises(ConfigError, match=f'{advice}$'):
    partitioning.make_mesh(MeshConfig(*sizes), jax.devices()[:8])


def test_arrays_go_to_the_mesh_and_come_back():
  mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
  values = np.arange(4 * 8, dtype=np.float64).reshape(4, 8)
  array = partitioning.place(values, jax.sharding.NamedSharding(mesh, PartitionSpec('fsdp', 'tensor')), 'float32')
  assert array.dtype == jnp.float32 and array.addressable_shards[0].data.shape == (2, 4)
  np.testing.assert_array_equal(partitioning.fetch(array), values)
  for index in range(4):
    np.testing.assert_array_equal(partitioning.fetch(array, index), values[index])
  np.testing.assert_array_equal(partitioning.fetch(values, 1), values[1])
