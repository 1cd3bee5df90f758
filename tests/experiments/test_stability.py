"""stability.py: one measure a variant, everything else alike."""

import dataclasses
import pathlib

import pytest

from chameleon_jax.cli.flags import frozen, load_config_file
from chameleon_jax.config import TrainConfig
from chameleon_jax.errors import ConfigError

FILE = str(pathlib.Path(__file__).resolve().parents[2] / 'experiments' / 'stability.py')


def _variant(name):
  return frozen(load_config_file(f'{FILE}:{name}'), TrainConfig)


def test_each_variant_changes_one_thing():
  baseline = frozen(load_config_file(FILE), TrainConfig)
  assert _variant('baseline') == baseline
  assert baseline.model.qk_norm and baseline.z_loss == 1e-5 and baseline.model.norm_position == 'pre' and baseline.model.dropout == 0
  for name, changes in (
      ('no_qk_norm', {'qk_norm': False}),
      ('post_norm', {'norm_position': 'post'}),
      ('dropout', {'dropout': 0.1}),
  ):
    assert _variant(name) == dataclasses.replace(baseline, model=dataclasses.replace(baseline.model, **changes))
  assert _variant('no_z_loss') == dataclasses.replace(baseline, z_loss=0.0)
  both = _variant('no_qk_norm+no_z_loss')
  assert not both.model.qk_norm and both.z_loss == 0


def test_an_unknown_variant_is_one_line():
  with pytest.raises(ConfigError, match="no variant 'no_norm'; there are baseline, no_qk_norm"):
    _variant('no_norm')
  with pytest.raises(ConfigError, match="lora.py' takes no argument, got 'x'"):
    load_config_file(FILE.replace('stability.py', 'lora.py:x'))
