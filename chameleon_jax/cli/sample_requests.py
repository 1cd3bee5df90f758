"""Requests for `chameleon sample`: from its flags, from a text file, from a file of JSON lines.

    prompts.txt      one prompt a line
    prompts.jsonl    {"prompt": "Draw a red apple.", "id": "apple", "options": {"seed": 3}}
                     {"prompt": [{"image": "cat.png"}, {"text": "What is this?"}]}

Pictures are looked for beside the file. Blank lines count for nothing but the number of the lines behind them. A line that is
no request becomes a `Malformed`, so that the others can run. Knows no model.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax.cli.values import frozen
from chameleon_jax.config import SamplingOptions
from chameleon_jax.errors import ChameleonError, ConfigError, DataError, PromptError
from chameleon_jax.tokens.document import Document, Image, Segment, Text, Turn
from chameleon_jax.tokens.images import load_image
from chameleon_jax.tokens.text import check_unicode


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt to continue.

  Attributes:
    id: what results call it.
    prompt: the document.
    given: the prompt as it was written, a text or a list of segments.
    options: how to draw.
    where: the line it stands on, for messages; '' for a prompt from flags.
  """

  id: str
  prompt: Document
  given: Any
  options: SamplingOptions
  where: str = ''


@dataclasses.dataclass(frozen=True)
class Malformed:
  """A line that is no request, and why; `error` names file and line."""

  id: str
  error: str


def prompt_document(segments: Sequence[Segment], *, completion: bool) -> Document:
  """A prompt as a turn of a conversation, or with `completion` as the beginning of a plain document.

  Raises:
    PromptError: there is nothing in it, and `completion` is not asked for.
  """
  if completion:
    return Document.plain(*segments)
  if not any(not isinstance(segment, Text) or segment.text for segment in segments):
    raise PromptError('the prompt is empty: give --prompt="..." or --image=FILE (or --completion to write freely)')
  return Document((Turn(segments, role='prompt'),))


def copies(requests: Iterable[Request | Malformed], count: int) -> list[Request | Malformed]:
  """Each request `count` times, under the ids `a.1`, `a.2`, ... where that is more than once."""
  found: list[Request | Malformed] = []
  for request in requests:
    if isinstance(request, Malformed) or count == 1:
      found.append(request)
    else:
      found += [dataclasses.replace(request, id=f'{request.id}.{copy + 1}') for copy in range(count)]
  return found


def read_requests(path: str | Path, options: SamplingOptions, *, completion: bool) -> list[Request | Malformed]:
  """The requests of a file, in order.

  Args:
    path: a `.txt` or `.jsonl` file in UTF-8.
    options: of every request, where its line does not say otherwise.
    completion: prompts are beginnings of documents, not turns.

  Raises:
    ConfigError: another kind of file, missing, or empty.
  """
  file = Path(path)
  if file.suffix not in ('.txt', '.jsonl'):
    raise ConfigError(f'--prompts_file reads .txt (one prompt a line) and .jsonl (one request a line), got {str(path)!r}')
  try:
    data = file.read_bytes()
  except OSError as error:
    raise ConfigError(f'cannot read the prompts of {path}: {error.strerror}') from error
  parse = _text_line if file.suffix == '.txt' else _json_line
  found: list[Request | Malformed] = []
  line_of_id: dict[str, int] = {}
  for number, line in _lines(data):
    where = f'{path}:{number}'
    name = str(number)
    try:
      text = line.decode('utf-8')
      values = parse(text)
      name = _id(values, number)
      if name in line_of_id:
        raise ConfigError(f'the id {name!r} is that of line {line_of_id[name]} already')
      line_of_id[name] = number
      found.append(_request(values, name, options, folder=file.parent, completion=completion, where=where))
    except UnicodeDecodeError as error:
      found.append(Malformed(name, f'{where}: byte {error.start + 1} is no UTF-8 ({error.reason})'))
    except ChameleonError as error:
      found.append(Malformed(name, f'{where}: {" ".join(str(error).split())}'))
  if not found:
    raise ConfigError(f'{path} holds no prompts')
  return found


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
  """Number and content of every line that is not blank; only the line feed ends a line, as in JSON lines."""
  for number, line in enumerate(data.removeprefix(b'\xef\xbb\xbf').split(b'\n'), 1):
    if line.strip():
      yield number, line.removesuffix(b'\r')


def _text_line(line: str) -> dict[str, Any]:
  return {'prompt': line}


def _json_line(line: str) -> dict[str, Any]:
  try:
    values = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'no JSON: {error}') from error
  _check_keys(values, ('prompt', 'options', 'id'), 'a request')
  if 'prompt' not in values:
    raise ConfigError('the request has no "prompt"')
  return values


def _check_keys(values: Any, known: Sequence[str], what: str) -> None:
  if not isinstance(values, dict):
    raise ConfigError(f'{what} is a JSON object, got {json.dumps(values)[:60]}')
  for key in values:
    if key not in known:
      near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
      raise ConfigError(f'unknown key {key!r} of {what}; the nearest known key is {near!r}')


def _id(values: dict[str, Any], number: int) -> str:
  found = values.get('id', number)
  if isinstance(found, bool) or not isinstance(found, (str, int)) or found == '':
    raise ConfigError(f'an id is a text or a number, got {json.dumps(found)[:60]}')
  return str(found)


def _request(
  values: dict[str, Any], name: str, options: SamplingOptions, *, folder: Path, completion: bool, where: str
) -> Request:
  given = values['prompt']
  if not isinstance(given, (str, list)) or (not given and not completion):
    raise PromptError(f'"prompt" is a text or a list of segments and not empty, got {json.dumps(given)[:60]}')
  parts = [{'text': given}] if isinstance(given, str) else given
  prompt = prompt_document([_segment(part, folder) for part in parts], completion=completion)
  own = values.get('options', {})
  if not isinstance(own, dict):
    raise ConfigError(f'"options" is a JSON object, got {json.dumps(own)[:60]}')
  base = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
  return Request(name, prompt, given, frozen(base | own, SamplingOptions, key='options'), where)


def _segment(part: Any, folder: Path) -> Segment:
  _check_keys(part, ('text', 'image'), 'a segment')
  if len(part) != 1 or not isinstance(next(iter(part.values())), str):
    raise DataError(f'a segment is {{"text": "..."}} or {{"image": "FILE"}}, got {json.dumps(part)[:60]}')
  if 'image' in part:
    return Image(load_image(folder / part['image']))
  check_unicode(part['text'])
  return Text(part['text'])
