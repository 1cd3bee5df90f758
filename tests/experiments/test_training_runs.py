"""The experiment files of the transformer: they resolve, and hold the settings they claim."""

import dataclasses
import pathlib

import pytest

from chameleon_jax.cli.flags import frozen, load_config_file
from chameleon_jax.config import TrainConfig
from chameleon_jax.data.sources.source import SOURCES

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'experiments'


def _config(name):
  return frozen(load_config_file(str(FOLDER / f'{name}.py')), TrainConfig)


@pytest.mark.parametrize('name', ['emoji_pretrain', 'emoji_sft', 'emoji_sft_continued', 'chameleon_7b'])
def test_every_source_is_known(name):
  config = _config(name)
  assert {source for stage in config.data.stages for source, _ in stage.weights} <= SOURCES.keys()


@pytest.mark.parametrize('name', ['emoji_pretrain', 'chameleon_7b'])
def test_stage_2_halves_stage_1_and_adds_instructions(name):
  first, second = _config(name).data.stages
  assert (first.fraction, second.fraction) == (0.8, 0.2)
  before, after = dict(first.weights), dict(second.weights)
  assert {source: after[source] for source in before} == {source: weight / 2 for source, weight in before.items()}
  assert set(after) - set(before) == {'emoji_chat'}
  assert after['emoji_chat'] == pytest.approx(sum(before.values()) / 2)  # the other half


def test_fine_tuning_continues_the_pre_trained_model():
  pretrain, sft = _config('emoji_pretrain'), _config('emoji_sft')
  assert sft.vocabulary == pretrain.vocabulary
  assert sft.model == pretrain.model
  assert sft.optimizer.learning_rate < pretrain.optimizer.learning_rate
  continued = _config('emoji_sft_continued')
  assert continued.vocabulary == sft.vocabulary
  assert continued.model == dataclasses.replace(sft.model, dropout=0.0)
  assert (continued.init_from, sft.init_from) == ('runs/emoji/sft/model', 'runs/emoji/pretrain/model')


def test_the_tokenizers_use_the_same_vocabulary():
  from chameleon_jax.config import ImageTokenizerTrainConfig, TextTokenizerTrainConfig

  text = frozen(load_config_file(str(FOLDER / 'emoji_text_tokenizer.py')), TextTokenizerTrainConfig)
  images = frozen(load_config_file(str(FOLDER / 'emoji_image_tokenizer.py')), ImageTokenizerTrainConfig)
  pretrain = _config('emoji_pretrain')
  assert text.vocabulary == pretrain.vocabulary
  assert images.model.n_codes == pretrain.vocabulary.n_codes
  assert images.model.n_image_tokens == 64


def test_7b_has_the_settings_of_the_paper():
  config = _config('chameleon_7b')
  assert config.data.batch_size * config.data.seq_len == 2**23
  assert config.n_steps * 2**23 == pytest.approx(9.2e12, rel=1e-3)
  optimizer = config.optimizer
  assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.schedule) == (1e-4, 4000, 'exponential')
  assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 1e-5, 0.1, 1.0)
  assert config.z_loss == 1e-5
  assert config.model.dropout == 0.1
  assert config.data.seq_len % config.loss_chunks == 0
