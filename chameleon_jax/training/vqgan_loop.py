"""The run that trains an image tokenizer: data, steps, evaluation, checkpoints, model folder.

The order of pictures and all randomness are functions of the seed and the step, so a resumed run is the run that was not
interrupted. Knows the pieces and their order; each piece is elsewhere.
"""

import os
import pathlib
from typing import Any

import jax
import numpy as np

from chameleon_jax.array_types import Array, Pictures
from chameleon_jax.config import ImageTokenizerTrainConfig
from chameleon_jax.errors import ChameleonError, ConfigError
from chameleon_jax.evals.reconstruction import evaluate_reconstruction
from chameleon_jax.interop.native import ModelParts, abstract_vqgan, load_model, save_model
from chameleon_jax.partitioning import batch_sharding, fetch, make_mesh, place
from chameleon_jax.training.agreement import Largest
from chameleon_jax.training.checkpoint import Checkpoints, resolved
from chameleon_jax.training.interruption import InterruptedRunError, Interruption
from chameleon_jax.training.mesh_checks import check_image_tokenizer_mesh
from chameleon_jax.training.metrics import MetricsWriter
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.vqgan_data import augment, batch_indices, load_pictures
from chameleon_jax.training.vqgan_state import VQGANState, abstract_state, make_initial_state
from chameleon_jax.training.vqgan_step import TrainStep, make_vqgan_train_step

EVALUATED_TRAIN_PICTURES = 256
PROGRESS_KEYS = ('loss', 'l2', 'l1', 'perceptual', 'discriminator', 'code', 'codes_alive')


def train_image_tokenizer(
  config: ImageTokenizerTrainConfig,
  workdir: str | os.PathLike[str],
  *,
  pictures: dict[str, Pictures] | None = None,
  stop_after: int | None = None,
) -> VQGANState:
  """Trains from the newest checkpoint in `workdir` (or from the start) to `config.n_steps` and writes `workdir/model`.

  Args:
    config: everything that decides the run.
    workdir: gets checkpoints/, metrics.jsonl, tensorboard/ and model/.
    pictures: {'train': uint8 [n, H, W, 3], 'validation': ...} instead of `config.source`.
    stop_after: return after this step as if the run had been interrupted there (with a checkpoint, without a model).

  Raises:
    InterruptedRunError: SIGTERM or SIGINT came; the state is saved, no model folder is written.
    ChameleonError: bad settings or data, a failed save, or a loss that is not finite.
  """
  workdir = pathlib.Path(workdir)
  mesh = make_mesh(config.mesh)
  check_image_tokenizer_mesh(config, mesh, abstract_vqgan(config.model))
  if pictures is None:
    pictures = {split: load_pictures(config.source, split, resolution=config.model.resolution) for split in ('train', 'validation')}
  optimizer = make_optimizer(config.optimizer, config.n_steps)
  discriminator_optimizer = make_optimizer(config.discriminator_optimizer, config.n_steps)
  steps: dict[bool, TrainStep] = {}

  def train_step(state: VQGANState, batch: Any, key: Array, *, adversarial: bool) -> tuple[VQGANState, dict[str, Array]]:
    if adversarial not in steps:
      steps[adversarial] = make_vqgan_train_step(config, optimizer, discriminator_optimizer, mesh, adversarial=adversarial)
    return steps[adversarial](state, batch, key)

  last = config.n_steps if stop_after is None else min(stop_after, config.n_steps)
  with (
    Interruption(config.checkpoint.grace_seconds) as interruption,
    Checkpoints(workdir / 'checkpoints', config.checkpoint) as checkpoints,
    MetricsWriter(workdir, total_steps=config.n_steps) as writer,
  ):
    start = checkpoints.intact_step(writer.say)
    if start is not None:
      state = checkpoints.restore(abstract_state(config, optimizer, discriminator_optimizer, mesh), step=start)
      writer.say(f'resuming after step {start}')
    else:
      start = 0
      state = make_initial_state(config, optimizer, discriminator_optimizer, mesh, params=_initial_params(config))
    writer.rewind(start)
    writer.say(describe(config, state, pictures))
    if last > start:
      writer.say('compiling (a minute or so)')
    key = jax.random.key(config.seed)
    pending: list[tuple[int, Array]] = []
    signal_of_any, stopped_by, done, saved = Largest(mesh), 0, start, start
    for step in range(start, last):
      if stopped_by := signal_of_any(interruption.number):
        interruption.stop(stopped_by)
        break
      batch = pictures['train'][batch_indices(len(pictures['train']), config.batch_size, seed=config.seed, step=step)]
      batch = augment(batch, seed=config.seed, step=step, horizontal_flip=config.horizontal_flip, max_shift=config.max_shift)
      adversarial = config.loss.discriminator_weight > 0 and step >= config.loss.discriminator_start
      state, metrics = train_step(state, place(batch, batch_sharding(mesh)), key, adversarial=adversarial)
      done = step + 1
      pending.append((done, metrics['loss']))
      save = done % config.checkpoint.every_steps == 0 or done == last
      if done % config.log_every == 0 or save or done == start + 1:
        check_finite(pending)
        pending.clear()
        values = {name: float(value) for name, value in metrics.items()}
        writer.write(done, values)
        writer.progress(done, {name: values[name] for name in PROGRESS_KEYS if name in values})
      if done % config.eval_every == 0 or done == config.n_steps:
        _evaluate(config, state, pictures, writer)
      if save:
        checkpoints.save(done, state, config=resolved(config))
        saved = done
    if stopped_by and saved != done:
      check_finite(pending)
      checkpoints.save(done, state, config=resolved(config))
    checkpoints.wait()
    if stopped_by:
      raise InterruptedRunError(stopped_by, done)
  if last == config.n_steps:
    save_model(workdir / 'model', ModelParts(vqgan_config=config.model, vqgan_params=jax.tree.map(fetch, state.best_params)))
  return state


