"""Meta's two argument files, `params.json` and `consolidate_params.json`, read and written (spec model.md 1.2, 2.2).

The arguments of a model are the top level of params.json, overlaid with its object "model", overlaid with consolidate_params.json; names
that are not among Meta's fields count for nothing. Sizes are measured at the tensors and only compared here. Does not know the tensors'
names.

The released files are gated and were not seen; which fields they give is known from the programs that read them. The longest row has
no field: where it is not the usual one it stands in an object "chameleon_jax" of params.json, which Meta's loader drops.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from chameleon_jax import presets
from chameleon_jax.config import TransformerConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.shards import parse_json

PARAMS = 'params.json'
CONSOLIDATE = 'consolidate_params.json'
OURS = 'chameleon_jax'
MAX_SEQ_LEN = 4096  # of both released models; the arguments have no field for it
QK_NORM_EPS = 1e-5  # fixed in Meta's code

_DEFAULTS: dict[str, Any] = {
    'model_parallel_size': 1,
    'dim': 512,
    'n_layers': 8,
    'n_heads': 8,
    'n_kv_heads': None,
    'vocab_size': -1,
    'ffn_dim_multiplier': None,
    'multiple_of': 256,
    'norm_eps': 1e-5,
    'rope_theta': 10000.0,
    'qk_normalization': False,
    'swin_norm': False,
}
_OPTIONAL = ('n_kv_heads', 'ffn_dim_multiplier')
_FRACTIONS = ('ffn_dim_multiplier', 'norm_eps', 'rope_theta')
_SUPPRESSED = (
    'in the release image output is suppressed, so unless they were trained since, pictures they write will be noise; '
    'use the weights of Anole, or retrain the image columns of lm_head'
)
_SHORT_TYPES = {'bfloat16': 'bf16', 'float16': 'fp16', 'float32': 'fp32', 'float64': 'fp64'}


@dataclass(frozen=True)
class Sizes:
  """What the tensors tell of a network; `d_head` is None without q/k norms, and then only n_heads of params.json tells it."""

  vocab_size: int
  d_model: int
  n_layers: int
  q_rows: int
  kv_rows: int
  d_ff: int
  d_head: int | None


def merge(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
  """The fields that the files give, without defaults.

  Args:
    files: params.json and, where there is one, consolidate_params.json, by these names.
    where: the folder, for messages.

  Raises:
    CheckpointError: params.json is missing, a file is no JSON object, or a field has a value it cannot have.
  """
  if PARAMS not in files:
    raise CheckpointError(f'{where} has no {PARAMS}; the order of the norms (swin_norm) stands nowhere else, so download it too')
  params = parse_json(files[PARAMS], f'{where}/{PARAMS}')
  model = params.get('model', {})
  if not isinstance(model, dict):
    raise CheckpointError(f'{where}/{PARAMS}: "model" is a {type(model).__name__}, not an object')
  consolidate = parse_json(files[CONSOLIDATE], f'{where}/{CONSOLIDATE}') if CONSOLIDATE in files else {}
  merged = {name: value for name, value in (params | model | consolidate).items() if name in _DEFAULTS}
  for name, value in merged.items():
    _check(name, value, where)
  return merged


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
  """Every argument of Meta's code."""
  return _DEFAULTS | dict(given)


def ffn_width(dim: int, multiplier: float | None, multiple_of: int) -> int:
  """Inner width that Meta's code gives a feed-forward layer: 4096 -> 11008 and 8192 -> 22016 with a multiple of 256."""
  width = int(2 * (4 * dim) / 3)
  if multiplier is not None:
    width = int(multiplier * width)
  return multiple_of * math.ceil(width / multiple_of)


