"""The small files of our model folder: config.json and the text tokenizer. What lies where: `native.folder`."""

import dataclasses
import json
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from chameleon_jax.config import TransformerConfig, VocabularyConfig, VQGANConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.pickle_reader import brief
from chameleon_jax.interop.native.checksums import check_files
from chameleon_jax.tokens.text import SentencePieceText, TextTokenizer

FORMAT = 'chameleon_jax'
VERSION = 2
CONFIG_FILE = 'config.json'
TRANSFORMER = 'transformer'
IMAGE_TOKENIZER = 'image_tokenizer'
_MAX_NUMBER = 1e30
_MAX_FILE = 1 << 20  # bytes
_MAX_SIZE = 1 << 24  # of any size in config.json; 30B's largest is 65,536
_TEXT_FILES = ('text_tokenizer.model', 'text_tokenizer.json')


@dataclasses.dataclass(frozen=True)
class Header:
  """What config.json says. `origin` is None where the weights were made here, else {'format': ..., 'n_shards': ...}."""

  version: int
  transformer: TransformerConfig | None
  vqgan: VQGANConfig | None
  vocabulary: VocabularyConfig | None
  origin: dict[str, Any] | None


def config_from_dict(kind: type, values: dict[str, Any], *, where: str) -> Any:
  """Builds the flat dataclass `kind` from JSON values; lists become tuples.

  Raises:
    CheckpointError: a field is unknown or missing, or the dataclass refuses a value.
  """
  hints = typing.get_type_hints(kind)
  known = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
  unknown = sorted(set(values) - set(known))
  if unknown:
    raise CheckpointError(f'{where}: {kind.__name__} has no field {unknown[0]!r}; was this written by a newer version?')
  converted = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
  for name, value in converted.items():
    if not _fits(value, known[name]):
      raise CheckpointError(f'{where}: {kind.__name__}.{name} cannot be {brief(value)}; correct it, or copy the folder again')
  try:
    return kind(**converted)
  except (TypeError, ValueError) as error:
    raise CheckpointError(f'{where}: {error}') from error


def _fits(value: Any, hint: Any) -> bool:
  """Whether a JSON value is of a field's type; a whole number will do for a fraction."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Literal:
    return isinstance(value, str) and value in arguments
  if origin is tuple:
    return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
  if hint is float:
    return type(value) in (int, float) and abs(value) < _MAX_NUMBER  # False for nan
  if hint is int:
    return type(value) is int and abs(value) <= _MAX_SIZE
  return type(value) is hint if hint in (bool, str) else True


def read_header(folder: pathlib.Path) -> Header:
  """Reads config.json.

  Raises:
    CheckpointError: the folder is missing or no model folder, or the file is damaged or of a newer version.
  """
  file = folder / CONFIG_FILE
  if not folder.is_dir():
    raise CheckpointError(f'model folder {folder} does not exist')
  if not file.exists():
    raise CheckpointError(f'{folder} is no model folder: it holds no {CONFIG_FILE}')
  try:
    if file.stat().st_size > _MAX_FILE:
      raise CheckpointError(f'{file} has {file.stat().st_size} bytes, more than the {_MAX_FILE} read here; copy the folder again')
    config = json.loads(file.read_text(encoding='utf-8'))
  except CheckpointError:
    raise
  except (ValueError, RecursionError) as error:
    raise CheckpointError(f'{file} is not valid JSON: {" ".join(str(error).split())[:120]}') from error
  except OSError as error:
    raise CheckpointError(f'{file} cannot be read: {error.strerror or error}') from error
  if not isinstance(config, dict) or config.get('format') != FORMAT:
    raise CheckpointError(f'{file} is not of this project: expected "format": "{FORMAT}"')
  if config.get('version') not in (1, VERSION):
    raise CheckpointError(f'{folder} has version {config.get("version")!r}; this program reads versions 1 to {VERSION}')
  unknown = sorted(set(config) - {'format', 'version', 'transformer', 'vqgan', 'vocabulary', 'origin'})
  if unknown:
    raise CheckpointError(f'{file}: unknown key {unknown[0]!r}; the file is damaged or of a newer version')

  def part(name: str, kind: type) -> Any:
    values = config.get(name)
    if values is not None and not isinstance(values, dict):
      raise CheckpointError(f'{file}: {name!r} is no object')
    return None if values is None else config_from_dict(kind, values, where=str(file))

  origin = config.get('origin')
  if origin is not None and (not isinstance(origin, dict) or set(origin) != {'format', 'n_shards'}):
    raise CheckpointError(f"{file}: 'origin' must hold format and n_shards")
  kinds = {'transformer': TransformerConfig, 'vqgan': VQGANConfig, 'vocabulary': VocabularyConfig}
  return Header(config['version'], **{name: part(name, kind) for name, kind in kinds.items()}, origin=origin)


def write_header(folder: pathlib.Path, header: Header) -> None:
  """Writes config.json."""
  config: dict[str, Any] = {'format': FORMAT, 'version': header.version}
  for name in ('transformer', 'vqgan', 'vocabulary'):
    part = getattr(header, name)
    if part is not None:
      config[name] = dataclasses.asdict(part)
  if header.origin is not None:
    config['origin'] = header.origin
  (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def load_text_tokenizer(folder: pathlib.Path, checksums: Mapping[str, int] | None) -> TextTokenizer | None:
  """The text tokenizer of a model folder, None where it has none; compared with the folder's checksums where they are given."""
  for name in _TEXT_FILES:
    check_files(folder, name, checksums)
  sentencepiece, released = (folder / name for name in _TEXT_FILES)
  if sentencepiece.exists():
    return SentencePieceText.load(sentencepiece)
  if not released.exists():
    return None
  from chameleon_jax.tokens.text_json import JsonText  # loads the tokenizers library, which most folders do not need

  return JsonText.load(released)


def save_text_tokenizer(folder: pathlib.Path, text_tokenizer: TextTokenizer | None) -> None:
  """Writes the text tokenizer under the name of its kind."""
  if text_tokenizer is not None:
    text_tokenizer.save(folder / _TEXT_FILES[0 if isinstance(text_tokenizer, SentencePieceText) else 1])
