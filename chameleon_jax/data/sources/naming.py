"""Names of sources outside the package: `KIND:ARGUMENT?option=value&option=value`.

    jsonl:data/train.jsonl             kind jsonl, argument data/train.jsonl
    webdataset:shards/*-0000?.tar      a question mark that no `word=` follows belongs to the argument
    tfds:coco_captions?order=random    one option

Knows neither the kinds nor files.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from chameleon_jax.errors import DataError

_FORM = re.compile(r'(\w+):(.*?)(?:\?(\w+=[^&]*(?:&\w+=[^&]*)*))?', re.DOTALL)


def nearest(name: str, known: Collection[str]) -> str:
  """'did you mean ...?', or the list of what is known."""
  near = difflib.get_close_matches(name, known, n=1)
  return f'did you mean {near[0]!r}?' if near else f'known are {", ".join(known)}'


@dataclasses.dataclass(frozen=True)
class SourceName:
  """A name taken apart; `options` are texts until one of the methods reads them."""

  name: str
  kind: str
  argument: str
  options: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

  @classmethod
  def parse(cls, name: str) -> 'SourceName':
    """Takes a name apart.

    Raises:
      DataError: it has not the form, or names an option twice.
    """
    found = _FORM.fullmatch(name)
    if found is None or not found[2]:
      raise DataError(f'source {name!r} has not the form KIND:ARGUMENT, such as jsonl:data/train.jsonl')
    pairs = [tuple(part.split('=', 1)) for part in (found[3] or '').split('&') if part]
    options = dict(pairs)
    if len(options) != len(pairs):
      raise DataError(f'source {name!r} gives an option twice')
    return cls(name, found[1], found[2], options)

  def allow(self, *known: str) -> None:
    """Raises DataError for an option that is none of `known`."""
    for option in self.options:
      if option not in known:
        raise DataError(f'source {self.name!r}: unknown option {option!r}; {nearest(option, known)}')

  def choice(self, option: str, choices: tuple[str, ...]) -> str:
    """The value of an option out of `choices`, the first by default."""
    value = self.options.get(option, choices[0])
    if value not in choices:
      raise DataError(f'source {self.name!r}: {option}={value} is none of {", ".join(choices)}')
    return value

  def share(self, option: str, default: float) -> float:
    """A number in [0, 1)."""
    value = self._number(option, default, float)
    if not 0 <= value < 1:
      raise DataError(f'source {self.name!r}: {option}={value} is no share in [0, 1)')
    return value

  def count(self, option: str, default: int, *, least: int) -> int:
    """A whole number of at least `least`."""
    value = self._number(option, default, int)
    if value < least:
      raise DataError(f'source {self.name!r}: {option}={value} is less than {least}')
    return value

  def _number(self, option: str, default: Any, kind: type) -> Any:
    text = self.options.get(option)
    try:
      return default if text is None else kind(text)
    except ValueError as error:
      raise DataError(f'source {self.name!r}: {option}={text} is no number') from error