def transformer_config(files: Mapping[str, bytes], sizes: Sizes, where: str) -> tuple[TransformerConfig, tuple[str, ...]]:
  """The network, in float32 with unrolled layers, and notes for the user.

  Args:
    files: the argument files, as `merge` takes them.
    sizes: as measured; fields that are given must agree with them, but for the inner width, where the tensors win.
    where: the folder, for messages.

  Raises:
    CheckpointError: a field contradicts the tensors, or the sizes fit no network.
  """
  given = merge(files, where)
  if sizes.d_head is None and 'n_heads' not in given:
    raise CheckpointError(f'{where}/{PARAMS} gives no n_heads, and without q/k norms the tensors do not tell it; add it')
  d_head = sizes.q_rows // given['n_heads'] if sizes.d_head is None else sizes.d_head
  if d_head < 1 or sizes.q_rows % d_head or sizes.kv_rows % d_head:
    raise CheckpointError(f'{where}: {sizes.q_rows} query and {sizes.kv_rows} key rows do not split into heads of {d_head} channels')
  measured = {
      'dim': sizes.d_model,
      'n_layers': sizes.n_layers,
      'n_heads': sizes.q_rows // d_head,
      'n_kv_heads': sizes.kv_rows // d_head,
      'vocab_size': sizes.vocab_size,
      'qk_normalization': sizes.d_head is not None,
  }
  for name, value in measured.items():
    stated = given.get(name)
    if stated is not None and stated != value and not (name == 'vocab_size' and stated <= 0):
      raise CheckpointError(f'{where}: the argument files give {name} {stated}, the tensors {value}; they belong to different models')
  if sizes.q_rows != sizes.d_model:
    raise CheckpointError(f'{where}: {sizes.q_rows} query rows and width {sizes.d_model}: heads of Meta split the width among them')
  arguments = with_defaults(given)
  try:
    config = TransformerConfig(
        vocab_size=sizes.vocab_size,
        d_model=sizes.d_model,
        n_layers=sizes.n_layers,
        n_heads=measured['n_heads'],
        n_kv_heads=measured['n_kv_heads'],
        d_head=d_head,
        d_ff=sizes.d_ff,
        max_seq_len=_max_seq_len(files, where),
        norm_position='post' if arguments['swin_norm'] else 'pre',
        norm_eps=float(arguments['norm_eps']),
        qk_norm=sizes.d_head is not None,
        qk_norm_eps=QK_NORM_EPS,
        rope_theta=float(arguments['rope_theta']),
        scan_layers=False,
    )
  except ValueError as error:
    raise CheckpointError(f'{where}: {error}') from error
  width = ffn_width(sizes.d_model, arguments['ffn_dim_multiplier'], arguments['multiple_of'])
  if width == sizes.d_ff:
    return config, ()
  return config, (f'{PARAMS} works out to an inner width of {width}, the tensors have {sizes.d_ff}: the tensors are followed',)


def argument_files(config: TransformerConfig, n_shards: int, stored: np.dtype, base: Mapping[str, bytes]) -> dict[str, bytes]:
  """params.json and consolidate_params.json of a network.

  Args:
    config: the network.
    n_shards: model-parallel shards.
    stored: type of the stored tensors.
    base: files of an earlier Meta checkpoint, by name; theirs are kept byte by byte where they say the same, and changed in the
      fields that differ where not.
  """
  wanted: dict[str, Any] = {
      'model_parallel_size': n_shards,
      'dim': config.d_model,
      'n_layers': config.n_layers,
      'n_heads': config.n_heads,
      'n_kv_heads': config.n_kv_heads,
      'vocab_size': config.vocab_size,
      'norm_eps': config.norm_eps,
      'rope_theta': config.rope_theta,
      'qk_normalization': config.qk_norm,
      'swin_norm': config.norm_position == 'post',
  }
  short = _SHORT_TYPES.get(stored.name, stored.name)
  if PARAMS not in base:
    params: dict[str, Any] = {'model': {name: value for name, value in wanted.items() if name != 'model_parallel_size'}}
    params['model'] |= _ffn_arguments(config)
    if config.max_seq_len != MAX_SEQ_LEN:
      params[OURS] = {'max_seq_len': config.max_seq_len}
    return {PARAMS: _dump(params), CONSOLIDATE: _dump({'model_parallel_size': n_shards, 'dtype': short, 'tokenizer_path': None})}

  before = with_defaults(merge(base, 'the origin'))
  before['n_kv_heads'] = before['n_heads'] if before['n_kv_heads'] is None else before['n_kv_heads']
  if before['vocab_size'] <= 0:
    before['vocab_size'] = config.vocab_size
  changes = {name: value for name, value in wanted.items() if before[name] != value}
  if ffn_width(config.d_model, before['ffn_dim_multiplier'], before['multiple_of']) != config.d_ff:
    changes |= _ffn_arguments(config)
  params = parse_json(base[PARAMS], PARAMS)
  consolidate = parse_json(base[CONSOLIDATE], CONSOLIDATE) if CONSOLIDATE in base else {}
  if consolidate.get('dtype', short) != short:
    changes['dtype'] = short
  files: dict[str, bytes] = {name: base[name] for name in (PARAMS, CONSOLIDATE) if name in base}
  longest = _max_seq_len(base, 'the origin')
  if longest != config.max_seq_len:
    params[OURS] = {'max_seq_len': config.max_seq_len}
  for name, value in changes.items():
    late = name in consolidate or name == 'model_parallel_size'
    target = consolidate if late else params.get('model', params)
    target[name] = value
  if longest != config.max_seq_len or any(name not in consolidate for name in changes):
    files[PARAMS] = _dump(params)
  if any(name in consolidate for name in changes):
    files[CONSOLIDATE] = _dump(consolidate)
  return files


