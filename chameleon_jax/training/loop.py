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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from chameleon_jax import hosts
from chameleon_jax.array_types import Array, Params
from chameleon_jax.config import TrainConfig
from chameleon_jax.data.encode import make_encoder, world_pictures
from chameleon_jax.data.pipeline import dropped_documents, make_batches, to_devices, validation_batches
from chameleon_jax.data.shards import host_rows
from chameleon_jax.errors import ChameleonError, CheckpointError, ConfigError
from chameleon_jax.interop.native import ModelParts, check_fit, make_vocabulary, save_model
from chameleon_jax.interop.native.adapter import Adapter, Base, fingerprint, save_adapter, unrolled
from chameleon_jax.interop.opening import load_for_training, load_tokenizers
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import fetch, make_mesh
from chameleon_jax.training.agreement import Largest
from chameleon_jax.training.checkpoint import Checkpoints, resolved
from chameleon_jax.training.interruption import InterruptedRunError, Interruption
from chameleon_jax.training.losses import LossSums
from chameleon_jax.training.mesh_checks import check_mesh
from chameleon_jax.training.metrics import MetricsWriter, StepLog
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.state import TrainState, abstract_state, init_frozen, init_state
from chameleon_jax.training.step import Metrics, make_eval_step, make_train_step
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
) -> TrainState:
  """Trains, or goes on training, and writes the model folder.

  Args:
    config: the run.
    workdir: where it lives; holds the checkpoints that are resumed.
    tokenizers: text tokenizer and, for pictures, image tokenizer; those of `config.tokenizers`, else of
      `config.init_from`, by default.
    stop_after: save and stop after this step; the schedule stays that of `config.n_steps`.
    max_minutes: save and stop after this time.

  Returns:
    The state after the last step.

  Raises:
    NonFiniteLossError: names the step; the last good checkpoint stays.
    InterruptedRunError: SIGTERM or SIGINT came; the state is saved, no model folder is written.
    ConfigError, DataError, CheckpointError: settings, data or files do not fit.
  """
  deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
  workdir = Path(workdir)
  parts = _tokenizers(config, tokenizers)
  mesh = make_mesh(config.mesh)
  check_mesh(config, mesh)
  last_step = config.n_steps if stop_after is None else min(stop_after, config.n_steps)

  with (
      Interruption(config.checkpoint.grace_seconds) as interruption,
      MetricsWriter(workdir, total_steps=config.n_steps) as writer,
      Checkpoints(workdir / 'checkpoints', config.checkpoint) as checkpoints,
  ):
    run = _Run(config, parts, mesh, writer, checkpoints)
    state = run.start()
    writer.rewind(int(state.step))
    if jax.process_index() == 0:
      (workdir / '.config.json.writing').write_text(json.dumps(resolved(config), indent=2) + '\n')
      (workdir / '.config.json.writing').replace(workdir / 'config.json')
    try:
      state = run.steps(state, last_step, deadline, interruption=interruption)
    finally:
      run.batches.close()
    if run.tuning.config.method == 'lora':
      run.save_adapter(workdir / 'adapter', state)
    if run.tuning.config.export == 'merged':
      save_model(workdir / 'model', run.model_parts(state))
      writer.say(f'model folder: {workdir / "model"} (step {int(state.step)})')
    return state


