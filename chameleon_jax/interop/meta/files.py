"""Which files a Meta checkpoint consists of, and the `.pth` files among them opened for reading (spec model.md 2.1, 2.2, 4.6).

    data/
      tokenizer/   text_tokenizer.json  vqgan.ckpt  vqgan.yaml  checklist.chk
      models/7b/   consolidated.pth                     params.json  consolidate_params.json  checklist.chk
      models/30b/  consolidated.00.pth .. .03.pth       params.json  consolidate_params.json  checklist.chk

What a file holds beside the tensors that the model takes, and in which order, is kept as a *tree*: JSON in which every tensor is a
mark and every container says its kind, since JSON has neither tuples nor keys that are numbers.

    {'rope.freqs': None, 'a': [tensor]}   ->   {"dict": [["rope.freqs", null], ["a", {"list": [{"tensor": 1}]}]]}
"""

import hashlib
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.pickle_reader import brief
from chameleon_jax.interop.files.pth import MAX_DEPTH, LazyTensor, PthFile
from chameleon_jax.interop.lazy import TensorSpec

CHECKLIST = 'checklist.chk'
TEXT, VQGAN = 'text_tokenizer.json', 'vqgan.ckpt'
MODELS, TOKENIZER = 'models', 'tokenizer'
_RANK_FILE = re.compile(r'consolidated\.(\d{2,4})\.pth')
_MAX_TEXT = 64 << 20
_SMALL = ('.json', '.yaml')  # endings of the files that are compared with the checklist on every opening


# ------------------------------------------------------------------------------------------------ folders


def rank_files(folder: Path) -> list[Path]:
  """The files of the ranks in order, [] where there are none: consolidated.pth alone if it is there, else consolidated.NN.pth.

  Raises:
    CheckpointError: the numbers have a gap, or a file of that form has no number.
  """
  whole = folder / 'consolidated.pth'
  if whole.is_file():
    return [whole]
  found = sorted(path.name for path in folder.glob('consolidated.*.pth'))
  numbers = {}
  for name in found:
    if not (match := _RANK_FILE.fullmatch(name)):
      raise CheckpointError(f'{folder / name} counts as a shard but has no number; rename it (consolidated.00.pth, ..) or move it away')
    numbers[int(match[1])] = name
  for rank in range(len(found)):
    if numbers.get(rank) != f'consolidated.{rank:02d}.pth':
      there = ', '.join(found)[:200]
      raise CheckpointError(f'{folder} has {len(found)} shards but no consolidated.{rank:02d}.pth (it has {there}); download it')
  return [folder / name for _, name in sorted(numbers.items())]


def holds_meta(folder: Path) -> bool:
  """Whether there is anything of the form, sound or not."""
  patterns = [f'{place}consolidated{rank}.pth' for place in ('', f'{MODELS}/*/') for rank in ('', '.*')]
  shards = any(path.is_file() for pattern in patterns for path in folder.glob(pattern))
  return shards or any((place / name).is_file() for place in (folder, folder / TOKENIZER) for name in (TEXT, VQGAN))


def find_model(folder: Path) -> Path | None:
  """The folder with the transformer: `folder` itself, or the one model of a `data` folder; None where there is just a tokenizer.

  Raises:
    CheckpointError: there is nothing of a Meta checkpoint, or several models.
  """
  if rank_files(folder):
    return folder
  models = sorted(path for path in (folder / MODELS).glob('*') if path.is_dir() and rank_files(path))
  if len(models) > 1:
    raise CheckpointError(f'{folder} holds several models; give one of {", ".join(str(path) for path in models)}')
  if models:
    return models[0]
  if not holds_meta(folder):
    raise CheckpointError(f"{folder} holds nothing of Meta's format: no consolidated.pth, consolidated.NN.pth, {VQGAN} or {TEXT}")
  return None


def tokenizer_folders(folder: Path, model: Path | None, given: Path | None) -> list[Path]:
  """Where to look for the tokenizers, the nearest first: given, beside the model, data/tokenizer as in the release, ../tokenizer.

  Raises:
    CheckpointError: the given folder has neither of the files.
  """
  if given is not None and not any((given / name).is_file() for name in (TEXT, VQGAN)):
    raise CheckpointError(f'the tokenizer folder {given} has neither {TEXT} nor {VQGAN}; give the folder that holds them')
  if model is None:
    found = [folder, folder / TOKENIZER]
  else:
    place = Path(os.path.abspath(model))
    found = [model, place.parent.parent / TOKENIZER, place.parent / TOKENIZER]
  return ([] if given is None else [given]) + found


def read_text(path: Path) -> bytes:
  """A small file; raises CheckpointError where it cannot be read or is no small one."""
  try:
    if path.stat().st_size > _MAX_TEXT:
      raise CheckpointError(f'{path} has {path.stat().st_size} bytes, more than the {_MAX_TEXT} read here; download it again')
    return path.read_bytes()
  except OSError as error:
    raise CheckpointError(f'{path} cannot be read: {error.strerror or error}') from error


def check_checklist(folder: Path, *, weights: bool) -> None:
  """Compares the files of a folder with its checklist.chk: the small ones that are there, or with `weights` all that it lists.

  A folder without a checklist passes, except with `weights`. Small files cost nothing to compare; shards and vqgan.ckpt would be read
  a second time, and hold checksums of their own, which are compared when a tensor is read.

  Raises:
    CheckpointError: a file differs, or is missing with `weights`; or the checklist is none.
  """
  if not weights and not (folder / CHECKLIST).is_file():
    return
  listed = read_checklist(folder)
  small = [name for name in listed if name.endswith(_SMALL) and (folder / name).is_file()]
  for name in listed if weights else small:
    if not (folder / name).is_file():
      raise CheckpointError(f'{folder / name} is missing, and {CHECKLIST} lists it; download it')
    if _md5(folder / name) != listed[name]:
      what = f'{folder / name} is not the file that {CHECKLIST} lists'
      raise CheckpointError(f'{what}; download it again, or delete {CHECKLIST} if you changed the file yourself')


