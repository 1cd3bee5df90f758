"""Compiled programs kept between runs: a command that has run before starts without compiling anew.

They lie in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)/chameleon_jax/compiled-MACHINE, apart by kind of processor, since a
program compiled for one does not run on another. jax writes and checks the files (its key holds the program, the versions and the flags),
and they may be deleted at any time. JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.

Does not import jax: the settings are environment variables that it reads when it starts.
"""

import hashlib
import os
import pathlib
import platform
from collections.abc import MutableMapping

_SHORTEST = '0.1'  # seconds of compilation that are worth a file


def keep_compiled_programs(environment: MutableMapping[str, str] = os.environ) -> None:
  """Sets what jax is to find, unless the user has said otherwise; to be called before jax is imported."""
  folder = cache_folder(environment)
  if folder is not None:
    environment.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder))
    environment.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', _SHORTEST)


def cache_folder(environment: MutableMapping[str, str]) -> pathlib.Path | None:
  """Where the programs of this machine belong; None where the user has no folder of his own."""
  base = environment.get('XDG_CACHE_HOME') or (os.path.join(environment['HOME'], '.cache') if environment.get('HOME') else None)
  return None if base is None else pathlib.Path(base) / 'chameleon_jax' / f'compiled-{_machine()}'


def _machine() -> str:
  """Twelve hexadecimal digits for a kind of processor."""
  described = [platform.machine(), platform.processor()]
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    lines = info.read_text(encoding='utf-8', errors='replace').splitlines()
    described += sorted({line for line in lines if line.startswith(('flags', 'Features', 'model name'))})
  return hashlib.sha256('\n'.join(described).encode()).hexdigest()[:12]
