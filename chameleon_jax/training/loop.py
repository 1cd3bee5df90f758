"""A whole run of the transformer: pre-training or supervised fine-tuning, started or resumed.

    WORKDIR/config.json      the resolved config
    WORKDIR/checkpoints/     state, position in the data and config of the last steps
    WORKDIR/metrics.jsonl    scalars; WORKDIR/tensorboard/ the same
    WORKDIR/model/           model folder, written when the run ends or is cut short cleanly

A run that finds checkpoints in its folder goes on from the newest; on one machine and CPU its losses are then
bit-identical to those of a run that was never interrupted. Pre-training and fine-tuning differ in their
config only: the sources of documents, whose prompts carry no loss, and the schedule.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from chameleon_jax.array_types import Array
from chameleon_jax.config import TrainConfig
from chameleon_jax.data.encode import make_encoder, world_pictures
from chameleon_jax.data.pipeline import dropped_documents, make_batches, to_devices, validation_batches
from chameleon_jax.errors import ChameleonError, ConfigError
from chameleon_jax.interop.native import ModelParts, check_fit, make_vocabulary, save_model
from chameleon_jax.interop.opening import load_for_training, load_tokenizers
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.training.checkpoint import Checkpoints, resolved
from chameleon_jax.training.diagnostics import figures
from chameleon_jax.training.losses import LossSums
from chameleon_jax.training.metrics import MetricsWriter, StepLog
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.profiling import Profiler
from chameleon_jax.training.samples import Sampler
from chameleon_jax.training.spikes import Spike, SpikeGuard, go_back, report
from chameleon_jax.training.state import TrainState, abstract_state, init_state
from chameleon_jax.training.step import make_eval_step, make_train_step


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
    ConfigError, DataError, CheckpointError: settings, data or files do not fit.
  """
  deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
  workdir = Path(workdir)
  parts = run_tokenizers(config, tokenizers)
  mesh = make_mesh(config.mesh)
  last_step = config.n_steps if stop_after is None else min(stop_after, config.n_steps)

  with MetricsWriter(workdir, total_steps=config.n_steps) as writer, Checkpoints(workdir / 'checkpoints', config.checkpoint) as checkpoints:
    run = _Run(config, parts, mesh, writer, checkpoints, workdir=workdir, profile_steps=profile_steps)
    state = run.start()
    if jax.process_index() == 0:
      (workdir / 'config.json').write_text(json.dumps(resolved(config), indent=2) + '\n')
    try:
      state = run.steps(state, last_step, deadline)
    finally:
      run.profiler.close()
      run.batches.close()
    if jax.process_count() == 1:
      save_model(workdir / 'model', run.model_parts(state))
      writer.say(f'model folder: {workdir / "model"} (step {int(state.step)})')
    else:
      writer.say('a run on several hosts writes no model folder; its parameters are in the checkpoints')
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
    self.optimizer = make_optimizer(config.optimizer, config.n_steps)
    self.abstract = abstract_state(self.model, self.optimizer, mesh)
    self.train_step = make_train_step(self.model, self.optimizer, config, mesh)
    self.eval_step = make_eval_step(self.model, config, mesh, jax.tree.map(lambda leaf: leaf.sharding, self.abstract.params))
    self.key = jax.random.key(config.seed)
    self.saved_step: int | None = None
    self.guard = SpikeGuard(config.spikes)
    self.profiler = Profiler(workdir, profile_steps, say=writer.say, agree=None if jax.process_count() == 1 else _agreed_number)
    self.data = data_options(config, parts, say=writer.say)
    self.sampler = Sampler(config, parts, data=self.data, writer=writer, workdir=workdir)
    self.batches = make_batches(config.data, n_steps=config.n_steps, endless=True, **self.data)  # some may be thrown away, see spikes.py

  def start(self) -> TrainState:
    """The newest checkpoint, or a fresh state; moves the data to the same place."""
    n_parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract.params))
    shape = f'{self.config.data.batch_size} x {self.config.data.seq_len} tokens a step'
    self.writer.say(f'{n_parameters:,} parameters, {shape}, {len(self.mesh.devices.flat)} x {self.mesh.devices.flat[0].device_kind}')
    self.saved_step = self.checkpoints.latest_step()
    if self.saved_step is not None:
      before = self.checkpoints.config(self.saved_step)
      for change in _changes(before, resolved(self.config)):
        self.writer.say(f'note: config differs from the checkpoint: {change}')
      state = self.checkpoints.restore(self.abstract, iterator=self.batches)
      self.guard.restore(self.checkpoints.notes(self.saved_step).get('spikes'), step=self.saved_step)
      self.writer.say(f'resumed after step {self.saved_step:,}')
      return state
    return self._first_state()

  def _first_state(self) -> TrainState:
    params = None
    if self.config.init_from is not None:
      params = _initial_params(self.config)
      self.writer.say(f'starting from {self.config.init_from}')
    return init_state(self.model, self.optimizer, self.mesh, key=jax.random.fold_in(self.key, 2**31 - 1), params=params)

  def steps(self, state: TrainState, last_step: int, deadline: float) -> TrainState:
    """Runs up to `last_step` or the deadline and saves; logs, evaluates and saves on the way."""
    config, log = self.config, StepLog(self.writer)
    fetch_at_once = self.mesh.devices.flat[0].platform == 'cpu'  # many CPU devices deadlock when steps pile up
    step = int(state.step)
    with jax.set_mesh(self.mesh):
      while step < last_step:
        began = time.monotonic()
        batch = next(self.batches)
        arrays = to_devices(batch, self.mesh)
        waited = time.monotonic() - began
        self.profiler.before(step + 1, look=step % config.log_every == 0)
        state, metrics = self.train_step(state, arrays, self.key)
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
          state, log = self._rewind(spike), StepLog(self.writer)
          step = int(state.step)
          continue
        if measured is not None and step % (config.diagnostics_every or 1) == 0:
          self.writer.write(step, figures(measured), prefix='diagnostics')
        if logs or stops:
          log.write(step, dropped=dropped_documents(self.batches))
        if evaluates or step == config.n_steps:
          with log.pause():
            self._evaluate(state, step)
            self.sampler.evaluated(step, state.params)
        if saves:
          with log.pause():
            self._save(state, step)
        if stops:
          break
    if self.saved_step != step:
      self._save(state, step)
    self.checkpoints.wait()
    return state

  def _save(self, state: TrainState, step: int) -> None:
    self.checkpoints.save(step, state, iterator=self.batches, config=resolved(self.config), notes={'spikes': self.guard.books()})
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
        sums = jax.tree.map(lambda a, b: a + float(b), sums, self.eval_step(state.params, to_devices(batch, self.mesh)))
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
        transformer_params=jax.device_get(state.params),
        vqgan_config=self.parts.vqgan_config,
        vqgan_params=self.parts.vqgan_params,
        vocabulary=self.config.vocabulary,
        text_tokenizer=self.parts.text_tokenizer,
    )


