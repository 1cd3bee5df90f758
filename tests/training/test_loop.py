"""Whole runs: resuming after a kill and after a clean stop, stopping on a loss that is not finite, the model folder."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import MeshConfig, OptimizerConfig, TransformerConfig
from chameleon_jax.data.sources import source as registry
from chameleon_jax.errors import CheckpointError, ConfigError
from chameleon_jax.interop.native import ModelParts, abstract_vqgan, load_model, save_model
from chameleon_jax.interop.opening import open_checkpoint
from chameleon_jax.tokens.document import Document, Image, Text
from chameleon_jax.tokens.text_json import JsonText
from chameleon_jax.training import loop
from chameleon_jax.training.checkpoint import Checkpoints
from chameleon_jax.training.loop import NonFiniteLossError, train
from chameleon_jax.training.state import unboxed

SCRIPT = pathlib.Path(__file__).with_name('tiny_run.py')


def _load_script():
  spec = importlib.util.spec_from_file_location('tiny_run', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


tiny_run = _load_script()


@pytest.fixture(autouse=True)
def sources(monkeypatch):
  for name, factory in tiny_run.SOURCES.items():
    monkeypatch.setitem(registry.SOURCES, name, factory)


@pytest.fixture(scope='module')
def tokenizers():
  return tiny_run.tokenizers()


def _metrics(workdir, *, prefix='train'):
  """step -> its last written values, without what depends on the clock."""
  found = {}
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    values = json.loads(line)
    kept = {name: value for name, value in values.items() if name.startswith(prefix) and 'second' not in name and 'wait' not in name}
    if kept:
      found[values['step']] = kept
  return found


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_losses_are_bit_identical_after_sigkill(tmp_path, optimizer):
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(path for path in sys.path if path), 'XLA_FLAGS': ''}
  command = [sys.executable, str(SCRIPT), str(tmp_path / 'killed'), '--optimizer', optimizer]
  first = subprocess.run([*command, '--whole_first', '--kill_after', '8'], env=environment, capture_output=True, text=True, timeout=300)
  assert first.returncode == -signal.SIGKILL, first.stderr
  assert sorted(_metrics(tmp_path / 'killed')) == list(range(1, 9))
  assert not (tmp_path / 'killed' / 'model').exists()

  second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
  assert second.returncode == 0, second.stderr
  assert 'resumed after step' in second.stderr
  whole, resumed = _metrics(tmp_path / 'whole'), _metrics(tmp_path / 'killed')
  assert sorted(whole) == list(range(1, 13))
  assert resumed == whole
  assert _metrics(tmp_path / 'killed', prefix='validation') == _metrics(tmp_path / 'whole', prefix='validation')
  kept = json.loads((tmp_path / 'killed' / 'config.json').read_text())
  assert kept['data']['stages'][1] == {'fraction': 0.5, 'weights': [['counting_text', 0.5], ['counting_pairs', 0.5]]}


def test_a_run_in_two_parts_on_a_mesh_is_the_run_in_one(tmp_path, tokenizers, capsys):
  config = tiny_run.config(mesh=MeshConfig(data=2, fsdp=2, tensor=2))
  whole = train(config, tmp_path / 'whole', tokenizers=tokenizers)
  half = train(config, tmp_path / 'parts', tokenizers=tokenizers, stop_after=5)
  assert int(half.step) == 5
  assert load_model(tmp_path / 'parts' / 'model').transformer_config == config.model
  parts = train(config, tmp_path / 'parts', tokenizers=tokenizers)
  assert int(parts.step) == int(whole.step) == 12
  assert _metrics(tmp_path / 'parts') == _metrics(tmp_path / 'whole')
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), parts.params, whole.params)

  values = _metrics(tmp_path / 'whole')
  assert 'train/loss_image' not in values[6]
  assert values[7]['train/loss_image'] > 0  # the stage with pictures began
  assert values[12]['train/loss_text'] < values[1]['train/loss_text'] - 1
  assert {'train/gradient_norm', 'train/logit_norm', 'train/z', 'train/parameter_norm', 'train/fill'} <= values[1].keys()
  validation = _metrics(tmp_path / 'whole', prefix='validation')
  assert sorted(validation) == [8, 12]
  assert {'validation/loss_text', 'validation/loss_image', 'validation/counting_text/loss_text'} <= validation[12].keys()

  model = load_model(tmp_path / 'parts' / 'model')
  assert model.transformer_config == config.model
  assert model.vocabulary == tiny_run.VOCABULARY
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), model.transformer_params, jax.device_get(parts.params))
  with Checkpoints(tmp_path / 'whole' / 'checkpoints', config.checkpoint) as checkpoints:
    assert checkpoints.all_steps() == [9, 12]
    assert checkpoints.config(9)['optimizer']['learning_rate'] == 0.01

  capsys.readouterr()
  train(config, tmp_path / 'whole', tokenizers=tokenizers)  # nothing left to do
  assert 'resumed after step 12' in capsys.readouterr().err

  other = dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=128))
  with pytest.raises(CheckpointError, match="'params/layers/feed_forward/down_proj' has shape"):
    train(other, tmp_path / 'whole', tokenizers=tokenizers)
  assert 'note: config differs from the checkpoint: config.model.d_ff was 64, is 128' in capsys.readouterr().err

  fine_tune = dataclasses.replace(config, init_from=str(tmp_path / 'whole' / 'model'), seed=5)
  tuned = train(fine_tune, tmp_path / 'tuned', max_minutes=0)  # its tokenizers come from init_from
  assert int(tuned.step) == 1
  tuned_metrics = _metrics(tmp_path / 'tuned')
  assert sorted(tuned_metrics) == [1]
  assert tuned_metrics[1]['train/loss'] < values[1]['train/loss'] - 1
  with Checkpoints(tmp_path / 'tuned' / 'checkpoints', config.checkpoint) as checkpoints:
    assert checkpoints.latest_step() == 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, tokenizers):
  optimizer = OptimizerConfig(learning_rate=1e30, warmup_steps=2, schedule='constant')
  config = tiny_run.config(optimizer=optimizer, checkpoint=dataclasses.replace(tiny_run.config().checkpoint, every_steps=1))
  with pytest.raises(NonFiniteLossError, match=r'step (\d+): not finite .*last good checkpoint is step') as raised:
    train(config, tmp_path, tokenizers=tokenizers)
  failed = int(str(raised.value).split(':')[0].removeprefix('step '))
  assert failed >= 2
  with Checkpoints(tmp_path / 'checkpoints', config.checkpoint) as checkpoints:
    assert checkpoints.latest_step() == failed - 1
  assert not (tmp_path / 'model').exists()


class Pixels:
  """One picture in the world of 'pixels', as pixels."""

  def __init__(self, split, codes):
    del split, codes

  def __len__(self):
    return 4

  def document(self, index, rng):
    return Document.plain(Text('x'), Image(np.full((20, 16, 3), 60 * index, np.uint8)))


def test_pictures_become_codes_by_the_image_tokenizer(tmp_path, tokenizers, monkeypatch):
  monkeypatch.setitem(registry.SOURCES, 'pixels', Pixels)
  vqgan = presets.tiny_vqgan()
  encode = lambda pictures: np.zeros((len(pictures), vqgan.n_image_tokens), np.int32)
  monkeypatch.setattr(loop, 'make_encoder', lambda config, params: encode)
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), unboxed(abstract_vqgan(vqgan)))
  parts = dataclasses.replace(tokenizers, vqgan_config=vqgan, vqgan_params=params)
  stages = (dataclasses.replace(tiny_run.config().data.stages[0], fraction=1.0, weights=(('pixels', 1.0),)),)
  config = tiny_run.config(data=dataclasses.replace(tiny_run.config().data, stages=stages))
  train(config, tmp_path, tokenizers=parts, stop_after=1)
  assert _metrics(tmp_path)[1]['train/n_image'] > 0
  model = load_model(tmp_path / 'model')
  assert model.vqgan_config == vqgan
  assert model.text_tokenizer.encode(' 31') == tokenizers.text_tokenizer.encode(' 31')


def test_tokenizers_must_be_there_and_fit(tokenizers, tmp_path):
  config = tiny_run.config()
  with pytest.raises(ConfigError, match='no tokenizers: set config.tokenizers'):
    train(config, tmp_path)
  with pytest.raises(CheckpointError, match='does not exist'):
    train(dataclasses.replace(config, tokenizers=str(tmp_path / 'nowhere')), tmp_path)
  with pytest.raises(ConfigError, match='no text tokenizer'):
    train(config, tmp_path, tokenizers=ModelParts())
  small = dataclasses.replace(tiny_run.VOCABULARY, size=200)
  narrow = dataclasses.replace(config, vocabulary=small, model=dataclasses.replace(config.model, vocab_size=200))
  with pytest.raises(CheckpointError, match='267 pieces'):
    train(narrow, tmp_path, tokenizers=tokenizers)
  assert not (tmp_path / 'checkpoints').exists()


def test_the_start_must_be_the_same_kind_of_model(tokenizers, tmp_path):
  config = tiny_run.config()
  save_model(tmp_path / 'tokenizers', dataclasses.replace(tokenizers, vocabulary=tiny_run.VOCABULARY))
  with pytest.raises(ConfigError, match='holds no transformer'):
    train(dataclasses.replace(config, init_from=str(tmp_path / 'tokenizers')), tmp_path / 'run', tokenizers=tokenizers)

  theirs: TransformerConfig = dataclasses.replace(config.model, norm_position='post')
  parts = ModelParts(transformer_config=theirs, transformer_params={}, vocabulary=tiny_run.VOCABULARY)
  for given, message in (
      (parts, "trained with norm_position 'post'"),
      (dataclasses.replace(parts, vocabulary=dataclasses.replace(tiny_run.VOCABULARY, n_codes=16)), 'another vocabulary'),
  ):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(loop, 'load_for_training', lambda path, scan_layers, given=given: given)
      with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, init_from='theirs'), tmp_path / 'run', tokenizers=tokenizers)


def test_a_run_starts_from_weights_of_the_release(tmp_path):
  """Tokenizers and weights come from the folder as it is; its layers are stacked as the run has them."""
  folder = pathlib.Path(__file__).parents[1] / 'golden' / 'models' / 'meta_7b_like'
  with open_checkpoint(folder) as release:
    model = dataclasses.replace(release.transformer_config, scan_layers=True, max_seq_len=64)
    embedding = release.transformer.read('embedding')
    gate = release.transformer.read('layers_1/feed_forward/gate_proj')
    vocabulary = release.vocabulary
  optimizer = OptimizerConfig(learning_rate=1e-6, warmup_steps=0, schedule='constant')
  config = tiny_run.config(model=model, vocabulary=vocabulary, init_from=str(folder), optimizer=optimizer)
  state = train(config, tmp_path / 'run', stop_after=1)
  np.testing.assert_allclose(state.params['embedding'], embedding, atol=1e-5)
  np.testing.assert_allclose(state.params['layers']['feed_forward']['gate_proj'][1], gate, atol=1e-5)
  written = load_model(tmp_path / 'run' / 'model')
  assert isinstance(written.text_tokenizer, JsonText) and written.vqgan_config.n_codes == vocabulary.n_codes
