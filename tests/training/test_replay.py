"""What a step saw is built again: the very batches that a run drew, resumed or not, with the documents they are made of."""

import json
import shutil

import numpy as np
import pytest

from chameleon_jax.cli.values import frozen
from chameleon_jax.config import TrainConfig
from chameleon_jax.data.sources import source as registry
from chameleon_jax.errors import CheckpointError, ConfigError
from chameleon_jax.tokens.render import render
from chameleon_jax.training import replay


@pytest.fixture(autouse=True)
def sources(monkeypatch, seen_run):
  for name, factory in seen_run.module.SOURCES.items():
    monkeypatch.setitem(registry.SOURCES, name, factory)


def _rebuild(run, step, *, workdir=None):
  workdir = workdir or run.workdir
  return replay.rebuild(workdir, frozen(replay.saved_config(workdir, step), TrainConfig), step, say=lambda line: None)


@pytest.mark.parametrize(('step', 'read_from'), [(1, None), (2, None), (6, None), (7, 6), (8, 6)])
def test_the_batch_is_the_one_that_was_drawn(seen_run, step, read_from):
  """Checkpoints of steps 6 and 8 are left; the run was cut short after step 5."""
  seen = _rebuild(seen_run, step)
  assert (seen.step, seen.number, seen.read_from) == (step, step, read_from)
  drawn = seen_run.batches[step - 1]
  assert drawn.keys() == seen.arrays.keys() - {'sources', 'documents', 'clean_tokens'}
  for name, value in drawn.items():
    np.testing.assert_array_equal(seen.arrays[name], value, err_msg=name)


def test_every_segment_is_the_document_it_is_said_to_be(seen_run):
  """The source is asked for the document itself; how often a number is repeated was drawn, so every number of repeats is tried."""
  seen = _rebuild(seen_run, 3)
  assert seen.sources == ('numbers_text', 'numbers_chat', 'numbers_pairs')
  names, n_noisy = set(), 0
  for row in range(8):
    arrays = {name: value[row] for name, value in seen.arrays.items()}
    padding = arrays['segment_ids'] == 0
    assert np.all(arrays['sources'][padding] == -1) and np.all(arrays['documents'][padding] == -1)
    for segment in range(1, arrays['segment_ids'].max() + 1):
      inside = arrays['segment_ids'] == segment
      (place,), (index,) = np.unique(arrays['sources'][inside]), np.unique(arrays['documents'][inside])
      names.add(seen.sources[place])
      source = registry.SOURCES[seen.sources[place]]('train', None)
      candidates = []
      for repeats in (2, 3, 4):
        document = source.document(int(index), _Fixed(repeats))
        candidates.append(render(document, seen.vocabulary, seen.parts.text_tokenizer).tokens.tolist())
      assert arrays['clean_tokens'][inside].tolist() in candidates
      n_noisy += int(np.count_nonzero(arrays['clean_tokens'][inside] != arrays['tokens'][inside]))
      np.testing.assert_array_equal(arrays['targets'][inside][:-1], arrays['clean_tokens'][inside][1:])
  assert names == {'numbers_text', 'numbers_chat'}  # those of the first stage
  assert n_noisy > 0


class _Fixed:
  """In place of a random generator."""

  def __init__(self, value):
    self.value = value

  def integers(self, low, high):
    return self.value


def test_batches_thrown_away_are_counted(seen_run, tmp_path):
  """A run whose books say that batches 2 and 3 were thrown away after step 1: step 2 saw batch 4, step 4 batch 6."""
  workdir = tmp_path / 'run'
  workdir.mkdir()
  shutil.copy(seen_run.workdir / 'config.json', workdir)
  line = {'step': 3, 'spike/loss': 9.0, 'spike/rewound_to': 1, 'spike/first_skipped': 2, 'spike/last_skipped': 3}
  (workdir / 'metrics.jsonl').write_text(json.dumps(line) + '\n' + json.dumps(line)[:20])
  for step, number in ((1, 1), (2, 4), (4, 6)):
    seen = _rebuild(seen_run, step, workdir=workdir)
    assert (seen.number, seen.read_from) == (number, None)
    np.testing.assert_array_equal(seen.arrays['tokens'], seen_run.batches[number - 1]['tokens'])


def test_what_cannot_be_rebuilt_is_said(seen_run, tmp_path):
  with pytest.raises(CheckpointError, match='holds no run: no config.json'):
    replay.saved_config(tmp_path, 1)
  (tmp_path / 'config.json').write_text('{"model": ')
  with pytest.raises(CheckpointError, match='config.json is damaged'):
    replay.saved_config(tmp_path, 1)
  with pytest.raises(ConfigError, match='step 9: the run in .* has steps 1 to 8'):
    replay.rebuild(seen_run.workdir, seen_run.config, 9)


def test_the_folder_is_left_as_it_was(seen_run):
  def everything():
    return {path: path.stat().st_mtime_ns for path in seen_run.workdir.rglob('*')}

  before = everything()
  _rebuild(seen_run, 7)
  assert everything() == before
