"""`chameleon peek`: the flags, and the errors a user can make; rebuilding and the page are tested in tests/training."""

import pytest

from chameleon_jax.cli import main as cli
from chameleon_jax.data.sources import source as registry


@pytest.fixture(autouse=True)
def sources(monkeypatch, seen_run):
  for name, factory in seen_run.module.SOURCES.items():
    monkeypatch.setitem(registry.SOURCES, name, factory)


def test_a_page_is_written(seen_run, tmp_path, capsys):
  output = tmp_path / 'new' / 'page.html'
  assert cli.main(['peek', f'--workdir={seen_run.workdir}', '--step=8', '--row=2', f'--output={output}']) == 0
  assert capsys.readouterr().out == f'{output}\n'
  text = output.read_text()
  assert '<h1>Step 8, row 2</h1>' in text
  drawn = seen_run.batches[7]
  ids = [int(piece.split('"')[0]) for piece in text.split(' data-id="')[1:]]
  assert ids == drawn['tokens'][2][drawn['segment_ids'][2] > 0].tolist()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--step=1'], '--workdir is missing'),
        (['--workdir={run}'], '--step is missing'),
        (['--workdir={run}', '--step=9'], 'has steps 1 to 8'),
        (['--workdir={run}', '--step=1', '--row=8'], '--row=8: the batches of this run have rows 0 to 7'),
        (['--workdir={run}/nowhere', '--step=1'], 'holds no run'),
        (['--workdir={run}', '--step=1', 'more'], "unexpected argument 'more'"),
    ],
)
def test_one_line_for_each_mistake(seen_run, capsys, tmp_path, arguments, message):
  output = tmp_path / 'page.html'
  given = [argument.format(run=seen_run.workdir) for argument in arguments]
  assert cli.main(['peek', f'--output={output}', *given]) == 1
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1
  assert not output.exists()
