"""Who may import whom: downwards only, with fences around the outside libraries (the map is in WORKSPACE.md).

Imports are read from the syntax tree, so one inside a function or under TYPE_CHECKING counts too.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = 'chameleon_jax'

# Longest prefix wins. Modules of one level may import each other only inside one group (the second entry).
LEVELS: dict[str, tuple[int, str]] = {
    'array_types': (0, 'base'),
    'config': (0, 'base'),
    'presets': (0, 'base'),
    'errors': (0, 'base'),
    'partitioning': (1, 'partitioning'),
    'hosts': (1, 'hosts'),
    'tokens': (1, 'tokens'),
    'models.transformer': (2, 'models.transformer'),
    'models.vqgan': (2, 'models.vqgan'),
    'models': (2, 'models'),
    'data.sources': (2, 'data'),
    'data.packing': (2, 'data'),
    'data': (3, 'data'),
    'training': (3, 'training'),
    'sampling': (3, 'sampling'),
    'sampling.engine': (4, 'sampling'),
    'evals': (5, 'evals'),
    'interop': (5, 'interop'),
    'training.loop': (6, 'training'),
    'training.vqgan_loop': (6, 'training'),
    'training.run_inputs': (6, 'training'),
    'training.samples': (6, 'training'),
    'training.replay': (6, 'training'),
    'training.row_page': (6, 'training'),
    'serving': (6, 'serving'),
    'chameleon': (6, 'chameleon'),
    'planning': (6, 'planning'),
    'cli': (7, 'cli'),
    'tools': (7, 'tools'),
    'experiments': (8, 'experiments'),  # above cli, for cli.flags alone
}

# Never, whatever the levels say: importer prefix -> target prefixes.
NEVER: dict[str, tuple[str, ...]] = {
    'models': ('tokens', 'data', 'training', 'sampling'),
    'sampling': ('training', 'data'),
    'experiments': (
        *('array_types', 'errors', 'partitioning', 'tokens', 'models', 'data', 'training', 'sampling', 'evals', 'interop', 'serving'),
        *('chameleon', 'cli.main', 'cli.values'),
    ),
}

# Outside library -> the prefixes inside the package that may import it.
FENCES: dict[str, tuple[str, ...]] = {
    'grain': ('data',),
    'array_record': ('data',),
    'tensorflow_datasets': ('data.sources.tfds',),
    'apache_beam': ('data.tokenize_beam',),
    'orbax': ('training.checkpoint', 'training.tree_files'),
    'absl.flags': ('cli',),
    'absl.app': ('cli',),
    'ml_collections': ('cli',),
    'tokenizers': ('tokens.text_json', 'tools'),
    'yaml': ('interop',),
    'jax._src': ('hosts',),
    'PIL': ('tokens.images',),
    'torch': (),
    'tensorflow': (),
}
# Inside these only numpy: no accelerator library.
NUMPY_ONLY = ('tokens',)


def _within(module: str, prefix: str) -> bool:
  return module == prefix or module.startswith(prefix + '.')


def _level(module: str) -> tuple[int, str] | None:
  prefixes = [prefix for prefix in LEVELS if _within(module, prefix)]
  return LEVELS[max(prefixes, key=len)] if prefixes else None


def _modules() -> dict[str, pathlib.Path]:
  """Name -> file. Names inside the package go without its prefix; its root is ''."""
  found = {}
  for path in (ROOT / PACKAGE).rglob('*.py'):
    parts = path.relative_to(ROOT / PACKAGE).with_suffix('').parts
    found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
  for folder in ('tools', 'experiments'):
    for path in (ROOT / folder).rglob('*.py'):
      found['.'.join(path.relative_to(ROOT).with_suffix('').parts)] = path
  return found


def _imports(module: str, source: str, known: set[str], *, is_package: bool) -> set[str]:
  """Every imported module of a source text, as absolute dotted names; `from a import b` is a.b where that is a module."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        above = f'{PACKAGE}.{module}'.rstrip('.').split('.')
        above = above[: len(above) - (node.level - (1 if is_package else 0))]
        base = '.'.join([*above, *([base] if base else [])])
      for alias in node.names:
        inside = f'{base}.{alias.name}'.removeprefix(f'{PACKAGE}.')
        outside = not _within(base, PACKAGE)
        found.add(f'{base}.{alias.name}' if outside or inside in known else base)
  return found


