"""Greedy sequences of the released preset against the reference of the released sampler: text, pictures, both in turn.

Settings are such that the two agree where `meta_reference` lists a difference; `test_meta_differences.py` shows the differences, and
`test_meta_processors.py` compares what random draws are made from.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions
from tests.sampling import meta_reference as meta
from tests.sampling.meta_model import CONFIG, OTHER, PICTURE, PROMPTS, N, T, V, expected, network, released, written

ROOM = CONFIG.max_seq_len - (N + 2)  # begin_image may be drawn by rows shorter than this


def greedy(modalities, **settings):
  return SamplingOptions.meta(modalities, greedy=True, **settings)


def pictures_in(row):
  """Codes of each picture of a row; fails where begin_image, codes and end_image are not in their order."""
  found, row = [], list(row)
  while V.begin_image in row:
    start = row.index(V.begin_image)
    end = row.index(V.end_image)
    assert end == start + N + 1 and V.is_image[row[start + 1 : end]].all()
    assert not V.is_image[row[:start]].any()
    found.append(row[start + 1 : end])
    row = row[end + 1 :]
  assert not V.is_image[row].any() and V.end_image not in row
  return found


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize('penalty', [1.0, 1.2, 3.0])
def test_text(penalty):
  options = greedy('text', max_new_tokens=24, repetition_penalty=penalty)
  rows = expected(PROMPTS, options)
  assert max(len(row) for row in rows) == 24
  assert written(PROMPTS, options) == rows


@pytest.mark.parametrize('end_sequence', [2.0, 3.0])
def test_text_that_stops(end_sequence):
  options = greedy('text', max_new_tokens=24)
  rows = expected(PROMPTS, options, end_sequence=end_sequence)
  assert len({len(row) for row in rows}) >= 3 and sum(row[-1] == V.end_sequence for row in rows) >= 3
  assert written(PROMPTS, options, end_sequence=end_sequence) == rows


def test_no_padding_reaches_the_network_of_the_reference():
  streams = []

  def logits_of(tokens):
    streams.append(tuple(tokens))
    return network()(tokens)

  batch = meta.rows_of(meta.generate(logits_of, V, PROMPTS, released(greedy('text', max_new_tokens=3))), len(PROMPTS))
  assert streams[: len(PROMPTS)] == [tuple(prompt) for prompt in PROMPTS] and not any(V.pad in stream for stream in streams)
  alone = [meta.generate(network(), V, [prompt], released(greedy('text', max_new_tokens=3))) for prompt in PROMPTS]
  assert batch == [meta.rows_of(steps, 1)[0] for steps in alone]


def test_text_stops_at_other_ids():
  options = greedy('text', max_new_tokens=24)
  rows = expected(PROMPTS, options)
  stopping = dataclasses.replace(options, stop_tokens=(rows[0][7], rows[2][3]))
  shorter = expected(PROMPTS, stopping)
  assert len(shorter[0]) <= 8 and len(shorter[2]) <= 4
  assert written(PROMPTS, stopping) == shorter


def test_text_to_the_end_of_the_context():
  """The longest prompt decides for the release; alone, each prompt is the longest."""
  options = greedy('text')
  for prompt in ([*PROMPTS[2], *range(T, T + 70)], [*PROMPTS[3], *range(T + 10, T + 80)]):
    rows = expected([prompt], options, end_sequence=0.5)
    assert len(rows[0]) == CONFIG.max_seq_len - len(prompt)
    assert written([prompt], options, end_sequence=0.5) == rows
  full = [V.begin_sequence, *[T] * (CONFIG.max_seq_len - 1)]
  assert expected([full], options) == written([full], options) == [[]]


# -------------------------------------------------------------------------------------------- pictures

SCALES = [(3.0, 1.2), (1.0, 1.0), (2.0, 1.0), (1.0, 3.0), (2.5, 2.5), (0.0, 1.0), (0.0, 0.0)]  # text, image
ENDING_IN_BEGIN_IMAGE = [*PROMPTS[3], V.begin_image]


@pytest.mark.parametrize(('guidance_text', 'guidance_image'), SCALES)
def test_pictures(guidance_text, guidance_image):
  options = greedy('image', guidance_text=guidance_text, guidance_image=guidance_image)
  prompts = [*PROMPTS, ENDING_IN_BEGIN_IMAGE]
  rows = expected(prompts, options)
  assert all(len(row) == N and V.is_image[row].all() for row in rows)
  assert rows[3] == rows[5]  # begin_image is appended to what lacks it
  assert written(prompts, options) == rows


def test_guidance_changes_pictures():
  """Were all scales to give the same codes, the test above would prove little."""
  by_scale = [expected(PROMPTS, greedy('image', guidance_text=s, guidance_image=i)) for s, i in SCALES]
  with_pictures = {str([rows[1], rows[3]]) for rows in by_scale}
  assert len(with_pictures) == len(SCALES)


def test_pictures_know_no_repetition_penalty():
  """Codes of the prompt come again as if they had not been there; with the penalty of text they would not."""
  pairs = itertools.product([PICTURE, OTHER], repeat=2)
  prompts = [[V.begin_sequence, *first, *second, T + 3 * place] for place, (first, second) in enumerate(pairs)]
  options = greedy('image', repetition_penalty=5.0)
  rows = expected(prompts, options)
  assert written(prompts, options) == rows
  assert rows == expected(prompts, greedy('image', repetition_penalty=1.0))
  steps = meta.generate(network(), V, prompts, released(options))
  penalised = []
  for index, prompt in enumerate(prompts):
    seen = [*prompt, V.begin_image]
    for step in steps:
      penalised.append(int(np.argmax(meta.repetition_penalty(step.scores[index], seen, 5.0))) != step.tokens[index])
      seen.append(step.tokens[index])
  assert any(penalised)


# ------------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize(('guidance_text', 'guidance_image'), [(3.0, 1.2), (1.0, 1.0), (1.0, 3.0), (2.5, 2.5)])
def test_text_and_pictures(guidance_text, guidance_image):
  """One batch here, prompt by prompt in the release; every row until it stops or fills the context."""
  options = greedy('mixed', guidance_text=guidance_text, guidance_image=guidance_image)
  rows = expected(PROMPTS, options, begin_image=3.0)
  pictures = [pictures_in(row) for row in rows]
  assert sum(len(found) >= 3 for found in pictures) >= 3
  assert any(len(prompt) + len(row) == CONFIG.max_seq_len for prompt, row in zip(PROMPTS, rows))
  assert written(PROMPTS, options, begin_image=3.0) == rows


def test_text_and_pictures_that_stop():
  options = greedy('mixed')
  rows = expected(PROMPTS, options, begin_image=3.0, end_sequence=2.0)
  assert sum(row[-1] == V.end_sequence for row in rows) >= 3 and sum(len(pictures_in(row)) > 0 for row in rows) >= 2
  assert written(PROMPTS, options, begin_image=3.0, end_sequence=2.0) == rows


def test_begin_image_as_a_stop_token():
  """The release's own default: a mixed run stops at begin_image and never enters a picture."""
  options = dataclasses.replace(greedy('mixed'), stop_tokens=(V.begin_image,))
  default = dataclasses.replace(released(options), extra_eos=None)
  rows = expected(PROMPTS, options, begin_image=3.0)
  for prompt, row in zip(PROMPTS, rows):
    steps = meta.generate(network(begin_image=3.0), V, [prompt], default)
    assert meta.rows_of(steps, 1) == [row]
  assert sum(row[-1] == V.begin_image for row in rows) >= 3 and not any(V.is_image[row].any() for row in rows)
  assert written(PROMPTS, options, begin_image=3.0) == rows


