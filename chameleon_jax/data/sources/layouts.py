r"""One JSON object -> a document: our own layout and those that people's data sets come in.

    ours            {"segments": ["A cat: ", {"image": "cat.png"}]}
                    {"turns": [{"role": "prompt", "segments": [...]}, {"role": "answer", "segments": [...]}]}
    conversations   {"conversations": [{"from": "human", "value": "What is <image>?"}, {"from": "gpt", "value": "A cat."}],
                     "image": "cat.png"}            LLaVA's `<image>`, Lumina-mGPT's `<|image|>`; one path or a list of them
    messages        {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": [{"type": "image"}]}],
                     "images": ["cat.png"]}
    pair            {"text": "Draw a cat.", "image": "cat.png"}     Anole: the text, then the picture; `caption` in place of `text`
    interleaved     {"texts": ["A cat:", null], "images": [null, "cat.png"]}     OBELICS: at each place one of the two
    text            {"text": "..."}

A picture is a path, a `data:` address in base64, or {"image_base64": "..."}. In conversations only answers carry loss; what
"system" says goes before the first prompt. Knows no files: pictures come from a function it is given. Facts: README of
Lumina-mGPT (TRAIN.md) and of Anole (training/README.md).
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document, Image, Role, Segment, Text, Turn
from chameleon_jax.tokens.images import load_image

ReadPicture = Callable[[str], np.ndarray]  # what the record calls it -> uint8 [H, W, 3]

_PLACES = re.compile(r'<\|image\|>|<image>')
_PROMPTS, _ANSWERS = ('human', 'user', 'prompt'), ('gpt', 'assistant', 'answer')
_ROLES: dict[str, Role] = {**dict.fromkeys(_PROMPTS, 'prompt'), **dict.fromkeys(_ANSWERS, 'answer')}
LAYOUTS = ('segments', 'turns', 'conversations', 'messages', 'texts with images', 'text with or without image')


def document_of(record: Any, read_picture: ReadPicture) -> Document:
  """The document of a parsed JSON object, in whichever layout it is.

  Raises:
    DataError: no known layout, pictures and their places do not match in number, a picture cannot be read.
  """
  if not isinstance(record, dict):
    raise DataError(f'a record is a JSON object, got {_kind(record)}')
  if 'turns' in record:
    turns = [_own_turn(turn, read_picture) for turn in _listed(record, 'turns')]
    return Document(tuple(turns))
  if 'segments' in record:
    return Document.plain(*(_segment(segment, read_picture) for segment in _listed(record, 'segments')))
  if 'conversations' in record:
    return _conversation(record, [(_text(turn, 'from'), _field(turn, 'value')) for turn in _listed(record, 'conversations')], read_picture)
  if 'messages' in record:
    return _conversation(record, [(_text(turn, 'role'), _field(turn, 'content')) for turn in _listed(record, 'messages')], read_picture)
  if isinstance(record.get('texts'), list):
    return _interleaved(record['texts'], _listed(record, 'images'), read_picture)
  for key in ('text', 'caption'):
    if key in record:
      pictures = [Image(read(name, read_picture)) for name in _pictures(record)]
      return Document.plain(_text(record, key), *pictures)
  raise DataError(f'no known layout: the keys are {", ".join(map(str, record)) or "none"}, known are {"; ".join(LAYOUTS)}')


def read(picture: Any, read_picture: ReadPicture) -> np.ndarray:
  """The pixels uint8 [H, W, 3] of what a record gives as a picture."""
  if isinstance(picture, Mapping):  # {"image_base64": ...}, {"path": ...}, {"bytes": ...} of other tools
    if isinstance(picture.get('image_base64'), str):
      return load_image(_from_base64(picture['image_base64']))
    inner = picture.get('image', picture.get('path'))
    if inner is not None:
      return read(inner, read_picture)
  if not isinstance(picture, str) or not picture:
    raise DataError(f'a picture is a path or base64, got {_kind(picture)}')
  if picture.startswith('data:'):
    return load_image(_from_base64(picture.partition(',')[2]))
  if re.match(r'https?://', picture):
    raise DataError(f'the picture {picture} is an address: download the pictures first and name files')
  return read_picture(picture)


def _from_base64(text: str) -> bytes:
  try:
    return base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError) as error:
    raise DataError(f'a picture is not base64 ({error})') from error


def _own_turn(turn: Any, read_picture: ReadPicture) -> Turn:
  role = _ROLES.get(_text(turn, 'role'))
  if role is None:
    raise DataError(f'unknown role {turn["role"]!r}: use prompt and answer')
  return Turn([_segment(segment, read_picture) for segment in _listed(turn, 'segments')], role)


def _segment(segment: Any, read_picture: ReadPicture) -> Segment:
  if isinstance(segment, str):
    return Text(segment)
  if isinstance(segment, Mapping) and isinstance(segment.get('text'), str):
    return Text(segment['text'])
  if isinstance(segment, Mapping) and ('image' in segment or 'image_base64' in segment):
    return Image(read(segment, read_picture))
  raise DataError(f'a segment is a string, {{"text": ...}} or {{"image": ...}}, got {_kind(segment)}')


def _conversation(record: Mapping[str, Any], turns: Sequence[tuple[str, Any]], read_picture: ReadPicture) -> Document:
  """Turns whose texts hold places for pictures, filled in order."""
  names = _pictures(record)
  waiting = iter(names)
  n_places = 0
  system: list[Segment] = []
  made: list[Turn] = []
  for speaker, value in turns:
    segments: list[Segment] = []
    for part in _parts(value):
      if isinstance(part, str):
        segments += [Text(part)] if part else []
        continue
      n_places += part is None
      name = next(waiting, None) if part is None else part
      if name is not None:
        segments.append(Image(read(name, read_picture)))
    if speaker == 'system' and not made:
      system += segments
      continue
    role = _ROLES.get(speaker)
    if role is None:
      raise DataError(f'unknown speaker {speaker!r}: known are {", ".join(_ROLES)} and system')
    if role == 'prompt' and system:
      segments, system = [*system, Text('\n'), *segments], []
    made.append(Turn(segments, role))
  if n_places != len(names):
    raise DataError(f'{len(names)} pictures and {n_places} places for them (<image> or <|image|>) in the conversation')
  if not made or made[0].role != 'prompt' or made[-1].role != 'answer':
    raise DataError(f'a conversation starts with a prompt and ends with an answer, got {[turn.role for turn in made]}')
  return Document(tuple(made))


def _parts(value: Any) -> Iterator[Any]:
  """Texts, None for each place of a picture, and pictures that stand where they belong."""
  if isinstance(value, str):
    pieces = _PLACES.split(value)
    for i, piece in enumerate(pieces):
      if i:
        yield None
      yield piece
    return
  if not isinstance(value, list):
    raise DataError(f'what a turn says is text or a list of parts, got {_kind(value)}')
  for part in value:
    kind = part.get('type') if isinstance(part, Mapping) else None
    if kind == 'text':
      yield from _parts(_text(part, 'text'))
    elif kind in ('image', 'image_url'):
      given = {key: part[key] for key in ('image', 'path', 'image_base64') if part.get(key)}
      address = part.get('image_url')
      if isinstance(address, Mapping):
        address = address.get('url')
      yield given or ({'path': address} if address else None)
    else:
      raise DataError(f'a part of a message has the type text or image, got {kind!r}')


def _interleaved(texts: Sequence[Any], pictures: Sequence[Any], read_picture: ReadPicture) -> Document:
  if len(texts) != len(pictures):
    raise DataError(f'"texts" has {len(texts)} places and "images" {len(pictures)}: at each place stands one of the two, the other is null')
  segments: list[Segment] = []
  for place, (text, picture) in enumerate(zip(texts, pictures)):
    if (text is None) == (picture is None):
      raise DataError(f'place {place} of "texts" and "images" must hold exactly one of the two')
    segments.append(Text(_text({'texts': text}, 'texts')) if picture is None else Image(read(picture, read_picture)))
  return Document.plain(*segments)


def _pictures(record: Mapping[str, Any]) -> list[Any]:
  """What the record names under `image` or `images`, as a list; one in base64 counts."""
  if 'image_base64' in record:
    return [{'image_base64': record['image_base64']}]
  value = record.get('image', record.get('images'))
  return [] if value is None else list(value) if isinstance(value, list) else [value]


def _listed(record: Any, key: str) -> list[Any]:
  value = _field(record, key)
  if not isinstance(value, list) or not value:
    raise DataError(f'{key!r} must be a list that is not empty, got {_kind(value)}')
  return value


def _text(record: Any, key: str) -> str:
  value = _field(record, key)
  if not isinstance(value, str):
    raise DataError(f'{key!r} must be text, got {_kind(value)}')
  return value


def _field(record: Any, key: str) -> Any:
  if not isinstance(record, Mapping) or key not in record:
    raise DataError(f'{key!r} is missing')
  return record[key]


def _kind(value: Any) -> str:
  names = {type(None): 'null', bool: 'a boolean', int: 'a number', float: 'a number', str: 'a string', list: 'a list', dict: 'an object'}
  return names.get(type(value), type(value).__name__)
