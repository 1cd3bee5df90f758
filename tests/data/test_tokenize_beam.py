"""The same shards from Apache Beam's own runner. Skipped without the extra `beam`."""

import functools
import json

import pytest

pytest.importorskip('apache_beam')

from chameleon_jax.data import tokenize_beam
from chameleon_jax.data.tokenize_folder import TokenizeJob
from chameleon_jax.data.tokenize_run import run
from chameleon_jax.errors import ConfigError
from chameleon_jax.interop.opening import load_tokenizers


def _contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def jobs(tmp_path):
  (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': f'line {i}'}) for i in range(11)) + '\n{"no": "layout"}')
  source = f'jsonl:{tmp_path}/a.jsonl?validation=0'
  return [TokenizeJob(source, 'train', str(tmp_path / name), n_shards=3, max_rejects=0.1) for name in ('here', 'beam')]


def test_a_pipeline_makes_the_same_shards(jobs, tiny_model_folder, tmp_path):
  load = functools.partial(load_tokenizers, tiny_model_folder)
  run(jobs[0], load)
  table = tokenize_beam.run(jobs[1], load, ['--runner=DirectRunner'])
  assert table['counts']['records'] == 11
  assert table['counts']['rejected'] == 1
  assert _contents(tmp_path / 'beam') == _contents(tmp_path / 'here')
  assert tokenize_beam.run(jobs[1], load, []) == table


def test_a_table_that_went_elsewhere(jobs, tiny_model_folder, monkeypatch):
  monkeypatch.setattr(tokenize_beam, 'tokenize_shards', lambda pipeline, job, load: pipeline | tokenize_beam.beam.Create([1]))
  with pytest.raises(ConfigError, match='is it the same folder on every worker'):
    tokenize_beam.run(jobs[1], functools.partial(load_tokenizers, tiny_model_folder), ['--runner=DirectRunner'])
