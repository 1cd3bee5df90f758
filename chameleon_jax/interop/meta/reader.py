"""Meta's released form of a Chameleon checkpoint, opened (spec model.md 2): `models/7b` with its shards and `tokenizer` beside it.

Anole's weights in this form (`rope.freqs` without a value) and checkpoints with fused tensors are of it too. Only headers are read on
opening; values are merged from the shards when they are asked for, and their checksums compared then. What the files hold beyond the
model travels in `Origin`:

    files     params.json, consolidate_params.json, vqgan.yaml byte by byte; consolidated.tree.json and vqgan.ckpt.tree.json:
              every key of the .pth files in order, with the values that are no tensors (see `meta.files`)
    extras    'consolidated/NAME' or 'consolidated.00/NAME', 'vqgan.ckpt/NAME' for tensors in its state_dict, 'vqgan.ckpt//WAY' beside it

`meta.writer` writes the form.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.lazy import NO_DECODER, LazyModel, Origin, TensorSource, TensorSpec
from chameleon_jax.interop.mapping import vqgan_name, vqgan_specs, vqgan_their_shape, vqgan_to_ours
from chameleon_jax.interop.meta.files import (
    CHECKLIST,
    TEXT,
    VQGAN,
    CheckedPth,
    check_checklist,
    find_model,
    holds_meta,
    rank_files,
    read_text,
    spec_of,
    tokenizer_folders,
    tree_of,
    verify_checklist,
)
from chameleon_jax.interop.meta.params import CONSOLIDATE, PARAMS, image_output_note, merge, transformer_config
from chameleon_jax.interop.meta.plan import TREE
from chameleon_jax.interop.meta.shards import extra_tensors, gather, transformer_source
from chameleon_jax.interop.meta.vqgan import YAML, vqgan_config
from chameleon_jax.interop.meta.vqgan_plan import STATE_DICT, VQGAN_TREE, extra_name
from chameleon_jax.interop.meta.writer import write_meta
from chameleon_jax.interop.native.folder import ModelParts, check_fit
from chameleon_jax.tokens.text import TextTokenizer
from chameleon_jax.tokens.text_json import JsonText

__all__ = ['image_output_note', 'is_meta', 'open_meta', 'verify_checklist', 'write_meta']


def is_meta(folder: Path) -> bool:
  """Whether a folder is of this form: shards, a `data` folder with models, or the tokenizer alone. Never raises."""
  try:
    return holds_meta(Path(folder))
  except OSError:
    return False


def open_meta(folder: Path, *, tokenizer: Path | None = None, verify_checklist: bool = False) -> LazyModel:
  """Opens a checkpoint; close it, or use it in a `with`.

  Args:
    folder: with the shards (`models/7b`), a `data` folder with one model below `models/`, or one with the tokenizer alone.
    tokenizer: folder with vqgan.ckpt and text_tokenizer.json. Either is looked for there, then beside the shards, in
      ../../tokenizer and in ../tokenizer; where it is in none of them, that part is None.
    verify_checklist: compare all files with the checklist.chk beside them; otherwise the small ones are, where there is one.

  Raises:
    CheckpointError: a file is missing, damaged or of another form, or the parts do not belong together. On reading: a tensor is
      damaged, or should be the same in all shards and is not.
  """
  folder = Path(folder)
  model = find_model(folder)
  places = tokenizer_folders(folder, model, None if tokenizer is None else Path(tokenizer))
  _check_checklists(model, places, everything=verify_checklist)
  with contextlib.ExitStack() as resources:
    values: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    extras: list[TensorSource] = []
    notes: list[str] = []
    n_shards = 1
    if model is not None:
      n_shards = _open_ranks(model, resources, values, files, extras, notes)
    if (place := _holding(places, VQGAN)) is not None:
      _open_vqgan(place, resources, values, files, extras, notes)
    values |= _open_text(places)
    parts = {name: values.get(name) for name in ('transformer_config', 'vqgan_config', 'vocabulary', 'text_tokenizer')}
    check_fit(ModelParts(**parts), where=str(folder))
    origin = Origin(format='meta', n_shards=n_shards, files=files, extras=_united(extras))
    notes += image_output_note(files)
    return LazyModel(path=str(folder), format='meta', origin=origin, notes=tuple(notes), resources=resources.pop_all(), **values)


def _check_checklists(model: Path | None, places: list[Path], *, everything: bool) -> None:
  """The folders that are read from, against the lists in them; `everything`, and one of them must have a list."""
  used = {place for name in (TEXT, VQGAN) if (place := _holding(places, name)) is not None} | ({model} if model else set())
  listing = [folder for folder in sorted(used) if (folder / CHECKLIST).is_file()]
  if everything and not listing:
    searched = ' or '.join(map(str, sorted(used)))
    raise CheckpointError(f'there is no {CHECKLIST} in {searched} to compare the files with; leave the check out')
  for folder in listing:
    check_checklist(folder, weights=everything)


def _open_ranks(
    folder: Path,
    resources: contextlib.ExitStack,
    values: dict[str, Any],
    files: dict[str, bytes],
    extras: list[TensorSource],
    notes: list[str],
) -> int:
  """The transformer; returns the number of shards."""
  paths = rank_files(folder)
  files |= {name: read_text(folder / name) for name in (PARAMS, CONSOLIDATE) if (folder / name).is_file()}
  stated = merge(files, str(folder)).get('model_parallel_size')
  if stated is not None and stated != len(paths):
    raise CheckpointError(f'{folder} has {len(paths)} shards, but its argument files give model_parallel_size {stated}; download it again')
  opened = [_opened(path, resources) for path in paths]
  shards = gather(opened)
  if stated is None:  # it stands in consolidate_params.json, and without that the shapes have to say it
    shards.check_count(str(folder))
  config, found = transformer_config(files, shards.sizes(), str(folder))
  source = transformer_source(shards, config, str(folder))
  if all(spec.dtype == ml_dtypes.bfloat16 for spec in source.specs.values()):
    config = dataclasses.replace(config, dtype='bfloat16', param_dtype='bfloat16')
  values |= {'transformer_config': config, 'transformer': source}
  extras.append(extra_tensors(shards, config))
  trees = {label: _tree(file, notes) for label, file in zip(shards.labels, opened)}
  files[TREE] = json.dumps(trees).encode()
  notes += found
  return len(paths)


def _open_vqgan(
    folder: Path,
    resources: contextlib.ExitStack,
    values: dict[str, Any],
    files: dict[str, bytes],
    extras: list[TensorSource],
    notes: list[str],
) -> None:
  """The image tokenizer; without its decoder where the file has none."""
  file = _opened(folder / VQGAN, resources)
  if not isinstance(file.tree, dict):
    raise CheckpointError(f'{file.path} holds no dict of tensors; download it again')
  prefix = f'{STATE_DICT}.' if isinstance(file.tree.get(STATE_DICT), dict) else ''
  everything = file.tensors()
  tensors = {name.removeprefix(prefix): tensor for name, tensor in everything.items() if name.startswith(prefix)}
  if (folder / YAML).is_file():
    files[YAML] = read_text(folder / YAML)
  config, found = vqgan_config({name: tuple(tensor.shape) for name, tensor in tensors.items()}, files.get(YAML), str(folder))
  decoder = any(name.startswith('decoder.') for name in tensors)
  specs: dict[str, TensorSpec] = {}
  theirs = {ours: vqgan_name(ours) for ours in vqgan_specs(config, decoder=decoder)}
  for ours, shape in vqgan_specs(config, decoder=decoder).items():
    name, expected = theirs[ours], vqgan_their_shape(ours, shape)
    if name not in tensors:
      raise CheckpointError(f'{file.path} has no tensor {name}; it is damaged or of another architecture')
    tensor = tensors[name]
    if tensor.shape != expected:
      raise CheckpointError(f'{file.path}: {name} has shape {list(tensor.shape)}, expected {list(expected)}; it is of another architecture')
    if tensor.dtype.name not in ('float32', 'bfloat16', 'float16', 'float64'):
      raise CheckpointError(f'{file.path}: {name} is {tensor.dtype}, not floating numbers; it is damaged')
    specs[ours] = TensorSpec(shape, tensor.dtype)

  def read(ours: str) -> np.ndarray:
    return vqgan_to_ours(ours, tensors[theirs[ours]].read())

  values |= {'vqgan_config': config, 'vqgan': TensorSource(specs, read)}
  known = {prefix + name for name in theirs.values()}
  others = {f'{VQGAN}/{extra_name(name, prefix)}': tensor for name, tensor in everything.items() if name not in known}
  extras.append(TensorSource({name: spec_of(tensor) for name, tensor in others.items()}, lambda name: others[name].read()))
  if not decoder:
    notes.append(NO_DECODER)
  files[VQGAN_TREE] = json.dumps(_tree(file, notes)).encode()
  notes += found


def _open_text(places: list[Path]) -> dict[str, TextTokenizer | VocabularyConfig]:
  place = _holding(places, TEXT)
  if place is None:
    return {}
  text = JsonText.load(place / TEXT)
  return {'text_tokenizer': text, 'vocabulary': text.vocabulary_config}


def _holding(places: list[Path], name: str) -> Path | None:
  return next((place for place in places if (place / name).is_file()), None)


def _opened(path: Path, resources: contextlib.ExitStack) -> CheckedPth:
  file = CheckedPth(path)
  resources.callback(file.close)
  return file


def _tree(file: CheckedPth, notes: list[str]) -> Any:
  tree, lost = tree_of(file.tree)
  if lost:
    notes.append(f'{file.path.name} holds values that are neither tensors nor plain, which are not kept: {", ".join(lost)[:200]}')
  return tree


def _united(sources: list[TensorSource]) -> TensorSource:
  """Several sources, no name in two of them, as one."""
  source_of = {name: source for source in sources for name in source.specs}
  specs = {name: source.specs[name] for name, source in source_of.items()}
  return TensorSource(specs, lambda name: source_of[name].read(name))