def image_output_note(files: Mapping[str, bytes]) -> tuple[str, ...]:
  """One sentence where consolidate_params.json says that the weights had their image output taken out (spec model.md 2.2, 9)."""
  try:
    values = parse_json(files.get(CONSOLIDATE, b'{}'), CONSOLIDATE)
  except CheckpointError:
    return ()
  if not any('noimggen' in str(values.get(name)) for name in ('src', 'tgt')):
    return ()
  return (f'{CONSOLIDATE} names these weights "noimggen": {_SUPPRESSED}',)


def port_output_note(config: TransformerConfig, *, decoder: bool) -> tuple[str, ...]:
  """The same sentence for the port, which has no file that says so: its copies of the release have these sizes and no picture decoder."""
  name = release_name(config)
  if decoder or name is None:
    return ()
  return (f'without a picture decoder and of the sizes of {name} these may be the release itself: {_SUPPRESSED}',)


def release_name(config: TransformerConfig) -> str | None:
  """Which model of the release has these sizes, '7b' or '30b'."""
  fields = ('vocab_size', 'd_model', 'n_layers', 'n_heads', 'n_kv_heads', 'd_head', 'd_ff', 'norm_position')
  for name, preset in (('7b', presets.chameleon_7b()), ('30b', presets.chameleon_34b())):
    if all(getattr(config, field) == getattr(preset, field) for field in fields):
      return name
  return None


def _check(name: str, value: Any, where: str) -> None:
  default = _DEFAULTS[name]
  if value is None and name in _OPTIONAL:
    return
  if isinstance(default, bool):
    fits = isinstance(value, bool)
  else:
    kinds = (int, float) if name in _FRACTIONS else (int,)
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    fits = fits and (name == 'vocab_size' or 0 < value < (1e30 if name in _FRACTIONS else 2**31))
  if not fits:
    raise CheckpointError(f'{where}: argument {name} is {str(value)[:40]!r}, which is no value for it; download {PARAMS} again')


def _max_seq_len(files: Mapping[str, bytes], where: str) -> int:
  ours = parse_json(files[PARAMS], f'{where}/{PARAMS}').get(OURS)
  value = ours.get('max_seq_len', MAX_SEQ_LEN) if isinstance(ours, dict) else MAX_SEQ_LEN
  if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
    raise CheckpointError(f'{where}/{PARAMS}: max_seq_len is {str(value)[:40]!r}, which is no length')
  return value


def _ffn_arguments(config: TransformerConfig) -> dict[str, Any]:
  """Arguments from which Meta's formula gives the network's inner width."""
  width, plain = config.d_ff, ffn_width(config.d_model, None, 1)
  # The half lets int() come to the width whatever the division lost.
  choices: list[tuple[float | None, int]] = [(None, 256), (None, width), ((width + 0.5) / plain, 1)]
  for multiplier, multiple_of in choices:
    if ffn_width(config.d_model, multiplier, multiple_of) == width:
      return {'ffn_dim_multiplier': multiplier, 'multiple_of': multiple_of}
  raise CheckpointError(f"no ffn_dim_multiplier gives the inner width {width} at width {config.d_model}: Meta's format cannot hold it")


def _dump(value: dict[str, Any]) -> bytes:
  return (json.dumps(value, indent=2) + '\n').encode()
