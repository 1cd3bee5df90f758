"""Plain parameter trees on disk: one folder a tree, written beside its place and renamed.

Does not know runs, steps or configs, which are `checkpoint.py`'s. Built on Orbax (the stable v0 interface), which is fenced into
these two files.
"""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from chameleon_jax.array_types import PyTree
from chameleon_jax.errors import CheckpointError

_BYTES_AT_ONCE = 1 << 27  # of a tree read into host memory


def one_line(error: BaseException) -> str:
  """The first line that says something: a full disk before everything else."""
  text = ' '.join(str(error).split())
  if 'No space left' in text or 'RESOURCE_EXHAUSTED' in text or 'Errno 28' in text:
    return 'the disk is full'
  return text[:300] or type(error).__name__


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
  """Keeps Orbax's tracebacks of a failed background save off the screen; the error itself is raised."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)


def save_tree(path: str | os.PathLike, tree: PyTree, *, compress: bool = True) -> None:
  """Writes a tree of arrays as the directory `path`, replacing it.

  The tree is written beside `path` and moved into place, so `path` is always the old tree or the new one. Orbax holds one copy of it in
  memory, and the compressed form as well; without `compress` the directory is a fifth larger for bfloat16, and written twice as fast.
  The arrays are this host's own (numpy, or on its devices); of several hosts only the one that calls it takes part.

  Raises:
    CheckpointError: it cannot be written; what was at `path` is still there.
  """
  path = Path(path).absolute()
  aside, old = path.with_name(f'.{path.name}.writing'), path.with_name(f'.{path.name}.old')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (aside, old):
      shutil.rmtree(leftover, ignore_errors=True)
    with quiet_orbax(), _tree_checkpointer(use_compression=compress) as checkpointer:
      checkpointer.save(aside / 'tree', tree)
    (aside / 'tree' / 'commit_success.txt').unlink(missing_ok=True)  # names the folder it was written in; the rename below is our commit
    if path.exists():
      path.rename(old)
    (aside / 'tree').rename(path)
    shutil.rmtree(old, ignore_errors=True)
  except Exception as error:
    if old.exists() and not path.exists():
      old.rename(path)
    raise CheckpointError(f'cannot write {path}: {one_line(error)}') from error
  finally:
    shutil.rmtree(aside, ignore_errors=True)


def load_tree(path: str | os.PathLike, abstract: PyTree = None) -> PyTree:
  """Reads what `save_tree` wrote.

  Args:
    path: the directory.
    abstract: tree of `jax.ShapeDtypeStruct`, with shardings where arrays should be laid out at once; shapes
      must agree, types are converted. None returns numpy arrays as they were saved.

  Raises:
    CheckpointError: missing, damaged, or of other shapes or names.
  """
  path = Path(path).absolute()
  if not path.is_dir():
    raise CheckpointError(f'no saved parameters at {path}')
  try:
    with quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
      metadata = metadata_of(checkpointer, path)
      if abstract is None:
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        # Else all arrays are read at once, with buffers of the file system for each.
        largest = max((leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(metadata)), default=0)
        with _tree_checkpointer(restore_concurrent_gb=max(largest, _BYTES_AT_ONCE) / 1e9 + 0.001) as bounded:
          return bounded.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
      check_same_shapes(f'the parameters at {path}', metadata, abstract)
      restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
      return checkpointer.restore(path, args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args))
  except CheckpointError:
    raise
  except Exception as error:
    raise CheckpointError(f'cannot read the parameters at {path}: {one_line(error)}') from error


def describe_tree(path: str | os.PathLike) -> PyTree:
  """Shapes and types of what `save_tree` wrote, as a tree of `jax.ShapeDtypeStruct`; reads no array.

  Raises:
    CheckpointError: missing or damaged.
  """
  path = Path(path).absolute()
  if not path.is_dir():
    raise CheckpointError(f'no saved parameters at {path}')
  try:
    with quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
      return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype), metadata_of(checkpointer, path))
  except CheckpointError:
    raise
  except Exception as error:
    raise CheckpointError(f'cannot read the parameters at {path}: {one_line(error)}') from error


def _tree_checkpointer(**options: Any) -> ocp.Checkpointer:
  """For this host alone: Orbax would otherwise wait for all others to save the same tree."""
  alone = ocp.options.MultiprocessingOptions()
  if jax.process_count() > 1:
    mine = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f'host{mine}')
  return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, **options), multiprocessing_options=alone)


def metadata_of(checkpointer: ocp.PyTreeCheckpointer, path: Path) -> PyTree:
  """Tree of saved shapes and types.

  Raises:
    CheckpointError: there are none.
  """
  metadata = checkpointer.metadata(path).item_metadata
  if metadata is None:
    raise CheckpointError(f'{path} holds no saved arrays, or they are damaged')
  return metadata.tree


def check_same_shapes(what: str, saved: PyTree, wanted: PyTree) -> None:
  """Raises CheckpointError naming the first leaf that only one side has or whose shapes differ."""

  def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    arrays = [(key, leaf) for key, leaf in leaves if getattr(leaf, 'shape', None) is not None]
    return {jax.tree_util.keystr(key, simple=True, separator='/'): tuple(leaf.shape) for key, leaf in arrays}

  here, there = shapes(saved), shapes(wanted)
  for name in sorted(here.keys() | there.keys(), key=lambda name: (not name.startswith('params'), name)):
    if name not in here:
      raise CheckpointError(f'{what} has no {name!r}, which the config asks for')
    if name not in there:
      raise CheckpointError(f'{what} holds {name!r}, which the config does not ask for')
    if here[name] != there[name]:
      raise CheckpointError(f'{name!r} has shape {here[name]} in {what}, the config wants {there[name]}')
