r"""Source `text:FILE | FOLDER | PATTERN`: plain text and code, cut into documents that fit a row.

A file of S bytes gives ceil(S / stride) documents, known from its size alone; nothing is read ahead. Cut k stands near byte
k * stride: behind the last empty line of the half stride before it, else behind the last line end there, else between two characters.
Joined, the documents of a file are the file again.

    'aaa\n\nbbb\nccc', stride 8  ->  'aaa\n\n' | 'bbb\nccc'

In a folder, files with the suffixes of text and code count. Text is UTF-8.

    ?max_bytes=N   most bytes of a document, 8,192 by default (about 2,500 tokens of English); the stride is two thirds of it
    ?validation=SHARE (see files.py)
"""

import zlib

import numpy as np

from chameleon_jax.data.sources.files import SplitRecords, find_files, read_bytes, split_argument
from chameleon_jax.data.sources.naming import SourceName
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document

_WRITTEN = ('.txt', '.text', '.md', '.rst', '.tex', '.html', '.htm', '.xml', '.csv', '.tsv', '.json', '.yaml', '.yml', '.toml')
_CODE = (
  *('.py', '.pyi', '.ipynb', '.c', '.h', '.cc', '.cpp', '.hpp', '.cu', '.cs', '.go', '.rs', '.java', '.kt', '.scala', '.swift', '.m'),
  *('.js', '.jsx', '.ts', '.tsx', '.css', '.rb', '.pl', '.php', '.lua', '.r', '.jl', '.hs', '.ml', '.clj', '.ex', '.erl', '.sh', '.sql'),
  *('.proto', '.cmake', '.gradle', '.vue', '.dart', '.zig', '.lean', '.v', '.sv', '.vhd', '.asm', '.s', '.f90', '.lisp', '.el', '.vim'),
)
SUFFIXES = (*_WRITTEN, *_CODE)
_DEFAULT_MAX_BYTES = 8192


class PlainText:
  """Pieces of text files, see the head of this file.

  Raises:
    DataError: no files, or an unknown option.
  """

  def __init__(self, name: SourceName, split: str):
    name.allow('max_bytes', 'validation')
    self._stride = name.count('max_bytes', _DEFAULT_MAX_BYTES, least=12) * 2 // 3
    argument, share = split_argument(name, split)
    found = [] if argument is None else find_files(argument, SUFFIXES, name=name.name)
    self._files = [(path, path.stat().st_size) for path in found]
    counts = [-(-size // self._stride) for _, size in self._files]
    self._records = SplitRecords(counts, [path.name for path, _ in self._files], split=split, share=share)

  def __len__(self) -> int:
    return len(self._records)

  def where(self, index: int) -> str:
    """File of a piece, and about where in it."""
    file, piece = self._records.place(index)
    return f'{self._files[file][0]}, from about byte {piece * self._stride:,}'

  def fingerprint(self) -> str:
    """Of the names and sizes of the files and of their first and last kilobytes."""
    crc = 0
    for path, size in self._files:
      ends = [read_bytes(path, 0, min(size, 1024)), read_bytes(path, max(0, size - 1024), min(size, 1024))]
      crc = zlib.crc32(repr((path.name, size, ends)).encode(), crc)
    return f'{len(self._files)} {self._stride} {crc}'

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """One piece of one file; draws nothing from `rng`."""
    del rng
    file, piece = self._records.place(index)
    path, size = self._files[file]
    back = self._stride // 2
    first = max(0, piece * self._stride - back)
    last = min(size, (piece + 1) * self._stride)
    data = read_bytes(path, first, last - first)
    start = 0 if piece == 0 else _cut(data[:back])
    end = len(data) if last == size else last - back - first + _cut(data[last - back - first :])
    try:
      return Document.plain(data[start:end].decode('utf-8'))
    except UnicodeDecodeError as error:
      raise DataError(f'{path}: not UTF-8 at byte {first + start + error.start:,} ({error.reason}); convert it or leave it out') from error


def _cut(window: bytes) -> int:
  """Where to cut in a window: behind the last empty line, else behind the last line end, else before the last character's first byte."""
  for mark in (b'\n\n', b'\n'):
    found = window.rfind(mark)
    if found >= 0:
      return found + len(mark)
  end = len(window)
  for back in range(1, min(4, end) + 1):
    byte = window[end - back]
    if byte & 0xC0 != 0x80:  # the first byte of a character
      length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
      return end if length == back else end - back
  return end
