"""cli/main.py and cli/flags.py: commands, help, and one line for every mistake."""

import dataclasses
import errno
import sys
import types

import pytest
from absl import flags

from chameleon_jax.cli import flags as config_flags
from chameleon_jax.cli import main as cli
from chameleon_jax.errors import DataError
from chameleon_jax.training.interruption import InterruptedRunError


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = 0.5
  shape: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Settings:
  inner: Inner = Inner()
  n_steps: int = 3
  loud: bool = False
  path: str | None = None


@pytest.fixture
def probe(monkeypatch):
  """A command `probe` that records its frozen config, its flags and its positional arguments."""
  seen = []

  def define_flags():
    config_flags.define_config(Settings)
    flags.DEFINE_string('workdir', 'here', 'where to write')

  def main(argv):
    seen.append((config_flags.get_config(), flags.FLAGS.workdir, argv[1:]))

  module = types.ModuleType('chameleon_jax.cli.probe')
  module.__doc__ = 'Probes things.'
  module.define_flags, module.main = define_flags, main
  monkeypatch.setitem(sys.modules, 'chameleon_jax.cli.probe', module)
  monkeypatch.setitem(cli.COMMANDS, 'probe', ('probe', 'probe things'))
  return seen


def _experiment(tmp_path, text, name='x.py'):
  path = tmp_path / name
  path.write_text(text)
  return str(path)


def test_help_lists_every_command(capsys):
  assert cli.main(['--help']) == 0
  out = capsys.readouterr().out
  for command in ('demo', 'sample', 'evaluate', 'train', 'train-image-tokenizer', 'train-text-tokenizer'):
    assert f'\n  {command} ' in out


def test_no_command_prints_usage_and_fails(capsys):
  assert cli.main([]) == 2
  assert 'usage: chameleon' in capsys.readouterr().out


def test_help_does_not_import_jax():
  import subprocess

  code = 'import sys; from chameleon_jax.cli.main import main; main(["--help"]); sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code], capture_output=True, check=False).returncode == 0


def test_unknown_command_names_the_nearest(capsys):
  assert cli.main(['trian']) == 2
  err = capsys.readouterr().err
  assert "unknown command 'trian'" in err and "'train'" in err and err.count('\n') == 1


def test_defaults_file_and_overrides(probe, tmp_path):
  path = _experiment(
      tmp_path,
      'from tests_probe_config import Settings\nfrom chameleon_jax.cli.flags import editable\ndef get_config():\n'
      '  config = editable(Settings())\n  config.n_steps = 7\n  return config\n',
  )
  module = types.ModuleType('tests_probe_config')
  module.Settings = Settings
  sys.modules['tests_probe_config'] = module
  try:
    assert cli.main(['probe']) == 0
    assert cli.main(['probe', f'--config={path}', '--config.inner.rate=1', '--config.loud', '--workdir=there', 'rest']) == 0
    assert cli.main(['probe', '--config.inner.shape', '3,4', '--config', path]) == 0
  finally:
    del sys.modules['tests_probe_config']
  assert probe[0] == (Settings(), 'here', [])
  assert probe[1] == (Settings(inner=Inner(rate=1.0), n_steps=7, loud=True), 'there', ['rest'])
  assert probe[2] == (Settings(inner=Inner(shape=(3, 4)), n_steps=7), 'here', [])


def test_command_help_lists_flags_and_config_fields(probe, capsys):
  assert cli.main(['probe', '--help']) == 0
  out = capsys.readouterr().out
  assert 'Probes things.' in out and '--workdir: where to write' in out
  assert '--config.inner.rate: float = 0.5' in out and '--config.path: str or None = None' in out
  assert probe == []


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--config.inner.rat=1'], "unknown key 'config.inner.rat'; the nearest known key is 'config.inner.rate'"),
        (['--config.n_steps=few'], "config.n_steps must be int, got 'few'"),
        (['--wrkdir=x'], 'wrkdir'),
        (['--config=no/such/file.py'], "no config file 'no/such/file.py'"),
    ],
)
def test_mistakes_are_one_line(probe, capsys, arguments, message):
  assert cli.main(['probe', *arguments]) != 0
  err = capsys.readouterr().err
  assert message in err and err.startswith('chameleon: ') and err.count('\n') == 1
  assert probe == []


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('x = 1\n', 'has no function get_config()'),
        ('def get_config(:\n', 'SyntaxError'),
        ('import no_such_module_here\n', 'ModuleNotFoundError'),
        ('def get_config():\n  return {}["a"]\n', 'KeyError'),
        ('def get_config():\n  return 3\n', 'must be an instance of a dataclass'),
    ],
)
def test_broken_experiment_files_are_one_line(probe, capsys, tmp_path, text, message):
  assert cli.main(['probe', f'--config={_experiment(tmp_path, text)}']) == 1
  err = capsys.readouterr().err
  assert message in err and err.count('\n') == 1


def test_a_missing_file_names_its_neighbour(probe, capsys, tmp_path):
  _experiment(tmp_path, '', name='emoji_pretrain.py')
  assert cli.main(['probe', f'--config={tmp_path / "emoji_pretrian.py"}']) == 1
  assert 'did you mean' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('error', 'code', 'message'),
    [
        (DataError('record 3 of f\nis damaged'), 1, 'chameleon: record 3 of f is damaged'),
        (OSError(errno.ENOSPC, 'No space left on device', 'run/1'), 1, 'chameleon: the disk is full: run/1'),
        (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'p.png'), 1, 'chameleon: No such file or directory: p.png'),
        (InterruptedRunError(15, 7), 143, 'chameleon: stopped by SIGTERM after step 7; it is saved'),
        (KeyboardInterrupt(), 130, 'chameleon: interrupted'),
    ],
)
def test_errors_become_one_line(probe, monkeypatch, capsys, error, code, message):
  def fail(argv):
    raise error

  monkeypatch.setattr(sys.modules['chameleon_jax.cli.probe'], 'main', fail)
  assert cli.main(['probe']) == code
  err = capsys.readouterr().err
  assert err.startswith(message) and err.count('\n') == 1


def test_a_bug_is_not_hidden(probe, monkeypatch):
  def fail(argv):
    raise RuntimeError('a bug')

  monkeypatch.setattr(sys.modules['chameleon_jax.cli.probe'], 'main', fail)
  with pytest.raises(RuntimeError):
    cli.main(['probe'])


def test_every_command_has_help(capsys):
  for command in cli.COMMANDS:
    assert cli.main([command, '--help']) == 0, command
    out = capsys.readouterr().out
    assert f'usage: chameleon {command}' in out and 'flags:' in out


def test_a_command_without_a_default_config_asks_for_one(monkeypatch, capsys):
  @dataclasses.dataclass(frozen=True)
  class Required:
    size: int

  module = types.ModuleType('chameleon_jax.cli.needy')
  module.define_flags = lambda: config_flags.define_config(Required)
  module.main = lambda argv: config_flags.get_config() and None
  monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.setitem(cli.COMMANDS, 'needy', ('needy', ''))
  assert cli.main(['needy']) == 1
  assert 'needs --config=FILE' in capsys.readouterr().err
