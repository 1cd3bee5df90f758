"""How arrays lie on the device mesh: one table, passed explicitly.

The mesh axes are `data`, `fsdp` and `tensor`; a size of 1 switches an axis off, so the mesh shape is the
strategy. Every parameter is born with logical axis names (`nn.with_logical_partitioning`) and `RULES` maps
them to mesh axes. The table is a constant: ambient rules are not part of jit's cache key, and a name that
is missing here raises instead of leaving an array unsharded without a word.
"""

import math
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from chameleon_jax.array_types import AnyArray, Array, PyTree
from chameleon_jax.config import MeshConfig
from chameleon_jax.errors import ConfigError

AXES = ('data', 'fsdp', 'tensor')
AnyMesh: TypeAlias = Mesh | AbstractMesh  # with devices or without

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ('batch', ('data', 'fsdp')),
    ('length', None),
    ('residual_length', 'tensor'),  # of the residual stream where TransformerConfig.sequence_parallel asks for it
    ('cache_length', None),
    ('act_embed', None),
    ('act_mlp', 'tensor'),
    ('act_heads', 'tensor'),
    ('act_kv_heads', 'tensor'),
    ('act_vocab', 'tensor'),
    ('vocab_in', ('tensor', 'fsdp')),  # rows of the embedding table: sharding its width forces a full rematerialisation
    ('embed_in', None),
    ('embed', 'fsdp'),
    ('mlp', 'tensor'),
    ('heads', 'tensor'),
    ('kv_heads', 'tensor'),
    ('vocab_out', 'tensor'),
    ('d_head', None),
    ('norm', None),
    ('layers', None),
    ('whole_layers', 'fsdp'),  # of a stack whose layers lie whole on one device each, while an optimizer works on them
    ('rank', None),  # of adapters
    ('conv_in', None),
    ('conv_out', 'fsdp'),
    ('code', None),
    ('code_dim', None),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with axes `AXES` over all devices (or the given ones).

  Raises:
    ConfigError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices()) if devices is None else devices
  sizes = [config.data, config.fsdp, config.tensor]
  known = 1
  for size in sizes:
    known *= size if size != -1 else 1
  if -1 in sizes:
    sizes[sizes.index(-1)] = max(1, len(devices) // known)
  needed = sizes[0] * sizes[1] * sizes[2]
  if needed != len(devices):
    advice = _fitting_size(sizes, len(devices))
    raise ConfigError(f'mesh {dict(zip(AXES, sizes))} needs {needed} devices, {len(devices)} are here; {advice}')
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def _fitting_size(sizes: list[int], n_devices: int) -> str:
  """Which one size to change; the words that end the message."""
  for index, axis in enumerate(AXES):
    others = math.prod(sizes) // sizes[index]
    if n_devices % others == 0:
      return f'set config.mesh.{axis}={n_devices // others}'
  return 'set config.mesh'


def target_platform() -> str:
  """Platform ('cpu', 'gpu' or 'tpu') that the program being traced is for: that of the ambient mesh, else of the default device.

  The two differ where a program is compiled ahead of time for devices that are not here.
  """
  device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  return getattr(device, 'platform', None) or jax.default_backend()


def on_one_cpu() -> bool:
  """Whether the program being traced is for a single CPU device, where other forms of some products are faster."""
  mesh = jax.sharding.get_abstract_mesh()
  return target_platform() == 'cpu' and (mesh.empty or mesh.size == 1)


def constrain(x: Array, *names: str | None) -> Array:
  """Constrains an activation to the logical axes `names`; does nothing outside a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return nn.with_logical_constraint(x, names, rules=RULES, fallback=nn.spmd.RulesFallback.RAISE_ERROR)


def shardings_of(abstract: PyTree, mesh: AnyMesh) -> PyTree:
  """Maps a boxed abstract tree (from `jax.eval_shape` of an init) to its shardings, box-free.

  Raises:
    ConfigError: a leaf carries an axis name that is not in `RULES`.
  """
  known = {name for name, _ in RULES}

  def sharding(path: Any, leaf: Any) -> Any:  # a NamedSharding, or an empty tree for an empty box
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return NamedSharding(mesh, PartitionSpec())
    if not jax.tree.leaves(leaf.value):  # a box around nothing: the place of a parameter that this part of the optimizer leaves out
      return leaf.value
    unknown = [name for name in leaf.names if name is not None and name not in known]
    if unknown:
      raise ConfigError(f'parameter {jax.tree_util.keystr(path)} has axis {unknown[0]!r}, which is not in partitioning.RULES')
    return NamedSharding(mesh, nn.logical_to_mesh_axes(leaf.names, RULES))

  return jax.tree_util.tree_map_with_path(sharding, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of a batch: rows over data and fsdp, everything else replicated."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def place(value: AnyArray, sharding: NamedSharding, dtype: DTypeLike | None = None) -> Array:
  """An array that every host has whole, laid out on the mesh; each host fills its own devices."""
  value = np.asarray(value, dtype)
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(array: AnyArray, index: int | None = None) -> np.ndarray:
  """An array in host memory, wherever its pieces lie. On several hosts all of them must call it, and all get it.

  Args:
    array: any array.
    index: fetch this entry of the first axis only; no more than that is gathered.
  """
  if not isinstance(array, jax.Array):
    return np.asarray(array if index is None else array[index])
  if index is not None or not (array.is_fully_addressable or array.is_fully_replicated):
    array = _gathered(array, index)
  return np.asarray(array)


def _gathered(array: Array, index: int | None) -> Array:
  """The array or one entry of it, whole on every device; one program serves all indices."""
  whole = NamedSharding(array.sharding.mesh, PartitionSpec()) if isinstance(array.sharding, NamedSharding) else None
  if index is None:
    return jax.jit(_same, out_shardings=whole)(array)
  return jax.jit(_entry, out_shardings=whole)(array, np.int32(index))


def _same(x: Array) -> Array:
  return x


def _entry(x: Array, index: Array) -> Array:
  return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