def _initial_params(config: ImageTokenizerTrainConfig) -> Any:
  if config.init_from is None:
    return None
  parts = load_model(config.init_from)
  if parts.vqgan_config is None:
    raise ConfigError(f'{config.init_from} holds no image tokenizer; set config.init_from to a model folder that has one')
  if parts.vqgan_config != config.model:
    raise ConfigError(f'the image tokenizer in {config.init_from} differs from config.model: {parts.vqgan_config}')
  return parts.vqgan_params


def describe(config: ImageTokenizerTrainConfig, state: VQGANState, pictures: dict[str, Pictures]) -> str:
  """One line on what is trained on what."""
  n = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  model = config.model
  return (
    f'image tokenizer: {n:,} parameters, {model.resolution} px -> {model.grid} x {model.grid} codes of {model.n_codes}; '
    f'{len(pictures["train"]):,} train and {len(pictures["validation"]):,} validation pictures'
  )


def check_finite(losses: list[tuple[int, Array]]) -> None:
  """Stops the run at the first loss that is not finite; checkpoints are only written after this check.

  Raises:
    ChameleonError: names the step.
  """
  for step, loss in losses:
    if not np.isfinite(float(loss)):
      raise ChameleonError(f'the loss of step {step} is {float(loss)}; the last checkpoint is kept. Lower the learning rate and run again')


def _evaluate(config: ImageTokenizerTrainConfig, state: VQGANState, pictures: dict[str, Pictures], writer: MetricsWriter) -> None:
  """PSNR, SSIM, codebook use of validation and of a fixed part of train, with the averaged weights if there are."""
  params = jax.tree.map(fetch, state.best_params)
  step = int(state.step)
  shown = []
  for split in ('validation', 'train'):
    subset = pictures[split]
    if len(subset) == 0:
      continue
    if split == 'train':
      subset = subset[np.linspace(0, len(subset) - 1, min(EVALUATED_TRAIN_PICTURES, len(subset))).astype(int)]
    values = evaluate_reconstruction(config.model, params, subset)
    writer.write(step, values, prefix=split)
    shown.append(f'{split}: ' + ' '.join(f'{name} {value:.4g}' for name, value in values.items()))
  writer.say(f'step {step} reconstruction  ' + '   '.join(shown))
