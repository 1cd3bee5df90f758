"""config.json of Hugging Face checkpoints, read into our configs and written from them (spec model.md 3.3 and 3.4).

Releases, forks and versions of the library spell the same field in two ways and leave out what equals a default of the class; every
spelling is read, and two that contradict each other are an error. What our networks cannot compute (biases, tied embeddings, scaled
rotary embeddings, attention inside the VQ levels) is refused here by name. Knows no tensors.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from chameleon_jax.config import TransformerConfig, VocabularyConfig, VQGANConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.pickle_reader import brief
from chameleon_jax.tokens import text_forms
from chameleon_jax.tokens.vocabulary import IMAGE_PREFIX, PLACEHOLDER, Vocabulary, config_of_names, is_known_special

CONFIG = 'config.json'
TOKENIZERS = ('tokenizer.json', 'text_tokenizer.json')
VQ_PREFIX = 'model.vqmodel.'
EXTRAS_PREFIX = 'model.safetensors/'  # of names in Origin.extras, whatever the files were called
ARCHITECTURES = ('ChameleonForConditionalGeneration', 'ChameleonForCausalLM')
NORM_GROUPS = 32  # of every GroupNorm of the port; its config has no field for it
QK_NORM_EPS = 1e-5  # likewise, whatever rms_norm_eps says (spec model.md 1.4)
_MAX_SIZE = 1 << 24
_MAX_NUMBER = 1e30
_ROPE = ('rope_theta', 'rope_scaling', 'rope_parameters')

# Our field -> its spellings, the newest first, and the default of the library's class.
_SIZES: dict[str, tuple[tuple[str, ...], int]] = {
    'vocab_size': (('vocab_size',), 65_536),
    'd_model': (('hidden_size',), 4096),
    'd_ff': (('intermediate_size',), 11_008),
    'n_layers': (('num_hidden_layers',), 32),
    'n_heads': (('num_attention_heads',), 32),
    'max_seq_len': (('max_position_embeddings',), 4096),
}
_VQ_SIZES: dict[str, tuple[tuple[str, ...], int]] = {
    'd_code': (('embed_dim',), 256),
    'n_codes': (('num_embeddings', 'n_embed'), 8192),
    'z_channels': (('latent_channels', 'z_channels'), 256),
    'resolution': (('resolution',), 512),
    'base_channels': (('base_channels', 'ch'), 128),
    'n_res_blocks': (('num_res_blocks',), 2),
}
_MULTIPLIERS = ('channel_multiplier', 'ch_mult')


class _Fields:
  """Typed look-ups in a JSON object; `where` opens every message."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self._values, self.where = values, where

  def get(self, names: tuple[str, ...], default: Any) -> Any:
    """The value under any of its names; null counts as absent."""
    found = [(name, self._values[name]) for name in names if self._values.get(name) is not None]
    for name, value in found[1:]:
      if value != found[0][1]:
        raise CheckpointError(f'{self.where}: {found[0][0]} and {name} mean the same but differ; correct one of them')
    return found[0][1] if found else default

  def size(self, names: tuple[str, ...], default: int) -> int:
    return self._size(names[0], self.get(names, default))

  def sizes(self, names: tuple[str, ...], default: tuple[int, ...]) -> tuple[int, ...]:
    values = self.get(names, list(default))
    if not isinstance(values, list) or not 0 < len(values) <= 16:
      raise CheckpointError(f'{self.where}: {names[0]} must be a list of 1 to 16 numbers, got {brief(str(values))}')
    return tuple(self._size(names[0], value) for value in values)

  def number(self, names: tuple[str, ...], default: float) -> float:
    value = self.get(names, default)
    if type(value) not in (int, float) or not 0 <= value < _MAX_NUMBER:
      raise CheckpointError(f'{self.where}: {names[0]} must be a number of at least 0, got {brief(str(value))}')
    return float(value)

  def flag(self, names: tuple[str, ...], default: bool) -> bool:
    value = self.get(names, default)
    if type(value) is not bool:
      raise CheckpointError(f'{self.where}: {names[0]} must be true or false, got {brief(str(value))}')
    return value

  def table(self, name: str) -> dict[str, Any]:
    value = self._values.get(name) or {}
    if not isinstance(value, dict):
      raise CheckpointError(f'{self.where}: {name} must be an object, got {brief(str(value))}')
    return value

  def refuse(self, names: tuple[str, ...], value: Any, reason: str) -> None:
    raise CheckpointError(f'{self.where}: {names[0]} is {brief(str(value))}; {reason}')

  def _size(self, name: str, value: Any) -> int:
    if type(value) is not int or not 0 < value <= _MAX_SIZE:
      raise CheckpointError(f'{self.where}: {name} must be a whole number from 1 to {_MAX_SIZE}, got {brief(str(value))}')
    return value


