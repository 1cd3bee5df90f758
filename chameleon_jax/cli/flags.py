"""The impure edge: experiment files and `--config.a.b=value` flags become one frozen, checked config.

A command calls `define_config(Type)` in its `define_flags()` and `get_config()` in its `main()`; an experiment
file imports `editable`. What a value may be is decided in `cli/values.py`; this file knows no command.
"""

import dataclasses
import importlib.util
import inspect
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from absl import flags

from chameleon_jax.cli.values import config_keys, did_you_mean, editable, frozen, override, type_name
from chameleon_jax.errors import ConfigError

__all__ = [
    'ConfigFlag',
    'config_help',
    'define_config',
    'define_workdir',
    'editable',
    'frozen',
    'get_config',
    'get_workdir',
    'load_config_file',
    'take_overrides',
]


def load_config_file(path: str) -> ml_collections.ConfigDict:
  """Runs an experiment file and returns what its `get_config()` returns, editable.

  Args:
    path: the file, or `FILE.py:ARGUMENT` for a file whose `get_config` takes a text.

  Raises:
    ConfigError: no such file, it does not run, it has no `get_config`, or it refuses the argument.
  """
  path, has_argument, argument = _split_argument(path)
  file = pathlib.Path(path)
  if not file.is_file():
    folder = file.parent if file.parent.is_dir() else pathlib.Path('.')
    siblings = sorted(str(other) for other in folder.glob('*.py'))
    raise ConfigError(f'no config file {path!r}{did_you_mean(path, siblings)}')
  spec = importlib.util.spec_from_file_location(f'experiment_{re.sub("[^a-zA-Z0-9]", "_", file.stem)}', file)
  if spec is None or spec.loader is None:
    raise ConfigError(f'config file {path!r} is not a Python file')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise ConfigError(f'config file {path!r} has no function get_config()')
    takes_argument = bool(inspect.signature(module.get_config).parameters)
    if has_argument and not takes_argument:
      raise ConfigError(f'config file {path!r} takes no argument, got {argument!r}')
    config = module.get_config(argument) if has_argument else module.get_config()
  except ConfigError:
    raise
  except Exception as error:
    raise ConfigError(f'config file {path!r}: {type(error).__name__}: {_one_line(error)}') from error
  return config if isinstance(config, ml_collections.ConfigDict) else editable(config)


def _split_argument(path: str) -> tuple[str, bool, str]:
  """'a/b.py:c,d' -> ('a/b.py', True, 'c,d'); a colon elsewhere belongs to the path."""
  file, colon, argument = path.partition('.py:')
  return (f'{file}.py', True, argument) if colon else (path, False, '')


def _one_line(error: BaseException) -> str:
  return ' '.join(str(error).split())


class ConfigFlag(flags.Flag):
  """`--config=FILE` together with the `--config.a.b=value` overrides given to `add_overrides`; the value is frozen."""

  def __init__(self, name: str, config_type: type, *, default_file: str | None, default: Any):
    self.config_type = config_type
    self.default_config = default
    self.overrides: list[tuple[str, str]] = []
    self._resolved: Any = None
    help_text = f'experiment file (FILE.py, or FILE.py:ARGUMENT) that makes a {config_type.__name__}; --{name}.KEY=VALUE changes one field'
    super().__init__(flags.ArgumentParser(), flags.ArgumentSerializer(), name, default_file, help_text)

  def parse(self, argument: Any) -> None:
    super().parse(argument)
    self._resolved = None

  def base(self) -> ml_collections.ConfigDict:
    """The config before overrides: from the file, else the default value, else the defaults of the dataclass."""
    if self._value is not None:
      return load_config_file(self._value)
    if self.default_config is not None:
      return editable(self.default_config)
    try:
      return editable(self.config_type())
    except TypeError as error:
      raise ConfigError(f'this command needs --{self.name}=FILE, an experiment file such as those in experiments/') from error

  def resolve(self) -> Any:
    """The frozen config.

    Raises:
      ConfigError: the file or an override is at fault.
    """
    if self._resolved is None:
      values = self.base()
      for path, text in self.overrides:
        override(values, self.config_type, path, text, key=self.name)
      self._resolved = frozen(values, self.config_type, key=self.name)
    return self._resolved


def define_config(config_type: type, default_file: str | None = None, *, default: Any = None, name: str = 'config') -> None:
  """Defines `--config`. After parsing, `get_config()` (in this file) returns the frozen `config_type`.

  Without `--config` the start is `default_file`, else `default`, else `config_type()`.
  """
  flag = ConfigFlag(name, config_type, default_file=default_file, default=default)
  flags.DEFINE_flag(flag, module_name=__name__)


def get_config(name: str = 'config') -> Any:
  """Returns the frozen config of the flag `--name`, file and overrides applied and checked."""
  flag = flags.FLAGS[name]
  assert isinstance(flag, ConfigFlag), f'--{name} was not defined by define_config'
  return flag.resolve()


def define_workdir(what: str) -> None:
  """Defines --workdir, the folder for `what`, which `get_workdir` asks for."""
  flags.DEFINE_string('workdir', None, f'folder for {what}')


def get_workdir() -> str:
  """The value of --workdir.

  Raises:
    ConfigError: it was not given.
  """
  if flags.FLAGS.workdir is None:
    raise ConfigError(f'--workdir is missing: name a {flags.FLAGS["workdir"].help}')
  return flags.FLAGS.workdir


def take_overrides(argv: Sequence[str], *, flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Moves every `--config.a.b=value` (or `--config.a.b value`) from argv into its ConfigFlag; returns the rest.

  `--config.flag` alone sets a boolean field.
  """
  rest: list[str] = []
  arguments = list(argv)
  while arguments:
    argument = arguments.pop(0)
    if argument == '--':
      return [*rest, argument, *arguments]
    match = re.fullmatch(r'--?(\w+)\.([\w.]+)(?:=(.*))?', argument, re.DOTALL)
    flag = flag_values[match[1]] if match is not None and match[1] in flag_values else None
    if match is None or not isinstance(flag, ConfigFlag):
      rest.append(argument)
      continue
    text = match[3]
    if text is None:
      annotations = {key: annotation for key, annotation, _ in config_keys(flag.config_type, key=flag.name)}
      annotation = annotations.get(f'{match[1]}.{match[2]}')
      text = 'true' if annotation is bool or not arguments or arguments[0].startswith('--') else arguments.pop(0)
    flag.overrides.append((match[2], text))
  return rest


def config_help(flag: ConfigFlag) -> str:
  """Lists every config field with its type and the value it has before overrides."""
  try:
    known = dict(_leaves(flag.base(), flag.name))
  except ConfigError:
    known = {}
  lines = []
  for key, annotation, default in config_keys(flag.config_type, key=flag.name):
    value = known.get(key, default)
    shown = '' if value is dataclasses.MISSING else f' = {value!r}'
    lines.append(f'  --{key}: {type_name(annotation)}{_shortened(shown)}')
  return '\n'.join(lines)


def _shortened(text: str, limit: int = 80) -> str:
  flat = ' '.join(text.split())
  return f' {flat[:limit]}{" ..." if len(flat) > limit else ""}' if flat else ''


def _leaves(values: ml_collections.ConfigDict, key: str) -> Iterator[tuple[str, Any]]:
  for name, value in values.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from _leaves(value, f'{key}.{name}')
    else:
      yield f'{key}.{name}', value