def verify_checklist(folder: Path) -> list[str]:
  """The names in checklist.chk whose file is missing or has another md5; reads every file whole.

  Raises:
    CheckpointError: there is no checklist, or it is none.
  """
  return [name for name, digest in read_checklist(folder).items() if _md5(folder / name) != digest]


def read_checklist(folder: Path) -> dict[str, str]:
  """Name -> md5 of every file in checklist.chk, whose lines are an md5, two spaces and a name.

  Raises:
    CheckpointError: there is no checklist, or it is none.
  """
  listed = {}
  for line in read_text(folder / CHECKLIST).decode('utf-8', 'replace').splitlines():
    if not line.strip():
      continue
    match = re.fullmatch(r'([0-9a-fA-F]{32}) [ *](\S.*)', line.rstrip())
    if not match or Path(match[2]).name != match[2] or '\0' in match[2]:
      raise CheckpointError(f'{folder / CHECKLIST} has a line {brief(line)}, which is not an md5 and a file name; download it again')
    listed[match[2]] = match[1].lower()
  return listed


def _md5(path: Path) -> str:
  """Empty where the file cannot be read."""
  try:
    with path.open('rb') as file:
      return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
  except OSError:
    return ''


# -------------------------------------------------------------------------------------------------- files


class CheckedPth(PthFile):
  """A checkpoint that compares the checksum of each storage when its values are first read.

  Reading a tensor gives the memory of those read before back to the system: they are maps of the file, and arrays taken
  earlier stay valid, their next use fetches the pages again.
  """

  def __init__(self, path: Path):
    self._sound: set[str] = set()
    super().__init__(path)

  def read_tensor(self, tensor: LazyTensor) -> np.ndarray:
    """See `LazyTensor.read`."""
    if 0 not in tensor.shape:
      name = f'{self._root}/data/{tensor.key}'
      if name not in self._sound:
        self._zip.check(name)
        self._sound.add(name)
      if hasattr(mmap, 'MADV_DONTNEED'):
        self._zip.map(name)[0].madvise(mmap.MADV_DONTNEED)
    return super().read_tensor(tensor)


def spec_of(tensor: LazyTensor) -> TensorSpec:
  """Shape and type of a tensor in a file."""
  return TensorSpec(tuple(tensor.shape), tensor.dtype)


# -------------------------------------------------------------------------------------------------- trees


def tree_of(node: Any) -> tuple[Any, list[str]]:
  """The tree of what a file holds, and the places of values that cannot be kept (bytes, types)."""
  lost: list[str] = []

  def kept(value: Any, name: str) -> bool:
    if isinstance(value, (LazyTensor, dict, list, tuple, str, int, float, type(None))):
      return True
    lost.append(name)
    return False

  def walk(node: Any, name: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
      raise CheckpointError(f'a checkpoint holds itself (at {brief(name)}); download it again, or do not trust it')
    if isinstance(node, LazyTensor):
      return {'tensor': 1}
    if not isinstance(node, (dict, list, tuple)):
      return node
    pairs = [(key, value, _joined(name, key, depth)) for key, value in (node.items() if isinstance(node, dict) else enumerate(node))]
    pairs = [(key, value, place) for key, value, place in pairs if kept(key, place) and kept(value, place)]
    if isinstance(node, dict):
      return {'dict': [[key, walk(value, place, depth + 1)] for key, value, place in pairs]}
    return {'list' if isinstance(node, list) else 'tuple': [walk(value, place, depth + 1) for _, value, place in pairs]}

  return walk(node, '', 0), lost


def tree_from(node: Any, tensor: Callable[[str], TensorSpec], where: str) -> Any:
  """Inverse of `tree_of`: the containers, with `tensor(name)` for each tensor; names are those of `PthFile.tensors()`.

  Raises:
    CheckpointError: `node` is no tree.
  """

  def walk(node: Any, name: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
      raise CheckpointError(f'{where} is nested too deeply')
    if not isinstance(node, dict):
      if isinstance(node, list):
        raise CheckpointError(f'{where} is no tree of a checkpoint; convert it again')
      return node
    if node == {'tensor': 1}:
      return tensor(name)
    kind, parts = next(iter(node.items()), ('', None))
    if kind not in ('dict', 'list', 'tuple') or len(node) != 1 or not isinstance(parts, list):
      raise CheckpointError(f'{where} is no tree of a checkpoint; convert it again')
    if kind == 'dict':
      if not all(isinstance(pair, list) and len(pair) == 2 and not isinstance(pair[0], (list, dict)) for pair in parts):
        raise CheckpointError(f'{where} is no tree of a checkpoint; convert it again')
      return {key: walk(value, _joined(name, key, depth), depth + 1) for key, value in parts}
    values = [walk(value, _joined(name, i, depth), depth + 1) for i, value in enumerate(parts)]
    return values if kind == 'list' else tuple(values)

  return walk(node, '', 0)


def _joined(name: str, key: Any, depth: int) -> str:
  """Name of a value, as `PthFile.tensors()` makes it of the keys that lead to it."""
  label = key if isinstance(key, str) else repr(key)
  return f'{name}.{label}' if depth else label
