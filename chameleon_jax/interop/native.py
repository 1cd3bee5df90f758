"""Our own model folder: what `train` writes at its end and `Chameleon.load` opens.

    DIR/config.json            format, version, and the config of each part that is there
    DIR/text_tokenizer.model   sentencepiece model
    DIR/transformer/           Orbax parameter tree
    DIR/image_tokenizer/       Orbax parameter tree

A folder may hold any subset of the parts. It is written aside and renamed, so a reader never sees half of one.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from chameleon_jax.array_types import Params, PyTree
from chameleon_jax.config import TransformerConfig, VocabularyConfig, VQGANConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.models.vqgan.model import VQGAN
from chameleon_jax.tokens.text import SentencePieceText
from chameleon_jax.training.checkpoint import load_tree, save_tree

FORMAT = 'chameleon_jax'
VERSION = 1
_CONFIG_FILE = 'config.json'
_TEXT_FILE = 'text_tokenizer.model'
_TRANSFORMER = 'transformer'
_IMAGE_TOKENIZER = 'image_tokenizer'


@dataclasses.dataclass(frozen=True)
class ModelParts:
  """The parts of a model folder; None where the folder lacks one."""

  transformer_config: TransformerConfig | None = None
  transformer_params: Params | None = None
  vqgan_config: VQGANConfig | None = None
  vqgan_params: Params | None = None
  vocabulary: VocabularyConfig | None = None
  text_tokenizer: SentencePieceText | None = None


def config_from_dict(kind: type, values: dict[str, Any], *, where: str) -> Any:
  """Builds the flat dataclass `kind` from JSON values; lists become tuples.

  Raises:
    CheckpointError: a field is unknown or missing, or the dataclass refuses a value.
  """
  known = {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
  unknown = sorted(set(values) - set(known))
  if unknown:
    raise CheckpointError(f'{where}: {kind.__name__} has no field {unknown[0]!r}; was this written by a newer version?')
  converted = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
  try:
    return kind(**converted)
  except (TypeError, ValueError) as error:
    raise CheckpointError(f'{where}: {error}') from error


def save_model(path: str | os.PathLike[str], parts: ModelParts, *, dtype: str | None = None) -> None:
  """Writes the model folder `path`, replacing a model folder that is there.

  Args:
    path: the folder.
    parts: what to write.
    dtype: type to store floating parameters in ('bfloat16' halves the folder); None keeps theirs.

  Raises:
    CheckpointError: `path` exists and is not a model folder, or writing failed (nothing is left behind).
  """
  target = pathlib.Path(path).absolute()
  if target.exists() and not (target / _CONFIG_FILE).exists() and any(target.iterdir()):
    raise CheckpointError(f'{target} exists and is not a model folder; choose another path')
  aside = target.with_name(f'.{target.name}.writing-{os.getpid()}')
  shutil.rmtree(aside, ignore_errors=True)
  aside.mkdir(parents=True)
  try:
    config: dict[str, Any] = {'format': FORMAT, 'version': VERSION}
    if parts.transformer_config is not None:
      config['transformer'] = dataclasses.asdict(parts.transformer_config)
      save_tree(aside / _TRANSFORMER, _cast(parts.transformer_params, dtype))
    if parts.vqgan_config is not None:
      config['vqgan'] = dataclasses.asdict(parts.vqgan_config)
      save_tree(aside / _IMAGE_TOKENIZER, _cast(parts.vqgan_params, dtype))
    if parts.vocabulary is not None:
      config['vocabulary'] = dataclasses.asdict(parts.vocabulary)
    if parts.text_tokenizer is not None:
      parts.text_tokenizer.save(aside / _TEXT_FILE)
    (aside / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n')
    old = target.with_name(f'.{target.name}.old-{os.getpid()}')
    if target.exists():
      target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)
  except OSError as error:
    raise CheckpointError(f'model folder {target} could not be written: {error}') from error
  finally:
    shutil.rmtree(aside, ignore_errors=True)


def load_model(path: str | os.PathLike[str]) -> ModelParts:
  """Reads a model folder; parameters come back in their config's `param_dtype`, on the default device.

  Raises:
    CheckpointError: the folder is missing, foreign or damaged, or its parts do not fit each other.
  """
  folder = pathlib.Path(path).absolute()
  if not folder.is_dir():
    raise CheckpointError(f'model folder {folder} does not exist')
  if not (folder / _CONFIG_FILE).exists():
    raise CheckpointError(f'{folder} is no model folder: it holds no {_CONFIG_FILE}')
  try:
    config = json.loads((folder / _CONFIG_FILE).read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise CheckpointError(f'{folder / _CONFIG_FILE} is not valid JSON: {error}') from error
  if not isinstance(config, dict) or config.get('format') != FORMAT:
    raise CheckpointError(f'{folder / _CONFIG_FILE} is not of this project: expected "format": "{FORMAT}"')
  if config.get('version') != VERSION:
    raise CheckpointError(f'{folder} has version {config.get("version")!r}; this program reads version {VERSION}')

  where = str(folder / _CONFIG_FILE)
  values: dict[str, Any] = {}
  if 'transformer' in config:
    transformer_config = config_from_dict(TransformerConfig, config['transformer'], where=where)
    values['transformer_config'] = transformer_config
    values['transformer_params'] = _load_params(folder / _TRANSFORMER, abstract_transformer(transformer_config))
  if 'vqgan' in config:
    vqgan_config = config_from_dict(VQGANConfig, config['vqgan'], where=where)
    values['vqgan_config'] = vqgan_config
    values['vqgan_params'] = _load_params(folder / _IMAGE_TOKENIZER, abstract_vqgan(vqgan_config))
  if 'vocabulary' in config:
    values['vocabulary'] = config_from_dict(VocabularyConfig, config['vocabulary'], where=where)
  if (folder / _TEXT_FILE).exists():
    values['text_tokenizer'] = SentencePieceText.load(folder / _TEXT_FILE)
  parts = ModelParts(**values)
  check_fit(parts, where=str(folder))
  return parts


def check_fit(parts: ModelParts, *, where: str) -> None:
  """Checks that vocabulary, transformer and tokenizers belong together.

  Raises:
    CheckpointError: two parts disagree on a size.
  """
  vocabulary, transformer, vqgan, text = parts.vocabulary, parts.transformer_config, parts.vqgan_config, parts.text_tokenizer
  if vocabulary is None:
    return
  if transformer is not None and transformer.vocab_size != vocabulary.size:
    raise CheckpointError(f'{where}: the transformer has {transformer.vocab_size} token ids, the vocabulary {vocabulary.size}')
  if vqgan is not None and vqgan.n_codes != vocabulary.n_codes:
    raise CheckpointError(f'{where}: the image tokenizer has {vqgan.n_codes} codes, the vocabulary {vocabulary.n_codes}')
  if text is not None and text.n_pieces > vocabulary.n_text:
    raise CheckpointError(f'{where}: the text tokenizer has {text.n_pieces} pieces, the vocabulary room for {vocabulary.n_text}')


def abstract_transformer(config: TransformerConfig) -> PyTree:
  """Boxed shapes of the transformer's parameters."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)['params']


def abstract_vqgan(config: VQGANConfig) -> PyTree:
  """Boxed shapes of the image tokenizer's parameters."""
  pixels = jax.ShapeDtypeStruct((1, config.resolution, config.resolution, 3), jnp.float32)
  return jax.eval_shape(VQGAN(config).init, jax.random.key(0), pixels)['params']


def _load_params(path: pathlib.Path, boxed: PyTree) -> Params:
  abstract = nn.meta.unbox(boxed)
  stored = load_tree(path)
  expected = {jax.tree_util.keystr(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
  found = {jax.tree_util.keystr(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(stored)}
  missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
  if missing or extra:
    what = f'lacks parameter {missing[0]}' if missing else f'has the unknown parameter {extra[0]}'
    raise CheckpointError(f'{path} {what}; its config.json describes another model')
  for name, leaf in expected.items():
    if tuple(found[name].shape) != tuple(leaf.shape):
      raise CheckpointError(f'{path}: parameter {name} has shape {tuple(found[name].shape)}, its config.json asks for {tuple(leaf.shape)}')
  return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), stored, abstract)


def _cast(params: Params | None, dtype: str | None) -> Params:
  if dtype is None:
    return params
  return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)
