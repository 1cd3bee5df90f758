"""Types of cache compared on a tiny model: every figure comes out, and the first type agrees with itself."""

import importlib.util
import pathlib

import numpy as np
import pytest

import chameleon_jax as cj
from chameleon_jax.data.sources.emoji_world import EmojiWorld

_TOOL = pathlib.Path(__file__).parents[2] / 'tools' / 'compare_caches.py'


@pytest.fixture(scope='module')
def tool():
  spec = importlib.util.spec_from_file_location('compare_caches', _TOOL)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_shares_of_tokens_and_of_answers(tool):
  answers = [np.array(row) for row in ([1, 2, 3, 4], [5, 6], [7])]
  assert tool.agreement(answers, answers) == (1.0, 1.0)
  others = [np.array(row) for row in ([1, 2, 9], [5, 6], [8])]  # 2 of 4, 2 of 2 and 0 of 1 tokens
  assert tool.agreement(answers, others) == tool.agreement(others, answers) == (4 / 7, 1 / 3)


def test_all_figures_of_a_tiny_model(tool, tiny_model_folder, monkeypatch):
  """Answers are given: other tests sample."""

  def generate_tokens(model, prompts, options):
    assert options.greedy and options.image_greedy and not options.guided
    return [np.arange(4) // (1 if model.cache_dtype == 'float32' or row else 2) for row in range(len(prompts))]

  monkeypatch.setattr(tool, 'TYPES', ('float32', 'int8'))
  monkeypatch.setattr(tool.Chameleon, 'generate_tokens', generate_tokens)
  found = tool.compare(cj.load(tiny_model_folder), EmojiWorld.load('all'), 2)
  assert len(found) == 7
  for figure in ('bits per byte', 'nats a code'):
    float32, int8 = found[figure]['float32'], found[figure]['int8']
    assert int8 == pytest.approx(float32, rel=0.01) and int8 != float32 > 0
  assert found['same best code']['float32'] == 1 >= found['same best code']['int8'] > 0.5
  for task in ('describe', 'draw'):  # of two answers one is 0 0 1 1 in place of 0 1 2 3
    assert found[f'{task}: equal greedy tokens'] == {'float32': 1, 'int8': 5 / 8}
    assert found[f'{task}: equal answers'] == {'float32': 1, 'int8': 1 / 2}
  lines = tool.table(found).splitlines()
  assert lines[:2] == ['| | float32 | int8 |', '|---|---|---|'] and len(lines) == 9
