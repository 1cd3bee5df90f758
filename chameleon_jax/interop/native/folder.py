"""Our own model folder: what `train` and `convert` write and `chameleon_jax.load` opens. Version 2:

    DIR/config.json            format, version, the config of each part that is there, and where the weights came from
    DIR/text_tokenizer.model   sentencepiece model, or
    DIR/text_tokenizer.json    the released form
    DIR/transformer/GROUP/     one Orbax tree each for `embedding`, `layers_0` .., `final_norm`, `lm_head`
    DIR/image_tokenizer/       Orbax tree; may lack `decoder`
    DIR/checksums.json         of every file but config.json
    DIR/origin/                files and tensors of a foreign checkpoint that have no place here, see `native.lazy`

A layer lies by itself, whether the network stacks its layers in memory (`scan_layers`) or not, so that weights larger than
memory can be written and read. Version 1 holds the transformer as one tree, stacked as the config says, and is still read.
A folder may hold any subset of the parts. It is written aside and renamed, so a reader never sees half of one.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax import hosts
from chameleon_jax.array_types import Params, PyTree
from chameleon_jax.config import TransformerConfig, VocabularyConfig, VQGANConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.dtypes import cast
from chameleon_jax.interop.native.checksums import check_files, read_checksums, write_checksums
from chameleon_jax.interop.native.files import (
  CONFIG_FILE,
  IMAGE_TOKENIZER,
  TRANSFORMER,
  VERSION,
  Header,
  load_text_tokenizer,
  read_header,
  save_text_tokenizer,
  write_header,
)
from chameleon_jax.interop.staging import staged
from chameleon_jax.interop.trees import TreeFiller, check_groups, check_n_layers, check_shapes, flat, group_shapes, stored_vqgan_shapes
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.models.transformer.quantization import is_quantized
from chameleon_jax.models.vqgan.model import VQGAN
from chameleon_jax.partitioning import fetch
from chameleon_jax.tokens.text import TextTokenizer
from chameleon_jax.tokens.vocabulary import Vocabulary
from chameleon_jax.training.tree_files import load_tree, save_tree


@dataclasses.dataclass(frozen=True)
class ModelParts:
  """The parts of a model; None where it lacks one. `vqgan_params` may lack 'decoder'."""

  transformer_config: TransformerConfig | None = None
  transformer_params: Params | None = None
  vqgan_config: VQGANConfig | None = None
  vqgan_params: Params | None = None
  vocabulary: VocabularyConfig | None = None
  text_tokenizer: TextTokenizer | None = None


def save_model(path: str | os.PathLike[str], parts: ModelParts, *, dtype: str | None = None) -> None:
  """Writes the model folder `path`, replacing a model folder that is there.

  On several hosts all must call it; the first one writes, and all return when the folder is there. The transformer is gathered
  one array at a time, so no host and no device needs room for more than one layer of it.

  Args:
    path: the folder.
    parts: what to write.
    dtype: type to store floating parameters in ('bfloat16' halves the folder); None keeps theirs.

  Raises:
    CheckpointError: `path` exists and is not a model folder, writing failed (nothing is left behind), or the weights are quantized.
  """
  if any(map(is_quantized, jax.tree.leaves(parts.transformer_params, is_leaf=is_quantized))):
    raise CheckpointError(f'{path}: a model folder holds the weights themselves, and these are quantized; load them without quantization')
  groups = _groups(parts.transformer_params if parts.transformer_config is not None else None)
  error: CheckpointError | None = None
  if hosts.is_first():
    try:
      _write(pathlib.Path(path).absolute(), parts, groups, dtype)
    except CheckpointError as raised:
      error = raised
  for _ in groups:  # the other hosts, and the first after an error: without it the rest would wait for ever
    pass
  hosts.meet('model folder', error=error)


def _write(target: pathlib.Path, parts: ModelParts, groups: Iterator[tuple[str, PyTree]], dtype: str | None) -> None:
  if target.exists() and not (target / CONFIG_FILE).exists() and any(target.iterdir()):
    raise CheckpointError(f'{target} exists and is not a model folder; choose another path')
  try:
    with staged(target) as folder:
      for group, tree in groups:
        save_tree(folder / TRANSFORMER / group, _cast(tree, dtype))
      if parts.vqgan_config is not None:
        save_tree(folder / IMAGE_TOKENIZER, _cast(jax.tree.map(np.asarray, parts.vqgan_params), dtype))
      save_text_tokenizer(folder, parts.text_tokenizer)
      write_header(folder, Header(VERSION, parts.transformer_config, parts.vqgan_config, parts.vocabulary, None))
      write_checksums(folder)
  except OSError as error:
    raise CheckpointError(f'model folder {target} could not be written: {error}') from error


def load_model(path: str | os.PathLike[str]) -> ModelParts:
  """Reads a model folder; parameters come back in their config's `param_dtype`, on the default device.

  The transformer's are stacked where its config says `scan_layers`, whatever the version of the folder.

  Raises:
    CheckpointError: the folder is missing, foreign or damaged, or its parts do not fit each other.
  """
  folder = pathlib.Path(path).absolute()
  header, checksums = read_header(folder), read_checksums(folder)
  values: dict[str, Any] = {'vocabulary': header.vocabulary, 'text_tokenizer': load_text_tokenizer(folder, checksums)}
  if header.transformer is not None:
    check_files(folder, TRANSFORMER, checksums)
    values['transformer_config'] = header.transformer
    values['transformer_params'] = _load_transformer(folder / TRANSFORMER, header.transformer, header.version)
  if header.vqgan is not None:
    check_files(folder, IMAGE_TOKENIZER, checksums)
    stored = load_tree(folder / IMAGE_TOKENIZER)
    check_shapes(folder / IMAGE_TOKENIZER, flat(stored), stored_vqgan_shapes(header.vqgan, flat(stored)))
    values['vqgan_config'] = header.vqgan
    values['vqgan_params'] = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stored)
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


def make_vocabulary(config: VocabularyConfig, text_tokenizer: TextTokenizer | None) -> Vocabulary:
  """The token table; a released tokenizer gives its own, as it knows which id each name has.

  Raises:
    CheckpointError: that table has another layout than `config`.
  """
  table = getattr(text_tokenizer, 'vocabulary', None)
  if not isinstance(table, Vocabulary):
    return Vocabulary(config)
  if table.config != config:
    raise CheckpointError(f'the text tokenizer has the token table {table.config}, the model {config}')
  return table


def abstract_transformer(config: TransformerConfig) -> PyTree:
  """Boxed shapes of the transformer's parameters."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)['params']


