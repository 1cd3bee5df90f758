"""Where compiled programs are kept, and whose word counts."""

import pathlib
import subprocess
import sys

from chameleon_jax.cli import compiled


def test_the_folder_is_the_users_and_of_this_kind_of_processor(monkeypatch):
  home = compiled.cache_folder({'HOME': '/home/me'})
  assert home is not None and home.parent == pathlib.Path('/home/me/.cache/chameleon_jax') and home.name.startswith('compiled-')
  assert compiled.cache_folder({'HOME': '/home/me', 'XDG_CACHE_HOME': '/cache'}) == pathlib.Path('/cache/chameleon_jax') / home.name
  assert compiled.cache_folder({}) is None
  monkeypatch.setattr(compiled.platform, 'machine', lambda: 'another')
  other = compiled.cache_folder({'HOME': '/home/me'})
  assert other is not None and other.name != home.name


def test_the_users_settings_stand():
  environment = {'HOME': '/home/me', 'JAX_COMPILATION_CACHE_DIR': '/mine'}
  compiled.keep_compiled_programs(environment)
  assert environment['JAX_COMPILATION_CACHE_DIR'] == '/mine'
  environment = {'HOME': '/home/me'}
  compiled.keep_compiled_programs(environment)
  assert environment['JAX_COMPILATION_CACHE_DIR'] == str(compiled.cache_folder(environment))
  environment = {}
  compiled.keep_compiled_programs(environment)
  assert environment == {}


def test_the_command_line_sets_it_before_jax_starts(tmp_path):
  program = (
    "import sys, os; from chameleon_jax.cli import main; main.main(['--version']); "
    "print('jax' in sys.modules, os.environ['JAX_COMPILATION_CACHE_DIR'])"
  )
  environment = {'HOME': str(tmp_path), 'PYTHONPATH': ':'.join(sys.path)}
  lines = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
  assert lines[-1] == f'False {compiled.cache_folder(environment)}'
