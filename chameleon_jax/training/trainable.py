"""What a run trains and what it leaves as it is: one split of the parameters, and how the two parts make a network again.

    method      trained (float32, moments, in checkpoints)        frozen (in `frozen_dtype`, only read)
    full        every parameter                                   nothing
    selected    what the patterns name; of lm_head, its rows      the rest, and the whole lm_head
    lora        adapters (`training/lora.py`)                     every parameter

A gradient is taken with respect to the trained part alone, so none is computed where nothing trained lies below. The frozen part is an
argument of the step beside the state, neither donated nor saved. Does not know where the parameters come from.
"""

import dataclasses
import fnmatch
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from chameleon_jax.array_types import AnyArray, Array, Params, PyTree
from chameleon_jax.config import FineTuneConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.partitioning import RULES
from chameleon_jax.training import lora

HEAD = 'lm_head'  # [D, V]: the rows of the output head are its columns


@dataclasses.dataclass(frozen=True)
class Tuning:
  """The split that a `FineTuneConfig` asks for; a value, hashable."""

  config: FineTuneConfig = FineTuneConfig()

  @property
  def freezes(self) -> bool:
    """Whether there is a frozen part."""
    return self.config.method != 'full'

  def split(self, params: Params, key: Array) -> tuple[Params, Params | None]:
    """Parameters -> (trained, frozen); frozen is None where everything trains.

    Args:
      params: the whole tree: arrays of numpy or jax, or boxes of them.
      key: for adapters, and for what starts anew.

    Raises:
      ConfigError: a pattern or a target names nothing, or everything.
    """
    if self.config.method == 'full':
      return params, None
    if self.config.method == 'lora':
      return lora.init_adapters(params, self.config, key), jax.tree.map(self._frozen, params)
    leaves = flatten_dict(params, sep='/')
    chosen = self._chosen(list(leaves))
    trained = {name: self._start(name, leaves[name], key) for name in chosen}
    frozen = {name: jax.tree.map(self._frozen, leaf) for name, leaf in leaves.items() if name not in chosen or self._is_cut(name)}
    return unflatten_dict(trained, sep='/'), unflatten_dict(frozen, sep='/')

  def variables(self, trained: Params, frozen: Params | None) -> dict[str, Params]:
    """The collections to give to the network."""
    if frozen is None:
      return {'params': trained}
    if self.config.method == 'lora':
      return {'params': frozen, 'lora': lora.scaled(trained, self.config)}
    return {'params': self._joined(trained, frozen)}

  def merged(self, trained: Params, frozen: Params | None) -> Params:
    """The parameters of an ordinary network: what `variables` computes with, as one tree."""
    if frozen is None:
      return trained
    return lora.merged(frozen, trained, self.config) if self.config.method == 'lora' else self._joined(trained, frozen)

  def _chosen(self, names: list[str]) -> set[str]:
    chosen: set[str] = set()
    for pattern in self.config.trainable:
      matched = set(fnmatch.filter(names, pattern))
      if not matched:
        raise ConfigError(f'fine_tune.trainable: {pattern!r} names no parameter; there are {", ".join(sorted(names)[:12])}, ..')
      chosen |= matched
    if self.config.head_rows is not None and HEAD not in chosen:
      raise ConfigError(f'fine_tune.head_rows {self.config.head_rows} needs {HEAD!r} among fine_tune.trainable')
    if len(chosen) == len(names) and self.config.head_rows is None:
      raise ConfigError("fine_tune.trainable names every parameter; method 'full' does that")
    return chosen

  def _is_cut(self, name: str) -> bool:
    return name == HEAD and self.config.head_rows is not None

  def _start(self, name: str, leaf: PyTree, key: Array) -> PyTree:
    """A trained leaf as training begins: cut to its rows, drawn anew where that is asked for."""
    boxed = isinstance(leaf, nn.LogicallyPartitioned)
    value = leaf.value if boxed else leaf
    if self._is_cut(name):
      first, end = self.config.head_rows or (0, 0)
      value = value[..., first:end]
    value = value.astype(jnp.float32)
    if self.config.restart_std is not None:
      drawn = jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), value.shape, jnp.float32)
      value = drawn * self.config.restart_std
    if not boxed:
      return value
    # Any number of rows may be chosen, so they lie whole on every device of the tensor axis.
    names = (*leaf.names[:-1], None) if self._is_cut(name) else leaf.names
    return nn.LogicallyPartitioned(value, names, rules=RULES)

  def _frozen(self, leaf: AnyArray) -> AnyArray:
    return leaf.astype(jnp.dtype(self.config.frozen_dtype))

  def _joined(self, trained: Params, frozen: Params) -> Params:
    leaves, changed = flatten_dict(frozen, sep='/'), flatten_dict(trained, sep='/')
    for name, value in changed.items():
      leaves[name] = self._with_rows(leaves[name], value) if self._is_cut(name) else value
    return unflatten_dict(leaves, sep='/')

  def _with_rows(self, table: AnyArray, rows: AnyArray) -> AnyArray:
    """The head [D, V] with its rows in place, in the type of the rows; padded and chosen, which splits over devices as it is."""
    first, end = self.config.head_rows or (0, 0)
    size = table.shape[-1]
    if isinstance(table, np.ndarray):
      return np.concatenate([table[..., :first].astype(rows.dtype), rows, table[..., end:].astype(rows.dtype)], axis=-1)
    ids = jnp.arange(size)
    padded = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(first, size - end)])
    return jnp.where((ids >= first) & (ids < end), padded, table.astype(rows.dtype))


FULL = Tuning()
