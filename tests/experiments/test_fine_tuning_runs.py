"""anole.py and lora.py: the settings they claim, and both as tiny runs over a checkpoint in Meta's form, to the exported model."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import chameleon_jax
from chameleon_jax.cli import main as cli
from chameleon_jax.cli.flags import frozen, load_config_file
from chameleon_jax.config import CheckpointConfig, DataConfig, StageConfig, TrainConfig
from chameleon_jax.data.sources import source as registry
from chameleon_jax.errors import CheckpointError, ConfigError
from chameleon_jax.interop.native import load_model
from chameleon_jax.interop.native.adapter import load_adapter
from chameleon_jax.interop.opening import open_checkpoint
from chameleon_jax.tokens.document import Codes, Document, Text
from chameleon_jax.training import lora
from chameleon_jax.training.checkpoint import Checkpoints
from chameleon_jax.training.loop import train
from chameleon_jax.training.tree_files import describe_tree

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASE = ROOT / 'tests' / 'golden' / 'models' / 'meta_7b_like'


def _experiment(name):
  return frozen(load_config_file(str(ROOT / 'experiments' / f'{name}.py')), TrainConfig)


class Stripes:
  """A word and the codes of a picture."""

  def __init__(self, split, codes):
    self.n_codes = 4

  def __len__(self):
    return 16

  def document(self, index, rng):
    return Document.plain(Text(' a'), Codes(np.full(self.n_codes, index, np.int32)))


@pytest.fixture(autouse=True)
def source(monkeypatch):
  monkeypatch.setitem(registry.SOURCES, 'stripes', Stripes)


def _tiny(name, *, learning_rate=0.01, **fine_tune):
  """The experiment over the small checkpoint: everything about what trains and how is its own."""
  config = _experiment(name)
  with open_checkpoint(BASE) as base:
    model, vocabulary = dataclasses.replace(base.transformer_config, max_seq_len=64, scan_layers=True), base.vocabulary
  assert vocabulary is not None
  rows = None if config.fine_tune.head_rows is None else (4, 4 + vocabulary.n_codes)
  data = DataConfig(stages=(StageConfig(1.0, (('stripes', 1.0),)),), seq_len=32, batch_size=8)
  return dataclasses.replace(
      config,
      model=dataclasses.replace(model, dtype='float32', param_dtype='float32'),
      vocabulary=vocabulary,
      data=data,
      init_from=str(BASE),
      fine_tune=dataclasses.replace(config.fine_tune, head_rows=rows, frozen_dtype='float32', **fine_tune),
      optimizer=dataclasses.replace(config.optimizer, learning_rate=learning_rate, warmup_steps=0, accumulate_steps=1),
      loss_chunks=1,
      n_steps=4,
      eval_every=4,
      eval_batches=1,
      log_every=1,
      checkpoint=CheckpointConfig(every_steps=2, keep_last=1, asynchronous=False),
  )


def _losses(workdir):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return {line['step']: line['train/loss'] for line in lines if 'train/loss' in line}


def test_they_hold_the_settings_they_claim():
  anole, tuned = _experiment('anole'), _experiment('lora')
  assert anole.fine_tune.head_rows == (4, 8196)
  assert anole.fine_tune.restart_std == pytest.approx(0.0221, abs=1e-4)
  assert anole.n_steps == 2197 and anole.text_loss_weight == 0
  assert 8192 * anole.model.d_model == 33_554_432  # "33.6 million"
  shapes = jax.eval_shape(lambda: lora.init_adapters(_abstract_7b(tuned.model), tuned.fine_tune, jax.random.key(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 39_976_960  # "40 million"
  for config in (anole, tuned):
    assert config.data.seq_len % config.loss_chunks == 0
    assert config.data.batch_size % config.optimizer.accumulate_steps == 0


def _abstract_7b(model):
  from chameleon_jax.interop.native import abstract_transformer
  from chameleon_jax.training.state import unboxed

  return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), unboxed(abstract_transformer(model)))


def test_anole_trains_the_image_rows_and_nothing_else(tmp_path):
  config = _tiny('anole', learning_rate=2e-3)
  state = train(config, tmp_path / 'run')
  end = 4 + config.vocabulary.n_codes
  assert [leaf.shape for leaf in jax.tree.leaves(state.params)] == [(config.model.d_model, end - 4)]
  before, after = chameleon_jax.load(BASE, dtype='float32').parts, load_model(tmp_path / 'run' / 'model')
  found = after.transformer_params
  np.testing.assert_array_equal(found['lm_head'][:, :4], before.transformer_params['lm_head'][:, :4])
  np.testing.assert_array_equal(found['lm_head'][:, end:], before.transformer_params['lm_head'][:, end:])
  assert np.std(found['lm_head'][:, 4:end]) == pytest.approx(config.fine_tune.restart_std, rel=0.15)  # drawn anew, a little trained
  np.testing.assert_array_equal(found['embedding'], before.transformer_params['embedding'])
  gate = before.transformer_params['layers_1']['feed_forward']['gate_proj']
  np.testing.assert_array_equal(found['layers']['feed_forward']['gate_proj'][1], gate)
  losses = _losses(tmp_path / 'run')
  assert losses[4] < losses[1]


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
  """(config, workdir) of a LoRA run made in two parts."""
  workdir = tmp_path_factory.mktemp('lora') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(registry.SOURCES, 'stripes', Stripes)
    config = _tiny('lora')
    train(config, workdir, stop_after=2)
    state = train(config, workdir)
  assert int(state.step) == 4
  return config, workdir


def test_a_lora_run_resumes_with_adapters_alone_in_its_checkpoints(tuned, tmp_path):
  config, workdir = tuned
  train(config, tmp_path / 'whole')
  assert _losses(workdir) == _losses(tmp_path / 'whole')
  assert _losses(workdir)[4] < _losses(workdir)[1]
  stored = jax.tree_util.tree_leaves_with_path(describe_tree(workdir / 'checkpoints' / '4' / 'state'))
  names = {jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in stored}
  assert {name.split('/')[-1] for name in names} <= {'a', 'b', 'count', 'step'} and len(names) > 42  # 7 pairs and their two moments
  with Checkpoints(workdir / 'checkpoints', config.checkpoint) as checkpoints:
    base = checkpoints.notes()['base']
    assert frozen(checkpoints.config(), TrainConfig) == config  # nothing beside it: `peek` reads it so
  assert base['path'] == str(BASE) and base['fingerprint'] == load_adapter(workdir / 'adapter').base.fingerprint


def test_apart_and_merged_are_the_same_model(tuned, tmp_path, capsys):
  _, workdir = tuned
  tokens = np.random.default_rng(0).integers(4, 30, (2, 12)).astype(np.int32)
  base = np.asarray(chameleon_jax.load(BASE, dtype='float32').logits(tokens))
  merged = np.asarray(chameleon_jax.load(workdir / 'model').logits(tokens))
  apart = np.asarray(chameleon_jax.load(BASE, adapter=workdir / 'adapter', dtype='float32').logits(tokens))
  scale = np.abs(merged - base).max()
  assert scale > 1e-3
  np.testing.assert_allclose(apart, merged, atol=1e-4 * np.abs(merged).max())
  assert np.abs(apart - merged).max() < 0.01 * scale
  arguments = [f'--source={BASE}', f'--adapter={workdir / "adapter"}', f'--target={tmp_path / "whole"}', '--target_format=orbax']
  assert cli.main(['convert', *arguments, '--dtype=float32']) == 0
  np.testing.assert_allclose(chameleon_jax.load(tmp_path / 'whole').logits(tokens), apart, atol=1e-5)

  peft = tmp_path / 'peft'
  assert cli.main(['convert', f'--adapter={workdir / "adapter"}', f'--export_peft={peft}']) == 0
  again = np.asarray(chameleon_jax.load(BASE, adapter=peft, dtype='float32').logits(tokens))
  np.testing.assert_array_equal(again, apart)
  capsys.readouterr()


def test_an_adapter_keeps_to_its_base(tuned, tmp_path):
  config, workdir = tuned
  with pytest.raises(CheckpointError, match=r'was trained beside .*meta_7b_like .* differ in .*: give the base it belongs to'):
    chameleon_jax.load(workdir / 'model', adapter=workdir / 'adapter')
  with pytest.raises(CheckpointError, match='is of another model'):
    chameleon_jax.load('emoji', adapter=workdir / 'adapter')
  with pytest.raises(CheckpointError, match='is no adapter: it holds neither adapter.json nor adapter_config.json'):
    chameleon_jax.load(BASE, adapter=workdir / 'model')
  other = dataclasses.replace(config, init_from=str(workdir / 'model'), n_steps=5)
  with pytest.raises(CheckpointError, match=r'was trained beside the weights of .*meta_7b_like .* set config.init_from to the former'):
    train(other, workdir)
  with pytest.raises(ConfigError, match="'lora' trains a part of given weights: set config.init_from"):
    train(dataclasses.replace(config, init_from=None, tokenizers=str(BASE)), tmp_path / 'none')


def test_export_apart_leaves_no_whole_model(tuned, tmp_path):
  config, workdir = tuned
  shutil.copytree(workdir / 'checkpoints', tmp_path / 'run' / 'checkpoints')
  apart = dataclasses.replace(config.fine_tune, export='apart')
  train(dataclasses.replace(config, fine_tune=apart), tmp_path / 'run')  # nothing left to do
  assert (tmp_path / 'run' / 'adapter').is_dir() and not (tmp_path / 'run' / 'model').exists()
  found, before = load_adapter(tmp_path / 'run' / 'adapter'), load_adapter(workdir / 'adapter')
  jax.tree.map(np.testing.assert_array_equal, found.pairs, before.pairs)
  assert found.base == before.base
