"""The device loop on a scripted model, against the slow sampler of conftest.py."""

import dataclasses

import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions
from tests.sampling.scripted import CONTEXT, N, V, example_prompts, make_engine, scripted_logits

MIXED = SamplingOptions(max_new_tokens=40, seed=1, temperature=1.0, image_temperature=1.0)


def written(prompts, options, **keywords):
  return [row.tolist() for row in make_engine(**keywords).generate_tokens(prompts, options)]


def expected(reference, prompts, options):
  return [
    reference(scripted_logits, prompt, options, row=row, vocabulary=V, n=N, max_seq_len=CONTEXT) for row, prompt in enumerate(prompts)
  ]


@pytest.mark.parametrize(
  'options',
  [
    MIXED,
    SamplingOptions(max_new_tokens=40, greedy=True, image_greedy=True),
    SamplingOptions(max_new_tokens=40, guidance_text=1.0, guidance_image=1.0, top_p=1.0, image_top_p=1.0, temperature=1.5, max_images=1),
    SamplingOptions(max_new_tokens=40, guidance_text=2.0, guidance_image=1.0, greedy=True, image_greedy=True),
    SamplingOptions(max_new_tokens=40, guidance_text=2.0, guidance_image=2.0, greedy=True, image_greedy=True),
    SamplingOptions(max_new_tokens=25, modalities='text', stop_at_end_turn=False),
  ],
  ids=['guided', 'greedy', 'unguided', 'without u', 'without i', 'text'],
)
def test_ragged_batch_equals_the_slow_sampler(options, reference):
  lines = written(example_prompts(), options)
  assert lines == expected(reference, example_prompts(), options)
  if options.modalities == 'mixed':
    assert sum(line.count(V.begin_image) for line in lines) >= 2


def test_several_guided_pictures_in_one_row():
  """Stream u starts again at every picture; stream i does not."""
  assert max(line.count(V.begin_image) for line in written(example_prompts(), MIXED)) >= 3


@pytest.mark.parametrize('max_steps', [1, 2, 3, 7])
def test_where_the_host_looks_in_changes_nothing(max_steps):
  """Streams are set aside and brought back at every cut."""
  engine = make_engine()
  tickets = [engine.submit(prompt, MIXED, row=row) for row, prompt in enumerate(example_prompts())]
  lines = {ticket: [] for ticket in tickets}
  while engine.pending:
    for progress in engine.advance(max_steps):
      lines[progress.ticket] += progress.tokens.tolist()
  assert list(lines.values()) == written(example_prompts(), MIXED)


@pytest.mark.parametrize('codes', [0, 2])
def test_single_picture_begun_by_the_prompt(codes, reference):
  options = SamplingOptions(modalities='image', seed=2)
  prompts = [np.append(prompt, [V.begin_image, 4, 9][: 1 + codes]).astype(np.int32) for prompt in example_prompts()]
  lines = written(prompts, options)
  assert lines == expected(reference, prompts, options)
  assert all(len(line) == N - codes and V.is_image[line].all() for line in lines)


def test_rows_do_not_depend_on_their_mates():
  together = written(example_prompts(), MIXED)
  engine = make_engine()
  for row, prompt in reversed(list(enumerate(example_prompts()))):
    engine.submit(prompt, MIXED, row=row)
  turned = {}
  while engine.pending:
    for progress in engine.advance():
      turned.setdefault(progress.ticket, []).extend(progress.tokens.tolist())
  alone = []
  for row, prompt in enumerate(example_prompts()):
    engine.submit(prompt, MIXED, row=row)
    alone.append([token for _ in iter(lambda: engine.pending, False) for p in engine.advance() for token in p.tokens.tolist()])
  assert together == list(turned.values())[::-1] == alone


def test_rows_with_options_of_their_own(reference):
  options = [
    MIXED,
    dataclasses.replace(MIXED, greedy=True, image_greedy=True, guidance_text=1.5, seed=4),
    dataclasses.replace(MIXED, modalities='text', repetition_penalty=2.0, max_new_tokens=17),
    dataclasses.replace(MIXED, guidance_text=1.0, guidance_image=1.0, max_images=1, top_p=0.5, seed=9),
  ]
  engine = make_engine()
  lines = [row.tolist() for row in engine.generate_tokens(example_prompts(), options)]
  for row, (prompt, option) in enumerate(zip(example_prompts(), options)):
    assert lines[row] == reference(scripted_logits, prompt, option, row=row, vocabulary=V, n=N, max_seq_len=CONTEXT)
