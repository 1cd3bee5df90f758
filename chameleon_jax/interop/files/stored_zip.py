"""A zip whose entries are not compressed, as a file of memory-mapped parts. `zipfile` reads its directory, the rest is done here."""

import io
import mmap
import os
import pathlib
import struct
import zipfile
import zlib

from chameleon_jax.errors import CheckpointError

MAX_DIRECTORY = 64 << 20  # bytes of the zip's directory, some 100 an entry
AGAIN = 'download or copy it again'
_CHUNK = 4 << 20
_LOCAL_HEADER = struct.Struct('<4s5H3I2H')
# What zipfile is known or documented to raise on damaged directories.
_ZIP_ERRORS = (zipfile.BadZipFile, ValueError, RuntimeError, LookupError, OverflowError, MemoryError, EOFError, struct.error, OSError)


class StoredZip:
  """An open zip of stored entries. Maps taken from it stay valid after it is closed.

  Raises:
    CheckpointError: by any method: the file is missing, closed, no zip or damaged, or an entry is compressed.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    self._map: mmap.mmap | None = None
    self._spans: dict[str, tuple[int, int]] = {}
    try:
      self._file = _Limited(self.path)
    except (OSError, ValueError) as error:
      raise CheckpointError(f'checkpoint {self.path} cannot be opened: {getattr(error, "strerror", None) or error}') from error
    try:
      self._entries = self._read_directory()
    except BaseException:
      self.close()
      raise

  @property
  def names(self) -> tuple[str, ...]:
    """Of every entry, in the directory's order."""
    return tuple(self._entries)

  def size(self, name: str) -> int | None:
    """Bytes of an entry, None where there is none of that name."""
    return self._entries[name].file_size if name in self._entries else None

  def close(self) -> None:
    """Closes the file. The map goes with the last array that views it: unmapping it earlier would leave those dangling."""
    self._map = None
    self._file.close()

  def read(self, name: str, limit: int) -> bytes:
    """The bytes of a small entry, checksum compared."""
    if self._entries[name].file_size > limit:
      raise CheckpointError(f'{self.path}: entry {name[:80]!r} has {self._entries[name].file_size} bytes, more than the {limit} read here')
    return self.check(name, keep=True)

  def check(self, name: str, *, keep: bool = False) -> bytes:
    """Compares the bytes of an entry with its checksum; returns them where `keep`."""
    start, left = self._span(name)
    crc, kept = 0, []
    try:
      self._file.seek(start)
      while left and (chunk := self._file.read(min(left, _CHUNK))):
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
        kept += [chunk] if keep else []
    except OSError as error:
      raise CheckpointError(f'{self.path} cannot be read: {error.strerror or error}') from error
    if left or crc != self._entries[name].CRC:
      raise CheckpointError(f'{self.path}: entry {name[:80]!r} is damaged, its checksum does not match; {AGAIN}')
    return b''.join(kept)

  def map(self, name: str) -> tuple[mmap.mmap, int]:
    """A read-only map of the whole file, and where in it the entry starts."""
    start, _ = self._span(name)
    try:
      if self._map is None:
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
      raise CheckpointError(f'{self.path} cannot be mapped into memory: {error}') from error
    return self._map, start

  def _read_directory(self) -> dict[str, zipfile.ZipInfo]:
    start = b''
    try:
      start = self._file.read(8)
      with zipfile.ZipFile(self._file) as directory:
        infos = directory.infolist()
    except _ZIP_ERRORS as error:
      if start.startswith(b'PK\x03\x04'):
        what = ' '.join(str(error).split())[:120]
        raise CheckpointError(f'{self.path} is a truncated or damaged zip ({what}); {AGAIN}') from error
      raise CheckpointError(
          f'{self.path} is no zip, as torch.save writes it since PyTorch 1.6; if it is an older checkpoint, '
          're-save it there with torch.save(torch.load(old), new), else download it again'
      ) from error
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
      raise CheckpointError(f'{self.path} has two entries of one name in its zip; {AGAIN}')
    return entries

  def _span(self, name: str) -> tuple[int, int]:
    """First byte and size of an entry. The header before the data may be longer than the directory says: torch pads it."""
    if self._file.closed:
      raise CheckpointError(f'{self.path} is closed; read from it inside the `with`')
    if name in self._spans:
      return self._spans[name]
    info = self._entries[name]
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
      raise CheckpointError(f'{self.path}: entry {name[:80]!r} is compressed or encrypted; unpack the file and pack it with `zip -0 -r`')
    try:
      self._file.seek(info.header_offset)
      header = self._file.read(_LOCAL_HEADER.size)
      signature, _, flags, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
      stored_name = self._file.read(name_length)
      extra = self._file.read(extra_length)
      expected = info.orig_filename.encode('utf-8' if info.flag_bits & 0x800 else 'cp437')
    except (OSError, ValueError, OverflowError, struct.error) as error:
      raise CheckpointError(f'{self.path}: the zip is damaged at entry {name[:80]!r}; {AGAIN}') from error
    start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    sound = signature == b'PK\x03\x04' and method == zipfile.ZIP_STORED and not flags & 1 and stored_name == expected
    if not sound or not _is_extra(extra, extra_length) or start + info.file_size > self._file.size:
      raise CheckpointError(f'{self.path}: the zip is damaged at entry {name[:80]!r}; {AGAIN}')
    self._spans[name] = (start, info.file_size)
    return self._spans[name]


def _is_extra(extra: bytes, length: int) -> bool:
  """Whether the extra field of a header is what the zip format asks for, a chain of (id, size, bytes): a damaged length shows here."""
  position = 0
  while position + 4 <= length == len(extra):
    position += 4 + int.from_bytes(extra[position + 2 : position + 4], 'little')
  return position == length


class _Limited(io.FileIO):
  """A file that reads no more at once than a sane directory of a zip needs: zipfile believes the size that the file states."""

  def __init__(self, path: pathlib.Path):
    super().__init__(path, 'rb')
    self.size = os.fstat(self.fileno()).st_size

  def read(self, size: int | None = -1, /) -> bytes:
    if size is not None and size > MAX_DIRECTORY:
      raise ValueError(f'its directory claims {size} bytes')
    return super().read(size)  # type: ignore[arg-type,return-value]
