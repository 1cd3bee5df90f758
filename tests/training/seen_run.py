"""One small run, cut short and resumed, with everything that shows its inside switched on; shared by the tests that look at it.

    read, run = seen_run.make(folder)      read: the batches that its steps drew, in the order they were drawn
"""

import grain
import jax
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import (
  CheckpointConfig,
  DataConfig,
  OptimizerConfig,
  SamplesConfig,
  SamplingOptions,
  StageConfig,
  TrainConfig,
  VocabularyConfig,
)
from chameleon_jax.data.sources import source as registry
from chameleon_jax.interop.native import ModelParts, abstract_vqgan, save_model
from chameleon_jax.tokens.document import Codes, Document, Text
from chameleon_jax.tokens.text import train_text_tokenizer
from chameleon_jax.training import loop
from chameleon_jax.training.state import unboxed

VOCABULARY = VocabularyConfig(size=512, n_codes=32, n_sentinels=0, n_reserved=2)


class Numbers:
  """' n n n', perhaps a picture whose codes count from n on, as a document or as a conversation."""

  def __init__(self, split, kind):
    self.first, self.kind = (0 if split == 'train' else 24), kind

  def __len__(self):
    return 24 if self.first == 0 else 8

  def document(self, index, rng):
    number = self.first + index
    text = Text(f' {number}' * int(rng.integers(2, 5)))
    picture = Codes((number + np.arange(16, dtype=np.int32)) % 32)
    return {
        'text': lambda: Document.plain(text),
        'pairs': lambda: Document.plain(text, picture),
        'chat': lambda: Document.chat((text, picture), picture),
    }[self.kind]()


SOURCES = {f'numbers_{kind}': lambda split, codes, kind=kind: Numbers(split, kind) for kind in ('text', 'pairs', 'chat')}


def config(**changes):
  first, second = (('numbers_text', 1.0), ('numbers_chat', 1.0)), (('numbers_pairs', 0.5), ('numbers_text', 0.5))
  values = {
      'model': presets.tiny_transformer(n_layers=2, vocab_size=512, dropout=0.1),
      'vocabulary': VOCABULARY,
      'data': DataConfig(
          stages=(StageConfig(0.5, first), StageConfig(0.5, second)), seq_len=64, batch_size=8, image_noise=0.8, prompt_image_noise=0.3
      ),
      'optimizer': OptimizerConfig(learning_rate=0.01, warmup_steps=2, schedule='cosine', eps=1e-8),
      'image_loss_weight': 0.5,
      'n_steps': 8,
      'eval_every': 8,
      'eval_batches': 1,
      'log_every': 1,
      'checkpoint': CheckpointConfig(every_steps=3),
      **changes,
  }
  return TrainConfig(**values)


def tokenizers():
  text = train_text_tokenizer([' '.join(map(str, range(32)))] * 20, n_pieces=267, character_coverage=1.0, seed=0)
  vqgan, rng = presets.tiny_vqgan(), np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), unboxed(abstract_vqgan(vqgan)))
  return ModelParts(text_tokenizer=text, vqgan_config=vqgan, vqgan_params=params, vocabulary=VOCABULARY)


class Watched(grain.DatasetIterator):
  """An iterator that lets another one through, but for the batches of the numbers to leave out; keeps what it gave."""

  def __init__(self, inner, given, leave_out=()):
    super().__init__((inner,))
    self.inner, self.given, self.leave_out, self.number = inner, given, leave_out, 0

  def __next__(self):
    while True:
      batch = next(self.inner)
      self.number += 1
      if self.number not in self.leave_out:
        self.given.append({name: value.copy() for name, value in batch.items()})
        return batch

  def get_state(self):
    return self.inner.get_state()

  def set_state(self, state):
    self.inner.set_state(state)

  def close(self):
    self.inner.close()


def watch(patch, *, leave_out=()):
  """Has `train` read through `Watched`; returns the list of batches that grows."""
  given, make_batches = [], loop.make_batches
  patch.setattr(loop, 'make_batches', lambda *arguments, **options: Watched(make_batches(*arguments, **options), given, leave_out))
  return given


def make(folder):
  """Runs 8 steps in two parts, 5 and 3; returns (batches drawn, config), with the run in folder / 'run'."""
  save_model(folder / 'tokenizers', tokenizers())
  options = SamplingOptions(max_new_tokens=24, guidance_text=1.0, guidance_image=1.0)
  run = config(
      tokenizers=str(folder / 'tokenizers'), diagnostics_every=3, samples=SamplesConfig(every_evaluations=1, n_prompts=3, options=options)
  )
  with pytest.MonkeyPatch.context() as patch:
    for name, factory in SOURCES.items():
      patch.setitem(registry.SOURCES, name, factory)
    given = watch(patch)
    loop.train(run, folder / 'run', stop_after=5, profile_steps=(2, 3))
    (folder / 'run' / 'profile').write_text('1\n')
    loop.train(run, folder / 'run')
  return given, run
