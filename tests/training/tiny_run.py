"""A run of seconds on a scripted source: `python tiny_run.py WORKDIR [--kill_after N] [--whole_first] [--optimizer adamw|muon]`.

With --kill_after the process kills itself, as `kill -9` does, right after the metrics of that step are written.
Also imported by test_loop.py.
"""

import argparse
import dataclasses
import os
import pathlib
import signal

import numpy as np

from chameleon_jax import presets
from chameleon_jax.config import CheckpointConfig, DataConfig, OptimizerConfig, StageConfig, TrainConfig, VocabularyConfig
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


def tokenizers():
  text = ' '.join(str(number) for number in range(32))
  return ModelParts(text_tokenizer=train_text_tokenizer([text] * 20, n_pieces=267, character_coverage=1.0, seed=0))


def _kill_after(step):
  write = loop.MetricsWriter.write

  def write_and_die(self, at, values, *, prefix='train'):
    write(self, at, values, prefix=prefix)
    if at == step and prefix == 'train':
      os.kill(os.getpid(), signal.SIGKILL)

  loop.MetricsWriter.write = write_and_die


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('--kill_after', type=int)
  parser.add_argument('--whole_first', action='store_true')
  parser.add_argument('--optimizer', choices=('adamw', 'muon'), default='adamw')
  arguments = parser.parse_args()
  run = config()
  # With Muon also the unrolled layers of the emoji experiments.
  model = dataclasses.replace(run.model, scan_layers=arguments.optimizer == 'adamw')
  run = dataclasses.replace(run, model=model, optimizer=dataclasses.replace(run.optimizer, name=arguments.optimizer))
  registry.SOURCES.update(SOURCES)
  if arguments.whole_first:
    loop.train(run, arguments.workdir.with_name('whole'), tokenizers=tokenizers())
  if arguments.kill_after is not None:
    _kill_after(arguments.kill_after)
  loop.train(run, arguments.workdir, tokenizers=tokenizers())


if __name__ == '__main__':
  main()
