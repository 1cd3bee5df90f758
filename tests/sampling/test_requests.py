"""Requests with constraints, bad ones, cancelled ones and failing ones, on the scripted model; and many random ones."""

import dataclasses
import re

import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions
from chameleon_jax.errors import PromptError, SamplingError
from tests.sampling.scripted import CONTEXT, N, V, example_prompts, make_engine, scripted_logits, scripts

GREEDY = SamplingOptions(max_new_tokens=40, greedy=True, image_greedy=True)
DRAWN = SamplingOptions(max_new_tokens=40, seed=1, temperature=1.0, image_temperature=1.0)
T = V.text_start


def one(prompt, options, **keywords):
  return make_engine(**keywords).generate_tokens([np.array(prompt, np.int32)], options)[0].tolist()


def run(engine, *, max_steps=256):
  """Runs to the end; tokens and last report by ticket."""
  lines, last = {}, {}
  while engine.pending:
    for progress in engine.advance(max_steps):
      assert last.get(progress.ticket) is None, 'a report after the last one'
      lines.setdefault(progress.ticket, []).extend(progress.tokens.tolist())
      if progress.finished:
        last[progress.ticket] = progress
  return lines, last


# ---------------------------------------------------------------------------------------------- constraints


@pytest.mark.parametrize('count', [0, 1, 2, 4])
@pytest.mark.parametrize('seed', range(3))
def test_exactly_n_pictures(count, seed):
  options = dataclasses.replace(DRAWN, min_images=count, max_images=count, max_new_tokens=count * (N + 2) + 5, seed=seed)
  for line in make_engine().generate_tokens(example_prompts(), options):
    assert (line == V.begin_image).sum() == (line == V.end_image).sum() == count


def test_pictures_that_exactly_fill_the_budget():
  line = one([V.begin_sequence], dataclasses.replace(DRAWN, min_images=3, max_new_tokens=3 * (N + 2)))
  assert [i for i, token in enumerate(line) if token == V.begin_image] == [0, N + 2, 2 * (N + 2)]


def test_fixed_codes_are_kept_and_the_rest_is_as_if_they_had_been_drawn():
  fixed = (3, None, 5, None)
  line = one([V.begin_sequence, T, V.begin_image], dataclasses.replace(GREEDY, modalities='image', fixed_codes=fixed))
  codes = V.code_of_token[line]
  assert (codes[0], codes[2]) == (3, 5)
  after_first = one([V.begin_sequence, T, V.begin_image, V.token_of_code[3]], dataclasses.replace(GREEDY, modalities='image'))
  assert line[1] == after_first[0]


def test_fixed_codes_are_of_the_first_picture_only():
  fixed = (1, 1, 1, 1)
  line = one([V.begin_sequence], dataclasses.replace(DRAWN, min_images=3, max_images=3, fixed_codes=fixed))
  pictures = np.array([[V.code_of_token[token] for token in line[i + 1 : i + 1 + N]] for i, t in enumerate(line) if t == V.begin_image])
  assert pictures[0].tolist() == [1] * N and (pictures[1:] != 1).any()


def test_banned_tokens_are_never_drawn():
  usual = one([V.begin_sequence, T], dataclasses.replace(GREEDY, modalities='text'))
  banned = tuple(set(usual[:3]))
  line = one([V.begin_sequence, T], dataclasses.replace(GREEDY, modalities='text', banned_tokens=banned))
  assert not set(line) & set(banned) and line != usual


def test_stop_tokens_end_the_row_and_are_part_of_the_result():
  usual = one([V.begin_sequence, T], dataclasses.replace(GREEDY, modalities='text'))
  stop = usual[4]
  line = one([V.begin_sequence, T], dataclasses.replace(GREEDY, modalities='text', stop_tokens=(stop,)))
  assert line == usual[: usual.index(stop) + 1]


def test_the_released_stop_at_begin_image():
  options = dataclasses.replace(DRAWN, stop_tokens=(V.begin_image,))
  line = one([V.begin_sequence, T], options)
  usual = one([V.begin_sequence, T], DRAWN)
  assert line == usual[: usual.index(V.begin_image) + 1]


