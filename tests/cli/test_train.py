"""`chameleon train`: flags and the errors a user can make; the run itself is tested with training/loop.py."""

import pathlib

import pytest

from chameleon_jax.cli import main as cli
from chameleon_jax.training import loop

CONFIG = f'--config={pathlib.Path(__file__).resolve().parents[2] / "experiments" / "emoji_pretrain.py"}'


@pytest.fixture
def calls(monkeypatch):
  found = []
  monkeypatch.setattr(loop, 'train', lambda config, workdir, **options: found.append((config, workdir, options)))
  return found


def test_flags_reach_the_loop(calls, tmp_path):
  arguments = ['train', CONFIG, f'--workdir={tmp_path}', '--config.optimizer.learning_rate=1e-4', '--stop_after=7', '--max_minutes=1.5']
  arguments.append('--profile_steps=100:105')
  assert cli.main(arguments) == 0
  ((config, workdir, options),) = calls
  assert config.optimizer.learning_rate == 1e-4
  assert workdir == str(tmp_path)
  assert options == {'stop_after': 7, 'max_minutes': 1.5, 'profile_steps': (100, 105)}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['train', CONFIG], '--workdir is missing'),
        (['train', '--workdir=x'], 'this command needs --config=FILE'),
        (['train', CONFIG, '--workdir=x', '--config.optimizer.learning_rat=1'], "nearest known key is 'config.optimizer.learning_rate"),
        (['train', CONFIG, '--workdir=x', '--profile_steps=9:3'], '--profile_steps=9:3: write FIRST:LAST'),
        (['train', CONFIG, '--workdir=x', '--config.data.seq_len=4096'], 'data.seq_len 4096 is longer than model.max_seq_len 512'),
    ],
)
def test_one_line_for_each_mistake(calls, capsys, arguments, message):
  assert cli.main(arguments) == 1
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1
  assert not calls


def test_missing_tokenizers_are_one_line(tmp_path, capsys):
  assert cli.main(['train', CONFIG, f'--workdir={tmp_path}', f'--config.tokenizers={tmp_path / "nowhere"}']) == 1
  assert 'does not exist' in capsys.readouterr().err