def data_options(config: TrainConfig, parts: ModelParts, *, say: Callable[[str], None]) -> dict[str, Any]:
  """What `make_batches` needs besides the config, from the tokenizers of the run."""
  names = [name for stage in config.data.stages for name, _ in stage.weights]
  vocabulary = make_vocabulary(config.vocabulary, parts.text_tokenizer)
  options: dict[str, Any] = {'vocabulary': vocabulary, 'text_tokenizer': parts.text_tokenizer}
  if parts.vqgan_config is not None:
    options['encode_images'] = make_encoder(parts.vqgan_config, parts.vqgan_params)
    pictures = world_pictures(names)
    if pictures is not None:
      say(f'encoding {len(pictures):,} pictures')
      options['codes'] = options['encode_images'](list(pictures))
  return options


def run_tokenizers(config: TrainConfig, given: ModelParts | None) -> ModelParts:
  """The tokenizers of a run, checked against its vocabulary.

  Raises:
    ConfigError: there are none.
    CheckpointError: they do not fit the vocabulary.
  """
  folder = config.tokenizers or config.init_from
  if given is None and folder is None:
    raise ConfigError('no tokenizers: set config.tokenizers to a model folder with a text tokenizer (and an image tokenizer for pictures)')
  parts = _merged(str(folder)) if given is None else given
  if parts.text_tokenizer is None:
    raise ConfigError(f'{folder or "the given tokenizers"} holds no text tokenizer; make one with `chameleon train-text-tokenizer`')
  mine = ModelParts(
      vqgan_config=parts.vqgan_config, vqgan_params=parts.vqgan_params, vocabulary=config.vocabulary, text_tokenizer=parts.text_tokenizer
  )
  check_fit(mine, where=f'config.vocabulary and {folder or "the given tokenizers"}')
  return mine


def _merged(folders: str) -> ModelParts:
  """The tokenizers of one folder, or of several separated by commas: each part from the first that has it."""
  found = [load_tokenizers(folder.strip()) for folder in folders.split(',')]
  images = next((parts for parts in found if parts.vqgan_config is not None), ModelParts())
  texts = next((parts for parts in found if parts.text_tokenizer is not None), ModelParts())
  return ModelParts(vqgan_config=images.vqgan_config, vqgan_params=images.vqgan_params, text_tokenizer=texts.text_tokenizer)


def _initial_params(config: TrainConfig) -> Any:
  parts = load_for_training(str(config.init_from), scan_layers=config.model.scan_layers)
  if parts.transformer_config is None:
    raise ConfigError(f'config.init_from: {config.init_from} holds no transformer')
  if parts.vocabulary is not None and parts.vocabulary != config.vocabulary:
    raise ConfigError(f'config.init_from: {config.init_from} has another vocabulary, {parts.vocabulary}, than config.vocabulary')
  for name in ('norm_position', 'norm_eps', 'qk_norm', 'qk_norm_eps', 'rope_theta'):
    theirs, ours = getattr(parts.transformer_config, name), getattr(config.model, name)
    if theirs != ours:
      raise ConfigError(f'config.init_from: {config.init_from} was trained with {name} {theirs!r}, config.model.{name} is {ours!r}')
  return parts.transformer_params


def _agreed(flag: bool) -> bool:
  """The flag of the first host, so that all stop at the same step."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def _agreed_number(number: int) -> int:
  """The number of the first host."""
  return int(multihost_utils.broadcast_one_to_all(np.asarray(number)))


def _losses(sums: LossSums) -> dict[str, float]:
  """Nats per token of each modality that was there."""
  found = {'loss_text': float(sums.text_weight), 'loss_image': float(sums.image_weight)}
  metrics: Mapping[str, Array] = sums.metrics()
  return {name: float(metrics[name]) for name, weight in found.items() if weight > 0}


def _changes(before: Any, now: Any, key: str = 'config') -> list[str]:
  """The settings that differ, one line each."""
  if isinstance(before, dict) and isinstance(now, dict):
    return [line for name in sorted(before.keys() | now.keys()) for line in _changes(before.get(name), now.get(name), f'{key}.{name}')]
  return [] if before == now else [f'{key} was {before!r}, is {now!r}']
