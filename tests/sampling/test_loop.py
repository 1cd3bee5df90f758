"""The device loop on a scripted model, against the slow sampler of conftest.py.

The scripted model hashes the tokens in its cache up to the query's slot, so its logits are right only if every
stream holds exactly its own tokens at exactly its own positions.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions, VocabularyConfig
from chameleon_jax.sampling import logits as drawing
from chameleon_jax.sampling import loop, modality
from chameleon_jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(VocabularyConfig(size=40, n_codes=8, n_sentinels=1, n_reserved=2))
N, CONTEXT, SLOTS, WIDTH, MAX_NEW = 4, 60, 64, 16, 48
V = VOCABULARY
_PRIME = 97


@functools.cache
def scripts():
  rng = np.random.default_rng(0)
  table = rng.normal(size=(_PRIME, V.size)).astype(np.float32) * 2
  table[:, V.begin_image] += 3  # pictures often
  table[:, [V.end_sequence, V.end_turn]] -= 3  # and long rows
  return rng.integers(1, _PRIME, size=(V.size, SLOTS)), table


def scripted_logits(tokens):
  """Logits after a whole stream, in numpy."""
  weights, table = scripts()
  return table[sum(int(weights[token, slot]) for slot, token in enumerate(tokens)) % _PRIME]


def forward(params, tokens, positions, last, cache):
  weights, table = params
  rows = jnp.arange(tokens.shape[0])
  cache = cache.at[rows[:, None], positions].set(tokens, mode='drop')
  slots = jnp.arange(cache.shape[1])
  terms = weights[cache, slots] * (slots <= positions[rows, last][:, None])
  return table[terms.sum(axis=1) % _PRIME], cache


def make_cache(rows, slots):
  return jnp.full((rows, slots), V.unknown, jnp.int32)


def streams(prompt, *, guided, codes):
  if not guided:
    return [prompt]
  pictures = [t for t in prompt if V.is_image[t] or t in (V.begin_sequence, V.begin_image, V.end_image)]
  return [prompt, pictures, [V.begin_sequence, *prompt[len(prompt) - codes - 1 :]] if codes >= 0 else [V.begin_sequence]]


def run(prompts, options, *, rows=None, codes=None):
  """Prefill and decode; returns the new tokens of each row."""
  batch = len(prompts)
  codes = [-1] * batch if codes is None else codes
  steps = drawing.make_steps(options)
  all_streams = [s for group in zip(*(streams(p, guided=steps.guided, codes=c) for p, c in zip(prompts, codes))) for s in group]
  tokens = np.full((len(all_streams), WIDTH), V.pad, np.int32)
  for i, stream in enumerate(all_streams):
    tokens[i, : len(stream)] = stream
  lengths = np.array([len(stream) for stream in all_streams], np.int32)
  budget = np.minimum(options.max_new_tokens, CONTEXT - lengths[:batch])
  if options.modalities == 'image':
    budget = N - np.array(codes)
  request = loop.Request(
    rules=modality.make_rules(options, batch),
    settings=drawing.make_settings(options, batch),
    keys=drawing.row_keys(options.seed, np.arange(batch) if rows is None else np.array(rows)),
    table=modality.token_table(V, n_image_tokens=N, max_seq_len=CONTEXT),
  )
  state = modality.init_state(lengths[:batch], open_codes=np.array(codes), remaining=budget)
  carry = loop.prefill(
    scripts(), tokens, lengths, state, request, forward=forward, make_cache=make_cache, steps=steps, slots=SLOTS, max_new=MAX_NEW
  )
  carry = loop.decode(scripts(), carry, request, forward=forward, steps=steps)
  return [np.asarray(carry.out)[i, : int(carry.state.drawn[i])].tolist() for i in range(batch)], carry


def example_prompts():
  """Four prompts of different length, one with a picture in it."""
  first = V.text_start
  picture = [V.begin_image, 4, 5, 6, 7, V.end_image]
  return [
    [V.begin_sequence, first, first + 1, V.end_turn],
    [V.begin_sequence, *picture, first + 2, V.end_turn],
    [V.begin_sequence],
    [V.begin_sequence, *range(first, first + 9), V.end_turn],
  ]


MIXED = SamplingOptions(max_new_tokens=40, seed=1, temperature=1.0, image_temperature=1.0)


@pytest.mark.parametrize(
  'options',
  [
    MIXED,
    SamplingOptions(max_new_tokens=40, greedy=True, image_greedy=True),
    SamplingOptions(max_new_tokens=40, guidance_text=1.0, guidance_image=1.0, top_p=1.0, image_top_p=1.0, temperature=1.5, max_images=1),
    SamplingOptions(max_new_tokens=25, modalities='text', stop_at_end_turn=False),
  ],
  ids=['guided', 'greedy', 'unguided', 'text'],
)
def test_ragged_batch_equals_the_slow_sampler(options, reference):
  prompts = example_prompts()
  written, carry = run(prompts, options)
  expected = [
    reference(scripted_logits, prompt, options, row=row, vocabulary=V, n=N, max_seq_len=CONTEXT) for row, prompt in enumerate(prompts)
  ]
  assert written == expected
  assert int(carry.step) == max(map(len, written))
  if options.modalities == 'mixed':
    assert sum(line.count(V.begin_image) for line in written) >= 2


def test_several_guided_pictures_in_one_row():
  """The third stream starts again at every picture; the second one does not."""
  written, _ = run(example_prompts(), MIXED)
  assert max(line.count(V.begin_image) for line in written) >= 3


@pytest.mark.parametrize('codes', [0, 2])
def test_single_picture_begun_by_the_prompt(codes, reference):
  options = SamplingOptions(modalities='image', seed=2)
  prompts = [[*prompt, V.begin_image, 4, 9][: len(prompt) + 1 + codes] for prompt in example_prompts()]
  written, _ = run(prompts, options, codes=[codes] * 4)
  expected = [
    reference(scripted_logits, prompt, options, row=row, vocabulary=V, n=N, max_seq_len=CONTEXT) for row, prompt in enumerate(prompts)
  ]
  assert written == expected
  assert all(len(line) == N - codes and V.is_image[line].all() for line in written)


def test_rows_do_not_depend_on_their_mates():
  prompts = example_prompts()
  together, _ = run(prompts, MIXED)
  turned, _ = run(prompts[::-1], MIXED, rows=[3, 2, 1, 0])
  alone = [run([prompt], MIXED, rows=[row])[0][0] for row, prompt in enumerate(prompts)]
  assert together == turned[::-1] == alone


def test_finished_rows_wait_as_padding():
  options = SamplingOptions(max_new_tokens=40, seed=5, temperature=3.0, top_p=0.99)
  written, carry = run(example_prompts(), options)
  lengths = [len(line) for line in written]
  assert len(set(lengths)) > 1
  out = np.asarray(carry.out)
  assert all((out[i, length : max(lengths)] == V.pad).all() for i, length in enumerate(lengths))
