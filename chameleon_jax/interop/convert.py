"""Converts a checkpoint of any format to any other, tensor by tensor, and reads the result back.

The target is written beside its place and renamed (`staging`), after every tensor read back from it was compared with the
source bit by bit. What each format holds and where: `lazy`; how one is told from another: `opening`.
"""

import dataclasses
import fnmatch
import functools
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Literal

import numpy as np

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.dtypes import cast
from chameleon_jax.interop.lazy import Format, LazyModel, TensorSource, TensorSpec
from chameleon_jax.interop.meta.files import MODELS, TOKENIZER
from chameleon_jax.interop.native.adapter import with_adapter
from chameleon_jax.interop.native.lazy import write_native
from chameleon_jax.interop.notices import LICENCES, write_notices
from chameleon_jax.interop.opening import detect_format, load_parts, open_checkpoint
from chameleon_jax.interop.read_back import compare
from chameleon_jax.interop.staging import clear_leftovers, file_errors, signals_as_exceptions, staged

__all__ = ['ConversionReport', 'Progress', 'convert', 'detect_format', 'load_parts', 'open_checkpoint']

FORMATS: tuple[Format, ...] = ('orbax', 'meta', 'huggingface')
# What may lie in a folder that --overwrite removes: the files and folders of checkpoints, and what hubs put beside them.
_PARTS = (
    *('*.json', '*.pth', '*.ckpt', '*.yaml', '*.chk', '*.safetensors', '*.bin', '*.model', '*.jinja'),
    *('transformer', 'image_tokenizer', 'origin', 'models', 'tokenizer', *LICENCES, 'README*', '.gitattributes', '.gitignore', '.cache'),
)
_SMALL_FILES = 64 << 20  # bytes set aside for tokenizers, configs and the gaps of the file system


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far a conversion is: tensors and bytes done of all, in its first ('writing') or second ('verifying') half."""

  phase: Literal['writing', 'verifying']
  tensors: int
  n_tensors: int
  nbytes: int
  n_nbytes: int


@dataclasses.dataclass(frozen=True)
class ConversionReport:
  """What was done. `n_bytes` counts the values as they are stored now; `notes` are sentences for the user."""

  source: str
  source_format: Format
  target: str
  target_format: Format
  n_tensors: int
  n_bytes: int
  verified: bool
  notes: tuple[str, ...]

  def lines(self) -> list[str]:
    """What to tell the user: the notes, then what was written."""
    checked = ', read back and compared' if self.verified else ''
    size = f'{self.n_tensors:,} tensors, {self.n_bytes / 1e9:,.2f} GB'
    return [*(f'note: {note}' for note in self.notes), f'wrote {self.target}: {self.target_format}, {size}{checked}']


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    target_format: str,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    n_shards: int | None = None,
    dtype: str | None = None,
    decoder: bool | None = None,
    overwrite: bool = False,
    verify: bool = True,
    verify_checklist: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConversionReport:
  """Writes the checkpoint `source` as `target` in another format, or in the same one.

  Memory stays near the largest tensor, or the largest layer where one side is our own format. An error or a signal leaves nothing
  behind; SIGTERM and SIGHUP raise `SystemExit` meanwhile.

  Args:
    source: folder, its format is detected.
    target: folder to make.
    target_format: 'orbax' is ours.
    tokenizer: see `open_checkpoint`.
    adapter: folder of a LoRA adapter that is added to the weights.
    n_shards: model-parallel shards of a Meta checkpoint; by default as many as the source has, if it ever was one.
    dtype: type to store the transformer in; None keeps the type of each tensor.
    decoder: whether a Hugging Face target keeps the picture decoder, for which transformers has no place; by default one
      that came from a folder of that family with a decoder (Anole) does.
    overwrite: replace a checkpoint that is at `target`; the old one goes when the new one is whole.
    verify: read the target back and compare.
    verify_checklist: compare every file of a Meta source, the weights included, with its checklist.chk first; see `open_checkpoint`.
    on_progress: called after every tensor.

  Raises:
    CheckpointError: the source is damaged, the format cannot hold it, `target` exists, the disk is too small, or what was
      written reads back differently.
  """
  source, target = pathlib.Path(source).absolute(), pathlib.Path(target).absolute()
  kind = next((known for known in FORMATS if known == target_format), None)
  if kind is None:
    raise CheckpointError(f'unknown format {target_format!r}; the formats are {", ".join(FORMATS)}')
  if n_shards is not None and target_format != 'meta':
    raise CheckpointError(f'n_shards is for targets in the form of Meta, not for {target_format}; leave it out')
  if decoder is not None and target_format != 'huggingface':
    raise CheckpointError(f'decoder is for targets in the form of Hugging Face, not for {target_format}, which keeps it; leave it out')
  with file_errors(f'{target} cannot be looked at'):
    target = _real(target) if target.is_symlink() else target
    clear_leftovers(target)  # before it is asked whether there is a target: an interrupted replacement may have to be undone
    _check_places(source, target, tokenizer, overwrite=overwrite)
  with open_checkpoint(source, tokenizer=tokenizer, verify_checklist=verify_checklist) as model:
    model = model if adapter is None else with_adapter(model, adapter, dtype=dtype)
    planned = {'transformer': _stored(model.transformer, dtype), 'vqgan': _stored(model.vqgan, None)}
    n_tensors = sum(map(len, planned.values()))
    n_bytes = sum(spec.nbytes for specs in planned.values() for spec in specs.values())
    if not n_tensors and model.text_tokenizer is None:
      raise CheckpointError(f'{source} holds no weights and no text tokenizer; there is nothing to convert')
    _check_space(target, n_bytes + sum(spec.nbytes for spec in model.origin.extras.specs.values()))
    report = _Counter(n_tensors, n_bytes, on_progress)
    with file_errors(f'{target} could not be written'), signals_as_exceptions(), staged(target) as folder:
      write = _writer(kind, n_shards=n_shards, dtype=dtype, decoder=decoder)
      notes = (*model.notes, *(write(folder, report.watch(model, 'writing')) or ()))
      write_notices(folder, source, model, tokenizer=None if tokenizer is None else pathlib.Path(tokenizer))
      if verify:
        with open_checkpoint(folder) as written:
          compare(report.watch(model, 'verifying'), written, dtype, target)
    return ConversionReport(str(source), model.format, str(target), kind, n_tensors, n_bytes, verify, notes)


def _writer(
    target_format: Format, *, n_shards: int | None, dtype: str | None, decoder: bool | None
) -> Callable[[pathlib.Path, LazyModel], tuple[str, ...] | None]:
  """The function that writes into an empty folder; it may return notes. The other families are loaded only when asked for."""
  if target_format == 'meta':
    from chameleon_jax.interop.meta.reader import write_meta

    return functools.partial(write_meta, n_shards=n_shards, dtype=dtype)
  if target_format == 'huggingface':
    from chameleon_jax.interop.huggingface.writer import write_huggingface

    return functools.partial(write_huggingface, dtype=dtype, decoder=decoder)
  return functools.partial(write_native, dtype=dtype)


# ---------------------------------------------------------------------------------------------- beforehand


def _real(path: pathlib.Path) -> pathlib.Path:
  """The path with its links followed; `Path.resolve` raises on a circle of them, in some versions no OSError."""
  return pathlib.Path(os.path.realpath(path))


def _check_places(source: pathlib.Path, target: pathlib.Path, tokenizer: str | os.PathLike[str] | None, *, overwrite: bool) -> None:
  """Refuses to write over anything that is needed or that is no checkpoint."""
  inputs = [source] if tokenizer is None else [source, pathlib.Path(tokenizer)]
  if detect_format(source) == 'meta':  # whose tokenizer is found by itself, and would go before it is read back
    inputs += [folder / TOKENIZER for folder in source.parents[:2] if (folder / TOKENIZER).is_dir()]
  place = _real(target)
  for given in inputs:
    if place == _real(given):
      raise CheckpointError(f'{target} is itself a folder to read from; choose another target')
    if place in _real(given).parents or _real(given) in place.parents:
      raise CheckpointError(f'{target} and {given} lie one inside the other; choose another target')
  if not os.path.lexists(target):
    return
  if not overwrite:
    raise CheckpointError(f'{target} exists; choose another target, or give --overwrite to replace the checkpoint there')
  if not target.is_dir():
    raise CheckpointError(f'{target} is a file; choose another target')
  models = [path for path in target.glob(f'{MODELS}/*') if path.is_dir()]
  if len(models) > 1:
    raise CheckpointError(f'{target} holds {len(models)} models, so it is not replaced; choose another target')
  for folder in (target, target / TOKENIZER, target / MODELS, *models):
    found = sorted(path for path in folder.iterdir() if path not in models) if folder.is_dir() else []
    for path in found:
      if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _PARTS):
        name = path.relative_to(target)
        raise CheckpointError(f'{target} holds {name}, which is no part of a checkpoint, so it is not replaced; choose another target')
  if any(target.iterdir()) and detect_format(target) is None:
    raise CheckpointError(f'{target} is no checkpoint, so it is not replaced; choose another target')


def _check_space(target: pathlib.Path, nbytes: int) -> None:
  parent = target.parent
  while not parent.exists():
    parent = parent.parent
  free, needed = shutil.disk_usage(parent).free, nbytes + nbytes // 64 + _SMALL_FILES
  if free < needed:
    sizes = f'needs {needed:,} bytes ({needed / 2**30:.1f} GiB) of disk, {free:,} are free'
    raise CheckpointError(f'{target} {sizes} in {parent}; make room first')


def _stored(source: TensorSource | None, dtype: str | None) -> dict[str, TensorSpec]:
  """Shapes and types as they will be stored."""
  specs = {} if source is None else source.specs
  return {name: TensorSpec(spec.shape, cast(np.empty(0, spec.dtype), dtype).dtype) for name, spec in specs.items()}


class _Counter:
  """Tells how far a conversion is, by the tensors that were asked for."""

  def __init__(self, n_tensors: int, n_bytes: int, report: Callable[[Progress], None] | None):
    self._n_tensors, self._n_bytes, self._report = n_tensors, n_bytes, report

  def watch(self, model: LazyModel, phase: Literal['writing', 'verifying']) -> LazyModel:
    """The same model, whose readers report."""
    report = self._report
    if report is None:
      return model
    done: dict[str, int] = {}

    def watched(part: str, source: TensorSource | None) -> TensorSource | None:
      if source is None:
        return None

      def read(name: str) -> np.ndarray:
        values = source.read(name)
        done[f'{part}/{name}'] = source.specs[name].nbytes
        report(Progress(phase, len(done), self._n_tensors, sum(done.values()), self._n_bytes))
        return values

      return TensorSource(source.specs, read)

    return dataclasses.replace(model, transformer=watched('transformer', model.transformer), vqgan=watched('vqgan', model.vqgan))
