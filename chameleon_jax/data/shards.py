"""One batch from several data shards: the same rows in the same order on any number of hosts and any mesh.

    data.shards 4, batch of 8 rows        1 host       2 hosts             8 hosts
    shard 0 -> rows 0 1 --+               runs all     host 0 runs 0, 1    two hosts run each shard
    shard 1 -> rows 2 3 --+-> batch       of them             and keeps    and keep one row
    shard 2 -> rows 4 5 --+                            rows 0 to 3         of its two
    shard 3 -> rows 6 7 --+                            host 1 the rest

Shard s of S is a pipeline of its own over documents s, s + S, ... of every source. A host runs the shards that its rows come
from, so a number of shards that the number of hosts divides does no work twice; any other number is right as well, only slower.
The saved position is that of all shards and says nothing of hosts: a run goes on with more or fewer of them.

Knows neither sources nor packing.
"""

import functools
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh

from chameleon_jax.errors import CheckpointError, ConfigError, DataError
from chameleon_jax.partitioning import batch_sharding

Batch = dict[str, np.ndarray]


@functools.lru_cache(maxsize=8)
def held_pieces(mesh: Mesh) -> tuple[int, ...]:
  """Which of the data x fsdp equal pieces of a batch lie on devices of this host, in rising order."""
  n_pieces = mesh.shape['data'] * mesh.shape['fsdp']
  found: set[int] = set()
  for index in batch_sharding(mesh).addressable_devices_indices_map((n_pieces,)).values():
    found |= set(range(n_pieces)[index[0] if index else slice(None)])
  return tuple(sorted(found))


def host_rows(mesh: Mesh, n_rows: int) -> np.ndarray:
  """The rows of a batch of `n_rows` that devices of this host hold, int [rows] in rising order.

  Hosts that a tensor axis joins hold the same rows; the rows of one host need not be neighbours.

  Raises:
    ConfigError: the rows do not split over the devices.
  """
  n_pieces = mesh.shape['data'] * mesh.shape['fsdp']
  if n_rows % n_pieces:
    raise ConfigError(f'data.batch_size {n_rows} does not split over {n_pieces} devices (data x fsdp)')
  size = n_rows // n_pieces
  return (np.array(held_pieces(mesh))[:, None] * size + np.arange(size)).ravel()


def rows_by_shard(rows: np.ndarray, *, n_rows: int, n_shards: int) -> dict[int, np.ndarray]:
  """Shard -> which of its own rows are wanted, for global rows in rising order.

  Example:
    rows_by_shard([2, 3, 6], n_rows=8, n_shards=4) == {1: [0, 1], 3: [0]}
  """
  size = n_rows // n_shards
  return {int(shard): rows[rows // size == shard] % size for shard in np.unique(rows // size)}


class ShardedBatches(grain.IterDataset):
  """The wanted rows of every shard, one below the other."""

  def __init__(
      self, shards: Mapping[int, grain.IterDataset], wanted: Mapping[int, np.ndarray], *, n_shards: int, n_documents: Mapping[str, int]
  ):
    """Args:
      shards: shard -> its batches; those that this host runs.
      wanted: shard -> rows of its batches to keep.
      n_shards: of the whole run.
      n_documents: source -> its number of documents, so that a data set that changed is told apart.
    """
    super().__init__(tuple(shards.values()))
    self._numbers, self._wanted, self._n_shards, self._n_documents = tuple(shards), wanted, n_shards, dict(n_documents)

  def __iter__(self) -> 'ShardedBatchesIterator':
    shards = {number: parent.__iter__() for number, parent in zip(self._numbers, self._parents)}
    return ShardedBatchesIterator(shards, self._wanted, n_shards=self._n_shards, n_documents=self._n_documents)


class ShardedBatchesIterator(grain.DatasetIterator):
  """Iterator of `ShardedBatches`. Its state is {'n_shards', 'n_documents', 'shards': {number: state}} of the shards it runs."""

  def __init__(
      self, shards: Mapping[int, grain.DatasetIterator], wanted: Mapping[int, np.ndarray], *, n_shards: int, n_documents: dict[str, int]
  ):
    super().__init__(tuple(shards.values()))
    self._shards, self._wanted, self._n_shards, self._n_documents = shards, wanted, n_shards, n_documents

  def __next__(self) -> Batch:
    batches = [(next(shard), self._wanted[number]) for number, shard in self._shards.items()]
    if len(batches) == 1 and len(batches[0][1]) == len(next(iter(batches[0][0].values()))):
      return batches[0][0]
    return {name: np.concatenate([batch[name][rows] for batch, rows in batches]) for name in batches[0][0]}

  def get_state(self) -> dict[str, Any]:
    states = {str(number): shard.get_state() for number, shard in self._shards.items()}
    return {'n_shards': self._n_shards, 'n_documents': self._n_documents, 'shards': states}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Moves to a saved position; `state` holds all shards, or is one of before there were shards.

    Raises:
      ConfigError: it was saved with another number of shards.
      DataError: a source has another number of documents now.
      CheckpointError: a shard is missing.
    """
    if 'shards' not in state:
      state = {'n_shards': 1, 'n_documents': {}, 'shards': {'0': state}}
    if state['n_shards'] != self._n_shards:
      before = state['n_shards']
      raise ConfigError(f'the checkpoint was written with data.shards {before}, config has {self._n_shards}; set data.shards={before}')
    for name, before in state['n_documents'].items():
      now = self._n_documents.get(name, before)
      if now != before:
        raise DataError(f'source {name!r} has {now:,} documents, it had {before:,} when the checkpoint was written; bring the old back')
    missing = [number for number in self._shards if str(number) not in state['shards']]
    if missing:
      raise CheckpointError(f'the position of data shard {missing[0]} is not in the checkpoint')
    for number, shard in self._shards.items():
      shard.set_state(state['shards'][str(number)])
