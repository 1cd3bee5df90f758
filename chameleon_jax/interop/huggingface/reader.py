"""Checkpoints of the Hugging Face family, read one tensor at a time (spec model.md 3); `writer` writes them.

    mainline   facebook/chameleon-*: language model and the encoder half of the VQ-GAN
    Anole      the same with `model.vqmodel.decoder.*`
    Lumina     language model alone; q/k norms [model_parallel_size, H], one row for each group of heads

A folder holds config.json beside *.safetensors, or beside pytorch_model*.bin as older ones do. Every tensor of the files has its place:
in our tree, among the harmless extras that are kept (`Origin.extras`), or it is an error. That very early revisions lack post_quant_conv
is not established (spec model.md 3.2), so one that does is refused.
"""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from chameleon_jax.config import TransformerConfig, VocabularyConfig, VQGANConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import mapping
from chameleon_jax.interop.files.pickle_reader import brief
from chameleon_jax.interop.files.safetensors_file import open_safetensors
from chameleon_jax.interop.files.shards import ShardedTensors, TensorFile, read_json
from chameleon_jax.interop.huggingface import config as huggingface_config
from chameleon_jax.interop.huggingface.config import CONFIG, EXTRAS_PREFIX, TOKENIZERS, VQ_PREFIX
from chameleon_jax.interop.huggingface.writer import write_huggingface
from chameleon_jax.interop.lazy import NO_DECODER, NO_IMAGE_TOKENIZER, NO_TEXT, LazyModel, Origin, TensorSource, TensorSpec
from chameleon_jax.interop.meta.files import CheckedPth
from chameleon_jax.interop.meta.params import port_output_note
from chameleon_jax.tokens.text import TextTokenizer
from chameleon_jax.tokens.text_json import JsonText
from chameleon_jax.tokens.vocabulary import PLACEHOLDER

__all__ = ['is_huggingface', 'open_huggingface', 'write_huggingface']

_BIN = 'pytorch_model.bin'
_MAX_FILE = 64 << 20  # bytes of a JSON file that is kept
_FLOATS = {np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
# Buffers that older versions of the library stored; they follow from the config.
_BUFFER = re.compile(r'(^|\.)rotary_emb\.(original_)?inv_freq$')
_LAYER = re.compile(r'model\.layers\.(\d{1,6})\.')
_VQ_LEVEL = re.compile(r'model\.vqmodel\.encoder\.down\.(\d{1,6})\.(?:block\.(\d{1,6})\.)?')


def is_huggingface(folder: pathlib.Path) -> bool:
  """Whether a folder is a checkpoint of this family: its config.json says so and weights lie beside it. Never raises."""
  folder = pathlib.Path(folder)
  try:
    values = read_json(folder / CONFIG, _MAX_FILE)
  except CheckpointError:
    return False
  if 'format' in values:  # our own folder says what it is
    return False
  architectures = values.get('architectures')
  named = isinstance(architectures, list) and any(isinstance(name, str) and name.startswith('Chameleon') for name in architectures)
  weights = any(True for pattern in ('*.safetensors', 'pytorch_model*.bin') for _ in folder.glob(pattern))
  return (values.get('model_type') == 'chameleon' or named) and weights


def open_huggingface(folder: pathlib.Path) -> LazyModel:
  """Opens a checkpoint; every header is checked, no tensor is read.

  The config's types are those of the language model's tensors where all are bfloat16, else float32.

  Raises:
    CheckpointError: a file is missing or damaged, a tensor is missing, unknown or of another shape than config.json says, or the
      network is none that ours can compute.
  """
  folder = pathlib.Path(folder)
  values = read_json(folder / CONFIG, _MAX_FILE)
  where = str(folder / CONFIG)
  with contextlib.ExitStack() as resources:
    tensors = _open_tensors(folder)
    resources.callback(tensors.close)
    config = huggingface_config.transformer_config(values, where)
    rules = _check_transformer(tensors.specs, config, folder)
    if all(tensors.specs[rule.theirs].dtype == ml_dtypes.bfloat16 for rule in rules.values()):
      config = dataclasses.replace(config, dtype='bfloat16', param_dtype='bfloat16')
    vqgan_config, vqgan_names = _check_vqgan(tensors.specs, values, folder)
    extras = _extras(tensors.specs, {rule.theirs for rule in rules.values()} | set(vqgan_names.values()), folder)
    text, vocabulary, notes = _vocabulary(folder, values, where, config.vocab_size)
    _check_fit(config, vqgan_config, vocabulary, folder)

    def read_transformer(name: str) -> np.ndarray:
      return rules[name].to_ours(tensors.read(rules[name].theirs), config)

    def read_vqgan(name: str) -> np.ndarray:
      return mapping.vqgan_to_ours(name, tensors.read(vqgan_names[name]))

    shapes = mapping.transformer_specs(config)
    transformer = {name: TensorSpec(shape, tensors.specs[rules[name].theirs].dtype) for name, shape in shapes.items()}
    vqgan = None
    if vqgan_config is None:
      notes.append(NO_IMAGE_TOKENIZER)
    else:
      shapes = mapping.vqgan_specs(vqgan_config)
      vqgan = {name: TensorSpec(shapes[name], tensors.specs[theirs].dtype) for name, theirs in vqgan_names.items()}
      if not any(name.startswith('decoder/') for name in vqgan):
        notes.append(NO_DECODER)
        notes += port_output_note(config, decoder=False)
    return LazyModel(
        path=str(folder),
        format='huggingface',
        transformer_config=config,
        transformer=TensorSource(transformer, read_transformer),
        vqgan_config=vqgan_config,
        vqgan=None if vqgan is None else TensorSource(vqgan, read_vqgan),
        vocabulary=vocabulary,
        text_tokenizer=text,
        origin=Origin(
            format='huggingface',
            files=_kept_files(folder),
            extras=TensorSource(
                {EXTRAS_PREFIX + name: tensors.specs[name] for name in extras}, lambda name: tensors.read(name.removeprefix(EXTRAS_PREFIX))
            ),
        ),
        notes=tuple(notes),
        resources=resources.pop_all(),
    )


# -------------------------------------------------------------------------------------------------- files


class _BinFile:
  """One pytorch_model*.bin: a flat dict of tensors."""

  def __init__(self, path: pathlib.Path):
    self._file = CheckedPth(path)
    try:
      self._tensors = self._file.tensors()
    except CheckpointError:
      self._file.close()
      raise
    self.specs: Mapping[str, TensorSpec] = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}

  def read(self, name: str) -> np.ndarray:
    """The values of a tensor, read-only."""
    return self._tensors[name].read()

  def release(self) -> None:
    """See `CheckedPth`, which does so with every reading."""

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _open_tensors(folder: pathlib.Path) -> TensorFile:
  if not any(folder.glob('*.safetensors')):
    if (folder / _BIN).exists():
      return _BinFile(folder / _BIN)
    if (folder / f'{_BIN}.index.json').exists():
      return ShardedTensors(folder / f'{_BIN}.index.json', _BinFile)
  return open_safetensors(folder)


