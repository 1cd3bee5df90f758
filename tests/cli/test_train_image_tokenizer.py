"""The command: a missing workdir is one line; the emoji experiment file is a valid config of at most 64 tokens."""

import pathlib

from chameleon_jax.cli.flags import frozen, load_config_file
from chameleon_jax.cli.main import main
from chameleon_jax.config import ImageTokenizerTrainConfig

EXPERIMENT = pathlib.Path(__file__).resolve().parents[2] / 'experiments' / 'emoji_image_tokenizer.py'


def test_missing_workdir(capsys):
  assert main(['train-image-tokenizer', f'--config={EXPERIMENT}']) == 1
  assert 'workdir' in capsys.readouterr().err


def test_emoji_experiment_has_at_most_64_tokens():
  config = frozen(load_config_file(str(EXPERIMENT)), ImageTokenizerTrainConfig)
  assert config.model.resolution == 64 and config.model.n_image_tokens <= 64


def test_unknown_key_names_the_nearest(capsys):
  assert main(['train-image-tokenizer', f'--config={EXPERIMENT}', '--config.loss.l2_wieght=1', '--workdir=x']) == 1
  assert 'l2_weight' in capsys.readouterr().err
