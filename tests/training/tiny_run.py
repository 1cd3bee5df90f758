"""A run of seconds on a scripted source, for the tests of whole runs and for tools/kill_test.py.

As a script it is one of several processes of a run on four devices: `python tiny_run.py WORKDIR PORT INDEX COUNT [TERM_AFTER]`.
With TERM_AFTER the process sends itself SIGTERM after that step.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np

from chameleon_jax import presets
from chameleon_jax.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, StageConfig, TrainConfig, VocabularyConfig
from chameleon_jax.data.sources import source as registry
from chameleon_jax.interop.native import ModelParts
from chameleon_jax.tokens.document import Codes, Document, Text
from chameleon_jax.tokens.text import train_text_tokenizer
from chameleon_jax.training import loop

VOCABULARY = VocabularyConfig(size=512, n_codes=32, n_sentinels=0, n_reserved=2)


class Counting:
  """'n n n ...' with a picture of 4 codes that all are n; the numbers of validation were never seen."""

  def __init__(self, split, with_picture):
    self.first, self.with_picture = (0 if split == 'train' else 24), with_picture

  def __len__(self):
    return 24 if self.first == 0 else 8

  def document(self, index, rng):
    number = self.first + index
    text = Text(f' {number}' * int(rng.integers(1, 5)))
    return Document.plain(text, Codes(np.full(4, number, np.int32))) if self.with_picture else Document.plain(text)


SOURCES = {
    'counting_text': lambda split, codes: Counting(split, False),
    'counting_pairs': lambda split, codes: Counting(split, True),
}


def config(**changes):
  values = {
      'model': presets.tiny_transformer(n_layers=1, vocab_size=512, dropout=0.1),
      'vocabulary': VOCABULARY,
      'data': DataConfig(
          stages=(StageConfig(0.5, (('counting_text', 1.0),)), StageConfig(0.5, (('counting_text', 0.5), ('counting_pairs', 0.5)))),
          seq_len=32,
          batch_size=8,
      ),
      'optimizer': OptimizerConfig(learning_rate=0.01, warmup_steps=2, schedule='cosine', eps=1e-8),
      'n_steps': 12,
      'eval_every': 8,
      'eval_batches': 1,
      'log_every': 1,
      'checkpoint': CheckpointConfig(every_steps=3),
      **changes,
  }
  return TrainConfig(**values)


def elastic_config(**changes):
  """On eight devices, with two data shards."""
  return config(mesh=MeshConfig(data=2, fsdp=2, tensor=2), data=dataclasses.replace(config().data, shards=2), **changes)


def tokenizers():
  text = ' '.join(str(number) for number in range(32))
  return ModelParts(text_tokenizer=train_text_tokenizer([text] * 20, n_pieces=267, character_coverage=1.0, seed=0))


def with_optimizer(run, name):
  """The run with another optimizer; with Muon also the unrolled layers of the emoji experiments."""
  model = dataclasses.replace(run.model, scan_layers=name == 'adamw')
  return dataclasses.replace(run, model=model, optimizer=dataclasses.replace(run.optimizer, name=name))


def record_steps(path):
  """From now on every step of a run appends {step, hash of its batch, its loss to the last bit} to `path`."""
  make = loop.make_train_step

  def make_recording(*arguments):
    step = make(*arguments)

    def recording(state, batch, key):
      digest = hashlib.sha256(b''.join(np.asarray(batch[name]).tobytes() for name in sorted(batch))).hexdigest()
      number = int(state.step) + 1
      state, metrics = step(state, batch, key)
      with open(path, 'a', buffering=1) as file:
        file.write(json.dumps({'step': number, 'batch': digest, 'loss': float(metrics['loss']).hex()}) + '\n')
      return state, metrics

    return recording

  loop.make_train_step = make_recording


def state_hash(state):
  """SHA-256 over every array of a state."""
  return hashlib.sha256(b''.join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))).hexdigest()


def signal_after(step, number, where=loop.MetricsWriter):
  """The process sends itself the signal right after the metrics of that step; returns what undoes it."""
  write = where.write

  def write_and_signal(self, at, values, *, prefix='train'):
    write(self, at, values, prefix=prefix)
    if at == step and prefix == 'train':
      os.kill(os.getpid(), number)

  where.write = write_and_signal
  return lambda: setattr(where, 'write', write)


def main():
  workdir, port, index, count, *term_after = sys.argv[1:]
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=int(count), process_id=int(index), initialization_timeout=60)
  registry.SOURCES.update(SOURCES)
  if term_after:
    signal_after(int(term_after[0]), signal.SIGTERM)
  try:
    run = dataclasses.replace(elastic_config(), mesh=MeshConfig(data=2, fsdp=2, tensor=1))
    loop.train(run, pathlib.Path(workdir), tokenizers=tokenizers())
  except loop.InterruptedRunError as error:
    print(f'chameleon: {error}', file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == '__main__':
  main()