def _kept_files(folder: pathlib.Path) -> dict[str, bytes]:
  """Small JSON files; not the indices, which the weights decide, nor the tokenizer, which travels by itself."""
  found = {}
  for path in sorted(folder.glob('*.json')):
    if path.name in TOKENIZERS or path.name.endswith('.index.json'):
      continue
    try:
      if path.stat().st_size <= _MAX_FILE:
        found[path.name] = path.read_bytes()
    except OSError as error:
      raise CheckpointError(f'{path} cannot be read: {error.strerror or error}') from error
  return found


# ------------------------------------------------------------------------------------------------- checks


def _check_transformer(specs: Mapping[str, TensorSpec], config: TransformerConfig, folder: pathlib.Path) -> dict[str, mapping.Rule]:
  """Our name -> rule, after every tensor was found in its shape. The number of layers comes first: it may be absurd."""
  layers = {match[1] for name in specs if (match := _LAYER.match(name))}
  if len(layers) != config.n_layers:
    raise CheckpointError(f'{folder}: config.json says num_hidden_layers {config.n_layers}, the files hold {len(layers)} layers')
  rules = {rule.ours: rule for rule in mapping.expand(mapping.HUGGINGFACE_RULES, config.n_layers)}
  for rule in rules.values():
    spec = _found(specs, rule.theirs, folder)
    shape = rule.shape(config)
    # Lumina: one row a group, with the heads of a group neighbours (spec model.md 1.4).
    grouped = len(shape) == 2 and '_norm/' in rule.ours and spec.shape[1:] == shape[1:] and spec.shape[0] and shape[0] % spec.shape[0] == 0
    if spec.shape != shape and not grouped:
      _wrong_shape(rule.theirs, spec, shape, folder)
  return rules


