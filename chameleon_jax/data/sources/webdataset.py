"""Source `webdataset:FILE | FOLDER | PATTERN`: tar archives in which files of one name up to its first dot are one sample.

    000.jpg  000.txt        a picture and its caption (also .caption, .cls; pairs.py says in which form)
    001.json 001.0.png ...  a record of `layouts.py`; a picture "0.png" of it is the member 001.0.png, "x/y.png" any member
    002.png  002.json       a record without a layout of its own: the caption is its "caption", "text" or "txt"

Members of a sample stand side by side, as the format has it. Only their places are kept; the archives must not be compressed.

    ?form=... ?order=... (see pairs.py)   ?validation=SHARE (see files.py)
"""

import json
import pathlib
import posixpath
import tarfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from chameleon_jax.data.sources.files import SplitRecords, find_files, read_bytes, split_argument
from chameleon_jax.data.sources.image_folder import SUFFIXES
from chameleon_jax.data.sources.index_cache import cached_index
from chameleon_jax.data.sources.layouts import document_of
from chameleon_jax.data.sources.naming import SourceName
from chameleon_jax.data.sources.pairs import OPTIONS, PairForm, texts_of
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document
from chameleon_jax.tokens.images import load_image

_TEXTS = ('txt', 'caption', 'text', 'cls')
_CAPTION_KEYS = ('caption', 'text', 'txt', 'captions')
_LAYOUT_KEYS = ('segments', 'turns', 'conversations', 'messages', 'texts')


def key_of(member: str) -> tuple[str, str]:
  """'a/0012.seg.png' -> ('a/0012', 'seg.png')."""
  folder, name = posixpath.split(member)
  stem, _, extension = name.partition('.')
  return posixpath.join(folder, stem), extension


def index_members(path: pathlib.Path) -> Mapping[str, np.ndarray]:
  """Places of the members of a tar archive, by its headers.

  Returns:
    offsets, sizes int64 [members]; names uint8, joined by null characters; first int64 [samples]: number of each sample's first member.

  Raises:
    DataError: no tar archive, or cut off.
  """
  length = path.stat().st_size
  names: list[str] = []
  offsets, sizes, first = [], [], []
  previous = None
  try:
    with tarfile.open(path, 'r:') as archive:
      for member in archive:
        if not member.isfile() or posixpath.basename(member.name).startswith('.'):
          continue
        if member.offset_data + member.size > length:
          end = member.offset_data + member.size
          raise DataError(f'{path} is cut off: member {member.name!r} ends at byte {end:,}, the file at {length:,}')
        key = key_of(member.name)[0]
        if key != previous:
          first.append(len(names))
          previous = key
        names.append(member.name)
        offsets.append(member.offset_data)
        sizes.append(member.size)
      end = archive.offset  # behind the last member
  except (tarfile.TarError, EOFError) as error:
    raise DataError(f'{path} is no tar archive, or is cut off: {" ".join(str(error).split())}') from error
  if read_bytes(path, end, min(512, max(0, length - end))) != bytes(512):
    raise DataError(f'{path} is cut off or damaged at byte {end:,}: the block of zeros that ends an archive is not there; copy it again')
  joined = np.frombuffer('\0'.join(names).encode('utf-8', 'surrogateescape'), np.uint8)
  return {'offsets': np.array(offsets, np.int64), 'sizes': np.array(sizes, np.int64), 'names': joined, 'first': np.array(first, np.int64)}


class _Archive:
  """The samples of one archive."""

  def __init__(self, path: pathlib.Path):
    index = cached_index(path, 'tar-1', index_members)
    self.path = path
    self._offsets, self._sizes = index['offsets'], index['sizes']
    self._names = bytes(index['names']).decode('utf-8', 'surrogateescape').split('\0') if len(self._offsets) else []
    self._ends = np.append(index['first'][1:], len(self._names))
    self._first = index['first']
    self.crc32 = zlib.crc32(b''.join(np.ascontiguousarray(index[name]).tobytes() for name in ('names', 'offsets', 'sizes')))

  def __len__(self) -> int:
    return len(self._first)

  def key(self, sample: int) -> str:
    return key_of(self._names[self._first[sample]])[0]

  def members(self, sample: int) -> dict[str, int]:
    """Extension -> number of the member."""
    return {key_of(self._names[i])[1].lower(): i for i in range(self._first[sample], self._ends[sample])}

  def read(self, member: int) -> bytes:
    return read_bytes(self.path, int(self._offsets[member]), int(self._sizes[member]))

  def find(self, name: str) -> int | None:
    """Number of the member of that name; None without one."""
    return self._names.index(name) if name in self._names else None


class WebDataset:
  """Samples of tar archives, see the head of this file.

  Raises:
    DataError: no archives, an archive that is compressed, cut off or empty, or an unknown option.
  """

  def __init__(self, name: SourceName, split: str):
    name.allow('validation', *OPTIONS)
    self._form = PairForm.of(name)
    argument, share = split_argument(name, split)
    paths = [] if argument is None else find_files(argument, ('.tar',), name=name.name)
    self._archives = [_Archive(path) for path in paths]
    self._records = SplitRecords([len(a) for a in self._archives], [path.name for path in paths], split=split, share=share)

  def __len__(self) -> int:
    return len(self._records)

  def where(self, index: int) -> str:
    """Archive and key of a sample."""
    archive, sample = self._records.place(index)
    return f'{self._archives[archive].path}, sample {self._archives[archive].key(sample)}'

  def fingerprint(self) -> str:
    """Of the names of archives and members, and of their places and sizes."""
    return repr([(archive.path.name, len(archive), archive.crc32) for archive in self._archives])

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """The document of one sample; the form of a pair may draw the order and the caption from `rng`."""
    number, sample = self._records.place(index)
    try:
      return self._document(self._archives[number], sample, rng)
    except DataError as error:
      raise DataError(f'{self.where(index)}: {error}') from error

  def _document(self, archive: _Archive, sample: int, rng: np.random.Generator) -> Document:
    members = archive.members(sample)
    record: Any = None
    if 'json' in members:
      try:
        record = json.loads(archive.read(members['json']).decode('utf-8'))
      except ValueError as error:
        raise DataError(f'its json is damaged: {error}') from error
      if isinstance(record, dict) and any(key in record for key in _LAYOUT_KEYS):
        return document_of(record, lambda picture: load_image(self._picture(archive, members, picture)))
    captions = next((texts_of(archive.read(members[kind]).strip()) for kind in _TEXTS if kind in members), None)
    if captions is None and isinstance(record, dict):
      captions = next((texts_of(record[key]) for key in _CAPTION_KEYS if key in record), None)
    picture = next((members[kind[1:]] for kind in SUFFIXES if kind[1:] in members), None)
    if captions is None:
      raise DataError(f'no caption among its members ({", ".join(members)}): give it a .txt or a .json')
    if picture is None:
      return Document.plain(*captions)
    return self._form.document(captions, load_image(archive.read(picture)), rng)

  def _picture(self, archive: _Archive, members: Mapping[str, int], name: str) -> bytes:
    found = members.get(name.lower().lstrip('.'))
    found = archive.find(name) if found is None else found
    if found is None:
      raise DataError(f'picture {name!r} is not in the archive')
    return archive.read(found)
