"""Adapters in the form of Hugging Face's `peft` library, read and written by its names alone.

    DIR/adapter_config.json           peft_type LORA, r, lora_alpha, target_modules, base_model_name_or_path
    DIR/adapter_model.safetensors     base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight  [r, inputs]
                                      base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight  [outputs, r]

Both turn half-split channels, so no channel moves (see `mapping`). What scales otherwise (rslora, a rank or an alpha of its own for some
modules, DoRA, biases) is refused. Does not know how an adapter is trained or added.
"""

import json
import os
import pathlib
import re

import numpy as np

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.safetensors_file import SafetensorsFile, SafetensorsWriter
from chameleon_jax.interop.lazy import TensorSpec
from chameleon_jax.interop.mapping import HUGGINGFACE_RULES
from chameleon_jax.interop.native.adapter import PEFT_FILE, Adapter, Pair
from chameleon_jax.interop.staging import staged
from chameleon_jax.training.lora import TARGETS

_WEIGHTS = 'adapter_model.safetensors'
# Settings that make an adapter something else than W + alpha / r A B of the projections.
_ODD = (
    *('use_rslora', 'use_dora', 'use_qalora', 'use_bdlora', 'rank_pattern', 'alpha_pattern', 'lora_bias', 'modules_to_save'),
    *('fan_in_fan_out', 'layer_replication', 'target_parameters', 'trainable_token_indices', 'alora_invocation_tokens'),
    *('arrow_config', 'kasa_config'),
)
_PREFIX = 'base_model.model.'
_THEIRS = {rule.ours: rule.theirs.removesuffix('.weight') for rule in HUGGINGFACE_RULES if rule.ours.split('/')[-1] in TARGETS}


def save_peft(path: str | os.PathLike[str], adapter: Adapter) -> None:
  """Writes a folder that `peft.PeftModel.from_pretrained` reads beside Hugging Face's form of the base weights.

  Args:
    path: the folder; must not exist.
    adapter: what to write.

  Raises:
    CheckpointError: `path` exists, or writing failed.
  """
  target = pathlib.Path(path).absolute()
  if target.exists():
    raise CheckpointError(f'{target} exists; choose another path')
  tensors: dict[str, np.ndarray] = {}
  for name, (a, b) in adapter.pairs.items():
    stem = _PREFIX + _their_name(name)
    tensors[f'{stem}.lora_A.weight'] = np.ascontiguousarray(a.reshape(-1, adapter.rank).T, np.float32)
    tensors[f'{stem}.lora_B.weight'] = np.ascontiguousarray(b.reshape(adapter.rank, -1).T, np.float32)
  config = {
      'peft_type': 'LORA',
      'task_type': 'CAUSAL_LM',
      'r': adapter.rank,
      'lora_alpha': adapter.alpha,
      'target_modules': sorted({name.split('/')[-1] for name in adapter.pairs}),
      'base_model_name_or_path': None if adapter.base is None else adapter.base.path,
      'bias': 'none',
      'lora_dropout': 0.0,
      'inference_mode': True,
  }
  try:
    with staged(target) as folder:
      specs = {name: TensorSpec(value.shape, value.dtype) for name, value in tensors.items()}
      with SafetensorsWriter(folder, specs, max_shard_bytes=2**62) as writer:
        for name, value in tensors.items():
          writer.write(name, value)
      (folder / 'model.safetensors').rename(folder / _WEIGHTS)
      (folder / PEFT_FILE).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
  except OSError as error:
    raise CheckpointError(f'adapter folder {target} could not be written: {error}') from error


def load_peft(folder: pathlib.Path) -> Adapter:
  """Reads such a folder; pairs come back as matrices, and get their heads from `native.adapter.fitted`.

  Raises:
    CheckpointError: it is damaged, or scales in a way that one rank and one alpha do not say.
  """
  try:
    config = json.loads((folder / PEFT_FILE).read_text(encoding='utf-8'))
    kind, rank, alpha = config['peft_type'], int(config['r']), float(config['lora_alpha'])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f'{folder / PEFT_FILE} is damaged ({type(error).__name__}: {error}); copy the folder again') from error
  odd = [key for key in _ODD if config.get(key)]
  if config.get('bias', 'none') != 'none':
    odd.append('bias')
  if kind != 'LORA' or odd:
    what = odd[0] if odd else f'peft_type {kind!r}'
    raise CheckpointError(f'{folder / PEFT_FILE}: {what} is not read here; merge it with peft first')
  if not (folder / _WEIGHTS).is_file():
    raise CheckpointError(f'{folder} lacks {_WEIGHTS}; copy the folder again')
  sides: dict[str, dict[str, np.ndarray]] = {}
  file = SafetensorsFile(folder / _WEIGHTS)
  try:
    for name in file.specs:
      found = re.fullmatch(rf'{re.escape(_PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight', name)
      if found is None:
        raise CheckpointError(f'{folder / _WEIGHTS} holds {name}, which is no part of a plain adapter; merge it with peft first')
      sides.setdefault(_our_name(found[1], folder), {})[found[2]] = np.asarray(file.read(name), np.float32)
  finally:
    file.close()
  pairs: dict[str, Pair] = {}
  for name, pair in sorted(sides.items()):
    if set(pair) != {'A', 'B'} or pair['A'].shape[0] != rank or pair['B'].shape[-1] != rank:
      raise CheckpointError(f'{folder / _WEIGHTS}: the pair of {name} is not whole, or not of rank {rank}; copy the folder again')
    pairs[name] = pair['A'].T, pair['B'].T
  return Adapter(rank, alpha, pairs)


def _their_name(ours: str) -> str:
  layer = re.match(r'layers_(\d+)/', ours)
  rule = ours if layer is None else f'layers_{{layer}}/{ours[layer.end() :]}'
  return _THEIRS[rule].replace('{layer}', '' if layer is None else layer[1])


def _our_name(theirs: str, folder: pathlib.Path) -> str:
  for ours, pattern in _THEIRS.items():
    found = re.fullmatch(re.escape(pattern).replace(re.escape('{layer}'), r'(\d+)'), theirs)
    if found is not None:
      return ours.replace('{layer}', found[1]) if found.groups() else ours
  raise CheckpointError(f'{folder} adapts {theirs}, which is no projection of a Chameleon transformer')
