"""Frozen dataclasses unfrozen, edited and frozen again, with every value checked against its annotation.

Inside the library a config is a frozen dataclass. Here it becomes an `ml_collections.ConfigDict` that an
experiment file may edit, texts become values of a field's type, and the result is frozen again:

    frozen(editable(config), type(config)) == config

`ml_collections.config_flags` is not used: it neither checks tuples, `Literal`s and `None` defaults nor names
the nearest key. This file knows no particular config, no flag and no file.
"""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from chameleon_jax.errors import ConfigError

ConfigType = TypeVar('ConfigType')

_TRUE = ('true', 't', 'yes', '1')
_FALSE = ('false', 'f', 'no', '0')


# ------------------------------------------------------------------------------- frozen <-> editable


def editable(config: Any) -> ml_collections.ConfigDict:
  """Unfreezes a dataclass into a `ConfigDict`; tuples stay tuples, dataclasses inside them become ConfigDicts.

  Keys are locked (a misspelt one raises at the line that sets it); types are checked by `frozen`.
  """
  if not dataclasses.is_dataclass(config) or isinstance(config, type):
    raise ConfigError(f'a config must be an instance of a dataclass, got {config!r}')
  fields = {field.name: _editable_value(getattr(config, field.name)) for field in dataclasses.fields(config)}
  return ml_collections.ConfigDict(fields, type_safe=False, convert_dict=False).lock()


def _editable_value(value: Any) -> Any:
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return editable(value)
  if isinstance(value, tuple):
    return tuple(_editable_value(item) for item in value)
  return value


def frozen(values: Any, config_type: type[ConfigType], *, key: str = 'config') -> ConfigType:
  """Builds `config_type` from a `ConfigDict` or any mapping (such as a parsed JSON object), checking every value.

  Integers are accepted where floats are asked for, lists where tuples are. A `config_type` instance is returned as is.

  Raises:
    ConfigError: a key is unknown or missing, a value has the wrong type, or the dataclass refuses the values.
  """
  if isinstance(values, config_type):
    return values
  if not isinstance(values, (Mapping, ml_collections.ConfigDict)):
    raise ConfigError(f'{key} must hold the fields of {config_type.__name__}, got {values!r}')
  hints = typing.get_type_hints(config_type)
  fields = {field.name: field for field in dataclasses.fields(config_type)}  # type: ignore[arg-type]
  arguments = {}
  for name, value in values.items():
    if name not in fields:
      raise ConfigError(_unknown_key(f'{key}.{name}', config_type, key))
    arguments[name] = _checked(value, hints[name], f'{key}.{name}')
  for name, field in fields.items():
    if name not in arguments and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      raise ConfigError(f'{key}.{name} is missing and has no default')
  try:
    return config_type(**arguments)
  except ValueError as error:
    raise ConfigError(f'{key}: {error}') from error


def _checked(value: Any, annotation: Any, key: str) -> Any:
  """Returns `value` in the form `annotation` asks for, or raises a ConfigError that names `key`."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is Any:
    return value
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in arguments:
      return None
    choices = [choice for choice in arguments if choice is not type(None)]
    if len(choices) == 1 and value is not None:
      return _checked(value, choices[0], key)
    for choice in choices:
      try:
        return _checked(value, choice, key)
      except ConfigError:
        continue
  elif origin is typing.Literal:
    for choice in arguments:
      if type(value) is type(choice) and value == choice:
        return value
    raise ConfigError(f'{key} must be one of {", ".join(map(repr, arguments))}, got {value!r}{did_you_mean(value, arguments)}')
  elif origin is tuple:
    if isinstance(value, (tuple, list)):
      if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_checked(item, arguments[0], f'{key}.{i}') for i, item in enumerate(value))
      if len(value) == len(arguments):
        return tuple(_checked(item, choice, f'{key}.{i}') for i, (item, choice) in enumerate(zip(value, arguments)))
  elif dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
    return frozen(value, annotation, key=key)
  elif annotation is float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      return float(value)
  elif annotation is int:
    if isinstance(value, int) and not isinstance(value, bool):
      return value
  elif isinstance(annotation, type) and isinstance(value, annotation):
    return value
  raise ConfigError(f'{key} must be {type_name(annotation)}, got {value!r}')


# ------------------------------------------------------------------------------------ text -> values


def parse_value(text: str, annotation: Any, *, key: str) -> Any:
  """Reads the text of a flag as a value of type `annotation`.

      'none' -> None where allowed     '1e-4' -> 0.0001 (float)     '1e5' -> 100000 (int)     'yes' -> True
      '1,2,4' or '(1, 2, 4)' -> (1, 2, 4)     "a,b" -> ('a', 'b')     "(('text', 1),)" -> (('text', 1.0),)

  Raises:
    ConfigError: the text is no such value; the message names `key`.
  """
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  stripped = text.strip()
  if origin in (typing.Union, types.UnionType):
    if type(None) in arguments and stripped.lower() == 'none':
      return None
    choices = [choice for choice in arguments if choice is not type(None)]
    for choice in choices[:-1]:
      try:
        return parse_value(text, choice, key=key)
      except ConfigError:
        continue
    return parse_value(text, choices[-1], key=key)
  if origin is typing.Literal:
    matches = [choice for choice in arguments if str(choice) == stripped]
    return _checked(matches[0] if matches else text, annotation, key)
  if annotation is str:
    return text
  if annotation is bool:
    if stripped.lower() in _TRUE + _FALSE:
      return stripped.lower() in _TRUE
  elif annotation in (int, float):
    number = _float(stripped) if annotation is float else _int(stripped)
    if number is not None:
      return number
  elif origin is tuple:
    return _checked(_parse_tuple(stripped, arguments), annotation, key)
  else:
    try:
      return _checked(ast.literal_eval(stripped), annotation, key)
    except (ValueError, SyntaxError):
      pass
  raise ConfigError(f'{key} must be {type_name(annotation)}, got {text!r}')


def _float(text: str) -> float | None:
  try:
    return float(text)
  except ValueError:
    return None


def _int(text: str) -> int | None:
  try:
    return int(text)
  except ValueError:
    number = _float(text)
    return int(number) if number is not None and number.is_integer() else None


def _parse_tuple(text: str, arguments: tuple[Any, ...]) -> Any:
  if text in ('', '()', '[]'):
    return ()
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    items = [item.strip() for item in text.strip('()[]').split(',')]
    return tuple(items) if arguments and arguments[0] is str else text
  return value if isinstance(value, (tuple, list)) else (value,)


def type_name(annotation: Any) -> str:
  """Returns a short name of an annotation for messages: `float or None`, `one of 'pre', 'post'`, `tuple[int, ...]`."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(type_name(argument) for argument in arguments)
  if origin is typing.Literal:
    return f'one of {", ".join(map(repr, arguments))}'
  if origin is tuple:
    return f'tuple[{", ".join("..." if argument is Ellipsis else type_name(argument) for argument in arguments)}]'
  if annotation is type(None):
    return 'None'
  return getattr(annotation, '__name__', str(annotation))


