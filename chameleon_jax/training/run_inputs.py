"""What a run of the transformer starts from: its tokenizers, its data, the weights it goes on from.

Shared by the loop and by `replay`, which builds the batch of a step again. Knows no step, no state and no optimizer.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from chameleon_jax.config import TrainConfig
from chameleon_jax.data.encode import make_encoder, world_pictures
from chameleon_jax.data.shards import host_rows
from chameleon_jax.errors import ConfigError
from chameleon_jax.interop.native import ModelParts, check_fit, make_vocabulary
from chameleon_jax.interop.native.adapter import Base, fingerprint
from chameleon_jax.interop.opening import load_for_training, load_tokenizers


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


def initial_params(config: TrainConfig) -> tuple[Any, Base]:
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


def data_options(config: TrainConfig, parts: ModelParts, mesh: Mesh | None = None, *, say: Callable[[str], None]) -> dict[str, Any]:
  """What `make_batches` needs besides the config, from the tokenizers of the run; with a mesh the rows of this host only."""
  names = [name for stage in config.data.stages for name, _ in stage.weights]
  vocabulary = make_vocabulary(config.vocabulary, parts.text_tokenizer)
  options: dict[str, Any] = {'vocabulary': vocabulary, 'text_tokenizer': parts.text_tokenizer}
  if mesh is not None:
    options['rows'] = host_rows(mesh, config.data.batch_size)
  if parts.vqgan_config is not None:
    options['encode_images'] = make_encoder(parts.vqgan_config, parts.vqgan_params)
    pictures = world_pictures(names)
    if pictures is not None:
      say(f'encoding {len(pictures):,} pictures')
      options['codes'] = options['encode_images'](list(pictures))
  return options


def config_changes(before: Any, now: Any, key: str = 'config') -> list[str]:
  """The settings that differ, one line each."""
  if isinstance(before, dict) and isinstance(now, dict):
    names = sorted(before.keys() | now.keys())
    return [line for name in names for line in config_changes(before.get(name), now.get(name), f'{key}.{name}')]
  return [] if before == now else [f'{key} was {before!r}, is {now!r}']
