"""A run in two processes that share every parameter: its batches are built again from its folder, and its samples are those of one host."""

import importlib.util
import io
import os
import pathlib
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

from chameleon_jax.cli.values import frozen
from chameleon_jax.config import TrainConfig
from chameleon_jax.data.sources import source as registry
from chameleon_jax.interop.native import load_model
from chameleon_jax.training import replay, samples
from chameleon_jax.training.metrics import MetricsWriter
from chameleon_jax.training.run_inputs import data_options

QUICKLY = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'  # the same programs, slower code
SCRIPT = pathlib.Path(__file__).with_name('two_hosts_run.py')


@pytest.fixture(scope='module')
def two_hosts(tmp_path_factory):
  """(module of the script, folder of the run, what each process read)."""
  spec = importlib.util.spec_from_file_location('two_hosts_run', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  folder = tmp_path_factory.mktemp('two_hosts')
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = str(server.getsockname()[1])
  path = os.pathsep.join(path for path in sys.path if path)
  environment = {**os.environ, 'PYTHONPATH': path, 'XLA_FLAGS': f'--xla_force_host_platform_device_count=4 {QUICKLY}'}
  # Only process 0 fills jax's cache of programs: with it the processes would reach their first exchange far apart, and Gloo waits 30 s.
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
  hosts = [
      subprocess.Popen([sys.executable, str(SCRIPT), str(folder), port, str(index), '2'], env=environment, **pipes) for index in range(2)
  ]
  try:
    said = [host.communicate(timeout=400)[0] for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  assert [host.returncode for host in hosts] == [0, 0], said
  with pytest.MonkeyPatch.context() as patch:
    for name, factory in module.seen_run.SOURCES.items():
      patch.setitem(registry.SOURCES, name, factory)
    yield module, folder / 'run', [dict(np.load(folder / f'batches-{index}.npz')) for index in range(2)]


@pytest.mark.slow  # two processes start and compile
def test_the_batch_of_both_hosts_is_built_again(two_hosts):
  """Row r of the page is row r of the whole batch, whichever host read it; steps 3 and 4 go on from a position that both saved."""
  _, workdir, read = two_hosts
  assert [host['rows'].tolist() for host in read] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  for step, read_from in ((1, None), (2, None), (3, 2), (4, 2)):
    config = frozen(replay.saved_config(workdir, step), TrainConfig)
    seen = replay.rebuild(workdir, config, step, say=lambda line: None)
    assert (seen.number, seen.read_from) == (step, read_from)
    for host in read:
      for name in host.keys() - {'rows'}:
        np.testing.assert_array_equal(seen.arrays[name][host['rows']], host[name][step - 1], err_msg=f'{name} of step {step}')


@pytest.mark.slow
def test_samples_of_two_hosts_are_those_of_one(two_hosts, tmp_path):
  """Drawn on a mesh that spans both processes, written once; then from the model folder on one device."""
  module, workdir, _ = two_hosts
  assert [path.name for path in (workdir / 'samples').iterdir()] == ['step_0000004']
  config, parts = module.config(), load_model(workdir / 'model')
  with MetricsWriter(tmp_path, total_steps=4, stream=io.StringIO()) as writer:
    data = data_options(config, parts, say=lambda line: None)
    samples.Sampler(config, parts, data=data, writer=writer, workdir=tmp_path).draw(4, parts.transformer_params)
  drawn, expected = (_without_pictures(folder / 'samples' / 'step_0000004' / 'index.html') for folder in (workdir, tmp_path))
  assert drawn == expected and drawn.count('<article>') == 2


def _without_pictures(page):
  return re.sub(r'data:image/png;base64,[\w+/=]+', 'picture', page.read_text())
