"""A conversion that is interrupted leaves nothing behind, and none takes much more memory than the largest tensor."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from chameleon_jax.interop.convert import convert
from tests.interop.conversions import META, PORT, assert_same, names

SLOW = """
import pathlib, signal, sys, time
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # a suite under nohup hands on that they are ignored
  signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
from chameleon_jax.interop import convert
seen = []
def slowly(progress):
  seen.append(progress)
  if progress.phase == sys.argv[3] and progress.tensors == 20:
    print('under way', flush=True)
    time.sleep(60)
convert.convert(sys.argv[1], sys.argv[2], sys.argv[4], overwrite=True, on_progress=slowly)
"""


def interrupted(target, number, *, phase='writing', target_format='orbax'):
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
  process = subprocess.Popen(
      [sys.executable, '-c', SLOW, str(META), str(target), phase, target_format], stdout=subprocess.PIPE, text=True, env=environment
  )
  assert process.stdout.readline() == 'under way\n'
  beside = names(target.parent)
  process.send_signal(number)
  return process, process.wait(60), beside


@pytest.mark.parametrize(
    ('number', 'phase', 'target_format'),
    [
        (signal.SIGTERM, 'writing', 'orbax'),
        (signal.SIGINT, 'verifying', 'orbax'),
        (signal.SIGTERM, 'writing', 'meta'),
        (signal.SIGTERM, 'writing', 'huggingface'),
    ],
)
def test_an_interrupted_conversion_leaves_nothing(tmp_path, number, phase, target_format):
  target = tmp_path / 'a' / 'target'
  target.parent.mkdir()
  process, code, beside = interrupted(target, number, phase=phase, target_format=target_format)
  assert code == (143 if number == signal.SIGTERM else -signal.SIGINT)
  assert beside == [f'.target.writing-{process.pid}'], 'it was killed mid-way'
  assert names(tmp_path / 'a') == []


def test_a_conversion_killed_outright_is_cleared_by_the_next(tmp_path):
  target = tmp_path / 'target'
  convert(PORT, target, 'orbax')
  process, code, _ = interrupted(target, signal.SIGKILL)
  assert code == -signal.SIGKILL
  assert names(tmp_path) == [f'.target.writing-{process.pid}', 'target']
  assert_same(PORT, target)
  convert(META, target, 'orbax', overwrite=True)
  assert names(tmp_path) == ['target']
  assert_same(META, target)


BIG = """
import pathlib, shutil, sys
import numpy as np
from chameleon_jax.config import TransformerConfig
from chameleon_jax.interop import convert as converter
from chameleon_jax.interop.lazy import LazyModel, TensorSource, TensorSpec
from chameleon_jax.interop.mapping import transformer_specs
from chameleon_jax.interop.opening import open_checkpoint

def memory(key):
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

folder, n_shards, n_layers, *formats = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
sizes = {'vocab_size': 8192, 'd_model': 2048, 'n_layers': n_layers, 'n_heads': 16, 'n_kv_heads': 16, 'd_head': 128, 'd_ff': 8192}
config = TransformerConfig(**sizes, scan_layers=False)
specs = {name: TensorSpec(shape, np.dtype(np.float32)) for name, shape in transformer_specs(config).items()}
zeros = TensorSource(specs, lambda name: np.zeros(specs[name].shape, np.float32))
model = LazyModel(path='zeros', format='orbax', transformer_config=config, transformer=zeros)
(folder / 'first').mkdir()
converter._writer(formats[0], n_shards=n_shards, dtype=None, decoder=None)(folder / 'first', model)
source = folder / 'first'
with open_checkpoint(source) as model:  # everything that is loaded once
  model.transformer.read('final_norm/weight')
largest = max(spec.nbytes for spec in specs.values())
for target_format in formats[1:]:
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak is counted from here
  before = memory('VmRSS')
  report = converter.convert(source, folder / f'as_{target_format}', target_format)
  n_files = len(list((folder / f'as_{target_format}').rglob('consolidated*.pth')))
  print(target_format, report.n_bytes, largest, memory('VmHWM') - before, n_files)
  shutil.rmtree(source)
  source = folder / f'as_{target_format}'
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path('/proc/self/clear_refs').exists(), reason='the peak of memory is read from Linux')
@pytest.mark.parametrize(('n_shards', 'n_layers', 'formats'), [(1, 10, ['orbax', 'huggingface']), (2, 6, ['orbax', 'meta'])])
def test_memory_stays_near_the_largest_tensor(tmp_path, n_shards, n_layers, formats):
  """Every format is read and written: the target is read back for comparison. Two shards are merged tensor by tensor, and split again."""
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
  try:
    command = [sys.executable, '-c', BIG, str(tmp_path), str(n_shards), str(n_layers), 'meta', *formats]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
  finally:
    shutil.rmtree(tmp_path)
  lines = [line.split() for line in run.stdout.splitlines()]
  assert [line[0] for line in lines] == formats
  for name, *numbers in lines:
    n_bytes, largest, peak, n_files = map(int, numbers)
    assert n_files == (n_shards if name == 'meta' else 0)
    limit = 3 * largest + 2**30
    assert n_bytes > (2.1 if n_layers == 10 else 1.3) * limit, 'the checkpoint itself would pass'
    assert peak < limit, f'{name}: {peak / 2**20:.0f} MiB'
