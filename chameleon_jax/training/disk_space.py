"""Whether the checkpoints of a run fit on the disk, asked before its first step. Knows sizes, not formats."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from chameleon_jax.array_types import PyTree
from chameleon_jax.config import CheckpointConfig
from chameleon_jax.errors import CheckpointError


def check_disk_space(directory: Path, state: PyTree, config: CheckpointConfig, *, n_kept: int, say: Callable[[str], None]) -> None:
  """Compares what will be written with what is free.

  Args:
    directory: of the checkpoints; it exists.
    state: arrays or shapes of all that a checkpoint holds.
    config: how many stay. A new one is written before the oldest goes.
    n_kept: checkpoints that are there already.
    say: takes a line where the first fits and not all.

  Raises:
    CheckpointError: not even the next one fits.
  """
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  disk = shutil.disk_usage(directory)
  if disk.total == 0:  # a file system that does not tell
    return
  numbers = f'a checkpoint takes up to {_in_words(size)}, and {_in_words(disk.free)} are free in {directory}'
  if disk.free < size:
    raise CheckpointError(f'{numbers}; make room, or name a --workdir on another disk')
  missing = config.keep_last + 1 - n_kept
  if disk.free < missing * size:
    say(f'note: {numbers}; checkpoint.keep_last {config.keep_last} needs room for {missing} more')


def _in_words(size: int) -> str:
  return f'{size / 2**30:.2f} GiB' if size >= 2**27 else f'{size / 2**20:.1f} MiB'
