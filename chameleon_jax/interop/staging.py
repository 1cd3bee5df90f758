"""Folders that appear whole or not at all: written beside their place under a dot name, then renamed.

    runs/.model.writing-4711    being written by process 4711, which holds a lock on it
    runs/.model.old-4711        the folder it replaces, for the moment between two renames

An error, Ctrl-C or a signal turned into an exception removes the first and keeps the old folder. A process killed outright
leaves its dot folder behind; the next writing of the same place removes it, or moves the old folder back where that is all
that is left. Does not know what is in the folders.

Locks are POSIX (`fcntl`). Where the system has none, as Windows, two writers of one folder are not kept apart, and what a killed
process left is removed by the next only where it is this very process's number: nobody can tell whether the others still live.
"""

import contextlib
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from chameleon_jax.errors import CheckpointError

try:
  import fcntl
except ImportError:  # no POSIX
  fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
  """An empty folder that takes the place of `target` when the block ends without an error.

  A folder at `target` is replaced; whether it may be is for the caller to decide. Replacing takes two renames; a process
  killed between them leaves the old folder under its dot name, see above.

  Args:
    target: absolute path; parents that are missing are made, and removed again after an error.

  Raises:
    CheckpointError: another process is writing the same folder.
    OSError: from the file system.
  """
  aside, old = (target.with_name(f'.{target.name}.{state}-{os.getpid()}') for state in ('writing', 'old'))
  made = _make_parents(target.parent)
  lock, mine = -1, False  # whether the folder of that name is ours
  try:
    clear_leftovers(target)
    aside.mkdir()
    mine = True
    if fcntl is not None:
      lock = os.open(aside, os.O_RDONLY)
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield aside
    try:
      if target.exists():
        target.rename(old)
      aside.rename(target)
    except BaseException:
      if old.exists() and not target.exists():
        old.rename(target)
      raise
    remove_tree(old)
  except BaseException:
    if mine:
      remove_tree(aside)
    if target.exists():
      remove_tree(old)
    for parent in made:
      with contextlib.suppress(OSError):
        parent.rmdir()
    raise
  finally:
    if lock >= 0:
      os.close(lock)


def clear_leftovers(target: Path) -> None:
  """Removes what killed processes left beside `target`; a replaced folder whose successor never came is moved back.

  Raises:
    CheckpointError: a living process is writing `target`, or the folder above it cannot be looked through or changed.
  """
  with file_errors(f'{target.parent} cannot be searched for what an interrupted run may have left of {target.name}'):
    for folder in _beside(target, 'writing'):
      if _is_locked(folder):
        raise CheckpointError(f'{target} is being written by another process (into {folder}); wait for it, or end it')
      if fcntl is not None or folder.name.endswith(f'-{os.getpid()}'):
        remove_tree(folder)
    for folder in _beside(target, 'old'):
      if target.exists():
        remove_tree(folder)
      else:
        folder.rename(target)


@contextlib.contextmanager
def file_errors(what: str) -> Iterator[None]:
  """Turns an OSError of the block into a CheckpointError of one line: `what`, the reason, and the file where it is another one."""
  try:
    yield
  except OSError as error:
    file = '' if error.filename is None or str(error.filename) in what else f' ({error.filename})'
    raise CheckpointError(f'{what}: {" ".join(str(error.strerror or error).split())}{file}') from error


def remove_tree(folder: Path) -> None:
  """Removes a folder as far as the file system allows, also while threads of an interrupted save still write into it."""
  for attempt in range(20):
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
      return
    time.sleep(0.01 * attempt)


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
  """Turns SIGTERM and SIGHUP into `SystemExit` inside the block, so that clean-up runs; exit codes are those of a shell (143, 129).

  Only in the main thread, and only where nobody else handles the signal.
  """

  def stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise SystemExit(128 + number)

  mine = []
  if threading.current_thread() is threading.main_thread():
    numbers = [getattr(signal, name) for name in ('SIGTERM', 'SIGHUP') if hasattr(signal, name)]  # Windows has no SIGHUP
    mine = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
  for number in mine:
    signal.signal(number, stop)
  try:
    yield
  finally:
    for number in mine:
      signal.signal(number, signal.SIG_DFL)


def _make_parents(folder: Path) -> list[Path]:
  """Makes the folder and those above it; returns the new ones, innermost first."""
  missing = []
  while not folder.exists():
    missing.append(folder)
    folder = folder.parent
  made: list[Path] = []
  try:
    for parent in reversed(missing):
      parent.mkdir(exist_ok=True)
      made.insert(0, parent)
  except OSError:
    for parent in made:
      with contextlib.suppress(OSError):
        parent.rmdir()
    raise
  return made


def _beside(target: Path, state: str) -> list[Path]:
  """Our dot folders beside `target`: they end in the number of a process, so that `.model.old-backup` is nobody's leftover."""
  name = re.compile(rf'\.{re.escape(target.name)}\.{state}-[0-9]+')
  found = sorted(target.parent.iterdir()) if target.parent.is_dir() else []
  return [path for path in found if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _is_locked(folder: Path) -> bool:
  if fcntl is None:
    return False
  try:
    descriptor = os.open(folder, os.O_RDONLY)
  except OSError:  # gone since it was listed
    return False
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    return True
  finally:
    os.close(descriptor)
  return False
