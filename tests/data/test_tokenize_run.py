"""The shards do not depend on how many processes made them, or on how often they were interrupted."""

import functools
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from chameleon_jax.data import tokenize_run
from chameleon_jax.data.tokenize_folder import TokenizeJob, TooManyRejects
from chameleon_jax.data.tokenize_run import run
from chameleon_jax.errors import DataError
from chameleon_jax.interop.opening import load_tokenizers
from chameleon_jax.tokens.images import save_png

N = 24


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A JSONL file with a picture in each record, the third of which is damaged."""
  root = tmp_path_factory.mktemp('data')
  rng = np.random.default_rng(0)
  for i in range(N):
    save_png(root / f'{i}.png', rng.integers(0, 256, (18, 16, 3), np.uint8))
  (root / '2.png').write_bytes(b'damaged')
  (root / 'a.jsonl').write_text('\n'.join(json.dumps({'text': f'picture {i}', 'image': f'{i}.png'}) for i in range(N)))
  return root


def _job(data, output, **changes):
  values = {'n_shards': 4, 'batch_size': 4, 'max_rejects': 0.1, **changes}
  return TokenizeJob(f'jsonl:{data}/a.jsonl?validation=0', 'train', str(output), **values)


def _contents(folder):
  return {path.name: zlib.crc32(path.read_bytes()) for path in sorted(folder.iterdir())}


@pytest.fixture(scope='module')
def alone(data, tiny_model_folder, tmp_path_factory):
  """Contents of the shards made in one go by one process."""
  output = tmp_path_factory.mktemp('alone')
  totals = []
  table = run(_job(data, output), functools.partial(load_tokenizers, tiny_model_folder), on_progress=totals.append)
  assert table['counts'] == {'records': N - 1, 'rejected': 1, 'pictures': N - 1, 'text_bytes': 221, 'pieces': table['counts']['pieces']}
  assert (totals[-1].documents, totals[-1].pictures, totals[-1].rejected, totals[-1].n_documents) == (N, N - 1, 1, N)
  found = _contents(output)
  assert len(found) == 6  # four shards, one list of rejects, the table
  return found


def test_two_processes_make_the_same(data, alone, tiny_model_folder, tmp_path):
  totals = []
  load = functools.partial(load_tokenizers, tiny_model_folder)
  run(_job(data, tmp_path), load, processes=2, on_progress=totals.append)
  assert _contents(tmp_path) == alone
  assert (totals[-1].documents, totals[-1].new_pictures) == (N, N - 1)
  assert run(_job(data, tmp_path), load, processes=2)['counts']['records'] == N - 1  # ended: nothing to do
  assert _contents(tmp_path) == alone


SCRIPT = '''
import functools, sys
from chameleon_jax.data.tokenize_folder import TokenizeJob
from chameleon_jax.data.tokenize_run import run
from chameleon_jax.interop.opening import load_tokenizers
from chameleon_jax.data.sources import jsonl
import time
read = jsonl.JsonLines.document
def slow(self, index, rng):
  time.sleep(0.05)
  return read(self, index, rng)
jsonl.JsonLines.document = slow
run(TokenizeJob(*sys.argv[1:4], n_shards=4, batch_size=4, max_rejects=0.1), functools.partial(load_tokenizers, sys.argv[4]))
'''


@pytest.mark.slow
def test_a_killed_job_goes_on_and_ends_the_same(data, alone, tiny_model_folder, tmp_path):
  output = tmp_path / 'out'
  job = _job(data, output)
  process = subprocess.Popen([sys.executable, '-c', SCRIPT, job.source, 'train', str(output), str(tiny_model_folder)])
  deadline = time.monotonic() + 60
  while not list(output.glob('shard-*.json')) and time.monotonic() < deadline:  # the first shard is done, the second has begun
    time.sleep(0.005)
  time.sleep(0.06)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  left = {path.name for path in output.iterdir()}
  assert 'job.json' in left
  assert 'tokenized.json' not in left
  assert 1 <= len([name for name in left if name.startswith('shard') and name.endswith('.json')]) < 4
  for path in output.glob('.*.part'):
    path.unlink()  # what a killed writer leaves has a dot and its number, and is nobody's shard
  run(job, functools.partial(load_tokenizers, tiny_model_folder))
  assert _contents(output) == alone


def _dies(folder):
  parts = load_tokenizers(folder)
  os.kill(os.getpid(), signal.SIGKILL)
  return parts


@pytest.mark.slow
def test_a_worker_that_dies(data, tiny_model_folder, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2])  # where the worker finds `_dies`
  with pytest.raises(DataError, match=r'worker tokenize-. died \(exit code -9\); run the same command again to go on'):
    run(_job(data, tmp_path), functools.partial(_dies, tiny_model_folder), processes=2)
  assert not list(tmp_path.glob('shard*'))


def _fails(error):
  raise error


@pytest.mark.parametrize(
    ('error', 'kind', 'message'),
    [
        (DataError('a line'), DataError, '^a line$'),
        (OSError(28, 'No space left on device', 'x'), OSError, 'No space left'),
        (ValueError('unforeseen'), RuntimeError, 'ValueError: unforeseen'),
    ],
)
def test_errors_of_a_worker_reach_its_parent(data, tmp_path, error, kind, message):
  ours, theirs = multiprocessing.Pipe()
  tokenize_run._work(theirs, _job(data, tmp_path), functools.partial(_fails, error), {})
  sent, value = ours.recv()
  assert sent == 'error'
  with pytest.raises(kind, match=message):
    raise value


def test_a_worker_ends_with_its_parent(data, tiny_model_folder, tmp_path):
  ours, theirs = multiprocessing.Pipe()
  ours.close()
  tokenize_run._work(theirs, _job(data, tmp_path), functools.partial(load_tokenizers, tiny_model_folder), {})  # returns, and says nothing


def test_rejects_of_all_workers_count(data, tiny_model_folder, tmp_path):
  load = functools.partial(load_tokenizers, tiny_model_folder)
  with pytest.raises(TooManyRejects, match='1 of 24 documents'):
    run(_job(data, tmp_path, max_rejects=0.04), load)


def test_gpus_are_shared_out(monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5')
  assert tokenize_run._gpus() == ['3', '5']
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert tokenize_run._gpus() == []
