"""The emoji world: about 3,800 small pictures with names and attributes, and the topics of Python's documentation.

The embedded data set of the package. Two ArrayRecord files in `assets/emoji_world`, written by
`tools/build_emoji_world.py` (which says how pictures, names, attributes and splits are made):

  emoji.array_record    record 0 = manifest, record i + 1 = 64x64 RGB picture of item i, lossless WebP
  topics.array_record   record 0 = manifest, record i + 1 = zlib-compressed text of topic i

  one record:   | uint32 index | payload | uint32 CRC-32 of index and payload |     little endian
  manifest:     zlib-compressed JSON {"format": ..., "items": [metadata of item 0, of item 1, ...], ...}

It does not know tokens, documents or training. Pictures: Noto Color Emoji (OFL 1.1); text: Python (PSF licence).
"""

import dataclasses
import functools
import json
import pathlib
import struct
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from chameleon_jax.array_types import Pictures
from chameleon_jax.errors import DataError
from chameleon_jax.tokens import images

Split = Literal['train', 'validation']

ASSETS = pathlib.Path(__file__).resolve().parents[2] / 'assets' / 'emoji_world'
SIDE = 64


@dataclasses.dataclass(frozen=True)
class EmojiItem:
  """One picture and what is known about it.

  Attributes:
    index: row in the full world, whatever split it was loaded from; also the row of a table of codes.
    emoji: the character sequences drawn like this, `emoji[0]` the one that gave the attributes.
    names: English names, one for each of `emoji`; `names[0]` is THE name: 'man running: medium-dark skin tone'.
    languages: other languages ('de', 'fr', 'ja', ...) -> name of `emoji[0]`.
    base: the name without tone and gender, shared by all variants: 'person running'.
    skin_tones: none, one, or two of 'light', 'medium-light', 'medium', 'medium-dark', 'dark'.
    gender: 'person' | 'man' | 'woman' | None where there is none; couples 'woman and man', families 'man, woman, girl'.
    split: 'train' | 'validation'.
  """

  index: int
  emoji: tuple[str, ...]
  names: tuple[str, ...]
  languages: Mapping[str, str] = dataclasses.field(hash=False)
  base: str
  skin_tones: tuple[str, ...]
  gender: str | None
  split: Split

  @property
  def name(self) -> str:
    """THE English name: what a description must say."""
    return self.names[0]

  @property
  def is_flag(self) -> bool:
    """Whether this is the flag of a country or region."""
    return self.name.startswith('flag: ')


@dataclasses.dataclass(frozen=True, eq=False)
class EmojiWorld:
  """Items, their pictures and the text of one split.

  Attributes:
    items: the items of the split, in the order of their index.
    pictures: uint8 [len(items), 64, 64, 3], read-only; row k belongs to items[k].
    text_train, text_validation: the documentation topics of both splits, whatever split was loaded.
  """

  items: tuple[EmojiItem, ...]
  pictures: Pictures
  text_train: tuple[str, ...]
  text_validation: tuple[str, ...]

  @classmethod
  def load(cls, split: str = 'all', *, path: str | pathlib.Path | None = None) -> 'EmojiWorld':
    """Reads the shipped world (once per process) or the one in the folder `path`.

    Args:
      split: 'train' | 'validation' | 'all'.
      path: another folder with the two files.

    Raises:
      DataError: unknown split, or a file is missing or damaged; the message names file and record.
    """
    if split not in ('train', 'validation', 'all'):
      raise DataError(f'unknown split {split!r} of the emoji world: use train, validation or all')
    world = _load_all(pathlib.Path(path) if path is not None else ASSETS)
    if split == 'all':
      return world
    rows = np.array([item.index for item in world.items if item.split == split], np.int64)
    pictures = world.pictures[rows]
    pictures.flags.writeable = False
    return cls(tuple(world.items[row] for row in rows), pictures, world.text_train, world.text_validation)

  def __len__(self) -> int:
    return len(self.items)


@functools.lru_cache(maxsize=2)
def _load_all(folder: pathlib.Path) -> EmojiWorld:
  path = folder / 'emoji.array_record'
  metadata, payloads = _read_file(path, 'chameleon_jax emoji world 1')
  items = []
  pictures = np.empty((len(payloads), SIDE, SIDE, 3), np.uint8)
  for index, (fields, payload) in enumerate(zip(metadata, payloads, strict=True)):
    try:
      item: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
      items.append(EmojiItem(index=index, **item))
      picture = images.load_image(payload)
    except (TypeError, DataError) as error:
      raise DataError(f'{path}, record {index + 1}: {error}; reinstall the package') from error
    if picture.shape != (SIDE, SIDE, 3):
      raise DataError(f'{path}, record {index + 1}: picture of shape {picture.shape}, not (64, 64, 3); reinstall the package')
    pictures[index] = picture
  pictures.flags.writeable = False

  path = folder / 'topics.array_record'
  metadata, payloads = _read_file(path, 'chameleon_jax topics 1')
  texts: dict[str, list[str]] = {'train': [], 'validation': []}
  for index, (fields, payload) in enumerate(zip(metadata, payloads, strict=True)):
    try:
      texts[fields['split']].append(zlib.decompress(payload).decode())
    except (KeyError, zlib.error, UnicodeDecodeError) as error:
      raise DataError(f'{path}, record {index + 1}: not a text ({error}); reinstall the package') from error
  return EmojiWorld(tuple(items), pictures, tuple(texts['train']), tuple(texts['validation']))


def _read_file(path: pathlib.Path, expected_format: str) -> tuple[list[dict], list[bytes]]:
  """Reads and checks all records of one file: metadata of its items, and their payloads."""
  from array_record.python import array_record_module  # 0.1 s, and only this function needs it

  if not path.is_file():
    raise DataError(f'{path} is missing: reinstall the package')
  reader = array_record_module.ArrayRecordReader(str(path), 'readahead_buffer_size:0')
  n_records = reader.num_records()
  if n_records == 0:
    raise DataError(f'{path}: cut off or not an ArrayRecord file; reinstall the package')
  records = []
  for position in range(n_records):
    try:
      records.append(unpack_record(reader.read([position])[0], position))
    except (RuntimeError, IndexError, ValueError) as error:
      raise DataError(f'{path}, record {position}: {str(error).splitlines()[0]}; reinstall the package') from error
  try:
    manifest = json.loads(zlib.decompress(records[0]))
    found = manifest['format']
    items = list(manifest['items'])
  except (zlib.error, ValueError, KeyError, TypeError) as error:
    raise DataError(f'{path}, record 0: no manifest ({error!r}); reinstall the package') from error
  if found != expected_format or len(items) != n_records - 1:
    raise DataError(f'{path}: {found!r} with {n_records - 1} of {len(items)} records, expected {expected_format!r}; reinstall the package')
  return items, records[1:]


def unpack_record(record: bytes, position: int) -> bytes:
  """Checks one record and returns its payload.

  Raises:
    ValueError: too short, wrong checksum, or not the record of this position.
  """
  if len(record) < 8:
    raise ValueError(f'{len(record)} bytes are too few')
  (index,) = struct.unpack('<I', record[:4])
  (checksum,) = struct.unpack('<I', record[-4:])
  if zlib.crc32(record[:-4]) != checksum:
    raise ValueError('wrong checksum')
  if index != position:
    raise ValueError(f'holds index {index}')
  return record[4:-4]
