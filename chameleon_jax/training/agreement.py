"""What all hosts of a run must know together: texts of each, and a number that any of them may raise.

On one host everything returns at once what it was given. On several the calls are collective: every host makes them in the same
order. They go over the devices, as the steps do, so nothing but jax's own programs is needed.
"""

import json
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chameleon_jax.array_types import Array
from chameleon_jax.errors import CheckpointError

_BLOCK = 4096  # bytes; each length of a gathered text is a program of its own


def gather(text: str) -> list[str]:
  """The texts of all hosts, in the order of their process numbers; the same list on every host."""
  if jax.process_count() == 1:
    return [text]
  encoded = np.frombuffer(text.encode(), np.uint8)
  lengths = np.asarray(multihost_utils.process_allgather(np.array([len(encoded)], np.int32))).ravel()
  padded = np.zeros(-(-max(1, lengths.max()) // _BLOCK) * _BLOCK, np.uint8)
  padded[: len(encoded)] = encoded
  gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
  return [row[:length].tobytes().decode() for row, length in zip(gathered, lengths)]


def joined(states: Iterable[Any]) -> Any:
  """States of several hosts as one: dictionaries are joined, everything else must agree.

  Example:
    joined([{'n': 2, 'shards': {'0': 5}}, {'n': 2, 'shards': {'1': 7}}]) == {'n': 2, 'shards': {'0': 5, '1': 7}}

  Raises:
    CheckpointError: two hosts differ about the same entry.
  """
  first, *others = states
  for other in others:
    if isinstance(first, dict) and isinstance(other, dict):
      both = [name for name in first if name in other]
      first = {**first, **other, **{name: joined((first[name], other[name])) for name in both}}
    elif first != other:
      raise CheckpointError(f'hosts disagree about the position in the data ({first!r} and {other!r}); give all of them the same data')
  return first


def joined_state(state: Any) -> Any:
  """`joined` over all hosts, each of which gives its own JSON-able state."""
  return joined(json.loads(text) for text in gather(json.dumps(state)))


class Largest:
  """The largest number that any host gives, known to all hosts at the same step.

  One tiny program a step. Its result is read a step later, so the host never waits for the devices:

    step          1  2  3  4
    host 0 gives  0  0  0  0
    host 1 gives  0 15 15 15
    both get      0  0 15 15
  """

  def __init__(self, mesh: Mesh):
    self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._largest = jax.jit(lambda values: values.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    self._in_order = mesh.devices.flat[0].platform != 'cpu'  # CPU devices run programs at the same time, and collectives may then cross
    self._n_devices = mesh.devices.size
    self._pending: Array | None = None

  def __call__(self, value: int) -> int:
    """Gives this host's number; returns the largest of those given in the call before."""
    if jax.process_count() == 1:
      return value
    previous = self._pending
    mine = jax.make_array_from_callback((self._n_devices,), self._sharding, lambda index: np.full(1, value, np.int32))
    self._pending = self._largest(mine)
    if not self._in_order:
      jax.block_until_ready(self._pending)
    return 0 if previous is None else int(previous)
