"""A mesh without devices, and what a sampler holds on one of them: exact bytes from the project's own shapes and shardings.

`shard_shape` of the shardings on an abstract mesh; the cache from its own `init_cache`. Nothing here is a model or an estimate.

Does not know: training (`weights.py`), what a step needs beside weights (`memory.py`), nor speeds.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from chameleon_jax.array_types import PyTree
from chameleon_jax.config import CacheDtype, Dtype, MeshConfig, TransformerConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer.cache import init_cache
from chameleon_jax.models.transformer.model import Transformer, decoding_params
from chameleon_jax.partitioning import AXES, RULES, shardings_of
from chameleon_jax.training.state import unboxed


@dataclasses.dataclass(frozen=True)
class Layout:
  """Sizes of the mesh axes, all known."""

  data: int
  fsdp: int
  tensor: int

  @classmethod
  def of(cls, config: MeshConfig, n_devices: int) -> 'Layout':
    """The mesh of a config over so many devices.

    Raises:
      ConfigError: the sizes do not multiply to `n_devices`.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
      sizes[sizes.index(-1)] = max(1, n_devices // known)
    if math.prod(sizes) != n_devices:
      named = ', '.join(f'{name} {size}' for name, size in zip(AXES, sizes))
      raise ConfigError(f'the mesh ({named}) needs {math.prod(sizes)} devices, the topology has {n_devices}; set config.mesh')
    return cls(*sizes)

  @property
  def batch_shards(self) -> int:
    """Devices that share a batch."""
    return self.data * self.fsdp

  def mesh(self, platform: str = 'tpu') -> AbstractMesh:
    """An abstract mesh; programs traced under it are for `platform`."""
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    sizes = (self.data, self.fsdp, self.tensor)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)

  def __str__(self) -> str:
    return f'{self.data} x {self.fsdp} x {self.tensor}'


def itemsize(dtype: Dtype) -> int:
  """Bytes of a value."""
  return jnp.dtype(dtype).itemsize


def bytes_per_device(tree: PyTree) -> int:
  """Bytes of the shards of one device of a tree of shapes with shardings."""

  def shard(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize

  return sum(map(shard, jax.tree.leaves(tree)))


@functools.lru_cache(maxsize=16)
def boxed_params(model: TransformerConfig) -> PyTree:
  """Shapes of the parameters with their axis names."""
  tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
  return jax.eval_shape(Transformer(model).init, jax.eval_shape(lambda: jax.random.key(0)), tokens)['params']


def misfit(model: TransformerConfig, layout: Layout) -> str | None:
  """Why the parameters do not divide over a mesh, one line; None where they do."""
  sizes = dict(zip(AXES, (layout.data, layout.fsdp, layout.tensor)))
  rules = dict(RULES)
  for path, box in jax.tree_util.tree_leaves_with_path(boxed_params(model), is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)):
    for name, size in zip(box.names, box.value.shape):
      axes = rules[name] or ()
      over = math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
      if size % over:
        where = jax.tree_util.keystr(path, simple=True, separator='/').removesuffix('/value')
        return f'{name} {size} of {where} does not divide over {over} devices'
  return None


@functools.lru_cache(maxsize=256)
def decoding_bytes(model: TransformerConfig, layout: Layout) -> int:
  """Bytes on one device of the weights a sampler holds: one array a layer, matrices in the compute type."""

  def held(n_layers: int) -> int:
    config = dataclasses.replace(model, n_layers=n_layers, scan_layers=False, remat='none', dropout=0.0)
    boxed = boxed_params(config)
    shardings = shardings_of(boxed, layout.mesh())
    held = jax.eval_shape(functools.partial(decoding_params, config=config), unboxed(boxed))
    return bytes_per_device(
      jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), held, shardings)
    )

  one, two = held(1), held(2)
  return one + (model.n_layers - 1) * (two - one)


def cache_bytes(model: TransformerConfig, layout: Layout, *, streams: int, slots: int, dtype: CacheDtype | None = None) -> int:
  """Bytes on one device of the sampler's cache: its rows over data and fsdp, its heads over tensor. Of int8, values and scales."""
  with use_abstract_mesh(Layout(1, 1, 1).mesh()):
    cache = jax.eval_shape(lambda: jax.tree.leaves(init_cache(model, streams // layout.batch_shards, slots, dtype)))
  return bytes_per_device(cache) // layout.tensor