def _check_vqgan(
    specs: Mapping[str, TensorSpec], values: Mapping[str, Any], folder: pathlib.Path
) -> tuple[VQGANConfig | None, dict[str, str]]:
  """The config and our name -> their name; (None, {}) where no file holds any."""
  if not any(name.startswith(VQ_PREFIX) for name in specs):
    return None, {}
  config = huggingface_config.vqgan_config(values, str(folder / CONFIG))
  places = [match for name in specs if (match := _VQ_LEVEL.match(name))]
  found = len({match[1] for match in places}), len({match[2] for match in places if match[2]})
  if found != (len(config.channel_multipliers), config.n_res_blocks):
    asked = f'{len(config.channel_multipliers)} levels of {config.n_res_blocks} blocks'
    raise CheckpointError(f'{folder}: vq_config in config.json says {asked}, the files hold {found[0]} levels of {found[1]}')
  base, last = config.base_channels, config.base_channels * config.channel_multipliers[-1]
  first: dict[str, tuple[int, ...]] = {  # the other sizes follow from these
      'encoder.conv_in.weight': (base, 3, 3, 3),
      'encoder.conv_out.weight': (config.z_channels, last, 3, 3),
      'quantize.embedding.weight': (config.n_codes, config.d_code),
  }
  for name, shape in first.items():
    if (spec := _found(specs, VQ_PREFIX + name, folder)).shape != shape:
      _wrong_shape(VQ_PREFIX + name, spec, shape, folder)
  has_decoder = any(name.startswith(f'{VQ_PREFIX}decoder.') for name in specs)
  names = {}
  for ours, our_shape in mapping.vqgan_specs(config, decoder=has_decoder).items():
    names[ours] = theirs = VQ_PREFIX + mapping.vqgan_name(ours)
    shape = mapping.vqgan_their_shape(ours, our_shape)
    if (spec := _found(specs, theirs, folder)).shape != shape:
      _wrong_shape(theirs, spec, shape, folder)
  return config, names


def _found(specs: Mapping[str, TensorSpec], name: str, folder: pathlib.Path) -> TensorSpec:
  if name not in specs:
    raise CheckpointError(f'{folder} lacks the tensor {name}; download it again, or see whether config.json is of another model')
  if specs[name].dtype not in _FLOATS:
    raise CheckpointError(f'{folder}: tensor {name} has the type {specs[name].dtype}; quantised checkpoints are not read')
  return specs[name]


def _wrong_shape(name: str, spec: TensorSpec, shape: tuple[int, ...], folder: pathlib.Path) -> None:
  raise CheckpointError(f'{folder}: tensor {name} has shape {list(spec.shape)}, config.json asks for {list(shape)}')


def _extras(specs: Mapping[str, TensorSpec], known: set[str], folder: pathlib.Path) -> list[str]:
  """Names without a place in our tree: rotary buffers, and whatever a fork keeps in its image tokenizer."""
  extras = [name for name in specs if name not in known]
  for name in extras:
    if not (_BUFFER.search(name) or name.startswith(VQ_PREFIX)):
      raise CheckpointError(f'{folder} has the unknown tensor {brief(name)}: its network is not the one this reads')
  return extras


def _vocabulary(
    folder: pathlib.Path, values: Mapping[str, Any], where: str, size: int
) -> tuple[TextTokenizer | None, VocabularyConfig | None, list[str]]:
  """Text tokenizer, layout of the tokens and notes; the tokenizer file goes first, and must agree with config.json."""
  names = huggingface_config.vocabulary_map(values, where)
  path = next((folder / name for name in TOKENIZERS if (folder / name).exists()), None)
  if path is not None:
    text = JsonText.load(path)
    if names:
      _check_same_names(names, huggingface_config.names_of_tokenizer(text.to_json()), path)
    return text, text.vocabulary_config, []
  if not names:
    return None, None, ['the checkpoint has no tokenizer and no vocabulary_map: texts and pictures cannot become tokens']
  try:
    vocabulary = huggingface_config.vocabulary_of_map(names, size, where)
  except CheckpointError as error:
    return None, None, [f'no vocabulary: {error}']
  return None, vocabulary, [NO_TEXT]


def _check_same_names(names: Mapping[str, int], tokenizer: Mapping[str, int], path: pathlib.Path) -> None:
  """The map of config.json may be shorter, and calls one reserved token `<image>`."""
  for name, token in names.items():
    if name != PLACEHOLDER and tokenizer.get(name) != token:
      there = f'has it at {tokenizer[name]}' if name in tokenizer else 'has no such token'
      raise CheckpointError(f'{path.parent}: vocabulary_map in config.json gives {brief(name)} the id {token}, {path.name} {there}')


def _check_fit(
    transformer: TransformerConfig, vqgan: VQGANConfig | None, vocabulary: VocabularyConfig | None, folder: pathlib.Path
) -> None:
  if vocabulary is None:
    return
  if vocabulary.size != transformer.vocab_size:
    raise CheckpointError(f'{folder}: the tokenizer has {vocabulary.size} tokens, the network {transformer.vocab_size}')
  if vqgan is not None and vqgan.n_codes != vocabulary.n_codes:
    raise CheckpointError(f'{folder}: the image tokenizer has {vqgan.n_codes} codes, the vocabulary {vocabulary.n_codes} image tokens')
