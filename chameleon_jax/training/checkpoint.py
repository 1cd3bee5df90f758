"""Checkpoints of a run.

A checkpoint holds the train state, the position of the input pipeline and the resolved config, saved as one
step, so that none of them can be newer than the others. Steps appear under their final name only when they
are whole; a process killed while saving leaves the previous step as the latest. Then each host adds checksums of its
share of the files, by which a step that was damaged later is told apart and passed over.

The position is what the iterators of all hosts say together, in one JSON file, so another number of hosts can read it.
Does not know what is in the state, the position or the config. Built on Orbax's `CheckpointManager` (the stable v0
interface), which is fenced into this file and `tree_files.py`.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from chameleon_jax.array_types import PyTree
from chameleon_jax.config import CheckpointConfig
from chameleon_jax.errors import ChameleonError, CheckpointError
from chameleon_jax.training import integrity
from chameleon_jax.training.agreement import gather, joined_state
from chameleon_jax.training.tree_files import check_same_shapes, metadata_of, one_line, quiet_orbax

FORMAT = 'chameleon_jax.checkpoint.1'  # marks our checkpoints, so that a foreign one is told apart

_STATE, _POSITION, _CONFIG = 'state', 'position', 'config'
_OLD_POSITION = Path('iterator') / 'process_0-of-1.json'  # of checkpoints from before data shards, written on one host


class Checkpoints:
  """The checkpoints of one run, numbered by step.

  With `config.asynchronous` the arrays are copied at once and written in the background; an error of the
  writing shows up as `CheckpointError` at the next `save`, `wait` or `close`. In every case the steps
  listed by `latest_step` are complete.

  Example:
    with Checkpoints(workdir / 'checkpoints', config.checkpoint) as checkpoints:
      checkpoints.save(100, state, iterator=batches, config=dataclasses.asdict(config))
  """

  def __init__(self, directory: str | os.PathLike, config: CheckpointConfig = CheckpointConfig(), *, read_only: bool = False):
    self.directory = Path(directory).absolute()
    self._tables = integrity.TableWriter() if config.checksums else None
    try:
      if not read_only:
        self.directory.mkdir(parents=True, exist_ok=True)
      with quiet_orbax():
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_last, keep_period=config.keep_every, enable_async_checkpointing=config.asynchronous
        )
        if read_only:  # a run may be writing there: make, remove and change nothing
          options = ocp.CheckpointManagerOptions(read_only=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
    except (OSError, ValueError) as error:
      raise CheckpointError(f'cannot use {self.directory} for checkpoints: {one_line(error)}') from error

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
    try:
      self.close()
    except CheckpointError:
      if error is None:  # the first error is the one to show
        raise

  def save(
      self, step: int, state: PyTree, *, iterator: Any = None, config: dict[str, Any], notes: dict[str, Any] | None = None
  ) -> None:
    """Saves everything of `step`.

    Args:
      step: updates that are in `state`.
      state: tree of arrays, without boxes.
      iterator: the data of this host; what its `get_state` says is merged over all hosts. None where there is none.
      config: the resolved config as JSON-able values.
      notes: whatever else the run must know to go on, as JSON-able values.

    Raises:
      CheckpointError: the step exists, it or a save before it could not be written, or hosts differ about the same position.
    """
    items: dict[str, Any] = {
        _STATE: ocp.args.StandardSave(state),
        _CONFIG: ocp.args.JsonSave({'format': FORMAT, 'step': step, 'config': config, 'notes': notes or {}}),
    }
    if iterator is not None:
      items[_POSITION] = ocp.args.JsonSave(joined_state(iterator.get_state()))
    if step in self._manager.all_steps():
      raise CheckpointError(f'step {step} was not saved in {self.directory}: a checkpoint of that step exists')
    with self._errors(f'saving step {step}'):
      self._finish_table()
      self._manager.check_for_errors()
      saved = self._manager.save(step, args=ocp.args.Composite(**items), force=True)
    if not saved:
      raise CheckpointError(f'step {step} was not saved in {self.directory}: Orbax declined it')
    if self._tables is not None:
      part, n_parts = jax.process_index(), jax.process_count()
      self._tables.start(self.directory / str(step), self._manager.is_saving_in_progress, part=part, n_parts=n_parts)

  def latest_step(self) -> int | None:
    """The newest complete step, None where there is none."""
    return self._manager.latest_step()

  def all_steps(self) -> list[int]:
    """The complete steps, oldest first."""
    return sorted(self._manager.all_steps())

  def intact_step(self, say: Callable[[str], None]) -> int | None:
    """The newest step whose files are those that were written, None where no step was ever saved. For the run that goes on from it.

    Damaged steps newer than that one are renamed to `damaged-STEP`, and `say` gets one line about each. All hosts check a part
    of the files and come to the same answer.

    Raises:
      CheckpointError: there are steps, and all of them are damaged.
    """
    steps = self.all_steps()
    for step in reversed(steps):
      path = self.directory / str(step)
      found = integrity.find_damage(path, part=jax.process_index(), n_parts=jax.process_count())
      damage = next((text for text in gather(found or '') if text), None)
      if damage is None:
        return step
      aside = self._set_aside(path)
      before = [other for other in steps if other < step]
      then = f'going back to step {before[-1]}' if before else 'there is none before it'
      say(f'checkpoint {path} is damaged: {damage}; it is now {aside.name}, {then}')
    if steps:
      raise CheckpointError(f'no checkpoint in {self.directory} is intact; bring one back, or name another workdir to start anew')
    return None

  def _set_aside(self, path: Path) -> Path:
    names = [f'damaged-{path.name}', *(f'damaged-{path.name}-{number}' for number in range(2, 100))]
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    with self._errors(f'setting aside {path.name}'):
      if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f'damaged {path.name}')  # all have chosen the same name
      if jax.process_index() == 0:
        path.rename(aside)
      if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f'set aside {path.name}')
      self._manager.reload()
    return aside

  def restore(self, abstract: PyTree, *, iterator: Any = None, step: int | None = None) -> PyTree:
    """Returns the state of `step`, the newest by default, laid out as `abstract` says.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct` with shardings (or of arrays to imitate).
      iterator: an iterator that is moved to the saved position in place, by its `set_state`.
      step: which step.

    Raises:
      CheckpointError: no such step, not a checkpoint of this project, or the shapes or names differ.
      ChameleonError: the iterator refuses the position.
    """
    step = self._known_step(step)
    self.config(step)  # tells a foreign checkpoint apart
    path = self.directory / str(step)
    with self._errors(f'restoring step {step}'):
      if iterator is not None:
        iterator.set_state(self._position(step))
      with ocp.PyTreeCheckpointer() as checkpointer:
        check_same_shapes(f'checkpoint {path}', metadata_of(checkpointer, path / _STATE), abstract)
      return self._manager.restore(step, args=ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract)}))[_STATE]

  def _position(self, step: int) -> dict[str, Any]:
    path = self.directory / str(step)
    if (path / _POSITION).is_dir():
      return self._manager.restore(step, args=ocp.args.Composite(**{_POSITION: ocp.args.JsonRestore()}))[_POSITION]
    if (path / _OLD_POSITION).is_file():
      return json.loads((path / _OLD_POSITION).read_text())
    raise CheckpointError(f'checkpoint {path} holds no position of the input data; restore it without iterator')

  def restore_iterator(self, iterator: Any, *, step: int) -> None:
    """Moves a Grain iterator to the position saved with `step`, and reads no arrays.

    Raises:
      CheckpointError: no such step, or it holds no position.
    """
    step = self._known_step(step)
    with self._errors(f'reading the position of step {step}'):
      iterator.set_state(self._position(step))

  def config(self, step: int | None = None) -> dict[str, Any]:
    """The resolved config saved with `step`, the newest by default.

    Raises:
      CheckpointError: no such step, or not a checkpoint of this project.
    """
    return self._about(step)['config']

  def notes(self, step: int | None = None) -> dict[str, Any]:
    """The notes saved with `step`, the newest by default; raises as `config` does."""
    return self._about(step).get('notes', {})

  def _about(self, step: int | None) -> dict[str, Any]:
    step = self._known_step(step)
    path = self.directory / str(step)
    if not (path / _CONFIG).is_dir() or not (path / _STATE).is_dir():
      raise CheckpointError(f'{path} is not a checkpoint of chameleon_jax (no {_STATE} and {_CONFIG} in it); name another directory')
    with self._errors(f'reading the config of step {step}'):
      saved = self._manager.restore(step, args=ocp.args.Composite(**{_CONFIG: ocp.args.JsonRestore()}))[_CONFIG]
    if not isinstance(saved, dict) or saved.get('format') != FORMAT:
      raise CheckpointError(f'{path} was not written in the format {FORMAT}; name another directory')
    return saved

  def wait(self) -> None:
    """Returns once every save is on disk.

    Raises:
      CheckpointError: one of them failed.
    """
    with self._errors('saving'):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
      self._finish_table()

  def close(self) -> None:
    """Waits and lets go of the directory.

    Raises:
      CheckpointError: a save in the background failed.
    """
    try:
      self.wait()
    finally:
      with self._errors('closing'):
        self._manager.close()

  def _finish_table(self) -> None:
    if self._tables is not None:
      self._tables.finish()

  def _known_step(self, step: int | None) -> int:
    if step is None:
      step = self.latest_step()
      if step is None:
        raise CheckpointError(f'no checkpoint in {self.directory}')
    elif step not in self._manager.all_steps():
      raise CheckpointError(f'no checkpoint of step {step} in {self.directory}; there are {self.all_steps()}')
    return step

  @contextlib.contextmanager
  def _errors(self, doing: str) -> Iterator[None]:
    try:
      with quiet_orbax():
        yield
    except ChameleonError:
      raise
    except Exception as error:  # Orbax raises OSError, ValueError, KeyError, XlaRuntimeError and its own
      raise CheckpointError(f'{doing} in {self.directory} failed: {one_line(error)}') from error


def resolved(config: Any) -> dict[str, Any]:
  """A frozen dataclass as plain JSON values: tuples become lists."""
  return json.loads(json.dumps(dataclasses.asdict(config)))
