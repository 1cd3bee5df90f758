"""Hugging Face's `generate` as a second oracle: greedy text after prompts of unequal length, left-padded there, ragged here.

Its Chameleon may write special tokens, begin_image and end_image (spec model.md 8.5), the released sampler may not: they are suppressed
there, so that both choose among the same ids. Image codes are out of its reach anyway.
"""

import functools
import itertools
import pathlib

import numpy as np
import pytest

import chameleon_jax
from chameleon_jax.config import SamplingOptions
from chameleon_jax.interop.convert import convert

MODELS = pathlib.Path(__file__).resolve().parents[1] / 'golden' / 'models'
LAYOUTS = ('hf_7b_like', 'hf_30b_like', 'anole_like', 'meta_30b_like')
PAD, STOP, N_NEW = 1, 2, 40
SURE = 1e-4  # a lead of the best id that float32 rounding does not turn round


@functools.cache
def ours(layout):
  return chameleon_jax.load(MODELS / layout, dtype='float32')


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
  """`theirs(layout)`: the same checkpoint in transformers; Meta's layout by way of our converter, whose logits test_golden.py checks."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')

  @functools.cache
  def load(layout):
    folder = MODELS / layout
    if layout.startswith('meta'):
      folder = tmp_path_factory.mktemp('port') / layout
      convert(MODELS / layout, folder, 'huggingface')
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval()

  return load


def never_released(model):
  """Ids that the released sampler does not write in text, by their names: all that start with '<' but '</s>' and '<'; and image codes."""
  names = model.config.vocabulary_map
  return sorted(i for name, i in names.items() if (name.startswith('<') and name not in ('<', '</s>')) or name.startswith('IMGIMG'))


def prompts(vocabulary):
  """Text, turns and pictures; from one token to sixty."""
  rng = np.random.default_rng(1)
  text = lambda n: rng.integers(vocabulary.text_start, vocabulary.size, n).tolist()
  picture = [vocabulary.begin_image, *rng.integers(4, 36, 9).tolist(), vocabulary.end_image]
  rows = [[0], [0, *text(6), vocabulary.end_turn], [0, *picture, *text(3)], [0, *text(30), *picture, *picture, *text(8)], [0, *text(17)]]
  return [*rows, [0, *text(4), vocabulary.end_turn, *text(7), vocabulary.end_turn, *picture]]


def generate(model, rows, *, penalty):
  """Hugging Face's new tokens of each row up to the stop token, and the smallest lead of a best id."""
  import torch

  width = max(len(row) for row in rows)
  tokens = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
  mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
  with torch.no_grad():
    made = model.generate(
      input_ids=tokens,
      attention_mask=mask,
      do_sample=False,
      num_beams=1,
      repetition_penalty=penalty,
      suppress_tokens=never_released(model),
      max_new_tokens=N_NEW,
      eos_token_id=STOP,
      pad_token_id=PAD,
      output_scores=True,
      return_dict_in_generate=True,
    )
  written, lead = [], np.inf
  for index, row in enumerate(made.sequences[:, width:].tolist()):
    written.append(row[: row.index(STOP) + 1] if STOP in row else row)
    for scores in made.scores[: len(written[-1])]:
      best = scores[index].topk(2).values
      lead = min(lead, float(best[0] - best[1]))
  return written, lead


@pytest.mark.parametrize('penalty', [1.0, 1.2])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_greedy_text(theirs, layout, penalty):
  model = ours(layout)
  rows = prompts(model.vocabulary)
  expected, lead = generate(theirs(layout), rows, penalty=penalty)
  assert lead > SURE, 'a tie: these prompts decide nothing'
  options = SamplingOptions.meta('text', greedy=True, repetition_penalty=penalty, max_new_tokens=N_NEW)
  assert [row.tolist() for row in model.generate_tokens(rows, options)] == expected


def test_the_prompts_could_tell(theirs):
  """The penalty changes rows, rows differ, and some end early."""
  written = {}
  for layout, penalty in itertools.product(LAYOUTS, (1.0, 1.2)):
    written[layout, penalty], _ = generate(theirs(layout), prompts(ours(layout).vocabulary), penalty=penalty)
  for layout in LAYOUTS:
    assert written[layout, 1.0] != written[layout, 1.2]
    assert len({str(row) for row in written[layout, 1.2]}) == len(written[layout, 1.2])
  assert sum(row[-1] == STOP for rows in written.values() for row in rows) >= 3


@pytest.mark.parametrize('layout', LAYOUTS)
def test_suppressed_ids_are_those_that_we_never_write(theirs, layout):
  vocabulary = ours(layout).vocabulary
  written = (vocabulary.is_text & ~vocabulary.is_barred) | (np.arange(vocabulary.size) == vocabulary.end_sequence)
  assert never_released(theirs(layout)) == np.flatnonzero(~written).tolist()
