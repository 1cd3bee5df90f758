"""What all hosts of a run must know together: texts of each, and a number that any of them may raise.

On one host everything returns at once what it was given. On several the calls are collective: every host makes them in the same
order. They go over the devices, as the steps do, so nothing but jax's own programs is needed.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chameleon_jax.array_types import Array


def gather(text: str) -> list[str]:
  """The texts of all hosts, in the order of their process numbers; the same list on every host."""
  if jax.process_count() == 1:
    return [text]
  encoded = np.frombuffer(text.encode(), np.uint8)
  lengths = np.asarray(multihost_utils.process_allgather(np.array([len(encoded)], np.int32))).ravel()
  padded = np.zeros(max(1, lengths.max()), np.uint8)
  padded[: len(encoded)] = encoded
  gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
  return [row[:length].tobytes().decode() for row, length in zip(gathered, lengths)]


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
