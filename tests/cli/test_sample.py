"""`chameleon sample` on a tiny model folder: what it prints and writes, and its one-line errors."""

import numpy as np
import pytest

from chameleon_jax.cli.main import main
from chameleon_jax.tokens.images import load_image, save_png


@pytest.fixture(scope='module')
def model(tiny_model_folder):
  return tiny_model_folder


def test_a_picture_to_a_page(model, tmp_path, capsys):
  save_png(tmp_path / 'in.png', np.full((20, 30, 3), 200, np.uint8))
  code = main(
    [
      'sample',
      f'--model={model}',
      '--prompt=draw a red apple',
      f'--image={tmp_path / "in.png"}',
      '--modalities=image',
      f'--output={tmp_path / "out"}',
    ]
  )
  captured = capsys.readouterr()
  assert code == 0, captured.err
  assert captured.out.strip() == f'[{tmp_path / "out" / "picture_1.png"}]'
  assert load_image(tmp_path / 'out' / 'picture_1.png').shape == (16, 16, 3)
  page = (tmp_path / 'out' / 'index.html').read_text()
  assert page.count('<img') == 2 and 'draw a red apple' in page


def test_completions_as_text(model, capsys):
  arguments = [
    'sample',
    f'--model={model}',
    '--completion',
    '--prompt=a green',
    '--modalities=text',
    '--max_new_tokens=4',
    '--count=2',
    '--temperature=3',
  ]
  assert main(arguments) == 0
  first = capsys.readouterr().out
  assert main(arguments) == 0
  assert capsys.readouterr().out == first and len(first) > 2


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'the prompt is empty'),
    (['--prompt=a', '--temperature=0'], 'temperature must be positive'),
    (['--prompt=' + 'a b ' * 100], 'the context of this model 64; shorten it'),
    (['--image=missing.png'], 'missing.png'),
    (['loose', 'words'], "unexpected argument 'loose'"),
  ],
)
def test_bad_input_is_one_line(model, arguments, message, capsys):
  assert main(['sample', f'--model={model}', *arguments]) == 1
  error = capsys.readouterr().err.strip()
  assert message in error and '\n' not in error
