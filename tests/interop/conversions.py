"""What the tests of conversions share: the golden checkpoints, and a comparison of two folders tensor by tensor."""

import pathlib
import shutil

import numpy as np

from chameleon_jax.interop.opening import open_checkpoint

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
MODELS = GOLDEN / 'models'
META, PORT = MODELS / 'meta_7b_like', MODELS / 'hf_7b_like'


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def values(model):
  found = {}
  for part in ('transformer', 'vqgan'):
    source = getattr(model, part)
    found |= {} if source is None else {f'{part}/{name}': np.array(source.read(name)) for name in source.specs}
  return found


def assert_same(folder, other, *, without=()):
  with open_checkpoint(folder) as a, open_checkpoint(other) as b:
    ours, theirs = values(a), values(b)
  ours = {name: value for name, value in ours.items() if not name.startswith(without)} if without else ours
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    assert value.dtype == theirs[name].dtype and value.tobytes() == theirs[name].tobytes(), name


def a_copy(tmp_path, source=PORT):
  return pathlib.Path(shutil.copytree(source, tmp_path / 'source'))
