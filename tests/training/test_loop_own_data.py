"""A run on data of one's own: pictures encoded on the way, the same from shards, and data that changed in between."""

import json

import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, StageConfig, TrainConfig, VocabularyConfig
from chameleon_jax.data import pipeline
from chameleon_jax.data.tokenize_folder import TokenizeJob
from chameleon_jax.data.tokenize_run import run
from chameleon_jax.errors import ChameleonError
from chameleon_jax.interop.opening import load_tokenizers
from chameleon_jax.tokens.images import save_png
from chameleon_jax.training.loop import train

VOCABULARY = VocabularyConfig(size=34 + 4 + 2 + 300, n_codes=32, n_sentinels=0, n_reserved=2)  # that of tiny_model_folder
N = 12


def _write(root, n=N):
  records = [{'segments': [f'apple {i}: ', {'image': f'{i}.png'}]} for i in range(n)]
  (root / 'train.jsonl').write_text('\n'.join(map(json.dumps, records)))
  (root / 'validation.jsonl').write_text('{"text": "a red pear"}')


@pytest.fixture
def data(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(N + 1):
    save_png(tmp_path / f'{i}.png', rng.integers(0, 256, (20, 16, 3), np.uint8))
  _write(tmp_path)
  return tmp_path


def _config(source, folder):
  return TrainConfig(
      model=presets.tiny_transformer(vocab_size=VOCABULARY.size, max_seq_len=64, n_layers=1),
      vocabulary=VOCABULARY,
      data=DataConfig(stages=(StageConfig(1.0, ((source, 1.0),)),), seq_len=64, batch_size=8),
      tokenizers=str(folder),
      optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1, schedule='constant'),
      n_steps=4,
      mesh=MeshConfig(data=-1, fsdp=1),
      eval_every=4,
      eval_batches=1,
      log_every=1,
      checkpoint=CheckpointConfig(every_steps=2, asynchronous=False),
  )


def _losses(workdir):
  """step -> training loss, and validation loss of text."""
  found = {}
  for line in map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines()):
    found |= {(line['step'], name): line[name] for name in ('train/loss', 'validation/loss_text') if name in line}
  return found


@pytest.mark.slow
def test_a_run_from_files_goes_as_one_from_their_shards(data, tiny_model_folder, monkeypatch):
  monkeypatch.setattr(pipeline, '_seed', lambda seed, *_: seed)  # it takes in the name of the source, and the order goes by it
  source = f'jsonl:{data}/train.jsonl'
  config = _config(source, tiny_model_folder)
  train(config, data / 'files', stop_after=2)
  _write(data, N + 1)
  with pytest.raises(ChameleonError, match='changed since the checkpoint was saved: 12 documents then, 13 now') as caught:
    train(config, data / 'files')
  assert source in str(caught.value)
  assert '\n' not in str(caught.value)
  _write(data)
  assert int(train(config, data / 'files').step) == 4

  for split in ('train', 'validation'):
    job = TokenizeJob(source, split, str(data / 'shards' / split), n_shards=1, batch_size=4)
    run(job, lambda: load_tokenizers(tiny_model_folder))
  train(_config(f'array_record:{data}/shards', tiny_model_folder), data / 'tokenized')
  losses = _losses(data / 'files')
  assert losses == _losses(data / 'tokenized')
  assert set(losses) == {(step, 'train/loss') for step in (1, 2, 3, 4)} | {(4, 'validation/loss_text')}
  assert losses[4, 'validation/loss_text'] > 0
