"""Meta's image tokenizer: vqgan.yaml, and the config that the tensors of vqgan.ckpt tell (spec model.md 3.3, 4.1, 4.3, 4.6).

All but the picture's size shows in the tensors' shapes, so the yaml is compared with them and gives the size; without a yaml it is
taken for the 512 of the release. GroupNorms have 32 groups and the first convolution sees pixels: neither file has a field for these.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from chameleon_jax.config import VQGANConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.pickle_reader import brief

YAML = 'vqgan.yaml'
RESOLUTION = 512
NORM_GROUPS = 32
_MAX_SIZE = 1 << 24
# The release's file has 1.5 kB and no alias; a few aliases of aliases are enough to ask for more memory than there is.
_MAX_YAML = 64 << 10
_MAX_ALIASES = 16
_MAX_YAML_DEPTH = 32
# Our field -> where it stands below model.params.
_PLACES = {
    'd_code': ('embed_dim',),
    'n_codes': ('n_embed',),
    'z_channels': ('ddconfig', 'z_channels'),
    'resolution': ('ddconfig', 'resolution'),
    'base_channels': ('ddconfig', 'ch'),
    'channel_multipliers': ('ddconfig', 'ch_mult'),
    'n_res_blocks': ('ddconfig', 'num_res_blocks'),
    'dropout': ('ddconfig', 'dropout'),
}
# What our network has no other form of.
_FIXED = {'double_z': False, 'in_channels': 3, 'out_ch': 3, 'attn_type': 'vanilla'}
Shapes = Mapping[str, tuple[int, ...]]


def vqgan_config(shapes: Shapes, data: bytes | None, where: str) -> tuple[VQGANConfig, tuple[str, ...]]:
  """The image tokenizer's config and notes for the user.

  Args:
    shapes: of every tensor of the state dict, under Meta's names.
    data: content of vqgan.yaml, None where there is none.
    where: the folder, for messages.

  Raises:
    CheckpointError: the tensors are of another architecture, the yaml is none, or it contradicts the tensors.
  """
  values = _measured(shapes, where)
  notes: tuple[str, ...] = ()
  if data is None:
    values['resolution'] = RESOLUTION
    notes = (f'there is no {YAML} beside vqgan.ckpt: pictures are taken to be {RESOLUTION} pixels wide, as in the release',)
  else:
    values |= _compared(_params(data, where), values, where)
  try:
    return VQGANConfig(**values, patch_size=1, norm_groups=NORM_GROUPS), notes
  except ValueError as error:
    raise CheckpointError(f'{where}: the image tokenizer does not fit: {error}') from error


def vqgan_yaml(config: VQGANConfig, base: bytes | None) -> bytes:
  """vqgan.yaml of a config; `base`, one of an earlier checkpoint, is kept byte by byte where it says the same, and overlaid where not."""
  wanted = {name: getattr(config, name) for name in _PLACES}
  wanted['channel_multipliers'] = list(config.channel_multipliers)
  content: dict[str, Any] = {'model': {'params': {'ddconfig': {}}}}
  if base is not None:
    params = _params(base, 'the origin')
    given = {name: _at(params, place) for name, place in _PLACES.items()}
    if all(value == given[name] or (name == 'dropout' and given[name] is None) for name, value in wanted.items()):
      return base
    content = yaml.safe_load(base)
  params = content['model']['params']
  for name, place in _PLACES.items():
    target = params
    for key in place[:-1]:
      target = target.setdefault(key, {})
    target[place[-1]] = wanted[name]
  if base is None:
    params['ddconfig'] |= {name: value for name, value in _FIXED.items() if name != 'attn_type'} | {'attn_resolutions': []}
  return yaml.safe_dump(content, sort_keys=False).encode()


def _measured(shapes: Shapes, where: str) -> dict[str, Any]:
  """All fields that the tensors tell."""

  def size(name: str, axis: int, rank: int) -> int:
    if name not in shapes:
      raise CheckpointError(f'{where}: the image tokenizer has no tensor {name}; it is damaged or of another architecture')
    if len(shapes[name]) != rank or 0 in shapes[name]:
      raise CheckpointError(f'{where}: {name} has shape {list(shapes[name])}, not {rank} axes; it is of another architecture')
    return shapes[name][axis]

  strange = next((name for name in shapes if re.match(r'(encoder\.down|decoder\.up)\.\d+\.attn\.', name)), None)
  if strange is not None:
    raise CheckpointError(f'{where}: {strange} is attention inside a level, which our network has only in the middle')
  base = size('encoder.conv_in.weight', 0, 4)
  if size('encoder.conv_in.weight', 1, 4) != 3:
    raise CheckpointError(f'{where}: encoder.conv_in.weight has shape {list(shapes["encoder.conv_in.weight"])}; pictures have 3 channels')
  n_levels = _count(shapes, r'encoder\.down\.(\d{1,3})\.block\.0\.conv1\.weight')
  widths = [size(f'encoder.down.{level}.block.0.conv1.weight', 0, 4) for level in range(n_levels)]
  if not widths or any(width % base for width in widths):
    raise CheckpointError(f'{where}: the levels of the encoder have {widths} channels, no multiples of the first {base}')
  return {
      'n_codes': size('quantize.embedding.weight', 0, 2),
      'd_code': size('quantize.embedding.weight', 1, 2),
      'z_channels': size('encoder.conv_out.weight', 0, 4),
      'base_channels': base,
      'channel_multipliers': tuple(width // base for width in widths),
      'n_res_blocks': _count(shapes, r'encoder\.down\.0\.block\.(\d{1,3})\.conv1\.weight'),
  }


def _count(shapes: Shapes, pattern: str) -> int:
  """How many of the places 0, 1, .. in a row there are."""
  found = {int(match[1]) for name in shapes if (match := re.fullmatch(pattern, name))}
  return next(index for index in range(len(found) + 1) if index not in found)


def _params(data: bytes, where: str) -> dict[str, Any]:
  """The object model.params of the yaml; its objects are followed with _at."""
  try:
    _bounded(data, where)
    content = yaml.safe_load(data)
  except CheckpointError:
    raise
  except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
    raise CheckpointError(f'{where}/{YAML} is not valid YAML: {" ".join(str(error).split())[:120]}; download it again') from error
  params = _at(content, ('model', 'params'))
  if not isinstance(params, dict) or not isinstance(params.get('ddconfig'), dict):
    raise CheckpointError(f'{where}/{YAML} has no model.params with a ddconfig; download it again')
  return params


def _bounded(data: bytes, where: str) -> None:
  """Raises CheckpointError where reading the yaml could take more than a moment: too long, too deep, too many aliases."""
  if len(data) > _MAX_YAML:
    raise CheckpointError(f'{where}/{YAML} has {len(data)} bytes, more than the {_MAX_YAML} read here; download it again')
  depth = n_aliases = 0
  for event in yaml.parse(data, Loader=yaml.SafeLoader):
    depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
    n_aliases += isinstance(event, yaml.AliasEvent)
    if depth > _MAX_YAML_DEPTH or n_aliases > _MAX_ALIASES:
      what = f'lists deeper than {_MAX_YAML_DEPTH}' if depth > _MAX_YAML_DEPTH else f'more than {_MAX_ALIASES} aliases'
      raise CheckpointError(f'{where}/{YAML} has {what}, which no released file has; download it again')


def _at(node: Any, place: tuple[str, ...]) -> Any:
  for key in place:
    node = node.get(key) if isinstance(node, dict) else None
  return node


def _compared(params: dict[str, Any], measured: dict[str, Any], where: str) -> dict[str, Any]:
  """The fields that only the yaml gives; the others must agree with the tensors where they are there."""
  for name, value in _FIXED.items():
    given = _at(params, ('ddconfig', name))
    if given is not None and given != value:
      raise CheckpointError(f'{where}/{YAML}: {name} is {brief(given)}; our network knows only {value}')
  for name, value in measured.items():
    given = _at(params, _PLACES[name])
    given = tuple(given) if isinstance(given, list) else given
    if given is not None and given != value:
      stated = list(map(brief, given[:8])) if isinstance(given, tuple) else brief(given)
      raise CheckpointError(f'{where}/{YAML}: {_PLACES[name][-1]} is {stated}, but {value} in vqgan.ckpt; they do not belong together')
  resolution, dropout = _at(params, _PLACES['resolution']), _at(params, _PLACES['dropout'])
  if type(resolution) is not int or not 0 < resolution <= _MAX_SIZE:
    raise CheckpointError(f'{where}/{YAML}: ddconfig.resolution is {brief(resolution)}, which is no size of a picture')
  dropout = 0.0 if dropout is None else dropout
  if type(dropout) not in (int, float) or not 0 <= dropout <= 1:
    raise CheckpointError(f'{where}/{YAML}: ddconfig.dropout is {brief(dropout)}, which is no share')
  return {'resolution': resolution, 'dropout': float(dropout)}
