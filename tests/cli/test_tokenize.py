"""`chameleon tokenize`: from a folder of pictures to a training run on its shards, and the mistakes one can make."""

import json

import numpy as np
import pytest

from chameleon_jax.cli import main as cli
from chameleon_jax.data.sources.source import make_source
from chameleon_jax.tokens.images import save_png


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  (tmp_path / 'pics').mkdir()
  for i in range(12):
    save_png(tmp_path / 'pics' / f'{i}.png', rng.integers(0, 256, (16, 16, 3), np.uint8))
    (tmp_path / 'pics' / f'{i}.txt').write_text(f'a red apple {i}')
  return tmp_path


def _run(folder, model, *more, source=None):
  source = source or f'image_folder:{folder}/pics?validation=0.3'
  return cli.main(['tokenize', f'--source={source}', f'--model={model}', f'--output={folder}/out', '--shards=2', '--batch_size=4', *more])


def test_both_splits_are_written(folder, tiny_model_folder, capsys):
  assert _run(folder, tiny_model_folder) == 0
  out = capsys.readouterr().out.splitlines()
  sizes = [len(make_source(f'array_record:{folder}/out', split)) for split in ('train', 'validation')]
  assert sum(sizes) == 12
  assert sizes[1] > 0
  n_bytes = sum(len(f'a red apple {i}') for i in range(12))
  tables = [json.loads((folder / 'out' / split / 'tokenized.json').read_text()) for split in ('train', 'validation')]
  assert sum(table['counts']['text_bytes'] for table in tables) == n_bytes
  text = f'{tables[0]["counts"]["text_bytes"]} bytes of text'
  assert out[0] == f'{folder}/out/train: {sizes[0]} documents, {sizes[0]} pictures, {text} in 2 shards'
  assert _run(folder, tiny_model_folder) == 0  # ended: says the same again
  assert capsys.readouterr().out.splitlines() == out


def test_rejects_are_told(folder, tiny_model_folder, capsys):
  (folder / 'pics' / '3.png').write_bytes(b'no picture')
  assert _run(folder, tiny_model_folder, '--max_rejects=0.5') == 0
  assert f'; 1 rejected, see {folder}/out/' in capsys.readouterr().out
  (folder / 'out').rename(folder / 'old')
  assert _run(folder, tiny_model_folder) == 1
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert '3.png is not a picture in a known format' in error
  assert 'rejected (max_rejects 0.01); the first' in error


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['tokenize', '--model=emoji', '--output=x'], '--source=KIND:ARGUMENT is needed'),
        (['tokenize', '--source=emoji_text', '--output=x'], '--model=DIR is needed'),
        (['tokenize', '--source=emoji_text', '--model=emoji'], '--output=DIR is needed'),
        (['tokenize', '--source=emoji_text', '--model=emoji', '--output=x', '--split=test'], '--split takes train, validation or both'),
        (['tokenize', '--source=jsonl:none.jsonl', '--model=emoji', '--output=x'], 'none.jsonl does not exist'),
        (['tokenize', '--source=emoji_txt', '--model=emoji', '--output=x'], "did you mean 'emoji_text'"),
        (['tokenize', '--source=emoji_text', '--model=nowhere', '--output={tmp}/x'], 'nowhere does not exist'),
        (['tokenize', '--source=emoji_text', '--model=emoji', '--output={tmp}/x', '--max_rejects=3'], 'max_rejects must be a share'),
        (['tokenize', 'extra', '--source=emoji_text'], "unexpected argument 'extra'"),
    ],
)
def test_one_line_for_each_mistake(capsys, tmp_path, arguments, message):
  assert cli.main([argument.format(tmp=tmp_path) for argument in arguments]) == 1
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1
