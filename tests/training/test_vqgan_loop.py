"""A whole tiny run: resume is exact, the model folder gives the run's codes, a bad loss stops it."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import (
  CheckpointConfig,
  DiscriminatorConfig,
  ImageTokenizerTrainConfig,
  MeshConfig,
  OptimizerConfig,
  VQGANConfig,
  VQLossConfig,
)
from chameleon_jax.errors import ChameleonError, ConfigError
from chameleon_jax.interop.native import load_model
from chameleon_jax.models.vqgan.model import encode_pictures
from chameleon_jax.training import vqgan_loop
from chameleon_jax.training.interruption import InterruptedRunError
from chameleon_jax.training.vqgan_loop import check_finite, train_image_tokenizer

MODEL = VQGANConfig(
  resolution=16, n_codes=8, d_code=4, z_channels=8, base_channels=8, channel_multipliers=(1,), n_res_blocks=1, patch_size=4, norm_groups=4
)
ADAM = OptimizerConfig(learning_rate=5e-3, schedule='constant', warmup_steps=0, eps=1e-8, weight_decay=0.0)
CONFIG = ImageTokenizerTrainConfig(
  model=MODEL,
  discriminator=DiscriminatorConfig(base_channels=8, n_layers=1),
  loss=VQLossConfig(discriminator_start=3, quantizer='ema', quantize_start=2, revive_every=2, perceptual='none', l2_weight=1.0),
  optimizer=ADAM,
  discriminator_optimizer=ADAM,
  horizontal_flip=True,
  batch_size=8,
  n_steps=5,
  average_decay=0.5,
  eval_every=5,
  log_every=1,
  mesh=MeshConfig(data=-1, fsdp=1),
  checkpoint=CheckpointConfig(every_steps=100, asynchronous=False),
)


def pictures() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {split: rng.integers(100, 256, (n, 16, 16, 3), dtype=np.uint8) for split, n in (('train', 10), ('validation', 3))}


def lines(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture
def idle_steps(monkeypatch):
  """Replaces the compiled update by one that only counts; the loss of step 3 is not a number."""

  def make(*args, **kwargs):
    def step(state, batch, key):
      step = state.step + 1
      return dataclasses.replace(state, step=step), {'loss': jnp.where(step == 3, jnp.nan, 1.0)}

    return step

  monkeypatch.setattr(vqgan_loop, 'make_vqgan_train_step', make)


def test_resumed_run_is_bit_identical_and_the_model_folder_is_the_run(tmp_path):
  whole = train_image_tokenizer(CONFIG, tmp_path / 'whole', pictures=pictures())
  train_image_tokenizer(CONFIG, tmp_path / 'parts', pictures=pictures(), stop_after=3)
  assert not (tmp_path / 'parts' / 'model').exists()
  parts = train_image_tokenizer(CONFIG, tmp_path / 'parts', pictures=pictures())
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(parts))
  values = {name: [line for line in lines(tmp_path / name) if 'train/loss' in line] for name in ('whole', 'parts')}
  assert [line['train/loss'] for line in values['whole']] == [line['train/loss'] for line in values['parts']]
  assert ['train/generator' in line for line in values['whole']] == [False, False, False, True, True]
  assert values['whole'][-1]['train/l2'] < values['whole'][0]['train/l2']
  last = lines(tmp_path / 'whole')[-1]
  assert last['step'] == 5 and last['train/psnr'] > 0 and 0 < last['train/use'] <= 1

  model = load_model(tmp_path / 'whole' / 'model')
  assert model.vqgan_config == CONFIG.model
  codes = encode_pictures(model.vqgan_config, model.vqgan_params, pictures()['validation'])
  np.testing.assert_array_equal(codes, encode_pictures(CONFIG.model, jax.device_get(whole.average), pictures()['validation']))


def test_start_from_a_model_folder(tmp_path, idle_steps):
  config = dataclasses.replace(CONFIG, n_steps=1, eval_every=100)
  first = train_image_tokenizer(config, tmp_path / 'first', pictures=pictures())
  from_folder = dataclasses.replace(config, init_from=str(tmp_path / 'first' / 'model'), seed=1)
  second = train_image_tokenizer(from_folder, tmp_path / 'second', pictures=pictures())
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(first.params), jax.device_get(second.params))
  other = dataclasses.replace(from_folder, model=dataclasses.replace(MODEL, n_codes=16))
  with pytest.raises(ConfigError, match=r'differs from config\.model'):
    train_image_tokenizer(other, tmp_path / 'other', pictures=pictures())


def test_sigterm_saves_and_stops(tmp_path, idle_steps, monkeypatch):
  write = vqgan_loop.MetricsWriter.write

  def write_and_signal(self, step, values, **options):
    write(self, step, values, **options)
    os.kill(os.getpid(), signal.SIGTERM)

  config = dataclasses.replace(CONFIG, n_steps=2, eval_every=100)
  with monkeypatch.context() as patch, pytest.raises(InterruptedRunError, match='SIGTERM after step 1; it is saved'):
    patch.setattr(vqgan_loop.MetricsWriter, 'write', write_and_signal)
    train_image_tokenizer(config, tmp_path, pictures=pictures())
  assert not (tmp_path / 'model').exists()
  assert int(train_image_tokenizer(config, tmp_path, pictures=pictures()).step) == 2
  assert [line['step'] for line in lines(tmp_path) if 'train/loss' in line] == [1, 2]


def test_a_diverging_run_keeps_its_last_checkpoint(tmp_path, idle_steps):
  config = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(every_steps=2, asynchronous=False), log_every=100)
  with pytest.raises(ChameleonError, match='step 3 is nan'):
    train_image_tokenizer(config, tmp_path, pictures=pictures())
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['2']
  assert not (tmp_path / 'model').exists()


@pytest.mark.skipif(len(jax.devices()) < 8, reason='needs 8 devices')
def test_batch_must_split_over_the_devices(tmp_path):
  with pytest.raises(ConfigError, match='batch_size 12'):
    train_image_tokenizer(dataclasses.replace(CONFIG, batch_size=12), tmp_path, pictures=pictures())


def test_a_loss_that_is_not_finite_names_its_step():
  check_finite([(1, jnp.array(0.5)), (2, jnp.array(0.1))])
  with pytest.raises(ChameleonError, match='step 7'):
    check_finite([(6, jnp.array(0.5)), (7, jnp.array(np.nan)), (8, jnp.array(np.inf))])