def violations(module: str, source: str, known: set[str], *, is_package: bool = False) -> list[str]:
  """Returns one line per forbidden import of `module`, whose text is `source`."""
  own = _level(module)
  if own is None:
    return [] if module == '' else [f'{module}: has no level; add it to LEVELS here and to the map in WORKSPACE.md']
  found = []
  for name in sorted(_imports(module, source, known, is_package=is_package)):
    if name == PACKAGE:
      continue  # the root loads everything lazily; only its own names, such as __version__, are left
    if not _within(name, PACKAGE):
      for library, allowed in FENCES.items():
        outside = module.startswith(('tools.', 'experiments.'))
        if _within(name, library) and not outside and not any(_within(module, prefix) for prefix in allowed):
          found.append(f'{module}: imports {name}, allowed only in {", ".join(allowed) or "no file of the package"}')
      if any(_within(module, prefix) for prefix in NUMPY_ONLY) and name.split('.')[0] in ('jax', 'jaxlib', 'flax', 'optax'):
        found.append(f'{module}: imports {name}, but {module.split(".")[0]} is numpy only')
      continue
    target = name.removeprefix(f'{PACKAGE}.')
    level = _level(target)
    if level is None:
      found.append(f'{module}: imports {name}, which has no level')
    elif level[0] > own[0]:
      found.append(f'{module} (level {own[0]}): imports {target} (level {level[0]}), upwards')
    elif level[0] == own[0] and level[1] != own[1]:
      found.append(f'{module}: imports {target} of the same level but another group')
    for importer, targets in NEVER.items():
      if _within(module, importer) and any(_within(target, prefix) for prefix in targets):
        found.append(f'{module}: {importer} never imports {target}')
  return found


def test_every_module_imports_downwards_only():
  modules = _modules()
  known = set(modules)
  assert {'config', 'cli.main', 'partitioning'} <= known
  found = [
      line
      for name, path in sorted(modules.items())
      for line in violations(name, path.read_text(encoding='utf-8'), known, is_package=path.name == '__init__.py')
  ]
  assert not found, '\n' + '\n'.join(found)


@pytest.mark.parametrize(
    ('module', 'source', 'expected'),
    [
        ('tokens.text', 'import chameleon_jax.models.vqgan.model', 'upwards'),
        ('config', 'from chameleon_jax import presets, partitioning', 'upwards'),
        ('tokens.images', 'def f():\n  import jax.numpy as jnp', 'numpy only'),
        ('models.vqgan.model', 'from chameleon_jax.models.transformer import model', 'another group'),
        ('models.vqgan.model', 'from chameleon_jax.tokens.vocabulary import Vocabulary', 'models never imports tokens.vocabulary'),
        ('sampling.loop', 'from chameleon_jax.training import losses', 'sampling never imports training'),
        ('sampling.logits', 'from .engine import Sampler', 'upwards'),
        ('sampling.engine', 'from ..chameleon import Chameleon', 'upwards'),
        ('training.step', 'from chameleon_jax.training.loop import train', 'upwards'),
        ('training.step', 'from chameleon_jax.sampling import logits', 'another group'),
        ('evals.emoji', 'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from chameleon_jax.chameleon import Chameleon', 'upwards'),
        ('experiments.new', 'from chameleon_jax.training.loop import train', 'experiments never imports training.loop'),
        ('training.loop', 'import grain', 'allowed only in data'),
        ('training.loop', 'import orbax.checkpoint as ocp', 'allowed only in training.checkpoint'),
        ('training.loop', 'from absl import flags', 'allowed only in cli'),
        ('config', 'import ml_collections', 'allowed only in cli'),
        ('data.sources.folder', 'from PIL import Image', 'allowed only in tokens.images'),
        ('interop.pth', 'import torch', 'allowed only in no file'),
        ('sampling.page', 'import array_record.python', 'allowed only in data'),
        ('brand_new', 'import numpy', 'has no level'),
    ],
)
def test_a_forbidden_import_is_found(module, source, expected):
  known = set(_modules()) | {'training.loop', 'training.losses', 'sampling.engine', 'sampling.logits', 'models.transformer.model'}
  found = violations(module, source, known)
  assert len(found) >= 1
  assert any(expected in line for line in found), found


@pytest.mark.parametrize(
    ('module', 'source'),
    [
        ('models.vqgan.model', 'import jax\nfrom chameleon_jax.config import VQGANConfig\nfrom . import blocks'),
        ('tokens.render', 'import numpy as np\nfrom chameleon_jax.tokens import document'),
        ('data.pipeline', 'import grain\nfrom chameleon_jax.data import packing'),
        ('training.loop', 'from absl import logging\nfrom chameleon_jax.data import pipeline\nfrom chameleon_jax.training import step'),
        ('cli.train', 'from absl import flags\nfrom chameleon_jax import __version__\nfrom chameleon_jax.training.loop import train'),
        ('experiments.x', 'from chameleon_jax import config, presets\nfrom chameleon_jax.cli.flags import editable'),
        ('tools.build', 'from PIL import Image'),
    ],
)
def test_a_downward_import_is_fine(module, source):
  known = set(_modules()) | {'training.loop', 'training.step', 'data.packing', 'data.pipeline', 'models.vqgan.blocks', 'tokens.document'}
  assert violations(module, source, known) == []
