"""Whole runs: resuming after a stop, on another mesh and on other hosts, stopping on a loss that is not finite, the model folder.

Kills at any moment are in tests/tools/test_kill_test.py.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
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
from chameleon_jax.training import run_inputs
from chameleon_jax.training.checkpoint import Checkpoints
from chameleon_jax.training.interruption import InterruptedRunError
from chameleon_jax.training.loop import NonFiniteLossError, train
from chameleon_jax.training.state import unboxed

SCRIPT = pathlib.Path(__file__).with_name('tiny_run.py')


def _load_script():
  spec = importlib.util.spec_from_file_location('tiny_run', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


tiny_run = _load_script()


@pytest.fixture(autouse=True, scope='module')
def sources():
  with pytest.MonkeyPatch.context() as patch:
    for name, factory in tiny_run.SOURCES.items():
      patch.setitem(registry.SOURCES, name, factory)
    yield


@pytest.fixture(scope='module')
def tokenizers():
  return tiny_run.tokenizers()


@pytest.fixture(scope='module')
def whole(tmp_path_factory, tokenizers):
  """(config, workdir, last state) of a run that nothing disturbed."""
  config, workdir = tiny_run.elastic_config(), tmp_path_factory.mktemp('runs') / 'whole'
  return config, workdir, train(config, workdir, tokenizers=tokenizers)


@pytest.fixture(scope='module')
def stopped(whole, tokenizers):
  """Workdir of the same run, stopped by SIGTERM after step 4."""
  config, workdir = whole[0], whole[1].with_name('stopped')
  undo = tiny_run.signal_after(4, signal.SIGTERM)
  try:
    with pytest.raises(InterruptedRunError, match='stopped by SIGTERM after step 4; it is saved') as raised:
      train(config, workdir, tokenizers=tokenizers)
  finally:
    undo()
  assert raised.value.exit_code == 143
  return workdir


def _metrics(workdir, *, prefix='train'):
  """step -> its values, without what depends on the clock; no step has two."""
  found = {}
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    values = json.loads(line)
    kept = {name: value for name, value in values.items() if name.startswith(prefix) and 'second' not in name and 'wait' not in name}
    if kept:
      assert values['step'] not in found
      found[values['step']] = kept
  return found


def test_a_run_in_two_parts_on_a_mesh_is_the_run_in_one(whole, tmp_path, tokenizers, capsys):
  config, folder, whole = whole
  half = train(config, tmp_path / 'parts', tokenizers=tokenizers, stop_after=5)
  assert int(half.step) == 5
  assert load_model(tmp_path / 'parts' / 'model').transformer_config == config.model
  parts = train(config, tmp_path / 'parts', tokenizers=tokenizers)
  assert int(parts.step) == int(whole.step) == 12
  assert _metrics(tmp_path / 'parts') == _metrics(folder)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), parts.params, whole.params)

  values = _metrics(folder)
  assert 'train/loss_image' not in values[6]
  assert values[7]['train/loss_image'] > 0  # the stage with pictures began
  assert values[12]['train/loss_text'] < values[1]['train/loss_text'] - 1
  assert {'train/gradient_norm', 'train/logit_norm', 'train/z', 'train/parameter_norm', 'train/fill'} <= values[1].keys()
  validation = _metrics(folder, prefix='validation')
  assert sorted(validation) == [8, 12]
  assert {'validation/loss_text', 'validation/loss_image', 'validation/counting_text/loss_text'} <= validation[12].keys()

  kept = json.loads((tmp_path / 'parts' / 'config.json').read_text())
  assert kept['data']['stages'][1] == {'fraction': 0.5, 'weights': [['counting_text', 0.5], ['counting_pairs', 0.5]]}
  model = load_model(tmp_path / 'parts' / 'model')
  assert model.transformer_config == config.model
  assert model.vocabulary == tiny_run.VOCABULARY
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), model.transformer_params, jax.device_get(parts.params))
  with Checkpoints(folder / 'checkpoints', config.checkpoint) as checkpoints:
    assert checkpoints.all_steps() == [9, 12]
    assert checkpoints.config(9)['optimizer']['learning_rate'] == 0.01

  capsys.readouterr()
  train(config, folder, tokenizers=tokenizers)  # nothing left to do
  assert 'resumed after step 12' in capsys.readouterr().err

  other = dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=128))
  with pytest.raises(CheckpointError, match="'params/layers/feed_forward/down_proj' has shape"):
    train(other, folder, tokenizers=tokenizers)
  assert 'note: config differs from the checkpoint: config.model.d_ff was 64, is 128' in capsys.readouterr().err

  fine_tune = dataclasses.replace(config, init_from=str(folder / 'model'), seed=5)
  tuned = train(fine_tune, tmp_path / 'tuned', max_minutes=0)  # its tokenizers come from init_from
  assert int(tuned.step) == 1
  tuned_metrics = _metrics(tmp_path / 'tuned')
  assert sorted(tuned_metrics) == [1]
  assert tuned_metrics[1]['train/loss'] < values[1]['train/loss'] - 1
  with Checkpoints(tmp_path / 'tuned' / 'checkpoints', config.checkpoint) as checkpoints:
    assert checkpoints.latest_step() == 1


def _assert_same_losses(workdir, whole, *, bitwise_until):
  """All losses of both runs, to the bit up to that step, to 1e-5 after it."""
  for prefix in ('train', 'validation'):
    mine, theirs = _metrics(workdir, prefix=prefix), _metrics(whole, prefix=prefix)
    assert mine.keys() == theirs.keys()
    for step, values in theirs.items():
      losses = {name: value for name, value in values.items() if '/loss' in name or name.endswith(('_text', '_image'))}
      tolerance = 0 if step <= bitwise_until else 1e-5
      assert losses and {name: mine[step][name] for name in losses} == pytest.approx(losses, rel=tolerance, abs=0)


def test_a_stopped_run_goes_on_on_another_mesh_and_from_the_last_intact_step(whole, stopped, tmp_path, tokenizers, capsys):
  config, folder, _ = whole
  workdir = tmp_path / 'elastic'
  shutil.copytree(stopped, workdir)
  assert sorted(_metrics(workdir)) == [1, 2, 3, 4] and not (workdir / 'model').exists()
  with Checkpoints(workdir / 'checkpoints', config.checkpoint) as checkpoints:
    assert checkpoints.all_steps() == [3, 4]
  train(dataclasses.replace(config, mesh=MeshConfig(data=8, fsdp=1, tensor=1)), workdir, tokenizers=tokenizers, stop_after=8)
  assert sorted(_metrics(workdir)) == list(range(1, 9))
  damaged = max((workdir / 'checkpoints' / '8' / 'state').rglob('d/*'), key=lambda path: path.stat().st_size)
  damaged.write_bytes(damaged.read_bytes()[:-1])

  capsys.readouterr()
  train(config, workdir, tokenizers=tokenizers)
  said = capsys.readouterr().err
  assert said.count('is damaged') == 1 and 'it is now damaged-8, going back to step 6' in said
  assert 'resumed after step 6' in said and 'lines after step 6 taken back' in said
  _assert_same_losses(workdir, folder, bitwise_until=4)


@pytest.mark.slow
def test_a_stopped_run_goes_on_on_two_hosts_and_one_host_stops_both(whole, stopped, tmp_path, tokenizers):
  """SIGTERM comes to the second host alone; both save the same step, from which one host goes on."""
  config, folder, _ = whole
  workdir = tmp_path / 'hosts'
  shutil.copytree(stopped, workdir)
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    port = listener.getsockname()[1]
  path = os.pathsep.join(path for path in sys.path if path)
  environment = {**os.environ, 'PYTHONPATH': path, 'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  hosts = [
      subprocess.Popen(
          [sys.executable, str(SCRIPT), str(workdir), str(port), str(index), '2', *(['8'] if index else [])],
          env=environment,
          stderr=subprocess.PIPE,
          text=True,
      )
      for index in range(2)
  ]
  try:
    said = [host.communicate(timeout=240)[1] for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  assert [host.returncode for host in hosts] == [143, 143], said
  assert 'resumed after step 4' in said[0] and 'SIGTERM: saving and stopping within 30 s' in said[1]
  with Checkpoints(workdir / 'checkpoints', config.checkpoint) as checkpoints:
    step = checkpoints.latest_step()
  assert step in (8, 9, 10)
  assert all(f'chameleon: stopped by SIGTERM after step {step}' in text for text in said)
  assert len(list((workdir / 'checkpoints' / str(step)).glob('checksums-*-of-2.json'))) == 2
  train(config, workdir, tokenizers=tokenizers)
  _assert_same_losses(workdir, folder, bitwise_until=4)


def test_a_disk_that_is_too_small_is_told_before_the_first_step(tmp_path, tokenizers, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1000))
  with pytest.raises(CheckpointError, match='0.0 MiB are free in .*checkpoints; make room'):
    train(tiny_run.config(), tmp_path, tokenizers=tokenizers)
  assert (tmp_path / 'metrics.jsonl').read_text() == '' and not list((tmp_path / 'checkpoints').iterdir())


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
  monkeypatch.setattr(run_inputs, 'make_encoder', lambda config, params: encode)
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
      patch.setattr(run_inputs, 'load_for_training', lambda path, scan_layers, given=given: given)
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
