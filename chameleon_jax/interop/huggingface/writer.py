"""Writes a checkpoint that `ChameleonForConditionalGeneration.from_pretrained` opens (spec model.md 3), one tensor in memory at a time.

What the format cannot hold is refused before anything is written. What the port cannot use is left out unless asked for: it has no VQ
decoder, and would warn about tensors it does not expect. It always builds the encoder half, from random numbers where the files have
none, and needs a `vocabulary_map` to be built at all; a model without one of these is written, and the notes say so.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from chameleon_jax.config import VQGANConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import mapping
from chameleon_jax.interop.dtypes import DTYPES, cast
from chameleon_jax.interop.files.pickle_reader import brief
from chameleon_jax.interop.files.safetensors_file import SafetensorsWriter
from chameleon_jax.interop.files.shards import parse_json
from chameleon_jax.interop.huggingface import config as huggingface_config
from chameleon_jax.interop.huggingface.config import CONFIG, EXTRAS_PREFIX, NORM_GROUPS, QK_NORM_EPS, TOKENIZERS, VQ_PREFIX
from chameleon_jax.interop.lazy import LazyModel, TensorSpec
from chameleon_jax.tokens.text_export import export_json
from chameleon_jax.tokens.text_json import JsonText
from chameleon_jax.tokens.vocabulary import PLACEHOLDER, Vocabulary, reserved_name

_Tensor = tuple[TensorSpec, Callable[[], np.ndarray]]


def write_huggingface(folder: pathlib.Path, model: LazyModel, *, dtype: str | None = None, decoder: bool | None = None) -> tuple[str, ...]:
  """Writes `model` into an existing, empty folder and returns notes for the user.

  Args:
    folder: where.
    model: what; a checkpoint of this family gives its tensors back bit for bit, with its JSON files as they were where they still fit.
    dtype: type of the language model's tensors ('float32', 'bfloat16', 'float16'); None keeps each as stored. The image tokenizer
      is float32 (its codes flip in less), or as stored where it came from this family.
    decoder: whether to write the VQ decoder. None does where the model came from a checkpoint of this family that had one.

  Raises:
    CheckpointError: the format cannot hold the model, or the folder cannot be written (what was begun is removed).
  """
  folder = pathlib.Path(folder)
  _check_representable(model, dtype, decoder)
  notes: list[str] = []
  tensors = _transformer_tensors(model, dtype) | _vqgan_tensors(model, decoder, notes) | _extras(model)
  files = _json_files(model, tensors, notes)
  written = []
  try:
    for name, content in files.items():
      written.append(folder / name)
      written[-1].write_bytes(content)
    with SafetensorsWriter(folder, {name: spec for name, (spec, _) in tensors.items()}) as writer:
      for name, (_, read) in tensors.items():
        writer.write(name, read())
  except BaseException as error:
    for path in written:
      path.unlink(missing_ok=True)
    if isinstance(error, OSError):
      raise CheckpointError(f'{folder} could not be written: {error.strerror or error}') from error
    raise
  return tuple(notes)


def _check_representable(model: LazyModel, dtype: str | None, decoder: bool | None) -> None:
  config, vqgan = model.transformer_config, model.vqgan_config
  where = f'{model.path} cannot be written in the Hugging Face format'

  def require(condition: bool, reason: str) -> None:
    if not condition:
      raise CheckpointError(f'{where}: {reason}')

  require(dtype is None or dtype in DTYPES, f'the type must be one of {", ".join(DTYPES)}, got {dtype!r}')
  if config is None or model.transformer is None:
    raise CheckpointError(f'{where}: it has no transformer')
  require(config.qk_norm, 'it has no q/k norms (qk_norm False), which the format has no field to say')
  require(config.qk_norm_eps == QK_NORM_EPS, f'qk_norm_eps is {config.qk_norm_eps}, the format fixes it at {QK_NORM_EPS}')
  heads = f'{config.n_heads} heads of {config.d_head} channels'
  require(config.n_heads * config.d_head == config.d_model, f'{heads} are not d_model {config.d_model}, as the format has it')
  if vqgan is None or model.vqgan is None:
    require(not decoder, 'its decoder is asked for, and it has no image tokenizer')
    return
  require(vqgan.patch_size == 1, f'the image tokenizer folds patches (patch_size {vqgan.patch_size}), which the format cannot say')
  require(vqgan.norm_groups == NORM_GROUPS, f'norm_groups is {vqgan.norm_groups}, the format fixes it at {NORM_GROUPS}')
  require(not decoder or any(name.startswith('decoder/') for name in model.vqgan.specs), 'its decoder is asked for, and it has none')
  n_codes = vqgan.n_codes if model.vocabulary is None else model.vocabulary.n_codes
  require(vqgan.n_codes == n_codes, f'the image tokenizer has {vqgan.n_codes} codes, the vocabulary {n_codes}')


# ------------------------------------------------------------------------------------------------ tensors


def _transformer_tensors(model: LazyModel, dtype: str | None) -> dict[str, _Tensor]:
  config, source = model.transformer_config, model.transformer
  assert config is not None and source is not None  # _check_representable
  tensors: dict[str, _Tensor] = {}
  for rule in mapping.rules_for(mapping.HUGGINGFACE_RULES, config):
    kind = source.specs[rule.ours].dtype if dtype is None else DTYPES[dtype]

    def read(rule: mapping.Rule = rule, kind: np.dtype = kind) -> np.ndarray:
      return cast(rule.to_theirs(source.read(rule.ours), config), kind, rule.theirs)

    tensors[rule.theirs] = TensorSpec(rule.shape(config), kind), read
  return tensors


def _vqgan_tensors(model: LazyModel, decoder: bool | None, notes: list[str]) -> dict[str, _Tensor]:
  source, from_family = model.vqgan, model.origin.format == 'huggingface'
  if source is None:
    notes.append('there is no image tokenizer: transformers fills its own with random numbers, so give it no pictures')
    return {}
  with_decoder = from_family if decoder is None else decoder
  tensors: dict[str, _Tensor] = {}
  for name, spec in source.specs.items():
    if name.startswith('decoder/') and not with_decoder:
      continue
    theirs = VQ_PREFIX + mapping.vqgan_name(name)
    kind = spec.dtype if from_family or spec.dtype.itemsize > 4 else DTYPES['float32']  # never rounded

    def read(name: str = name, kind: np.dtype = kind, theirs: str = theirs) -> np.ndarray:
      return cast(mapping.vqgan_to_theirs(name, source.read(name)), kind, theirs)

    tensors[theirs] = TensorSpec(mapping.vqgan_their_shape(name, spec.shape), kind), read
  if not with_decoder and any(name.startswith('decoder/') for name in source.specs):
    notes.append('the image decoder was left out, which transformers does not know: the copy reads pictures and draws none')
  return tensors


def _extras(model: LazyModel) -> dict[str, _Tensor]:
  """Tensors without a place in our tree, back to where they came from."""
  source = model.origin.extras
  if model.origin.format != 'huggingface':
    return {}
  names = [name for name in source.specs if name.startswith(EXTRAS_PREFIX)]
  return {name.removeprefix(EXTRAS_PREFIX): (source.specs[name], functools.partial(source.read, name)) for name in names}


# -------------------------------------------------------------------------------------------------- files


def _json_files(model: LazyModel, tensors: Mapping[str, _Tensor], notes: list[str]) -> dict[str, bytes]:
  """Every small file by its name. Those of the family are kept; config.json changes where the model differs from it."""
  config, from_family = model.transformer_config, model.origin.format == 'huggingface'
  assert config is not None  # _check_representable
  files = dict(model.origin.files) if from_family else {}
  for name in files:
    if name != pathlib.PurePosixPath(name).name or name in TOKENIZERS or '\\' in name or '\0' in name:
      raise CheckpointError(f'{model.path}: {brief(name)} cannot be the name of a file beside a checkpoint')
  base = parse_json(files[CONFIG], f'{model.path}: {CONFIG}') if CONFIG in files else {}
  names: dict[str, int] = {}
  if model.text_tokenizer is not None and model.vocabulary is not None:
    files['tokenizer.json'] = export_json(model.text_tokenizer, model.vocabulary, form='huggingface')
    names = huggingface_config.names_of_tokenizer(files['tokenizer.json'])
  elif model.vocabulary is not None and not base.get('vocabulary_map'):
    names = _names_without_text(model)
    notes.append('there is no text tokenizer: vocabulary_map names special and image tokens alone')
  if not names and not base.get('vocabulary_map'):
    notes.append('there is no vocabulary: transformers needs vocabulary_map in config.json and will not open the copy without it')
  if base.get('vocabulary_map') and {**base['vocabulary_map'], **names} == base['vocabulary_map']:
    names = {}  # it says at least as much
  kind = tensors['lm_head.weight'][0].dtype
  stated = base.get('dtype', base.get('torch_dtype'))
  changed = not base or (stated is not None and stated != kind.name)
  values = huggingface_config.merged(base, config, model.vqgan_config, names, dtype=kind.name if changed else None)
  if values != base:
    files[CONFIG] = _dump(values)
  if not from_family:
    files |= {name: _dump(content) for name, content in _new_files(model).items()}
  return files


def _names_without_text(model: LazyModel) -> dict[str, int]:
  assert model.vocabulary is not None
  vocabulary = Vocabulary(model.vocabulary)
  token = vocabulary.end_turn + 1
  renamed = reserved_name(token)
  return {PLACEHOLDER if name == renamed else name: i for i, name in enumerate(vocabulary.names)}


def _new_files(model: LazyModel) -> dict[str, dict[str, Any]]:
  """What the library wants beside config.json (spec model.md 3.4), for a model that comes from elsewhere."""
  vqgan = model.vqgan_config or VQGANConfig()
  files: dict[str, dict[str, Any]] = {
      'preprocessor_config.json': {
          'image_processor_type': 'ChameleonImageProcessor',
          'processor_class': 'ChameleonProcessor',
          'do_convert_rgb': True,
          'do_resize': True,
          'size': {'shortest_edge': vqgan.resolution},
          'resample': 1,
          'do_center_crop': True,
          'crop_size': {'height': vqgan.resolution, 'width': vqgan.resolution},
          'do_rescale': True,
          'rescale_factor': 0.0078,
          'do_normalize': True,
          'image_mean': [1.0, 1.0, 1.0],
          'image_std': [1.0, 1.0, 1.0],
      },
      'processor_config.json': {
          'processor_class': 'ChameleonProcessor',
          'image_token': PLACEHOLDER,
          'image_seq_length': vqgan.n_image_tokens,
      },
  }
  if model.vocabulary is None:
    return files
  text = model.text_tokenizer
  vocabulary = text.vocabulary if isinstance(text, JsonText) else Vocabulary(model.vocabulary)
  ids = {'bos': vocabulary.begin_sequence, 'eos': vocabulary.end_sequence, 'pad': vocabulary.pad}
  files['generation_config.json'] = {f'{role}_token_id': token for role, token in ids.items()}
  if text is not None:
    roles = {**ids, 'unk': vocabulary.unknown, 'sep': vocabulary.end_turn}
    special = {f'{role}_token': vocabulary.names[token] for role, token in roles.items()}
    files['special_tokens_map.json'] = special
    model_max_length = model.transformer_config.max_seq_len if model.transformer_config else 4096
    files['tokenizer_config.json'] = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'processor_class': 'ChameleonProcessor',
        **special,
        'clean_up_tokenization_spaces': False,
        'model_max_length': model_max_length,
        'padding_side': 'left',
    }
  return files


def _dump(values: Mapping[str, Any]) -> bytes:
  return (json.dumps(values, indent=2, ensure_ascii=False) + '\n').encode()
