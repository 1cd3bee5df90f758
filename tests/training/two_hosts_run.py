"""One of several processes of a small run that draws samples and notes its batches: `python two_hosts_run.py FOLDER PORT INDEX COUNT`.

The parameters lie in pieces on devices of all processes. FOLDER/run is the run, FOLDER/batches-INDEX.npz what the process read.
"""

import dataclasses
import importlib.util
import pathlib
import sys

import jax
import numpy as np
import pytest

from chameleon_jax.config import CheckpointConfig, MeshConfig, SamplesConfig, SamplingOptions
from chameleon_jax.data.shards import host_rows
from chameleon_jax.data.sources import source as registry
from chameleon_jax.training import loop


def _load(name):
  spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f'{name}.py'))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


seen_run = _load('seen_run')
OPTIONS = SamplingOptions(max_new_tokens=24, guidance_text=1.0, guidance_image=1.0)


def config():
  """Four steps on eight devices, two data shards, samples after the last step, a checkpoint every two."""
  plain = seen_run.config(n_steps=4, eval_every=4, checkpoint=CheckpointConfig(every_steps=2))
  return dataclasses.replace(
      plain,
      model=dataclasses.replace(plain.model, n_layers=1),
      data=dataclasses.replace(plain.data, shards=2),
      mesh=MeshConfig(data=1, fsdp=4, tensor=2),
      samples=SamplesConfig(every_evaluations=1, n_prompts=2, options=OPTIONS),
  )


def main():
  folder, port, index, count = sys.argv[1:]
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=int(count), process_id=int(index), initialization_timeout=60)
  registry.SOURCES.update(seen_run.SOURCES)
  given, run, folder = seen_run.watch(pytest.MonkeyPatch()), config(), pathlib.Path(folder)
  loop.train(run, folder / 'run', tokenizers=seen_run.tokenizers())
  rows = host_rows(loop.make_mesh(run.mesh), run.data.batch_size)
  names = given[0].keys()
  np.savez(folder / f'batches-{index}.npz', rows=rows, **{name: np.stack([batch[name] for batch in given]) for name in names})


if __name__ == '__main__':
  main()
