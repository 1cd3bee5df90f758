"""Source `image_folder:FOLDER`: picture files, each with its caption. Captions are looked for in this order:

    FOLDER/metadata.jsonl    {"file_name": "a/cat.png", "text": "A cat."} a line, as Hugging Face's folders have it
    FOLDER/captions.jsonl    the same, or captions.json: {"a/cat.png": "A cat."}, a list of such objects, or COCO's annotations
    FOLDER/a/cat.txt         beside the picture, one caption
    FOLDER/a/                else the name of the folder the picture is in, `a`, as its class

With a list of captions only the pictures it names are read, and a picture may have several captions.

    ?form=... ?order=... (see pairs.py)   ?validation=SHARE (see files.py; by the name of the picture)
"""

import json
import pathlib
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from chameleon_jax.data.sources.files import find_files, held_out, split_argument
from chameleon_jax.data.sources.naming import SourceName
from chameleon_jax.data.sources.pairs import OPTIONS, PairForm, texts_of
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document
from chameleon_jax.tokens.images import load_image

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp', '.tif', '.tiff')
LISTS = ('metadata.jsonl', 'captions.jsonl', 'captions.json')
_FILE_KEYS, _CAPTION_KEYS = ('file_name', 'image', 'file'), ('text', 'caption', 'captions')


class ImageFolder:
  """Pairs of pictures and captions below a folder, see the head of this file.

  Raises:
    DataError: no folder, no pictures, a damaged list of captions, or a picture without a caption.
  """

  def __init__(self, name: SourceName, split: str):
    name.allow('validation', *OPTIONS)
    self._form = PairForm.of(name)
    argument, share = split_argument(name, split)
    self._pairs: list[tuple[str, tuple[str, ...]]] = []  # file in the folder, its captions; none: they lie beside it
    self._root = pathlib.Path(argument or name.argument)
    if argument is not None:
      if self._root.exists() and not self._root.is_dir():
        raise DataError(f'source {name.name!r}: {self._root} is a file; name the folder')
      pairs = _listed_captions(self._root)
      if pairs is None:
        pairs = _captions_beside(self._root, find_files(argument, SUFFIXES, name=name.name))
      if not pairs:
        raise DataError(f'source {name.name!r}: the list of captions in {self._root} names no picture')
      wanted = split == 'validation'
      self._pairs = [pair for pair in pairs if share == 0 or bool(held_out(pair[0], 1, share)[0]) == wanted]

  def __len__(self) -> int:
    return len(self._pairs)

  def where(self, index: int) -> str:
    """File of a picture."""
    return str(self._root / self._pairs[index][0])

  def fingerprint(self) -> str:
    """Of the names of the pictures, their sizes in bytes, and their captions."""
    crc = 0
    for file, captions in self._pairs:
      sizes = [path.stat().st_size if path.is_file() else -1 for path in (self._root / file, (self._root / file).with_suffix('.txt'))]
      crc = zlib.crc32(repr((file, sizes, captions)).encode(), crc)
    return f'{len(self._pairs)} {crc}'

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """The pair of picture `index`; its form may draw the order and the caption from `rng`."""
    file, captions = self._pairs[index]
    path = self._root / file
    try:
      return self._form.document(captions or _beside(path), load_image(path), rng)
    except DataError as error:
      raise DataError(str(error) if str(path) in str(error) else f'{path}: {error}') from error


def _beside(path: pathlib.Path) -> list[str]:
  text = path.with_suffix('.txt')
  try:
    return texts_of(text.read_bytes().strip())
  except OSError as error:
    raise DataError(f'caption {text} cannot be read: {error.strerror or error}') from error


def _captions_beside(root: pathlib.Path, files: Iterable[pathlib.Path]) -> list[tuple[str, tuple[str, ...]]]:
  pairs: list[tuple[str, tuple[str, ...]]] = []
  for path in files:
    inside = path.relative_to(root)
    if path.with_suffix('.txt').is_file():
      pairs.append((inside.as_posix(), ()))
    elif len(inside.parts) > 1:
      pairs.append((inside.as_posix(), (inside.parts[-2].replace('_', ' '),)))
    else:
      advice = f'list it in {root / LISTS[0]}, write {inside.stem}.txt beside it, or put it into a folder of its class'
      raise DataError(f'{path} has no caption: {advice}')
  return pairs


def _listed_captions(root: pathlib.Path) -> list[tuple[str, tuple[str, ...]]] | None:
  """Pairs of the first list of captions that is there, in its order; None without one."""
  path = next((root / name for name in LISTS if (root / name).is_file()), None)
  if path is None:
    return None
  found: dict[str, list[str]] = {}
  try:
    text = path.read_bytes().decode('utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f'{path} cannot be read: {error}') from error
  if path.suffix == '.json':
    for number, (file, caption) in enumerate(_json_pairs(path, text), start=1):
      found.setdefault(file, []).extend(_checked(caption, f'{path}, entry {number}'))
  else:
    for number, line in enumerate(text.split('\n'), start=1):
      if line.strip():
        file, caption = _entry(_parsed(line, f'{path}, line {number}'), f'{path}, line {number}')
        found.setdefault(file, []).extend(_checked(caption, f'{path}, line {number}'))
  return [(file, tuple(captions)) for file, captions in found.items()]


def _parsed(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except ValueError as error:
    raise DataError(f'{where}: not JSON: {error}') from error


def _json_pairs(path: pathlib.Path, text: str) -> list[tuple[str, Any]]:
  value = _parsed(text, str(path))
  if isinstance(value, dict) and 'annotations' in value and 'images' in value:  # COCO
    try:
      names = {image['id']: image['file_name'] for image in value['images']}
      return [(names[note['image_id']], note['caption']) for note in value['annotations']]
    except (KeyError, TypeError) as error:
      raise DataError(f"{path}: not COCO's form of captions ({error!r})") from error
  if isinstance(value, dict):
    return list(value.items())
  if isinstance(value, list):
    return [_entry(entry, f'{path}, entry {number}') for number, entry in enumerate(value, start=1)]
  raise DataError(f'{path}: captions are an object or a list, this is a {type(value).__name__}')


def _entry(entry: Any, where: str) -> tuple[str, Any]:
  if isinstance(entry, dict):
    file = next((entry[key] for key in _FILE_KEYS if isinstance(entry.get(key), str)), None)
    caption = next((entry[key] for key in _CAPTION_KEYS if key in entry), None)
    if file is not None and caption is not None:
      return file, caption
  raise DataError(f'{where}: needs one of {", ".join(_FILE_KEYS)} and one of {", ".join(_CAPTION_KEYS)}')


def _checked(caption: Any, where: str) -> list[str]:
  try:
    return texts_of(caption)
  except DataError as error:
    raise DataError(f'{where}: {error}') from error
