"""Parameter trees as tables of names, and back: what readers and writers of whole checkpoints share."""

import re
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
  """What the image tokenizer must hold: without a single tensor of the decoder, it is one that has none.

  Raises:
    CheckpointError: the number of levels or blocks in the config is not that of the stored names.
  """
  check_vqgan_levels('the image tokenizer', config, stored)
  return vqgan_specs(config, decoder=any(name.startswith('decoder/') for name in stored))


def group_shapes(config: TransformerConfig) -> dict[str, dict[str, tuple[int, ...]]]:
  """Group -> name -> shape of the transformer with unrolled layers, in reading order."""
  groups: dict[str, dict[str, tuple[int, ...]]] = {}
  for name, shape in transformer_specs(config).items():
    groups.setdefault(name.split('/')[0], {})[name] = shape
  return groups


def check_n_layers(folder: Path, config: TransformerConfig, leaves: Mapping[str, Any] | None = None) -> None:
  """Compares the number of layers with what is stored, before anything is counted out by it: it may be absurd.

  Args:
    folder: of the transformer.
    config: what config.json says.
    leaves: the stored parameters of a folder of version 1, by name; else each layer has a folder of its own.

  Raises:
    CheckpointError: there are fewer than the config says.
  """
  stacked = [leaf.shape[0] for name, leaf in (leaves or {}).items() if name.startswith('layers/') and leaf.shape]
  if stacked:
    found = int(stacked[0])
  elif leaves is not None:
    found = len({name.split('/')[0] for name in leaves if name.startswith('layers_')})
  else:
    found = sum(1 for path in folder.glob('layers_*') if path.is_dir())
  if found < config.n_layers:
    first = next((index for index in range(found) if not stacked and leaves is None and not (folder / f'layers_{index}').is_dir()), found)
    where = f'no saved parameters at {folder}/layers_{first}'
    raise CheckpointError(f'{where}: config.json asks for {config.n_layers} layers, {found} are there; copy the folder again')


def check_vqgan_levels(where: object, config: VQGANConfig, stored: Mapping[str, Any]) -> None:
  """Compares the number of levels, and of blocks in each, with the names of stored parameters, before the network is built.

  Raises:
    CheckpointError: they differ.
  """
  places = [match for name in stored if (match := re.match(r'encoder/down_(\d{1,6})/(?:block_(\d{1,6})/)?', name))]
  found = len({match[1] for match in places}), len({match[2] for match in places if match[2]})
  if found != (len(config.channel_multipliers), config.n_res_blocks):
    asked = f'{len(config.channel_multipliers)} levels of {config.n_res_blocks} blocks'
    raise CheckpointError(f'{where} holds {found[0]} levels of {found[1]} blocks, its config.json asks for {asked}; copy the folder again')


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
