"""What hosts compare: every leaf of the config, the versions, the code; and the line on what differs."""

import dataclasses
import pathlib
import shutil

import jax

from chameleon_jax.config import ImageTokenizerTrainConfig
from chameleon_jax.hosts import facts
from chameleon_jax.hosts.facts import code_hash, difference, run_facts

NAMES = {0: 'process 0 (a)', 1: 'process 1 (b)', 2: 'process 2 (c)'}


def test_one_setting_that_differs_is_one_fact_that_differs():
  config = ImageTokenizerTrainConfig()
  other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5))
  mine, theirs = run_facts(config, stop_after=None), run_facts(other, stop_after=None)
  assert {key for key in mine if mine[key] != theirs[key]} == {'config.optimizer.learning_rate'}
  assert theirs['config.optimizer.learning_rate'] == '0.5'
  assert mine['config.model.channel_multipliers'] == '[1, 1, 2, 2, 4]'
  assert mine['--stop_after'] == 'null' and mine['jax'] == f'"{jax.__version__}"'


def test_the_hash_is_of_the_code(tmp_path, monkeypatch):
  before = code_hash()
  copy = tmp_path / 'package'
  shutil.copytree(facts._PACKAGE, copy, ignore=lambda folder, names: [name for name in names if not name.endswith('.py') and '.' in name])
  monkeypatch.setattr(facts, '_PACKAGE', copy)
  assert code_hash.__wrapped__() == before
  changed: pathlib.Path = copy / 'training' / 'losses.py'
  changed.write_text(changed.read_text() + '\n')
  assert code_hash.__wrapped__() != before


def test_difference_names_the_process_and_the_key():
  same = {'config.a': '1', 'code': '"x"'}
  assert difference({0: same, 1: dict(same), 2: dict(same)}, NAMES) is None
  line = difference({0: same, 1: same, 2: {**same, 'config.a': '2'}}, NAMES)
  assert line.startswith('process 2 (c) differs from process 0 (a): config.a is 2 there and 1 here; start all')
  line = difference({0: same, 1: {'code': '"y"', 'config.b': '3'}, 2: {}}, NAMES)
  assert 'process 1 (b) differs from process 0 (a): config.a is missing there and 1 here (and 2 more differ: code, config.b)' in line
  assert '; so do 1 more processes' in line
