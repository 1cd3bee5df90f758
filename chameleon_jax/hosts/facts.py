"""What all hosts of a run must have in common, as flat facts that can be compared and named.

Does not know who compares them.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def run_facts(config: Any, **flags: Any) -> dict[str, str]:
  """Every field of a frozen config by its key, every flag, and the versions of the code.

  Example:
    {'config.mesh.fsdp': '-1', ..., '--stop_after': 'null', 'chameleon_jax code': '5be1..', 'jax': '"0.10.2"', 'Python': '"3.11"'}
  """
  facts = {f'config.{key}': json.dumps(value) for key, value in _leaves(dataclasses.asdict(config))}
  facts |= {f'--{name}': json.dumps(value) for name, value in flags.items()}
  versions = {name: metadata.version(name) for name in ('jax', 'jaxlib', 'flax', 'optax')}
  versions |= {'Python': '.'.join(platform.python_version_tuple()[:2]), 'chameleon_jax code': code_hash()}
  return facts | {name: json.dumps(version) for name, version in versions.items()}


@functools.cache
def code_hash() -> str:
  """SHA-256 over the names and texts of the package's Python files, its first 16 digits."""
  digest = hashlib.sha256()
  for file in sorted(_PACKAGE.rglob('*.py')):
    text = file.read_bytes()
    digest.update(f'{file.relative_to(_PACKAGE).as_posix()} {len(text)}\n'.encode() + text)
  return digest.hexdigest()[:16]


def _leaves(values: Mapping[str, Any], key: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f'{key}{name}.')
    else:
      yield f'{key}{name}', value


def difference(facts: Mapping[int, Mapping[str, str]], names: Mapping[int, str]) -> str | None:
  """One line on the first process whose facts are not those of process 0, None where all agree.

  Args:
    facts: process -> its facts.
    names: process -> 'process 1 (its machine)'.
  """
  differing = [process for process in sorted(facts) if facts[process] != facts[0]]
  if not differing:
    return None
  first = differing[0]
  mine, theirs = facts[0], facts[first]
  keys = [key for key in [*mine, *(key for key in theirs if key not in mine)] if mine.get(key) != theirs.get(key)]
  what = f'{keys[0]} is {_shown(theirs.get(keys[0]))} there and {_shown(mine.get(keys[0]))} here'
  more = f' (and {len(keys) - 1} more differ: {", ".join(keys[1:4])})' if len(keys) > 1 else ''
  others = f'; so do {len(differing) - 1} more processes' if len(differing) > 1 else ''
  return f'{names[first]} differs from {names[0]}: {what}{more}{others}; start all of them with the same command and the same code'


def _shown(text: str | None) -> str:
  return 'missing' if text is None else text if len(text) <= 100 else f'{text[:100]}...'
