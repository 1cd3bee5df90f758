"""cli/evaluate.py: flags, errors, and the report; the figures themselves are tested in tests/evals/test_emoji.py."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from chameleon_jax import config as configs
from chameleon_jax.cli import main as cli
from chameleon_jax.interop.native import ModelParts, save_model
from chameleon_jax.models.vqgan.model import VQGAN


@pytest.fixture(scope='module')
def image_tokenizer(tmp_path_factory):
  """A model folder that holds an untrained image tokenizer alone: 4 tokens a picture."""
  config = configs.VQGANConfig(
      resolution=64,
      n_codes=16,
      d_code=4,
      z_channels=8,
      base_channels=8,
      channel_multipliers=(1,),
      n_res_blocks=1,
      patch_size=32,
      norm_groups=4,
  )
  params = nn.meta.unbox(VQGAN(config).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))['params'])
  path = tmp_path_factory.mktemp('model') / 'model'
  save_model(path, ModelParts(vqgan_config=config, vqgan_params=params))
  return path


def test_an_image_tokenizer_alone_gets_its_figures(image_tokenizer, tmp_path, capsys):
  report = tmp_path / 'new' / 'figures.json'
  assert cli.main(['evaluate', '--suite=emoji', f'--model={image_tokenizer}', f'--output={report}']) == 0
  table = capsys.readouterr().out.splitlines()
  assert table[0] == '| figure | value | aim | reached | of |' and len(table) == 6
  values = {figure['key']: figure for figure in json.loads(report.read_text())['figures']}
  assert list(values) == ['psnr_validation', 'psnr_train', 'image_tokens', 'codebook_use']
  assert values['image_tokens']['value'] == 4 and values['image_tokens']['reached'] is True
  assert values['psnr_validation']['n'] + values['psnr_train']['n'] == values['image_tokens']['n'] > 3000
  assert 0 < values['psnr_validation']['value'] < 28 and values['psnr_validation']['reached'] is False
  assert 0 < values['codebook_use']['value'] <= 100


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--tasks=draw'], '--tasks=draw needs them'),
        (['--tasks=drawing'], "unknown task 'drawing'"),
        (['--config.top_p=2'], 'top_p must lie in (0, 1]'),
        (['--config.tempreature=2'], "the nearest known key is 'config.temperature'"),
        (['--suite=imagenet'], 'imagenet'),
        (['extra'], "unexpected argument 'extra'"),
    ],
)
def test_mistakes_are_one_line(image_tokenizer, capsys, arguments, message):
  assert cli.main(['evaluate', f'--model={image_tokenizer}', *arguments]) != 0
  captured = capsys.readouterr()
  assert message in captured.err and captured.err.count('\n') == 1 and captured.out == ''


def test_a_missing_model_is_one_line(capsys):
  assert cli.main(['evaluate', '--model=no/such/folder']) == 1
  err = capsys.readouterr().err
  assert 'no/such/folder' in err and err.count('\n') == 1
