"""The launch pages: `two_processes.md` is run as it stands, the others name commands, flags and files that exist."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from chameleon_jax.cli.flags import frozen, load_config_file
from chameleon_jax.config import TrainConfig
from chameleon_jax.interop.native import load_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = ROOT / 'experiments' / 'launch'


def _blocks(page, language):
  fenced = re.findall(r'^```(\w*)\n(.*?)^```$', (PAGES / page).read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE)
  return [text for kind, text in fenced if kind == language]


def _free_port():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return str(server.getsockname()[1])


def _run_page(script, folder, seconds):
  """Runs a script in a clone of the repository (links stand for its folders); kills it, and all it started, when the time is up."""
  for name in ('experiments', 'chameleon_jax'):
    (folder / name).symlink_to(ROOT / name)
  binaries = folder / 'bin'
  binaries.mkdir()
  (binaries / 'python').symlink_to(sys.executable)
  (binaries / 'chameleon').write_text('#!/bin/sh\nexec python -m chameleon_jax.cli.main "$@"\n')
  (binaries / 'chameleon').chmod(0o755)
  environment = {
      **os.environ,
      'PATH': f'{binaries}{os.pathsep}{os.environ["PATH"]}',
      'PYTHONPATH': os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
      'PORT': _free_port(),
  }
  # Only process 0 fills jax's cache of programs: with it the processes would reach their first exchange far apart, and Gloo waits 30 s.
  for name in ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR'):
    environment.pop(name, None)
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  process = subprocess.Popen(['bash', '-eu', '-c', script], cwd=folder, env=environment, start_new_session=True, **pipes)
  try:
    return process.communicate(timeout=seconds), process.returncode
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)  # SIGTERM may be swallowed; a hung collective never ends


@pytest.mark.slow  # six processes start
def test_the_page_of_two_processes_word_for_word(tmp_path):
  blocks = _blocks('two_processes.md', 'bash')
  assert len(blocks) == 4
  (output, errors), code = _run_page('\n'.join(blocks), tmp_path, 400)
  assert code == 0, errors
  difference = float(re.search(r'largest relative difference of 20 losses: (\S+)', output)[1])
  assert difference <= 1e-5

  runs = {name: tmp_path / 'runs' / name for name in ('one_process', 'two_processes')}
  lines = [json.loads(line) for line in (runs['two_processes'] / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines if 'train/loss' in line] == list(range(1, 21))  # one writer
  one, two = (load_model(path / 'model') for path in runs.values())
  assert two.transformer_config == one.transformer_config and two.text_tokenizer.n_pieces == one.text_tokenizer.n_pieces
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), two.transformer_params, one.transformer_params)
  assert sorted(path.name for path in (runs['two_processes'] / 'checkpoints').iterdir() if path.name.isdigit()) == ['10', '20']

  # What the page shows at its end is what was printed, but for the name of the machine and the port.
  (shown,) = _blocks('two_processes.md', '')
  machine, port = socket.gethostname(), re.search(r'did not come to 127.0.0.1:(\d+)', errors)[1]
  expected = shown.replace('my-machine', machine).replace('8476', port).splitlines()
  said = [line for line in errors.splitlines() if line.startswith('chameleon: ')]
  assert said == [expected[0], expected[1], expected[1]]
  assert output.count('exit code 1') == 3
  assert not (tmp_path / 'runs' / 'alone').exists() and not (tmp_path / 'runs' / 'differing').exists()


@pytest.mark.parametrize('page', ['slurm.md', 'tpu_vm.md', 'kubernetes.md'])
def test_other_pages_name_what_exists(page):
  from absl import flags

  from chameleon_jax.cli import train
  from chameleon_jax.cli.values import config_keys

  text = (PAGES / page).read_text(encoding='utf-8')
  experiments = re.findall(r'--config=(\S+)', text)
  assert experiments
  for experiment in experiments:
    frozen(load_config_file(str(ROOT / experiment)), TrainConfig)
  before = set(flags.FLAGS)
  try:
    train.define_flags()
    known = set(flags.FLAGS) - before
  finally:
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
  keys = {f'--{key}' for key, _, _ in config_keys(TrainConfig)} | {f'--{name}' for name in known}
  ours = re.findall(r'(--(?:config\.[\w.]+|workdir|coordinator_address|num_processes|process_id|host_timeout))\b', text)
  assert ours and set(ours) <= keys
