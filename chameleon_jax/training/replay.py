"""Which batch a step of a run saw: built again from the run's folder, with the source of every document.

The data of a run is a row of batches that its config decides (`data/pipeline.py`), and step n saw the n-th of them that was not
thrown away (`training/spikes.py`). So the pipeline is built once more, moved to the newest position saved before that batch, the start
of the run where there is none, and read on. Documents are traced on the way, which changes neither batches nor positions.

Nothing in the folder is changed, and a run may be writing to it.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chameleon_jax.config import TrainConfig
from chameleon_jax.data.packing import Row
from chameleon_jax.data.pipeline import make_batches, source_names
from chameleon_jax.errors import ChameleonError, CheckpointError, ConfigError
from chameleon_jax.interop.native import ModelParts
from chameleon_jax.interop.opening import load_tokenizers
from chameleon_jax.tokens.vocabulary import Vocabulary
from chameleon_jax.training.checkpoint import Checkpoints
from chameleon_jax.training.run_inputs import data_options, run_tokenizers
from chameleon_jax.training.spikes import batch_of_step


@dataclasses.dataclass(frozen=True, eq=False)
class SeenBatch:
  """What a step saw.

  Attributes:
    step: of the run, from 1 on.
    number: of the batch in the data, which is the step unless batches were thrown away before.
    read_from: the checkpoint whose position the data was moved to; None for the start.
    arrays: [batch_size, seq_len] each, those of a step and those of `packing.Traced`.
    sources: names that `arrays['sources']` are places in.
    config: of the run.
    parts: its tokenizers.
    vocabulary: what its tokens mean.
  """

  step: int
  number: int
  read_from: int | None
  arrays: Row
  sources: tuple[str, ...]
  config: TrainConfig
  parts: ModelParts
  vocabulary: Vocabulary


def saved_config(workdir: str | os.PathLike[str], step: int) -> dict[str, Any]:
  """The config that `step` ran with, as JSON values: that of the first checkpoint from it on, else of the last start of the run.

  Raises:
    CheckpointError: the folder holds no run.
  """
  workdir = Path(workdir)
  with _checkpoints(workdir) as checkpoints:
    later = [kept for kept in checkpoints.all_steps() if kept >= step] if checkpoints is not None else []
    if checkpoints is not None and later:
      return checkpoints.config(later[0])
  file = workdir / 'config.json'
  try:
    return json.loads(file.read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise CheckpointError(f'{workdir} holds no run: no config.json in it; name the --workdir of `chameleon train`') from error
  except ValueError as error:
    raise CheckpointError(f'{file} is damaged: {error}') from error


def rebuild(
    workdir: str | os.PathLike[str],
    config: TrainConfig,
    step: int,
    *,
    tokenizers: ModelParts | None = None,
    say: Callable[[str], None] = print,
) -> SeenBatch:
  """Builds the batch of a step again.

  Args:
    workdir: of the run.
    config: that the step ran with, see `saved_config`.
    step: from 1 on.
    tokenizers: of the run, where it was given some; by default those the config names, or of the model it has written.
    say: takes lines on what goes on.

  Raises:
    ConfigError: the run has no such step.
    CheckpointError, DataError: its tokenizers or data are not there any more.
  """
  workdir = Path(workdir)
  if not 1 <= step <= config.n_steps:
    raise ConfigError(f'step {step}: the run in {workdir} has steps 1 to {config.n_steps}')
  parts = _run_tokenizers(workdir, config, tokenizers)
  data = data_options(config, parts, say=say)
  batches = make_batches(config.data, n_steps=config.n_steps, traced=True, endless=True, **data)
  try:
    with _checkpoints(workdir) as checkpoints:
      number = batch_of_step(step, _skipped(workdir, checkpoints, step))
      positions = {kept: _batches_before(checkpoints, kept) for kept in checkpoints.all_steps()} if checkpoints is not None else {}
      read_from = max((kept for kept, done in positions.items() if done < number), default=None)
      if checkpoints is not None and read_from is not None:
        checkpoints.restore_iterator(batches, step=read_from)
    already = 0 if read_from is None else positions[read_from]
    for _ in range(number - already - 1):
      next(batches)
    arrays = next(batches)
  finally:
    batches.close()
  return SeenBatch(step, number, read_from, arrays, source_names(config.data), config, parts, data['vocabulary'])


@contextlib.contextmanager
def _checkpoints(workdir: Path) -> Iterator[Checkpoints | None]:
  folder = workdir / 'checkpoints'
  if not folder.is_dir():
    yield None
    return
  with Checkpoints(folder, read_only=True) as checkpoints:
    yield checkpoints


def _run_tokenizers(workdir: Path, config: TrainConfig, given: ModelParts | None) -> ModelParts:
  try:
    return run_tokenizers(config, given)
  except ChameleonError:
    if given is not None or not (workdir / 'model').is_dir():
      raise
  return run_tokenizers(config, load_tokenizers(workdir / 'model'))


def _batches_before(checkpoints: Checkpoints, kept: int) -> int:
  """Batches drawn before a checkpoint was saved."""
  return int(checkpoints.notes(kept).get('spikes', {'batch': kept})['batch'])


def _skipped(workdir: Path, checkpoints: Checkpoints | None, step: int) -> list[tuple[int, int]]:
  """Batches thrown away up to a step: of the books of the first checkpoint from it on, else of all that is known."""
  kept = checkpoints.all_steps() if checkpoints is not None else []
  known = next((number for number in kept if number >= step), kept[-1] if kept else None)
  found: list[tuple[int, int]] = []
  if checkpoints is not None and known is not None:
    found = [(int(first), int(last)) for first, last in checkpoints.notes(known).get('spikes', {'skipped': []})['skipped']]
  if known is not None and known >= step:
    return found
  metrics = workdir / 'metrics.jsonl'
  for line in metrics.read_text(encoding='utf-8').splitlines() if metrics.is_file() else []:
    with contextlib.suppress(ValueError):  # a line cut off by a kill
      record = json.loads(line)
      if 'spike/first_skipped' in record:
        found.append((int(record['spike/first_skipped']), int(record['spike/last_skipped'])))
  return found