def transformer_config(values: Mapping[str, Any], where: str) -> TransformerConfig:
  """The transformer that config.json describes, in float32 with unrolled layers.

  Args:
    values: the JSON object; what it lacks has the default of the library's class.
    where: what errors call it.

  Raises:
    CheckpointError: a field has no usable value, or the network it describes is none of ours.
  """
  fields = _Fields(values, where)
  for name in ('attention_bias', 'mlp_bias'):
    if fields.flag((name,), False):
      fields.refuse((name,), True, 'the released networks have no biases in their projections and ours has no place for them')
  if fields.flag(('tie_word_embeddings',), False):
    fields.refuse(('tie_word_embeddings',), True, 'ours keeps embedding and output apart; save it untied, with an lm_head.weight')
  if (act := fields.get(('hidden_act',), 'silu')) not in ('silu', 'swish'):
    fields.refuse(('hidden_act',), act, 'only silu is known')
  sizes = {ours: fields.size(names, default) for ours, (names, default) in _SIZES.items()}
  n_heads = sizes['n_heads']
  # The class default is 32 as for the 7B; a written null means as many as query heads.
  absent = n_heads if 'num_key_value_heads' in values else 32
  if values.get('head_dim') is None and sizes['d_model'] % n_heads:
    raise CheckpointError(f'{where}: hidden_size {sizes["d_model"]} is not a multiple of num_attention_heads {n_heads}; give head_dim')
  return _built(
      TransformerConfig,
      where,
      **sizes,
      n_kv_heads=fields.size(('num_key_value_heads',), absent),
      d_head=fields.size(('head_dim',), sizes['d_model'] // n_heads),
      norm_position='post' if fields.flag(('swin_norm',), False) else 'pre',
      norm_eps=fields.number(('rms_norm_eps',), 1e-5),
      qk_norm_eps=QK_NORM_EPS,
      rope_theta=_rope_theta(fields),
      init_std=fields.number(('initializer_range',), 0.02),
      scan_layers=False,
  )


def _rope_theta(fields: _Fields) -> float:
  thetas = {'rope_theta': fields.get(('rope_theta',), None)}
  for table in ('rope_parameters', 'rope_scaling'):
    part = fields.table(table)
    for name in ('rope_type', 'type'):
      if part.get(name) not in (None, 'default', 'none'):
        fields.refuse((f'{table}.{name}',), part[name], 'only unscaled rotary embeddings (default) are known')
    if part.get('partial_rotary_factor') not in (None, 1, 1.0):
      fields.refuse((f'{table}.partial_rotary_factor',), part['partial_rotary_factor'], 'ours turns all channels')
    thetas[f'{table}.rope_theta'] = part.get('rope_theta')
  given = {name: value for name, value in thetas.items() if value is not None}
  theta = _Fields(given, fields.where).number(tuple(given) or ('rope_theta',), 10_000.0)
  if theta < 1:
    fields.refuse(('rope_theta',), theta, 'it must be at least 1')
  return theta


def vqgan_config(values: Mapping[str, Any], where: str) -> VQGANConfig:
  """The image tokenizer that `vq_config` describes; errors as `transformer_config`."""
  table, where = _Fields(values, where).table('vq_config'), f'{where}: vq_config'
  fields = _Fields(table, where)
  if resolutions := fields.get(('attn_resolutions',), []):
    fields.refuse(('attn_resolutions',), resolutions, 'ours has attention in the middle block alone, as the release')
  if fields.flag(('double_latent', 'double_z'), False):
    fields.refuse(('double_latent', 'double_z'), True, 'ours has one set of latents, as the release')
  if (kind := fields.get(('attn_type',), 'vanilla')) != 'vanilla':
    fields.refuse(('attn_type',), kind, 'only vanilla is known')
  for names in (('in_channels',), ('out_channels', 'out_ch')):
    if (channels := fields.get(names, 3)) != 3:
      fields.refuse(names, channels, 'ours takes and gives RGB pictures')
  sizes = {ours: fields.size(names, default) for ours, (names, default) in _VQ_SIZES.items()}
  multipliers = fields.sizes(_MULTIPLIERS, (1, 1, 2, 2, 4))
  dropout = fields.number(('dropout',), 0.0)
  return _built(VQGANConfig, where, **sizes, channel_multipliers=multipliers, dropout=dropout, norm_groups=NORM_GROUPS)


def _built(kind: type, where: str, **values: Any) -> Any:
  try:
    return kind(**values)
  except ValueError as error:
    raise CheckpointError(f'{where}: {error}') from error


def vocabulary_map(values: Mapping[str, Any], where: str) -> dict[str, int]:
  """Token name -> id as config.json has it, {} where it has none.

  Raises:
    CheckpointError: an id is no token of the vocabulary, or two names share one.
  """
  found = values.get('vocabulary_map') or {}
  size = _Fields(values, where).size(*_SIZES['vocab_size'])
  if not isinstance(found, dict) or not all(type(token) is int and 0 <= token < size for token in found.values()):
    raise CheckpointError(f'{where}: vocabulary_map must give every name an id from 0 to {size - 1}')
  names: dict[int, str] = {}
  for name, token in found.items():
    if token in names:
      raise CheckpointError(f'{where}: vocabulary_map gives {brief(names[token])} and {brief(name)} the same id {token}')
    names[token] = name
  return found


def vocabulary_of_map(names: Mapping[str, int], size: int, where: str) -> VocabularyConfig:
  """The layout behind a `vocabulary_map`, for checkpoints without a tokenizer file.

  Special and image tokens must stand in the order of the release, since a layout alone cannot say another one; the names of
  text tokens need not be there.

  Raises:
    CheckpointError: a token is missing, or stands elsewhere than in the release.
  """
  name_of = {token: name for name, token in names.items()}
  leading: list[str] = []
  while len(leading) in name_of and (name_of[len(leading)].startswith(IMAGE_PREFIX) or is_known_special(name_of[len(leading)])):
    leading.append(name_of[len(leading)])
  try:
    config = config_of_names(leading, size)
    expected = Vocabulary(config).names
  except CheckpointError as error:
    raise CheckpointError(f'{where}: vocabulary_map: {error}') from error
  for token, (name, usual) in enumerate(zip(leading, expected)):
    if name not in (usual, PLACEHOLDER):
      raise CheckpointError(f'{where}: vocabulary_map has {brief(name)} at id {token}, the release {brief(usual)}; add the tokenizer.json')
  return config


def names_of_tokenizer(data: bytes) -> dict[str, int]:
  """Token name -> id of every token in a tokenizer file of either form; raises CheckpointError where it is none."""
  return {name: token for token, name in enumerate(text_forms.token_names(text_forms.parse_content(data)))}


# ------------------------------------------------------------------------------------------------ writing


def merged(
    base: Mapping[str, Any], transformer: TransformerConfig, vqgan: VQGANConfig | None, names: Mapping[str, int], *, dtype: str | None
) -> dict[str, Any]:
  """The object to write as config.json.

  Args:
    base: that of the checkpoint the weights came from, {} where there is none. What it says about the model stays as it is spelled if
      it says the same, and is replaced otherwise.
    transformer: the transformer; its fields that the format can hold.
    vqgan: the image tokenizer, None if there is none.
    names: token name -> id, {} keeps what is there.
    dtype: name of the type of the language model's tensors; None keeps what is there.
  """
  values = dict(base) or {
      'architectures': [ARCHITECTURES[0]],
      'model_type': 'chameleon',
      'attention_dropout': 0.0,
      'model_parallel_size': 1,
      'use_cache': True,
      'bos_token_id': 0,
      'eos_token_id': 2,
      'pad_token_id': None,
  }
  values['model_type'] = 'chameleon'
  if not set(values.get('architectures') or ()) & set(ARCHITECTURES):
    values['architectures'] = [ARCHITECTURES[0]]
  if not base or not _same(transformer, _if_readable(transformer_config, base)):
    spelled = {name for names, _ in _SIZES.values() for name in names} | {'num_key_value_heads', 'head_dim', *_ROPE}
    values = {name: value for name, value in values.items() if name not in spelled} | _transformer_fields(transformer)
  if vqgan is not None and (not base.get('vq_config') or not _same(vqgan, _if_readable(vqgan_config, base))):
    old = _Fields(base, 'config.json').table('vq_config')
    spelled = {name for names, _ in _VQ_SIZES.values() for name in names} | set(_MULTIPLIERS)
    values['vq_config'] = {name: value for name, value in old.items() if name not in spelled} | _vqgan_fields(vqgan)
  if names and dict(names) != values.get('vocabulary_map'):
    values['vocabulary_map'] = dict(names)
  if dtype is not None:
    spelling = 'dtype' if 'dtype' in values else 'torch_dtype'
    values[spelling] = dtype
  return values


def _transformer_fields(config: TransformerConfig) -> dict[str, Any]:
  fields: dict[str, Any] = {names[0]: getattr(config, ours) for ours, (names, _) in _SIZES.items()}
  return fields | {
      'num_key_value_heads': config.n_kv_heads,
      'hidden_act': 'silu',
      'attention_bias': False,
      'mlp_bias': False,
      'tie_word_embeddings': False,
      'swin_norm': config.norm_position == 'post',
      'rms_norm_eps': config.norm_eps,
      'initializer_range': config.init_std,
      'rope_theta': config.rope_theta,
      'rope_parameters': {'rope_theta': config.rope_theta, 'rope_type': 'default'},
  }


def _vqgan_fields(config: VQGANConfig) -> dict[str, Any]:
  fields: dict[str, Any] = {names[0]: getattr(config, ours) for ours, (names, _) in _VQ_SIZES.items()}
  return fields | {
      'model_type': 'chameleon_vqgan',
      'channel_multiplier': list(config.channel_multipliers),
      'in_channels': 3,
      'double_latent': False,
      'attn_resolutions': [],
      'attn_type': 'vanilla',
      'dropout': config.dropout,
  }


def _if_readable(read: Any, base: Mapping[str, Any]) -> Any:
  try:
    return read(base, 'config.json')
  except CheckpointError:
    return None


def _same(config: Any, other: Any) -> bool:
  """Whether two configs agree in all that config.json can hold; types, dropout and the like are not its business."""
  apart = {'dropout', 'init_std', 'dtype', 'param_dtype', 'scan_layers', 'remat', 'commitment_weight', 'codebook_weight'}
  apart |= {'attention_implementation'}
  names = [field.name for field in dataclasses.fields(config) if field.name not in apart]
  return other is not None and all(getattr(config, name) == getattr(other, name) for name in names)
