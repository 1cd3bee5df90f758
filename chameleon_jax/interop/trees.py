"""Parameter trees as tables of names, and back: what readers and writers of whole checkpoints share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.array_types import AnyArray, Params, PyTree
from chameleon_jax.config import TransformerConfig, VQGANConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.mapping import transformer_specs, vqgan_specs


def flat(tree: PyTree) -> dict[str, Any]:
  """Name -> leaf; names are the keys on the way, joined by '/'."""
  return {'/'.join(str(part.key) for part in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Inverse of `flat`."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def check_shapes(where: object, found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
  """Compares names and shapes of stored arrays with those of the network.

  Raises:
    CheckpointError: names the first parameter that is missing, unknown or of another shape.
  """
  missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
  if missing or extra:
    what = f'lacks parameter {missing[0]}' if missing else f'has the unknown parameter {extra[0]}'
    raise CheckpointError(f'{where} {what}; its config.json describes another model')
  for name, shape in expected.items():
    if tuple(found[name].shape) != shape:
      raise CheckpointError(f'{where}: parameter {name} has shape {tuple(found[name].shape)}, its config.json asks for {shape}')


def stored_vqgan_shapes(config: VQGANConfig, stored: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """What the image tokenizer must hold: without a single tensor of the decoder, it is one that has none."""
  return vqgan_specs(config, decoder=any(name.startswith('decoder/') for name in stored))


def group_shapes(config: TransformerConfig) -> dict[str, dict[str, tuple[int, ...]]]:
  """Group -> name -> shape of the transformer with unrolled layers, in reading order."""
  groups: dict[str, dict[str, tuple[int, ...]]] = {}
  for name, shape in transformer_specs(config).items():
    groups.setdefault(name.split('/')[0], {})[name] = shape
  return groups


def check_groups(folder: Path, groups: Mapping[str, object]) -> None:
  """Raises CheckpointError where the folder holds a group that the network does not have."""
  extra = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in groups) if folder.is_dir() else []
  if extra:
    raise CheckpointError(f'{folder} has the unknown parameter {extra[0]}; its config.json describes another model')


class TreeFiller:
  """Collects unrolled tensors into the tree of a config; stacked leaves are allocated once and filled layer by layer."""

  def __init__(self, config: TransformerConfig):
    self._config = config
    self._leaves: dict[str, np.ndarray] = {}

  def put(self, name: str, value: AnyArray) -> None:
    """Adds a tensor by its unrolled name, in the config's `param_dtype`."""
    group, _, rest = name.partition('/')
    dtype = jnp.dtype(self._config.param_dtype)
    if not (self._config.scan_layers and group.startswith('layers_')):
      self._leaves[name] = np.array(value, dtype, order='C')  # a copy: readers hand out views of their files
      return
    stacked = f'layers/{rest}'
    if stacked not in self._leaves:
      self._leaves[stacked] = np.empty((self._config.n_layers, *value.shape), dtype)
    self._leaves[stacked][int(group.removeprefix('layers_'))] = value

  def tree(self) -> Params:
    """The tree of numpy arrays."""
    return nested(self._leaves)