def abstract_vqgan(config: VQGANConfig) -> PyTree:
  """Boxed shapes of the image tokenizer's parameters."""
  pixels = jax.ShapeDtypeStruct((1, config.resolution, config.resolution, 3), jnp.float32)
  return jax.eval_shape(VQGAN(config).init, jax.random.key(0), pixels)['params']


def _groups(params: Params | None) -> Iterator[tuple[str, PyTree]]:
  """The groups of a transformer's tree, {group: ...} each, in host memory; of stacked layers one is cut out at a time.

  On several hosts each group is gathered from all of them, so all must go through all groups.
  """
  for name, subtree in (params or {}).items():
    if name != 'layers':
      yield name, {name: jax.tree.map(fetch, subtree)}
      continue
    for index in range(jax.tree.leaves(subtree)[0].shape[0]):
      yield f'layers_{index}', {f'layers_{index}': jax.tree.map(lambda leaf, index=index: fetch(leaf, index), subtree)}


def _load_transformer(folder: pathlib.Path, config: TransformerConfig, version: int) -> Params:
  if version == 1:
    stored = load_tree(folder)
    check_n_layers(folder, config, flat(stored))
    abstract = flat(nn.meta.unbox(abstract_transformer(config)))
    check_shapes(folder, flat(stored), {name: tuple(leaf.shape) for name, leaf in abstract.items()})
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, config.param_dtype), stored)
  check_n_layers(folder, config)
  groups = group_shapes(config)
  check_groups(folder, groups)
  fill = TreeFiller(config)
  for group, shapes in groups.items():
    leaves = flat(load_tree(folder / group))
    check_shapes(folder / group, leaves, shapes)
    for name, value in leaves.items():
      fill.put(name, value)
  return jax.tree.map(jnp.asarray, fill.tree())


def _cast(params: Params | None, dtype: str | None) -> Params:
  """Parameters in another type; raises CheckpointError where float16 cannot hold a value."""
  if dtype is None:
    return params
  return jax.tree.map(lambda leaf: cast(np.asarray(leaf), dtype), params)
