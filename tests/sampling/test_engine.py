"""The sampler on a tiny transformer: equal to full recomputation, independent rows, limits, errors."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions
from chameleon_jax.errors import CheckpointError, PromptError
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.presets import tiny_transformer, tiny_vocabulary
from chameleon_jax.sampling import engine, loop, requests, stream_pool
from chameleon_jax.tokens.vocabulary import Vocabulary

CONFIG = tiny_transformer(max_seq_len=48, init_std=0.3)  # weights large enough that the context decides
V = Vocabulary(tiny_vocabulary())
N = 4


@functools.cache
def params():
  return nn.meta.unbox(Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params'])


@functools.cache
def sampler():
  return engine.Engine(CONFIG, params(), V, n_image_tokens=N)


@functools.cache
def _full():
  model = Transformer(CONFIG)
  return jax.jit(lambda params, tokens: model.apply({'params': params}, tokens)[0])


def logits_of(tokens):
  """Logits after a stream, without a cache; the padding behind it cannot be seen from its last token."""
  padded = np.full((1, CONFIG.max_seq_len), V.pad, np.int32)
  padded[0, : len(tokens)] = tokens
  return np.asarray(_full()(params(), padded)[0, len(tokens) - 1])


def prompts():
  t = V.text_start
  picture = [V.begin_image, 4, 9, 30, 7, V.end_image]
  rows = [
    [V.begin_sequence, t, t + 5, V.end_turn],
    [V.begin_sequence, *picture, t + 2, V.end_turn],
    [V.begin_sequence, *range(t, t + 17), V.end_turn],
  ]
  return [np.array(row, np.int32) for row in rows]


def expected(reference, rows, options):
  return [
    reference(logits_of, prompt, options, row=row, vocabulary=V, n=N, max_seq_len=CONFIG.max_seq_len) for row, prompt in enumerate(rows)
  ]


@pytest.mark.parametrize(
  'options',
  [
    SamplingOptions(modalities='text', max_new_tokens=12),
    SamplingOptions(modalities='image', image_top_p=0.95),
    SamplingOptions(max_new_tokens=28, temperature=1.0, seed=7),  # one row opens a picture, another stops early
  ],
  ids=['text', 'image', 'mixed'],
)
def test_equals_full_recomputation(options, reference):
  written = [row.tolist() for row in sampler().generate_tokens(prompts(), options)]
  assert written == expected(reference, prompts(), options)


def test_mixed_rows_with_forced_pictures(reference):
  """Prompts that end inside a picture: it is finished, closed, and the row goes on in text."""
  rows = [np.append(prompt, [V.begin_image, 4][: 1 + i % 2]).astype(np.int32) for i, prompt in enumerate(prompts())]
  options = SamplingOptions(max_new_tokens=12, seed=2)
  written = [row.tolist() for row in sampler().generate_tokens(rows, options)]
  assert written == expected(reference, rows, options)
  for i, row in enumerate(written):
    missing = N - i % 2
    assert V.is_image[row[:missing]].all() and row[missing] == V.end_image


def test_rows_do_not_depend_on_batch_or_batch_size():
  options = SamplingOptions(max_new_tokens=28, temperature=1.0, seed=7)
  whole = sampler().generate_tokens(prompts(), options)
  small = engine.Engine(CONFIG, params(), V, n_image_tokens=N, max_rows=1).generate_tokens(prompts(), options)
  first = sampler().generate_tokens(prompts()[:1], options)
  assert [row.tolist() for row in whole] == [row.tolist() for row in small]
  assert whole[0].tolist() == first[0].tolist()


def test_seeds_differ_and_repeat():
  options = SamplingOptions(modalities='text', max_new_tokens=12, temperature=2.0, top_p=0.99)
  runs = [sampler().generate_tokens(prompts()[:1], dataclasses.replace(options, seed=seed))[0].tolist() for seed in (0, 0, 1)]
  assert runs[0] == runs[1] != runs[2]


def test_settings_compile_nothing_new():
  base = SamplingOptions(modalities='text', max_new_tokens=12)
  sampler().generate_tokens(prompts(), base)
  before = loop.fill._cache_size(), loop.decode._cache_size()
  for change in (
    {'temperature': 0.5},
    {'top_p': 0.8},
    {'seed': 9},
    {'max_new_tokens': 9},
    {'stop_at_end_turn': False},
    {'repetition_penalty': 1.3},
  ):
    sampler().generate_tokens([prompt[:-1] for prompt in prompts()], dataclasses.replace(base, **change))
  assert (loop.fill._cache_size(), loop.decode._cache_size()) == before


def test_limits():
  full = np.full(CONFIG.max_seq_len, V.text_start, np.int32)
  options = SamplingOptions(modalities='text', max_new_tokens=12)
  assert sampler().generate_tokens([full], options)[0].size == 0
  assert len(sampler().generate_tokens([full[:-1]], options)[0]) == 1
  lengths = [len(row) for row in sampler().generate_tokens(prompts(), SamplingOptions(max_new_tokens=3))]
  assert max(lengths) <= 3
  assert sampler().generate_tokens([], options) == []


def test_a_prompt_of_begin_image_alone_has_room_for_all_streams():
  tight = dataclasses.replace(CONFIG, max_seq_len=N + 1)
  codes = engine.Engine(tight, params(), V, n_image_tokens=N).generate_tokens(
    [np.array([V.begin_image])], SamplingOptions(modalities='image')
  )
  assert len(codes[0]) == N and V.is_image[codes[0]].all()


@pytest.mark.parametrize(
  ('prompt', 'options', 'message'),
  [
    ([], {}, 'prompt 0 is empty'),
    ([0, 128], {}, 'token id 128, outside the vocabulary of 128'),
    ([0, -1], {}, 'token id -1'),
    ([0] * 49, {}, 'prompt 0 has 49 tokens, the context of this model 48'),
    ([0] * 48, {'modalities': 'image'}, 'prompt 0 has 49 tokens'),
    ([0] * 44, {'modalities': 'image'}, 'its picture needs 4 more'),
    ([0] * 5, {'modalities': 'image', 'max_new_tokens': 3}, 'raise max_new_tokens'),
    ([0, V.begin_image, 4], {'modalities': 'text'}, 'ends inside a picture'),
    ([0, V.begin_image, 4, 4, 4, 4, 4], {}, 'picture of 5 codes'),
    ([[0, 1]], {}, 'no list of token ids'),
    ([0.5], {}, 'no list of token ids'),
  ],
)
def test_bad_prompts(prompt, options, message):
  with pytest.raises(PromptError, match=message) as error:
    sampler().generate_tokens([np.array(prompt)], SamplingOptions(**options))
  assert '\n' not in str(error.value)


def test_vocabulary_of_another_model():
  with pytest.raises(CheckpointError, match='128 ids and the transformer 64'):
    engine.Engine(dataclasses.replace(CONFIG, vocab_size=64), params(), V, n_image_tokens=N)


def test_open_codes_examples():
  b, e = V.begin_image, V.end_image
  cases = {(0, b, 4, 5, 6): 3, (0, 50, b): 0, (0, b, 4, 5, e): None, (0, 50): None, (4, 5): None, (b,): 0}
  assert {prompt: requests.open_codes(np.array(prompt), V) for prompt in cases} == cases


@pytest.mark.parametrize(('n', 'smallest', 'expected'), [(0, 1, 1), (1, 1, 1), (3, 1, 4), (4, 1, 4), (5, 16, 16), (17, 16, 32)])
def test_power_of_two(n, smallest, expected):
  assert stream_pool.power_of_two(n, smallest=smallest) == expected