class _Run:
  """What stays fixed while a run goes on."""

  def __init__(self, config: TrainConfig, parts: ModelParts, mesh: Mesh, writer: MetricsWriter, checkpoints: Checkpoints):
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
    self.data = self._data_options()
    self.batches = make_batches(config.data, n_steps=config.n_steps, **self.data)

  def _data_options(self) -> dict[str, Any]:
    names = [name for stage in self.config.data.stages for name, _ in stage.weights]
    vocabulary = make_vocabulary(self.config.vocabulary, self.parts.text_tokenizer)
    rows = host_rows(self.mesh, self.config.data.batch_size)
    options: dict[str, Any] = {'vocabulary': vocabulary, 'text_tokenizer': self.parts.text_tokenizer, 'rows': rows}
    if self.parts.vqgan_config is not None:
      options['encode_images'] = make_encoder(self.parts.vqgan_config, self.parts.vqgan_params)
      pictures = world_pictures(names)
      if pictures is not None:
        self.writer.say(f'encoding {len(pictures):,} pictures')
        options['codes'] = options['encode_images'](list(pictures))
    return options

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
    key, params = jax.random.fold_in(self.key, 2**31 - 1), None
    if self.tuning.freezes:
      params = self._freeze(key)
    if self.saved_step is not None:
      before = self.checkpoints.config(self.saved_step)
      self._check_base(before.get('base'))
      for change in _changes(before, self.described()):
        self.writer.say(f'note: config differs from the checkpoint: {change}')
      state = self.checkpoints.restore(self.abstract, iterator=self.batches, step=self.saved_step)
      self.writer.say(f'resumed after step {self.saved_step:,}')
      return state
    if self.config.init_from is not None:
      params = _initial_params(self.config)[0] if params is None else params
      self.writer.say(f'starting from {self.config.init_from}')
    return init_state(self.model, self.optimizer, self.mesh, key=key, params=params, tuning=self.tuning)

  def _freeze(self, key: Array) -> Params:
    """Reads the weights to start from and puts those that do not train on the devices; returns the others."""
    params, self.base = _initial_params(self.config)
    trained, frozen = init_frozen(self.model, self.mesh, params, self.tuning, key=key)
    self.frozen = (frozen,)
    return trained

  def _check_base(self, before: dict[str, str] | None) -> None:
    now = self.described().get('base')
    if before is not None and now is not None and before['fingerprint'] != now['fingerprint']:
      raise CheckpointError(
          f'{self.checkpoints.directory} was trained beside the weights of {before["path"]} (fingerprint {before["fingerprint"]}); '
          f'those of {now["path"]} are others ({now["fingerprint"]}): set config.init_from to the former, or name another workdir'
      )

  def described(self) -> dict[str, Any]:
    """The config as it is saved, with the weights that the checkpoints belong to where they hold only a part."""
    base = {} if self.base is None else {'base': {'path': self.base.path, 'fingerprint': self.base.fingerprint}}
    return resolved(self.config) | base

  def steps(self, state: TrainState, last_step: int, deadline: float, *, interruption: Interruption) -> TrainState:
    """Runs up to `last_step`, the deadline or an interruption and saves; logs, evaluates and saves on the way."""
    config = self.config
    log = StepLog(self.writer, parts=config.data.batch_size // len(self.data['rows']))
    fetch_at_once = self.mesh.devices.flat[0].platform == 'cpu'  # many CPU devices deadlock when steps pile up
    step = int(state.step)
    previous: Metrics | None = None
    signal_of_any, stopped_by = Largest(self.mesh), 0
    with jax.set_mesh(self.mesh):
      while step < last_step:
        if stopped_by := signal_of_any(interruption.number):
          interruption.stop(stopped_by)
          break
        began = time.monotonic()
        batch = next(self.batches)
        arrays = to_devices(batch, self.mesh)
        waited = time.monotonic() - began
        state, metrics = self.train_step(state, arrays, self.key, *self.frozen)
        step += 1
        if fetch_at_once:
          self._check_finite(metrics, step)
        elif previous is not None:
          self._check_finite(previous, step - 1)  # a step behind, so the device never waits for the host
        previous = metrics
        log.add(metrics, batch, waited)
        logs, evaluates = step % config.log_every == 0, step % config.eval_every == 0
        stops = step >= last_step or ((logs or jax.process_count() == 1) and _agreed(time.monotonic() > deadline))
        saves = stops or step % config.checkpoint.every_steps == 0
        if logs or evaluates or saves:
          self._check_finite(metrics, step)
        if logs or stops:
          log.write(step, dropped=dropped_documents(self.batches))
        if evaluates or step == config.n_steps:
          with log.pause():
            self._evaluate(state, step)
        if saves:
          with log.pause():
            self._save(state, step)
        if stops:
          break
    if self.saved_step != step:
      if previous is not None:  # an interruption between two lines of the log
        self._check_finite(previous, step)
        if step % config.log_every:
          log.write(step, dropped=dropped_documents(self.batches))
      self._save(state, step)
    self.checkpoints.wait()
    if stopped_by:
      raise InterruptedRunError(stopped_by, step)
    return state

  def _save(self, state: TrainState, step: int) -> None:
    self.checkpoints.save(step, state, iterator=self.batches, config=self.described())
    self.saved_step = step

  def _check_finite(self, metrics: Metrics, step: int) -> None:
    if float(metrics['finite']) == 1.0:
      return
    figures = f'loss {float(metrics["loss"])}, gradient norm {float(metrics["gradient_norm"])}'
    kept = self.checkpoints.latest_step()
    advice = 'lower optimizer.learning_rate or lengthen optimizer.warmup_steps'
    where = 'no checkpoint was saved yet' if kept is None else f'the last good checkpoint is step {kept} in {self.checkpoints.directory}'
    raise NonFiniteLossError(f'step {step}: not finite ({figures}); stopped, {where}; {advice}')

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


def _tokenizers(config: TrainConfig, given: ModelParts | None) -> ModelParts:
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


def _initial_params(config: TrainConfig) -> tuple[Any, Base]:
  """The parameters of `config.init_from`, and which they are."""
  tensors: dict[str, int] = {}

  def note(name: str, values: np.ndarray) -> None:
    tensors[name] = fingerprint(values)

  watched = {'on_tensor': note} if config.fine_tune.method != 'full' else {}
  parts = load_for_training(str(config.init_from), scan_layers=config.model.scan_layers, **watched)
  if parts.transformer_config is None:
    raise ConfigError(f'config.init_from: {config.init_from} holds no transformer')
  if parts.vocabulary is not None and parts.vocabulary != config.vocabulary:
    raise ConfigError(f'config.init_from: {config.init_from} has another vocabulary, {parts.vocabulary}, than config.vocabulary')
  for name in ('norm_position', 'norm_eps', 'qk_norm', 'qk_norm_eps', 'rope_theta'):
    theirs, ours = getattr(parts.transformer_config, name), getattr(config.model, name)
    if theirs != ours:
      raise ConfigError(f'config.init_from: {config.init_from} was trained with {name} {theirs!r}, config.model.{name} is {ours!r}')
  return parts.transformer_params, Base(str(config.init_from), tensors)


def _size(dtype: np.dtype) -> int:
  return dtype.itemsize


def _agreed(flag: bool) -> bool:
  """The flag of the first host, so that all stop at the same step."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


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