# ---------------------------------------------------------------------------------------- overrides


def override(values: ml_collections.ConfigDict, config_type: type, path: str, text: str, *, key: str = 'config') -> None:
  """Sets the field at the dotted `path` of `values` in place, read from `text`; numbers in the path index tuples.

  Raises:
    ConfigError: no such field (the message names the nearest one), or the text is no value of its type.
  """
  _set(values, config_type, path.split('.'), text, key=key)


def _set(values: Any, annotation: Any, path: list[str], text: str, *, key: str) -> Any:
  """Returns `values` with the field at `path` replaced; ConfigDicts are changed in place, tuples rebuilt."""
  if not path:
    return parse_value(text, annotation, key=key)
  name = path[0]
  if isinstance(values, tuple):
    element = typing.get_args(annotation)[0] if typing.get_args(annotation)[-1] is Ellipsis else None
    if not name.isdigit() or int(name) >= len(values):
      raise ConfigError(f'{key} has {len(values)} entries, so the next part of the key is a number below {len(values)}, not {name!r}')
    chosen = element if element is not None else typing.get_args(annotation)[int(name)]
    changed = _set(values[int(name)], chosen, path[1:], text, key=f'{key}.{name}')
    return values[: int(name)] + (changed,) + values[int(name) + 1 :]
  config_type = _dataclass_of(annotation)
  if config_type is None:
    raise ConfigError(f'{key} is {type_name(annotation)} and has no field {name!r}')
  if name not in typing.get_type_hints(config_type):
    raise ConfigError(_unknown_key('.'.join([key, *path]), config_type, key))
  if values is None:
    raise ConfigError(f'{key} is None, so {key}.{name} cannot be set: set {key} as a whole')
  values[name] = _set(values[name], typing.get_type_hints(config_type)[name], path[1:], text, key=f'{key}.{name}')
  return values


def _dataclass_of(annotation: Any) -> type | None:
  for choice in (annotation, *typing.get_args(annotation)):
    if isinstance(choice, type) and dataclasses.is_dataclass(choice):
      return choice
  return None


def config_keys(config_type: type, *, key: str = 'config') -> Iterator[tuple[str, Any, Any]]:
  """Yields (dotted key, annotation, default or `dataclasses.MISSING`) of every leaf field, in order of definition."""
  hints = typing.get_type_hints(config_type)
  for field in dataclasses.fields(config_type):
    inner = _dataclass_of(hints[field.name]) if typing.get_origin(hints[field.name]) is not tuple else None
    if inner is not None:
      yield from config_keys(inner, key=f'{key}.{field.name}')
    else:
      yield f'{key}.{field.name}', hints[field.name], field.default


def _unknown_key(wrong: str, config_type: type, key: str) -> str:
  """Says that `wrong` is unknown and which key is nearest: same level first, then the same name elsewhere, then any."""
  level = {f'{key}.{field.name}': field.name for field in dataclasses.fields(config_type)}
  leaves = [name for name, _, _ in config_keys(config_type, key=key)]
  last, _, rest = wrong.removeprefix(key + '.').partition('.')
  near = [name for name, field in level.items() if field in difflib.get_close_matches(last, list(level.values()), n=1, cutoff=0.75)]
  near = [name for name in (f'{name}.{rest}' for name in near) if name in leaves] or near
  near = near or [name for name in leaves if name.rsplit('.', 1)[-1] == wrong.rsplit('.', 1)[-1]]
  near = near or difflib.get_close_matches(wrong, [*leaves, *level], n=1, cutoff=0.0)
  return f'unknown key {wrong!r}; the nearest known key is {near[0]!r}'


def did_you_mean(value: Any, choices: Sequence[Any]) -> str:
  """Returns "; did you mean ...?" with the nearest of `choices`, or nothing where none is near."""
  near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
  return f'; did you mean {near[0]!r}?' if near else ''
