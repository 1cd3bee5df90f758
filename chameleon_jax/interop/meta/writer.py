"""Writes a checkpoint in the layout of Meta's release (spec model.md 2), each tensor read once and one in memory at a time.

    FOLDER/models/7b/    consolidated.pth or consolidated.NN.pth, params.json, consolidate_params.json, checklist.chk
    FOLDER/tokenizer/    text_tokenizer.json, vqgan.ckpt, vqgan.yaml, checklist.chk

The model's folder is called 7b or 30b where it has their sizes, else model. `meta.open_meta(FOLDER)` opens it again. What goes where
is settled in `meta.plan` and `meta.vqgan_plan` before anything is written.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.dtypes import cast
from chameleon_jax.interop.files.pth_writer import PthWriter
from chameleon_jax.interop.lazy import LazyModel
from chameleon_jax.interop.mapping import Rule, vqgan_to_theirs
from chameleon_jax.interop.meta.files import CHECKLIST, MODELS, TEXT, TOKENIZER, VQGAN
from chameleon_jax.interop.meta.params import argument_files, release_name
from chameleon_jax.interop.meta.plan import TransformerPlan, plan_transformer
from chameleon_jax.interop.meta.shards import FUSED, FUSED_NAME, joined
from chameleon_jax.interop.meta.vqgan import YAML, vqgan_yaml
from chameleon_jax.interop.meta.vqgan_plan import VQGANPlan, plan_vqgan
from chameleon_jax.tokens.text_export import export_json


def write_meta(folder: Path, model: LazyModel, *, n_shards: int | None = None, dtype: str | None = None) -> tuple[str, ...]:
  """Writes `model` into an existing folder that holds neither models/ nor tokenizer/; returns notes for the user.

  Args:
    folder: where.
    model: what; a checkpoint that came from Meta gives its tensors back bit for bit under the same names, and its small files
      byte for byte where they still say what the model is.
    n_shards: model-parallel shards. None: as many as the checkpoint had if it came from Meta, else the fewest that hold its q/k norms.
    dtype: type of the transformer's tensors ('float32', 'bfloat16', 'float16'); None keeps each as stored. The image tokenizer
      keeps its own: its codes flip in less than float32.

  Raises:
    CheckpointError: the format cannot hold the model, or not in that many shards (nothing is written then); a tensor is damaged, or
      the folder cannot be written (what was begun is removed).
  """
  folder = Path(folder)
  transformer, vqgan = plan_transformer(model, n_shards, dtype), plan_vqgan(model)
  text = _text(model)
  if transformer is None and vqgan is None and text is None:
    raise CheckpointError(f"{model.path} cannot be written in Meta's format: it holds no weights and no text tokenizer")
  base = dict(model.origin.files) if model.origin.format == 'meta' else {}
  arguments: dict[str, bytes] = {}
  if transformer is not None:
    arguments = argument_files(transformer.config, len(transformer.labels), transformer.kinds['lm_head'], base)
  small = {} if text is None else {TEXT: text}
  if model.vqgan_config is not None and vqgan is not None:
    small[YAML] = vqgan_yaml(model.vqgan_config, base.get(YAML))
  for name in (MODELS, TOKENIZER):
    if (folder / name).exists():
      raise CheckpointError(f'{folder / name} exists already; write into an empty folder')
  try:
    if transformer is not None:
      place = folder / MODELS / (release_name(transformer.config) or 'model')
      place.mkdir(parents=True)
      sums = _write_ranks(place, model, transformer)
      _write_small(place, arguments, sums)
    if vqgan is not None or small:
      place = folder / TOKENIZER
      place.mkdir(parents=True)
      sums = {} if vqgan is None else {VQGAN: _write_vqgan(place, model, vqgan)}
      _write_small(place, small, sums)
  except BaseException as error:
    for name in (MODELS, TOKENIZER):
      shutil.rmtree(folder / name, ignore_errors=True)
    if isinstance(error, OSError):
      raise CheckpointError(f'{folder} could not be written: {error.strerror or error}') from error
    raise
  if model.vocabulary is not None and text is None:
    return (f'there is no text tokenizer, and without {TEXT} this format does not say which tokens are which',)
  return ()


def _text(model: LazyModel) -> bytes | None:
  if model.text_tokenizer is None:
    return None
  if model.vocabulary is None:
    raise CheckpointError(f"{model.path} cannot be written in Meta's format: it has a text tokenizer but no vocabulary")
  return export_json(model.text_tokenizer, model.vocabulary, form='meta')


def _write_small(place: Path, files: Mapping[str, bytes], sums: Mapping[str, str]) -> None:
  """The small files of a folder, and the checklist of all."""
  for name, data in files.items():
    (place / name).write_bytes(data)
  sums = dict(sums) | {name: hashlib.md5(data, usedforsecurity=False).hexdigest() for name, data in files.items()}
  (place / CHECKLIST).write_text(''.join(f'{md5}  {name}\n' for name, md5 in sums.items()))


def _write_ranks(place: Path, model: LazyModel, plan: TransformerPlan) -> dict[str, str]:
  """All rank files at once; returns name -> md5."""
  assert model.transformer is not None  # it has a plan
  waiting: dict[str, dict[str, np.ndarray]] = {}
  with contextlib.ExitStack() as stack:
    writers = [stack.enter_context(PthWriter(place / f'{label}.pth', tree)) for label, tree in zip(plan.labels, plan.trees)]
    for rule in plan.rules:
      full = rule.to_theirs(model.transformer.read(rule.ours), plan.config)
      kind = plan.kinds[rule.ours]
      fused = plan.fused.get(rule.theirs)
      if fused is None:
        for rank, writer in enumerate(writers):
          writer.write(rule.theirs, cast(_slice(rule, full, rank, len(writers)), kind, rule.theirs))
        continue
      match = FUSED_NAME.fullmatch(fused)
      assert match is not None  # `plan` found it so
      parts = [match[1] + part for part in FUSED[match[2]]]
      waiting.setdefault(fused, {})[rule.theirs] = full
      if len(waiting[fused]) < len(parts):
        continue
      rules = {rule.theirs: rule for rule in plan.rules if rule.theirs in parts}
      values = waiting.pop(fused)
      for rank, writer in enumerate(writers):
        slices = [_slice(rules[part], values[part], rank, len(writers)) for part in parts]
        writer.write(fused, cast(joined(slices, 0), kind, fused))
    for writer, extras in zip(writers, plan.extras):
      for name, extra in extras.items():
        writer.write(name, extra.read())
  return {writer.path.name: writer.md5 for writer in writers}


def _slice(rule: Rule, full: np.ndarray, rank: int, n: int) -> np.ndarray:
  """One rank's part of a full tensor; of the norms, one of its heads, which `plan` found to be alike."""
  if rule.axis is None:
    return full
  if rule.axis == 'rank':
    return full[rank * (len(full) // n)]
  size = full.shape[rule.axis] // n
  return full[(slice(None),) * rule.axis + (slice(rank * size, (rank + 1) * size),)]


def _write_vqgan(place: Path, model: LazyModel, plan: VQGANPlan) -> str:
  """vqgan.ckpt; returns its md5."""
  assert model.vqgan is not None  # it has a plan
  with PthWriter(place / VQGAN, plan.tree) as writer:
    for name, ours in plan.ours.items():
      writer.write(name, vqgan_to_theirs(ours, model.vqgan.read(ours)))
    for name, extra in plan.extras.items():
      writer.write(name, extra.read())
  return writer.md5
