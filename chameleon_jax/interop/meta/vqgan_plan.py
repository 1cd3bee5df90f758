"""What vqgan.ckpt of a model will hold, settled before it is written (spec model.md 4.6), and the names of what it holds beside the model.

    state_dict.encoder.conv_in.weight   the model's
    state_dict.loss.logvar              extra 'vqgan.ckpt/loss.logvar'
    optimizer.state                     extra 'vqgan.ckpt//optimizer.state', beside the state_dict

Which of the last two kinds the released file has is not established; it is some 6 MB larger than the model's own tensors.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.shards import parse_json
from chameleon_jax.interop.lazy import LazyModel, TensorSpec
from chameleon_jax.interop.mapping import vqgan_name, vqgan_specs, vqgan_their_shape
from chameleon_jax.interop.meta.files import VQGAN, tree_from
from chameleon_jax.interop.meta.plan import Extra, declared
from chameleon_jax.interop.meta.vqgan import NORM_GROUPS

VQGAN_TREE = 'vqgan.ckpt.tree.json'
STATE_DICT = 'state_dict'


@dataclass(frozen=True)
class VQGANPlan:
  """vqgan.ckpt: its tree, name in the file -> our name, and the extras by name in the file."""

  tree: dict[str, Any]
  ours: Mapping[str, str]
  extras: Mapping[str, Extra]


def plan_vqgan(model: LazyModel) -> VQGANPlan | None:
  """The image tokenizer's file, None without one.

  Raises:
    CheckpointError: the format cannot hold it.
  """
  config, source = model.vqgan_config, model.vqgan
  where = f"{model.path} cannot be written in Meta's format"
  if config is None or source is None:
    return None
  if config.patch_size != 1:
    raise CheckpointError(f'{where}: the image tokenizer folds patches (patch_size {config.patch_size}), which the format cannot say')
  if config.norm_groups != NORM_GROUPS:
    raise CheckpointError(f'{where}: the image tokenizer has norm_groups {config.norm_groups}, and the format fixes them at {NORM_GROUPS}')
  missing = next((name for name in vqgan_specs(config) if name not in source.specs), None)
  if missing is not None:
    raise CheckpointError(
        f'{where}: the image tokenizer has no {missing}, and the format asks for encoder and decoder; give a folder that has a whole '
        'vqgan.ckpt as the tokenizer'
    )
  theirs = {vqgan_name(name): name for name in vqgan_specs(config)}
  specs = {name: TensorSpec(vqgan_their_shape(ours, source.specs[ours].shape), source.specs[ours].dtype) for name, ours in theirs.items()}
  if model.origin.format != 'meta' or VQGAN_TREE not in model.origin.files:
    return VQGANPlan({STATE_DICT: specs}, {f'{STATE_DICT}.{name}': ours for name, ours in theirs.items()}, {})
  stored = parse_json(model.origin.files[VQGAN_TREE], f'{model.path}: {VQGAN_TREE}')
  extra_specs = {name.partition('/')[2]: spec for name, spec in model.origin.extras.specs.items() if name.startswith(f'{VQGAN}/')}
  prefix = f'{STATE_DICT}.' if has_state_dict(stored) else ''
  in_file = {prefix + name: spec for name, spec in specs.items()} | {place_of(name, prefix): spec for name, spec in extra_specs.items()}
  tree = tree_from(stored, functools.partial(declared, in_file, where), VQGAN_TREE)
  inside = tree.get(STATE_DICT) if prefix else tree
  if not isinstance(inside, dict):
    raise CheckpointError(f'{where}: {VQGAN_TREE} of its origin is no tree of a checkpoint; convert it again')
  inside |= {name: spec for name, spec in specs.items() if name not in inside}
  read = model.origin.extras.read
  extras = {place_of(name, prefix): Extra(spec, functools.partial(read, f'{VQGAN}/{name}')) for name, spec in extra_specs.items()}
  return VQGANPlan(tree, {prefix + name: ours for name, ours in theirs.items()}, extras)


def has_state_dict(stored: Any) -> bool:
  """Whether a stored tree has its tensors below 'state_dict'."""
  pairs = stored.get('dict') if isinstance(stored, dict) else None
  return isinstance(pairs, list) and any(isinstance(pair, list) and pair[:1] == [STATE_DICT] for pair in pairs)


def extra_name(place: str, prefix: str) -> str:
  """What a tensor of vqgan.ckpt is called among the extras: as below state_dict; one beside it is '/' and the whole way to it."""
  return place.removeprefix(prefix) if place.startswith(prefix) else f'/{place}'


def place_of(name: str, prefix: str) -> str:
  """Inverse of `extra_name`."""
  return name[1:] if prefix and name.startswith('/') else prefix + name