def test_the_last_index_of_begin_image():
  """A row one shorter than the bound opens its picture, closes it and has one place left; the next index is barred."""
  factors = {'begin_image': 8.0}
  options = greedy('mixed')
  for seed in range(100):  # a context after which begin_image is the likeliest, and would be so one token later
    prompt = [V.begin_sequence, *np.random.default_rng(seed).integers(T, V.size, ROOM - 1).tolist()]
    raw = [network(**factors)(row) for row in (prompt[:-1], prompt)]
    if all(np.argmax(meta.repetition_penalty(logits, prompt, 1.2)) == V.begin_image for logits in raw):
      break
  last, barred = prompt[:-1], prompt
  assert len(last) == ROOM - 1 and len(barred) == ROOM
  rows = expected([last, barred], options, **factors)
  assert rows[0][0] == V.begin_image and rows[0][N + 1] == V.end_image
  assert len(rows[0]) == N + 3 or rows[0][-1] == V.end_sequence
  assert len(pictures_in(rows[0])) == 1 and pictures_in(rows[1]) == [] and len(rows[1]) > 0
  assert written([last, barred], options, **factors) == rows
  assert written([barred, last], options, **factors) == rows[::-1]


def test_the_penalty_reaches_over_prompt_and_pictures():
  """Reaching over the new ids alone, or not over pictures, it would have written other rows."""
  options = greedy('mixed', repetition_penalty=1.2)
  rows = expected(PROMPTS, options, begin_image=3.0)
  assert written(PROMPTS, options, begin_image=3.0) == rows
  logits_of, changed = network(begin_image=3.0), {'prompt': 0, 'pictures': 0}
  for prompt, new in zip(PROMPTS, rows):
    for index, token in enumerate(new):
      if V.is_image[token] or token == V.end_image:
        continue
      row = [*prompt, *new[:index]]
      raw = logits_of(row)
      allowed = [V.end_sequence, *meta.text_tokens(V), *([V.begin_image] if len(row) < ROOM else [])]
      reaches = {'prompt': row[len(prompt) :], 'pictures': [t for t in row if V.is_text[t] or t == V.end_sequence], 'all': row}
      best = {name: int(np.argmax(meta.repetition_penalty(meta.allow_only(raw, allowed), seen, 1.2))) for name, seen in reaches.items()}
      assert best['all'] == token
      changed = {name: count + (best[name] != token) for name, count in changed.items()}
  assert changed['prompt'] > 0 and changed['pictures'] > 0


def test_requests_of_every_kind_in_one_batch():
  """The release runs them one by one."""
  several = [greedy('text', max_new_tokens=24), greedy('image'), greedy('mixed')]
  factors = {'begin_image': 3.0}
  rows, prompts, options = [], [], []
  for prompt, one in itertools.product(PROMPTS, several):
    rows += expected([prompt], one, **factors)
    prompts.append(prompt)
    options.append(one)
  assert written(prompts, options, **factors) == rows
