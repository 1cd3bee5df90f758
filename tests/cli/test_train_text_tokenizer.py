"""`chameleon train-text-tokenizer` from the command line to the model folder."""

import json
import pathlib

import pytest

from chameleon_jax.cli import main as cli
from chameleon_jax.cli.flags import frozen, load_config_file
from chameleon_jax.config import TextTokenizerTrainConfig, VocabularyConfig
from chameleon_jax.interop.native import load_model

EXPERIMENT = pathlib.Path(__file__).resolve().parents[2] / 'experiments' / 'emoji_text_tokenizer.py'
SMALL = [f'--config.vocabulary.{field}' for field in ('size=1400', 'n_codes=64', 'n_sentinels=0', 'n_reserved=4')]
SMALL += ["--config.sources=(('emoji_text', 1),)", '--config.max_sentences=2000']


def test_command_writes_a_model_folder(tmp_path, capsys):
  assert cli.main(['train-text-tokenizer', *SMALL, f'--workdir={tmp_path / "run"}']) == 0
  parts = load_model(tmp_path / 'run' / 'model')
  assert parts.vocabulary == VocabularyConfig(size=1400, n_codes=64, n_sentinels=0, n_reserved=4)
  assert parts.text_tokenizer.n_pieces == parts.vocabulary.n_text == 1326
  text = 'The "with" statement\n  is used\u2026 \U0001f600'
  assert parts.text_tokenizer.decode(parts.text_tokenizer.encode(text)) == text
  assert parts.transformer_config is None
  assert parts.vqgan_config is None
  saved = frozen(json.loads((tmp_path / 'run' / 'config.json').read_text()), TextTokenizerTrainConfig)
  assert (saved.vocabulary, saved.sources, saved.max_sentences) == (parts.vocabulary, (('emoji_text', 1),), 2000)
  assert sorted(file.name for file in (tmp_path / 'run').iterdir()) == ['config.json', 'model']
  assert 'bytes per piece' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], '--workdir is missing'),
    (['--workdir={}/run', '--config.vocabulary.size=9000000'], 'the text supports at most'),
    (['--workdir={}/run', "--config.sources=(('emoji_txt', 1),)"], 'emoji_txt'),
    (['--workdir={}/run', "--config.sources=(('emoji_text', 0),)"], 'at least once'),
    (['--workdir={}/run', '--config.vocabulary.size=72'], 'no room for text'),
  ],
)
def test_errors_are_one_line_and_leave_nothing(tmp_path, capsys, arguments, message):
  small = [argument for argument in SMALL if not any(argument.split('=')[0] in other for other in arguments)]
  assert cli.main(['train-text-tokenizer', *small, *(argument.format(tmp_path) for argument in arguments)]) == 1
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('chameleon: ')]
  assert len(lines) == 1
  assert message in lines[0]
  assert list(tmp_path.iterdir()) == []


def test_help_lists_the_fields(capsys):
  assert cli.main(['train-text-tokenizer', '--help']) == 0
  output = capsys.readouterr().out
  assert '--workdir' in output
  assert '--config.vocabulary.size' in output


def test_experiment_is_a_config():
  config = frozen(load_config_file(str(EXPERIMENT)), TextTokenizerTrainConfig)
  assert config.vocabulary == VocabularyConfig(size=3072, n_codes=1024, n_sentinels=0, n_reserved=8)
  assert 1500 <= config.vocabulary.n_text <= 2100