def test_a_prefix_is_part_of_the_result_and_of_the_row():
  prefix = (T + 1, V.begin_image, int(V.token_of_code[2]))
  line = one([V.begin_sequence, T], dataclasses.replace(GREEDY, prefix=prefix))
  assert tuple(line[:3]) == prefix
  assert line[3:] == one([V.begin_sequence, T, *prefix], dataclasses.replace(GREEDY, max_new_tokens=GREEDY.max_new_tokens - 3))
  # A picture in the prefix is one of those asked for; one left open by the prompt counts too.
  assert one([V.begin_sequence], dataclasses.replace(GREEDY, prefix=prefix, max_images=1)).count(V.begin_image) == 1
  assert one([V.begin_sequence, V.begin_image], dataclasses.replace(GREEDY, max_images=1)).count(V.begin_image) == 0


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
  ('prompt', 'options', 'message'),
  [
    ([], {}, 'is empty or no list of token ids'),
    ([0] * (CONTEXT + 1), {}, f'has {CONTEXT + 1} tokens, the context of this model {CONTEXT}'),
    ([0, V.begin_image, 4, V.begin_image], {}, 'begins a picture at token 3, inside the unfinished picture that began at 1'),
    ([0], {'stop_tokens': (V.size,)}, f'option stop_tokens with token id {V.size}, outside the vocabulary of {V.size}'),
    ([0], {'banned_tokens': (-1,)}, 'option banned_tokens with token id -1'),
    ([0], {'prefix': (T,) * 41}, 'option prefix with 41 tokens; raise max_new_tokens, now 40'),
    ([0], {'prefix': (T,), 'modalities': 'image'}, 'other than image tokens'),
    ([0], {'fixed_codes': (1, 2)}, f'fixed_codes with 2 entries, a picture has {N} codes'),
    ([0], {'fixed_codes': (1, 2, 3, V.n_codes)}, f'code {V.n_codes} at 3, outside the codebook of {V.n_codes}'),
    ([0], {'fixed_codes': (1, 2, 3, 4), 'modalities': 'text'}, "fixed_codes with modalities='text'"),
    ([0], {'min_images': 7}, 'asks for 7 pictures of 6 tokens, has room for 40 tokens'),
    ([0] * 50, {'min_images': 2}, 'asks for 2 pictures of 6 tokens, has room for 10 tokens'),
    ([0], {'min_images': 1, 'banned_tokens': (V.begin_image,)}, 'asks for 1 pictures and bans begin_image'),
    ([0], {'min_images': 2, 'modalities': 'image'}, 'writes one'),
  ],
)
def test_a_bad_request_is_refused_alone(prompt, options, message):
  engine = make_engine()
  good = engine.submit(example_prompts()[0], DRAWN)
  with pytest.raises(PromptError, match=re.escape(message)) as error:
    engine.submit(np.array(prompt, np.int32), dataclasses.replace(GREEDY, **options))
  assert '\n' not in str(error.value)
  assert run(engine)[0][good] == one(example_prompts()[0], DRAWN)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'temperature': 0.0}, 'temperature must be positive'),
    ({'top_p': 1.5}, 'top_p must lie in'),
    ({'guidance_text': float('nan')}, 'guidance_text must be a finite number'),
    ({'min_images': 3, 'max_images': 2}, 'max_images 2 is below min_images 3'),
    ({'min_images': -1}, 'min_images must not be negative'),
    ({'min_images': 1, 'modalities': 'text'}, "min_images 1 with modalities='text'"),
  ],
)
def test_options_out_of_range(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    SamplingOptions(**options)


def test_empty_batch_and_wrong_number_of_options():
  assert make_engine().generate_tokens([], GREEDY) == []
  with pytest.raises(PromptError, match='4 prompts and 1 options'):
    make_engine().generate_tokens(example_prompts(), [GREEDY])


def test_a_bad_prompt_in_a_batch_leaves_nothing_queued():
  engine = make_engine()
  with pytest.raises(PromptError, match='prompt 4 is empty'):
    engine.generate_tokens([*example_prompts(), np.zeros(0, np.int32)], GREEDY)
  assert not engine.pending


def test_logits_that_are_not_finite_end_their_row_alone():
  """NaN where row 1 stands after a few tokens: only rows that come upon the same state of the scripted model fail."""
  drawn_plainly = dataclasses.replace(DRAWN, guidance_text=1.0, guidance_image=1.0)  # one stream a row, so that its states are known
  usual = [row.tolist() for row in make_engine().generate_tokens(example_prompts(), drawn_plainly)]
  _, table = scripts()

  def states(row, n):
    return [scripted_logits([*example_prompts()[row], *usual[row][:drawn]]) for drawn in range(n)]

  met = [*states(0, len(usual[0])), *states(1, 5)]
  after = next(n for n in range(5, len(usual[1])) if not any(np.array_equal(states(1, n + 1)[n], other) for other in [*met, *states(1, n)]))
  hit = (table == states(1, after + 1)[after]).all(axis=1)
  assert hit.sum() == 1
  with pytest.raises(SamplingError, match=f'prompt 1: the logits are not finite after {after} tokens') as error:
    make_engine(table=np.where(hit[:, None], np.nan, table)).generate_tokens(example_prompts(), drawn_plainly)
  failures = error.value.failures
  assert 1 in failures and 0 not in failures
  for row, line in enumerate(error.value.results):
    assert line.tolist() == (usual[row][: len(line)] if row in failures else usual[row])
  assert len(error.value.results[1]) == after


def test_all_codes_banned_fails_that_row():
  codes = tuple(int(t) for t in V.token_of_code)
  engine = make_engine()
  good = engine.submit(example_prompts()[0], DRAWN)
  bad = engine.submit(example_prompts()[1], dataclasses.replace(DRAWN, modalities='image', banned_tokens=codes))
  lines, last = run(engine)
  assert last[bad].finished == 'failed' and 'is banned; ban fewer' in last[bad].error and lines[bad] == []
  assert lines[good] == one(example_prompts()[0], DRAWN)


# --------------------------------------------------------------------------------- coming, going, being cancelled


def test_why_a_request_ended():
  engine = make_engine()
  cases = {
    engine.submit(example_prompts()[0], dataclasses.replace(GREEDY, modalities='image')): 'picture',
    engine.submit(example_prompts()[0], dataclasses.replace(DRAWN, max_new_tokens=3)): 'length',
    engine.submit(np.full(CONTEXT, T), GREEDY): 'length',
    engine.submit(example_prompts()[0], dataclasses.replace(DRAWN, stop_tokens=tuple(range(T, V.size)), min_images=0)): 'stop',
  }
  _, last = run(engine)
  assert {ticket: progress.finished for ticket, progress in last.items()} == cases


@pytest.mark.parametrize('when', [0, 1, 3])
def test_cancelled_requests_leave_the_others_alone(when):
  engine = make_engine(max_rows=3)
  tickets = [engine.submit(prompt, DRAWN, row=row) for row, prompt in enumerate(example_prompts())]
  lines, last = {ticket: [] for ticket in tickets}, {}
  for turn in range(1000):
    if turn == when:
      engine.cancel(tickets[1])
      engine.cancel(tickets[3])
      engine.cancel(12345)
    if not engine.pending:
      break
    for progress in engine.advance(2):
      lines[progress.ticket] += progress.tokens.tolist()
      last[progress.ticket] = progress.finished
  usual = [row.tolist() for row in make_engine().generate_tokens(example_prompts(), DRAWN)]
  assert [last[t] for t in tickets].count('cancelled') == 2
  for row, ticket in enumerate(tickets):
    assert lines[ticket] == usual[row][: len(lines[ticket])]
    assert (len(lines[ticket]) < len(usual[row])) == (row in (1, 3))


def test_more_requests_than_rows():
  prompts = example_prompts() * 5
  engine = make_engine(max_rows=3)
  few = [row.tolist() for row in engine.generate_tokens(prompts, DRAWN)]
  assert few == [row.tolist() for row in make_engine().generate_tokens(prompts, DRAWN)]


def test_generate_tokens_keeps_the_reports_of_others():
  engine = make_engine()
  ticket = engine.submit(example_prompts()[0], DRAWN, row=0)
  engine.generate_tokens(example_prompts()[1:2], DRAWN)
  assert run(engine)[0][ticket] == one(example_prompts()[0], DRAWN)


def test_text_runs_without_streams_of_pictures():
  engine = make_engine()
  ticket = engine.submit(np.array([V.begin_sequence, T]), dataclasses.replace(DRAWN, max_images=0))
  sizes = set()
  while engine.pending:
    engine.advance(1)
    sizes.add(engine._pool.n_streams)
  assert sizes <= {0, 1} and ticket == 0


def test_streams_are_given_back_after_a_picture():
  engine = make_engine()
  engine.submit(np.array([V.begin_sequence, T]), dataclasses.replace(DRAWN, prefix=(T, V.begin_image), max_images=2))
  sizes = []
  while engine.pending:
    engine.advance(1)
    row = engine._rows[0] if engine._rows else None
    sizes.append((engine._pool.n_streams, row is not None and row.mode == 1))
  inside, outside = {n for n, picture in sizes if picture}, [n for n, picture in sizes if not picture]
  assert min(outside) <= 1 and max(inside) >= 2
  assert engine._pool.n_streams == 0
