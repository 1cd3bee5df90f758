"""A whole run of the transformer: pre-training or supervised fine-tuning, started or resumed.

    WORKDIR/config.json      the resolved config
    WORKDIR/checkpoints/     state, position in the data and config of the last steps
    WORKDIR/metrics.jsonl    scalars; WORKDIR/tensorboard/ the same
    WORKDIR/model/           model folder, written when the run ends or is cut short cleanly
    WORKDIR/adapter/         of a LoRA run: the adapter by itself

A run that finds checkpoints in its folder goes on from the newest that is intact, with the rows that come next, on any mesh and
any number of hosts; on the same mesh of CPU devices its losses are bit-identical to those of a run that was never interrupted.
SIGTERM and SIGINT save and stop it (`interruption.py`). Pre-training and fine-tuning differ in their
config only: the sources of documents, whose prompts carry no loss, and the schedule.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from chameleon_jax import hosts
from chameleon_jax.array_types import Array, Params
from chameleon_jax.config import TrainConfig
from chameleon_jax.data.pipeline import dropped_documents, make_batches, to_devices, validation_batches
from chameleon_jax.errors import ChameleonError, CheckpointError, ConfigError
from chameleon_jax.interop.native import ModelParts, save_model
from chameleon_jax.interop.native.adapter import Adapter, Base, save_adapter, unrolled
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import fetch, make_mesh
from chameleon_jax.training.agreement import Largest
from chameleon_jax.training.checkpoint import Checkpoints, resolved
from chameleon_jax.training.diagnostics import figures
from chameleon_jax.training.disk_space import check_disk_space
from chameleon_jax.training.interruption import InterruptedRunError, Interruption
from chameleon_jax.training.losses import LossSums
from chameleon_jax.training.mesh_checks import check_mesh
from chameleon_jax.training.metrics import MetricsWriter, StepLog
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.profiling import Profiler
from chameleon_jax.training.run_inputs import config_changes, data_options, initial_params, run_tokenizers
from chameleon_jax.training.samples import Sampler
from chameleon_jax.training.spikes import Spike, SpikeGuard, go_back, report
from chameleon_jax.training.state import TrainState, abstract_state, init_frozen, init_state
from chameleon_jax.training.step import make_eval_step, make_train_step
from chameleon_jax.training.trainable import Tuning


class NonFiniteLossError(ChameleonError):
  """The loss or its gradient is infinite or not a number; the update was not applied."""


def train(
    config: TrainConfig,
    workdir: str | os.PathLike,
    *,
    tokenizers: ModelParts | None = None,
    stop_after: int | None = None,
    max_minutes: float | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> TrainState:
  """Trains, or goes on training, and writes the model folder.

  Args:
    config: the run.
    workdir: where it lives; holds the checkpoints that are resumed.
    tokenizers: text tokenizer and, for pictures, image tokenizer; those of `config.tokenizers`, else of
      `config.init_from`, by default.
    stop_after: save and stop after this step; the schedule stays that of `config.n_steps`.
    max_minutes: save and stop after this time.
    profile_steps: first and last step of which a profiler's trace is written, see `training/profiling.py`.

  Returns:
    The state after the last step.

  Raises:
    NonFiniteLossError: names the step; the last good checkpoint stays.
    InterruptedRunError: SIGTERM or SIGINT came; the state is saved, no model folder is written.
    ConfigError, DataError, CheckpointError: settings, data or files do not fit.
  """
  deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
  workdir = Path(workdir)
  parts = run_tokenizers(config, tokenizers)
  mesh = make_mesh(config.mesh)
  check_mesh(config, mesh)
  last_step = config.n_steps if stop_after is None else min(stop_after, config.n_steps)

  with (
      Interruption(config.checkpoint.grace_seconds) as interruption,
      MetricsWriter(workdir, total_steps=config.n_steps) as writer,
      Checkpoints(workdir / 'checkpoints', config.checkpoint) as checkpoints,
  ):
    run = _Run(config, parts, mesh, writer, checkpoints, workdir=workdir, profile_steps=profile_steps)
    state = run.start()
    writer.rewind(int(state.step))
    if jax.process_index() == 0:
      (workdir / '.config.json.writing').write_text(json.dumps(resolved(config), indent=2) + '\n')
      (workdir / '.config.json.writing').replace(workdir / 'config.json')
    try:
      state = run.steps(state, last_step, deadline, interruption=interruption)
    finally:
      run.profiler.close()
      run.batches.close()
    if run.tuning.config.method == 'lora':
      run.save_adapter(workdir / 'adapter', state)
    if run.tuning.config.export == 'merged':
      save_model(workdir / 'model', run.model_parts(state))
      writer.say(f'model folder: {workdir / "model"} (step {int(state.step)})')
    return state


class _Run:
  """What stays fixed while a run goes on."""

  def __init__(
      self,
      config: TrainConfig,
      parts: ModelParts,
      mesh: Mesh,
      writer: MetricsWriter,
      checkpoints: Checkpoints,
      *,
      workdir: Path,
      profile_steps: tuple[int, int] | None,
  ):
    self.config, self.parts, self.mesh, self.writer, self.checkpoints = config, parts, mesh, writer, checkpoints
    self.model = Transformer(config.model)
    self.tuning = Tuning(config.fine_tune)
    if self.tuning.freezes and config.init_from is None:
      raise ConfigError(f'fine_tune.method {config.fine_tune.method!r} trains a part of given weights: set config.init_from')
    self.optimizer = make_optimizer(config.optimizer, config.n_steps)
    self.abstract = abstract_state(self.model, self.optimizer, mesh, self.tuning)
    self.train_step = make_train_step(self.model, self.optimizer, config, mesh)
    self.eval_step = make_eval_step(self.model, config, mesh, jax.tree.map(lambda leaf: leaf.sharding, self.abstract.params))
    self.key = jax.random.key(config.seed)
    self.frozen: tuple[Params, ...] = ()  # the fourth argument of the step, where there is one
    self.base: Base | None = None  # where the frozen parameters are from
    self.saved_step: int | None = None
    self.guard = SpikeGuard(config.spikes)
    self.profiler = Profiler(workdir, profile_steps, say=writer.say, agree=None if jax.process_count() == 1 else _agreed_number)
    self.data = data_options(config, parts, mesh, say=writer.say)
    self.sampler = Sampler(config, parts, data=self.data, writer=writer, workdir=workdir)
    self.batches = make_batches(config.data, n_steps=config.n_steps, endless=True, **self.data)  # some may be thrown away, see spikes.py

  def start(self) -> TrainState:
    """The newest checkpoint, or a fresh state; moves the data to the same place."""
    n_parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract.params))
    shape = f'{self.config.data.batch_size} x {self.config.data.seq_len} tokens a step'
    trained = 'parameters' if not self.tuning.freezes else f'parameters to train ({self.tuning.config.method})'
    self.writer.say(f'{n_parameters:,} {trained}, {shape}, {len(self.mesh.devices.flat)} x {self.mesh.devices.flat[0].device_kind}')
    n_hosts, n_shards = jax.process_count(), self.config.data.shards
    if n_shards % n_hosts:
      self.writer.say(f'note: {n_hosts} hosts prepare parts of {n_shards} data shards over again; a multiple of {n_hosts} saves that work')
    self.saved_step = self.checkpoints.intact_step(self.writer.say)
    self._check_disk()
    if self.saved_step is None:
      return self._first_state()
    if self.tuning.freezes:
      self._freeze()
    notes = self.checkpoints.notes(self.saved_step)
    self._check_base(notes.get('base'))
    for change in config_changes(self.checkpoints.config(self.saved_step), resolved(self.config)):
      self.writer.say(f'note: config differs from the checkpoint: {change}')
    state = self.checkpoints.restore(self.abstract, iterator=self.batches, step=self.saved_step)
    self.guard.restore(notes.get('spikes'), step=self.saved_step)
    self.writer.say(f'resumed after step {self.saved_step:,}')
    return state

  def _check_disk(self) -> None:
    """Of the host that writes; all the others hear what is wrong there."""
    error = None
    if hosts.is_first():
      directory, n_kept = self.checkpoints.directory, len(self.checkpoints.all_steps())
      try:
        check_disk_space(directory, self.abstract, self.config.checkpoint, n_kept=n_kept, say=self.writer.say)
      except CheckpointError as raised:
        error = raised
    hosts.meet('disk space', error=error)

  def _first_state(self) -> TrainState:
    params = None
    if self.config.init_from is not None:
      params = self._freeze() if self.tuning.freezes else initial_params(self.config)[0]
      self.writer.say(f'starting from {self.config.init_from}')
    return init_state(self.model, self.optimizer, self.mesh, key=self._first_key, params=params, tuning=self.tuning)

  @property
  def _first_key(self) -> Array:
    return jax.random.fold_in(self.key, 2**31 - 1)

  def _freeze(self) -> Params:
    """Reads the weights to start from and puts those that do not train on the devices; returns the others."""
    params, self.base = initial_params(self.config)
    trained, frozen = init_frozen(self.model, self.mesh, params, self.tuning, key=self._first_key)
    self.frozen = (frozen,)
    return trained

  def _check_base(self, before: dict[str, str] | None) -> None:
    now = self._base_note()
    if before is not None and now is not None and before['fingerprint'] != now['fingerprint']:
      raise CheckpointError(
          f'{self.checkpoints.directory} was trained beside the weights of {before["path"]} (fingerprint {before["fingerprint"]}); '
          f'those of {now["path"]} are others ({now["fingerprint"]}): set config.init_from to the former, or name another workdir'
      )

  def _base_note(self) -> dict[str, str] | None:
    """The weights that the checkpoints belong to where they hold only a part."""
    return None if self.base is None else {'path': self.base.path, 'fingerprint': self.base.fingerprint}

  def steps(self, state: TrainState, last_step: int, deadline: float, *, interruption: Interruption) -> TrainState:
    """Runs up to `last_step`, the deadline or an interruption and saves; logs, evaluates and saves on the way."""
    config, log = self.config, self._step_log()
    fetch_at_once = self.mesh.devices.flat[0].platform == 'cpu'  # many CPU devices deadlock when steps pile up
    step = int(state.step)
    signal_of_any, stopped_by, unlogged = Largest(self.mesh), 0, False
    with jax.set_mesh(self.mesh):
      while step < last_step:
        if stopped_by := signal_of_any(interruption.number):
          interruption.stop(stopped_by)
          break
        began = time.monotonic()
        batch = next(self.batches)
        arrays = to_devices(batch, self.mesh)
        waited = time.monotonic() - began
        self.profiler.before(step + 1, look=step % config.log_every == 0)
        state, metrics = self.train_step(state, arrays, self.key, *self.frozen)
        step += 1
        self.profiler.after(step, metrics)
        self.guard.add(step, metrics)
        measured = metrics.pop('diagnostics', None)
        log.add(metrics, batch, waited)
        logs, evaluates = step % config.log_every == 0, step % config.eval_every == 0
        stops = step >= last_step or ((logs or jax.process_count() == 1) and _agreed(time.monotonic() > deadline))
        saves = stops or step % config.checkpoint.every_steps == 0
        # Without waiting it is a step behind, so that the device need not pause for the host.
        spike = self._spike_to_leave(wait=fetch_at_once or logs or evaluates or saves)
        if spike is not None:
          del state, metrics, measured  # no room for two states
          state, log = self._rewind(spike), self._step_log()
          step = int(state.step)
          continue
        if measured is not None and step % (config.diagnostics_every or 1) == 0:
          self.writer.write(step, figures(measured), prefix='diagnostics')
        unlogged = not (logs or stops)
        if not unlogged:
          log.write(step, dropped=dropped_documents(self.batches))
        if evaluates or step == config.n_steps:
          with log.pause():
            self._evaluate(state, step)
            self.sampler.evaluated(step, lambda: self._whole(state))  # noqa: B023 (called at once)
        if saves:
          with log.pause():
            self._save(state, step)
        if stops:
          break
    # An interruption between two saves. Right behind a spike it leaves the checkpoint before it, from which the run meets it again.
    if self.saved_step != step and self._spike_to_leave(wait=True) is None:
      if unlogged:
        log.write(step, dropped=dropped_documents(self.batches))
      self._save(state, step)
    self.checkpoints.wait()
    if stopped_by:
      raise InterruptedRunError(stopped_by, self.saved_step or 0)
    return state

  def _step_log(self) -> StepLog:
    return StepLog(self.writer, parts=self.config.data.batch_size // len(self.data['rows']))

  def _save(self, state: TrainState, step: int) -> None:
    notes = {'spikes': self.guard.books(), 'base': self._base_note()}
    self.checkpoints.save(step, state, iterator=self.batches, config=resolved(self.config), notes=notes)
    self.saved_step = step

  def _spike_to_leave(self, *, wait: bool) -> Spike | None:
    """The next spike that the run goes back from; others are said, and a loss that is not finite is raised."""
    while (spike := self.guard.judge(wait=wait)) is not None and not self.guard.may_rewind:
      if not spike.finite:
        self._not_finite(spike)
      report(spike, self.writer)
    return spike

  def _rewind(self, spike: Spike) -> TrainState:
    kept = go_back(self.guard, spike, checkpoints=self.checkpoints, batches=self.batches, writer=self.writer)
    return self._first_state() if kept is None else self.checkpoints.restore(self.abstract, step=kept)

  def _not_finite(self, spike: Spike) -> None:
    shown = f'loss {spike.loss}, gradient norm {spike.gradient_norm}'
    kept = self.checkpoints.latest_step()
    advice = 'lower optimizer.learning_rate or lengthen optimizer.warmup_steps'
    where = 'no checkpoint was saved yet' if kept is None else f'the last good checkpoint is step {kept} in {self.checkpoints.directory}'
    raise NonFiniteLossError(f'step {spike.step}: not finite ({shown}); stopped, {where}; {advice}')

  def _evaluate(self, state: TrainState, step: int) -> None:
    """Losses on validation documents, of each source by itself and of all of them, always on the same batches."""
    total = LossSums.zeros()
    values: dict[str, float] = {}
    batches = validation_batches(self.config.data, n_steps=self.config.eval_batches, **self.data)
    for name, source_batches in batches.items():
      sums = LossSums.zeros()
      for batch in source_batches:
        sums = jax.tree.map(lambda a, b: a + float(b), sums, self.eval_step(state.params, to_devices(batch, self.mesh), *self.frozen))
      total = total + sums
      values |= {f'{name}/{key}': value for key, value in _losses(sums).items()}
    if not values:
      return
    values |= _losses(total)
    self.writer.write(step, values, prefix='validation')
    self.writer.progress(step, {f'validation {key.replace("_", " ")}': values[key] for key in _losses(total)})

  def model_parts(self, state: TrainState) -> ModelParts:
    """The trained transformer with the tokenizers it was trained with."""
    return ModelParts(
        transformer_config=self.config.model,
        transformer_params=self._whole(state),
        vqgan_config=self.parts.vqgan_config,
        vqgan_params=self.parts.vqgan_params,
        vocabulary=self.config.vocabulary,
        text_tokenizer=self.parts.text_tokenizer,
    )

  def _whole(self, state: TrainState) -> Params:
    """All parameters; those that trained beside frozen ones in host memory, in the type that the config says they are kept in."""
    if not self.frozen:
      return state.params
    merged = self.tuning.merged(*jax.tree.map(fetch, (state.params, *self.frozen)))
    return jax.tree.map(lambda leaf: np.asarray(leaf, min(leaf.dtype, jnp.dtype(self.config.model.param_dtype), key=_size)), merged)

  def save_adapter(self, path: Path, state: TrainState) -> None:
    """Writes the trained adapter of a LoRA run; on several hosts all must call it."""
    config, error = self.config.fine_tune, None
    adapter = Adapter(config.lora_rank, config.lora_alpha, unrolled(jax.tree.map(fetch, state.params)), self.base)
    if hosts.is_first():
      try:
        save_adapter(path, adapter)
      except CheckpointError as raised:
        error = raised
    hosts.meet('adapter folder', error=error)
    self.writer.say(f'adapter: {path} (step {int(state.step)})')


def _agreed(flag: bool) -> bool:
  """The flag of the first host, so that all stop at the same step."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def _agreed_number(number: int) -> int:
  """The number of the first host."""
  return int(multihost_utils.broadcast_one_to_all(np.asarray(number)))


def _size(dtype: np.dtype) -> int:
  return dtype.itemsize


def _losses(sums: LossSums) -> dict[str, float]:
  """Nats per token of each modality that was there."""
  found = {'loss_text': float(sums.text_weight), 'loss_image': float(sums.image_weight)}
  metrics: Mapping[str, Array] = sums.metrics()
  return {name: float(metrics[name]) for name, weight in found.items() if weight > 0}
