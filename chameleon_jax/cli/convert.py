"""Converts weights between our form, Meta's and Hugging Face's, in any direction.

    chameleon convert --source=models/7b --target=weights/7b --target_format=orbax
    chameleon convert --source=weights/7b --target=hf/7b --target_format=huggingface
    chameleon convert --source=Anole-7b-v0.1 --target=meta/7b --target_format=meta --n_shards=1
    chameleon convert --source=runs/sft/model --export_tokenizer=text_tokenizer.json
    chameleon convert --source=weights/7b --adapter=runs/lora/adapter --target=weights/7b-tuned --target_format=orbax
    chameleon convert --adapter=runs/lora/adapter --export_peft=peft/tuned

The source's format is told by its files: Meta's release, Hugging Face's port, Anole, Lumina-mGPT, or ours. Meta's tokenizer folder
is found where the release has it (`models/7b` beside `tokenizer`), else name it with --tokenizer. Memory stays near the largest
tensor. The target appears when it is whole and was compared with the source tensor by tensor; an interrupted
conversion leaves nothing behind.
"""

import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from chameleon_jax.errors import ConfigError

if TYPE_CHECKING:
  from chameleon_jax.interop.convert import Progress

_LINE_EVERY = 0.1  # seconds


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('source', None, "folder with the weights to read, or 'emoji' for those shipped with the package")
  flags.DEFINE_string('target', None, 'folder to make')
  flags.DEFINE_enum('target_format', None, ['orbax', 'meta', 'huggingface'], 'form to write; orbax is ours')
  flags.DEFINE_string('tokenizer', None, "folder with text_tokenizer.json and vqgan.ckpt, where they are not in the release's layout")
  flags.DEFINE_string('adapter', None, "folder of a LoRA adapter, ours or peft's, to add to the weights")
  flags.DEFINE_string('export_peft', None, "folder to write --adapter to in the form of Hugging Face's peft; needs no --source")
  flags.DEFINE_integer('n_shards', None, 'shards of a Meta target (default: as many as the source had)', lower_bound=1)
  flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16', 'float16'], 'type to store the transformer in (default: as it is)')
  flags.DEFINE_bool('decoder', None, 'keep the picture decoder in a Hugging Face target, as Anole does (default: if the source is one)')
  flags.DEFINE_bool('overwrite', False, 'replace the checkpoint at --target, once the new one is whole')
  flags.DEFINE_bool('verify', True, 'read the target back and compare it with the source')
  flags.DEFINE_bool('verify_checklist', False, "compare every file of Meta's release, weights included, with its checklist.chk first")
  flags.DEFINE_string('export_tokenizer', None, 'file to write the text tokenizer to, as a text_tokenizer.json; needs no --target')


def main(argv: Sequence[str]) -> int:
  """Runs the command."""
  from chameleon_jax.chameleon import shipped_path
  from chameleon_jax.interop.convert import convert

  if len(argv) > 1:
    raise ConfigError(f'unexpected argument {argv[1]!r}')
  values = flags.FLAGS
  if values.export_peft is not None:
    return _export_peft()
  if values.source is None:
    raise ConfigError('--source=DIR is needed: the folder with the weights')
  source = pathlib.Path(values.source)
  if not source.exists():
    source = shipped_path(values.source) or source
  converts = values.target is not None or values.target_format is not None
  if not converts and values.export_tokenizer is None:
    raise ConfigError('nothing to do: give --target=DIR and --target_format=FORMAT, or --export_tokenizer=FILE')
  if converts and (values.target is None or values.target_format is None):
    raise ConfigError(f'--{"target=DIR" if values.target is None else "target_format=orbax|meta|huggingface"} is needed as well')
  export = None if values.export_tokenizer is None else pathlib.Path(values.export_tokenizer)
  exported = b'' if export is None else _exported_tokenizer(source, export)
  if not converts:
    _write(export, exported)
    return 0
  line = _ProgressLine()
  try:
    report = convert(
        source,
        values.target,
        values.target_format,
        tokenizer=values.tokenizer,
        adapter=values.adapter,
        n_shards=values.n_shards,
        dtype=values.dtype,
        decoder=values.decoder,
        overwrite=values.overwrite,
        verify=values.verify,
        verify_checklist=values.verify_checklist,
        on_progress=line if sys.stderr.isatty() else None,
    )
  finally:
    line.end()
  print('\n'.join(report.lines()))
  _write(export, exported)  # after the conversion, which leaves nothing behind where it fails
  return 0


def _export_peft() -> int:
  from chameleon_jax.interop.huggingface.peft import save_peft
  from chameleon_jax.interop.native.adapter import load_adapter

  values = flags.FLAGS
  if values.adapter is None or values.target is not None or values.source is not None:
    raise ConfigError('--export_peft=DIR needs --adapter=DIR, and neither --source nor --target')
  save_peft(values.export_peft, load_adapter(values.adapter))
  print(f'wrote {values.export_peft}')
  return 0


def _exported_tokenizer(source: pathlib.Path, path: pathlib.Path) -> bytes:
  """The source's text tokenizer as one file: in Hugging Face's form where `path` is called tokenizer.json, else in Meta's.

  Raises:
    ChameleonError: there is none, or `path` exists or lies in the target.
  """
  from chameleon_jax.interop.opening import open_checkpoint
  from chameleon_jax.tokens.text_export import export_json

  values = flags.FLAGS
  if path.is_dir():
    raise ConfigError(f'--export_tokenizer={path} is a folder; name a file')
  if path.exists() and not values.overwrite:
    raise ConfigError(f'{path} exists; choose another name, or give --overwrite')
  if values.target is not None and os.path.realpath(values.target) in map(str, pathlib.Path(os.path.realpath(path)).parents):
    raise ConfigError(f'--export_tokenizer={path} lies in the target, which holds its own text tokenizer; choose another place')
  with open_checkpoint(source, tokenizer=values.tokenizer) as model:
    if model.text_tokenizer is None or model.vocabulary is None:
      raise ConfigError(f'{source} holds no text tokenizer to export')
    form = 'huggingface' if path.name == 'tokenizer.json' else 'meta'
    return export_json(model.text_tokenizer, model.vocabulary, form=form)  # type: ignore[arg-type]


def _write(path: pathlib.Path | None, data: bytes) -> None:
  from chameleon_jax.interop.staging import file_errors
  from chameleon_jax.tokens.text import write_file

  if path is None:
    return
  with file_errors(f'{path} could not be written'):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data)
  print(f'wrote {path}')


class _ProgressLine:
  """One line on stderr that is written over and over."""

  def __init__(self) -> None:
    self._last = 0.0
    self._width = 0

  def __call__(self, progress: 'Progress') -> None:
    now = time.monotonic()
    if now - self._last < _LINE_EVERY and progress.tensors < progress.n_tensors:
      return
    self._last = now
    sizes = f'{progress.nbytes / 1e9:.2f} / {progress.n_nbytes / 1e9:.2f} GB'
    text = f'{progress.phase}: {progress.tensors:,} / {progress.n_tensors:,} tensors, {sizes}'
    print(f'\r{text:<{self._width}}', end='', file=sys.stderr, flush=True)
    self._width = len(text)

  def end(self) -> None:
    """Leaves the line as it is, the cursor on the next."""
    if self._width:
      print(file=sys.stderr)
    self._width = 0
