"""`chameleon plan`: table, JSON, exit codes, one line for every mistake. The figures are tested with planning/."""

import json
import pathlib

import pytest

from chameleon_jax.cli import main as cli
from chameleon_jax.planning import compiler

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / 'experiments'
SFT = f'--config={EXPERIMENTS / "emoji_sft.py"}'


def test_a_published_size(tmp_path, capsys):
  output = tmp_path / 'plan.json'
  assert cli.main(['plan', '--size=7b', '--topology=8xh100', '--config.data.batch_size=16', f'--json={output}']) == 0
  text = capsys.readouterr().out
  assert text.startswith('Chameleon 7B: training, 16 rows of 4,096 tokens a step\n8 x H100')
  assert 'XLA_PYTHON_CLIENT_MEM_FRACTION=0.92' in text and 'what to change:' in text
  plan = json.loads(output.read_text())
  given, best = plan['candidates']['given'], plan['candidates']['best']
  assert plan['fits'] and plan['limit'] == pytest.approx(0.92 * 79.65 * 2**30, rel=1e-6)
  assert given['mesh'] == {'data': 1, 'fsdp': 8, 'tensor': 1} and given['settings']['model.remat'] == 'full'
  assert best['tokens_per_second'] > given['tokens_per_second'] and best['peak'] <= 0.95 * plan['limit']
  assert given['peak'] == max(sum(parts.values()) for parts in given['moments'].values())
  assert list(tmp_path.iterdir()) == [output]


def test_an_experiment_file_with_overrides(capsys):
  assert cli.main(['plan', SFT, '--topology=v5e-4', '--config.model.remat=full', '--efficiency=0.3']) == 0
  text = capsys.readouterr().out
  assert text.splitlines()[0] == f'{EXPERIMENTS / "emoji_sft.py"}: training, 16 rows of 384 tokens a step'
  assert 'remat full' in text and 'products reach 30% of that' in text


def test_nothing_fits_is_exit_code_one(capsys):
  assert cli.main(['plan', '--size=34b', '--topology=1xl4', '--task=sample', '--requests=2']) == 1
  text = capsys.readouterr().out
  assert 'why not:' in text and 'without guidance: --noguided' in text


def test_sampling_with_an_int8_cache(tmp_path, capsys):
  asked = ['plan', '--size=7b', '--topology=1xh200', '--task=sample', '--requests=8', '--noguided', '--context=2048']
  caches = []
  for flag in ([], ['--cache_dtype=int8']):
    output = tmp_path / 'plan.json'
    assert cli.main([*asked, *flag, f'--json={output}']) == 0
    caches.append(json.loads(output.read_text())['candidates']['given']['moments']['decode']['cache'])
  assert capsys.readouterr().out.splitlines()[-1] and caches == [8 * 2048 * 524_288, 8 * 2048 * 270_336]


def test_sampling(capsys):
  assert cli.main(['plan', '--size=7b', '--topology=1xh200', '--task=sample', '--requests=8', '--noguided', '--context=2048']) == 0
  assert capsys.readouterr().out.startswith('Chameleon 7B: sampling, 8 requests of 2,048 tokens\n')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--size=7b'], '--topology is missing'),
    (['--size=7b', '--topology=8xh10'], "unknown topology '8xh10'; the nearest known one is '8xh100'"),
    (['--topology=v5e-4'], 'give either --config=FILE'),
    ([SFT, '--size=7b', '--topology=v5e-4'], 'give either --config=FILE'),
    ([SFT, '--topology=v5e-4', '--config.mesh.fsdp=3'], 'needs 3 devices, the topology has 4'),
    ([SFT, '--topology=v5e-4', '--config.data.batch_sise=3'], "nearest known key is 'config.data.batch_size'"),
    ([SFT, '--topology=v5e-4', '--json=nowhere/plan.json'], 'nowhere does not exist'),
    ([SFT, '--topology=8xh100', '--compile'], 'made of GPUs'),
    ([SFT, '--topology=v5e-4', '--task=sample', '--compile'], '--compile judges the training step'),
    ([SFT, '--topology=v5e-4', 'more'], "unexpected argument 'more'"),
  ],
)
def test_one_line_for_each_mistake(capsys, arguments, message):
  assert cli.main(['plan', *arguments]) == 1
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1


def test_the_compiler_has_the_last_word(monkeypatch, tmp_path, capsys):
  """Both the settings as given and the choice are compiled; a refusal of the choice is exit code 1."""
  asked = []

  def refuse(config, topology):
    asked.append((config.model.remat, topology.name))
    return compiler.Verdict(False, 20 * 2**30, round(15.75 * 2**30), 3.0, 'the TPU compiler: 20.00 GiB needed of 15.75 GiB')

  monkeypatch.setattr(compiler, 'check_available', lambda topology: None)
  monkeypatch.setattr(compiler, 'compile_train_step', refuse)
  output = tmp_path / 'plan.json'
  assert cli.main(['plan', SFT, '--topology=v5e-4', '--config.model.remat=full', '--compile', f'--json={output}']) == 1
  assert asked == [('full', 'v5e-4'), ('none', 'v5e-4')]
  assert 'TPU compiler, best: does not fit: the TPU compiler: 20.00 GiB needed of 15.75 GiB' in capsys.readouterr().out
  assert json.loads(output.read_text())['compiler']['best']['fits'] is False
