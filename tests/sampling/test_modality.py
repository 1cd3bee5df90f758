"""The truth table of the modality state machine, its limits, and random walks through it."""

import dataclasses

import jax
import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions, VocabularyConfig
from chameleon_jax.sampling import modality
from chameleon_jax.sampling.modality import DONE, IMAGE, TEXT
from chameleon_jax.tokens.vocabulary import Vocabulary

# 0 s, 1 pad, 2 end_sequence, 3 unknown, 4-6 codes, 7 end_image, 8 begin_image, 9 sentinel, 10 end_turn, 11 reserved, 12-14 text
VOCABULARY = Vocabulary(VocabularyConfig(size=15, n_codes=3, n_sentinels=1, n_reserved=2))
WRITTEN, CODES, END, TURN, BEGIN, CLOSE, PAD = {12, 13, 14}, {4, 5, 6}, 2, 10, 8, 7, 1
N = 2
ROOMY = 100


def table(max_seq_len=ROOMY, n=N):
  return modality.token_table(VOCABULARY, n_image_tokens=n, max_seq_len=max_seq_len)


def rules(**options):
  return modality.make_rules([SamplingOptions(**options)])


def state(mode, *, codes=0, remaining=50, position=10, images=0):
  return modality.RowState(*(np.array([value], np.int32) for value in (mode, codes, remaining, position, images, 0)))


def nothing_banned(batch=1):
  return np.zeros((batch, VOCABULARY.size), bool)


def allowed(row, row_rules, row_table=None, *, banned=()):
  mask = nothing_banned()
  mask[0, list(banned)] = True
  return set(np.flatnonzero(np.asarray(modality.allowed(row, row_rules, row_table or table(), mask))[0]))


def advance(row, token, row_rules, *, stop=False):
  return modality.advance(row, np.array([token], np.int32), row_rules, table(), stop=np.array([stop]))


def after(row, token, row_rules, *, stop=False):
  moved = advance(row, token, row_rules, stop=stop)
  return int(moved.mode[0]), int(moved.codes[0])


MIXED, TEXT_ONLY, PICTURE = rules(), rules(modalities='text'), rules(modalities='image')


@pytest.mark.parametrize(
  ('row', 'row_rules', 'expected'),
  [
    (state(TEXT), MIXED, WRITTEN | {END, TURN, BEGIN}),
    (state(TEXT), TEXT_ONLY, WRITTEN | {END, TURN}),
    (state(TEXT), rules(stop_at_end_turn=False), WRITTEN | {END, BEGIN}),
    (state(TEXT), rules(modalities='text', stop_at_end_turn=False), WRITTEN | {END}),
    (state(TEXT, images=1), rules(max_images=2), WRITTEN | {END, TURN, BEGIN}),
    (state(TEXT, images=2), rules(max_images=2), WRITTEN | {END, TURN}),
    (state(TEXT, remaining=N + 2), MIXED, WRITTEN | {END, TURN, BEGIN}),
    (state(TEXT, remaining=N + 1), MIXED, WRITTEN | {END, TURN}),
    (state(IMAGE, codes=0), MIXED, CODES),
    (state(IMAGE, codes=1), MIXED, CODES),
    (state(IMAGE, codes=2), MIXED, {CLOSE}),
    (state(IMAGE, codes=1), PICTURE, CODES),
    (state(DONE), MIXED, {PAD}),
    (state(DONE, codes=2), PICTURE, {PAD}),
  ],
)
def test_allowed_is_the_truth_table(row, row_rules, expected):
  assert allowed(row, row_rules) == expected


@pytest.mark.parametrize(
  ('row', 'token', 'row_rules', 'expected'),
  [
    (state(TEXT), 13, MIXED, (TEXT, 0)),
    (state(TEXT), BEGIN, MIXED, (IMAGE, 0)),
    (state(TEXT), END, MIXED, (DONE, 0)),
    (state(TEXT), TURN, MIXED, (DONE, 0)),
    (state(TEXT, remaining=1), 13, MIXED, (DONE, 0)),
    (state(IMAGE, codes=0), 4, MIXED, (IMAGE, 1)),
    (state(IMAGE, codes=1), 6, MIXED, (IMAGE, 2)),
    (state(IMAGE, codes=2), CLOSE, MIXED, (TEXT, 0)),
    (state(IMAGE, codes=0), 4, PICTURE, (IMAGE, 1)),
    (state(IMAGE, codes=1), 4, PICTURE, (DONE, 2)),
    (state(DONE), PAD, MIXED, (DONE, 0)),
  ],
)
def test_advance_is_the_truth_table(row, token, row_rules, expected):
  assert after(row, token, row_rules) == expected


@pytest.mark.parametrize(
  ('row', 'row_rules', 'expected'),
  [
    (state(TEXT), rules(min_images=1), WRITTEN | {BEGIN}),  # owes one: may not end
    (state(TEXT, images=1), rules(min_images=1, max_images=1), WRITTEN | {END, TURN}),
    (state(TEXT, remaining=9), rules(min_images=2), WRITTEN | {BEGIN}),  # the drawn example: one of text to spare
    (state(TEXT, remaining=8), rules(min_images=2), {BEGIN}),
    (state(TEXT, images=1, remaining=5), rules(min_images=2), WRITTEN | {BEGIN}),
    (state(TEXT, images=1, remaining=4), rules(min_images=2), {BEGIN}),
    (state(TEXT, position=ROOMY - 6), rules(min_images=1), WRITTEN | {BEGIN}),  # the context rule: begin_image below 96
    (state(TEXT, position=ROOMY - 5), rules(min_images=1), {BEGIN}),
    (state(TEXT, position=ROOMY - 9), rules(min_images=2), {BEGIN}),
  ],
)
def test_rows_that_owe_pictures(row, row_rules, expected):
  assert allowed(row, row_rules) == expected


def test_banned_tokens():
  banned = {12, 13, END, 5, BEGIN, CLOSE, PAD}
  assert allowed(state(TEXT), MIXED, banned=banned) == {14, TURN}
  assert allowed(state(IMAGE, codes=1), MIXED, banned=banned) == {4, 6}
  assert allowed(state(IMAGE, codes=2), MIXED, banned=banned) == {CLOSE}  # the grammar's own tokens stay
  assert allowed(state(DONE), MIXED, banned=banned) == {PAD}
  assert allowed(state(IMAGE, codes=1), MIXED, banned=CODES) == set()


@pytest.mark.parametrize(
    ('row', 'token'), [(state(TEXT), 13), (state(TEXT), BEGIN), (state(IMAGE, codes=0), 4), (state(IMAGE, codes=2), CLOSE)]
)
def test_stop_tokens_end_a_row_anywhere(row, token):
  assert after(row, token, MIXED, stop=True)[0] == DONE
  assert after(row, token, MIXED)[0] != DONE


def test_counters():
  row = advance(state(TEXT, remaining=9, position=5), BEGIN, MIXED)
  assert [int(x[0]) for x in (row.remaining, row.position, row.images, row.drawn)] == [8, 6, 1, 1]
  still = advance(state(DONE, remaining=9, position=5), PAD, MIXED)
  assert [int(x[0]) for x in (still.remaining, still.position, still.images, still.drawn)] == [9, 5, 0, 0]


def test_the_drawn_example():
  row = modality.init_state(np.array([1]), open_codes=np.array([-1]), remaining=np.array([9]))
  seen = []
  for token in (13, BEGIN, 4, 5, CLOSE, 13, END):
    assert token in allowed(row, MIXED)
    seen.append((int(row.mode[0]), int(row.codes[0]), int(row.remaining[0])))
    row = advance(row, token, MIXED)
  seen.append((int(row.mode[0]), int(row.codes[0]), int(row.remaining[0])))
  assert seen == [(TEXT, 0, 9), (TEXT, 0, 8), (IMAGE, 0, 7), (IMAGE, 1, 6), (IMAGE, 2, 5), (TEXT, 0, 4), (TEXT, 0, 3), (DONE, 0, 2)]


def test_context_rule_is_the_released_one():
  # spec model.md 8.2, row 2, and 9, check 9: with 4096 and 1,024 codes begin_image is allowed at length 3069, refused at 3070.
  released = table(max_seq_len=4096, n=1024)
  assert BEGIN in allowed(state(TEXT, remaining=4096, position=3069), MIXED, released)
  assert BEGIN not in allowed(state(TEXT, remaining=4096, position=3070), MIXED, released)
  # The budget rule: exactly n + 2 tokens are enough, wherever the context ends.
  assert BEGIN in allowed(state(TEXT, remaining=1026, position=5), MIXED, released)
  assert BEGIN not in allowed(state(TEXT, remaining=1025, position=5), MIXED, released)


def test_states_after_prompts():
  row = modality.init_state(np.array([3, 4, 5]), open_codes=np.array([-1, 0, 2]), remaining=np.array([7, 8, 0]))
  assert row.mode.tolist() == [TEXT, IMAGE, DONE]
  assert row.codes.tolist() == [0, 0, 2]
  assert row.position.tolist() == [3, 4, 5]
  assert row.images.tolist() == [0, 1, 1]


@pytest.mark.parametrize('modalities', ['mixed', 'text', 'image'])
def test_random_walks_are_well_formed(modalities):
  """Whatever is drawn: whole pictures only, no token after a stop, and neither budget nor context exceeded."""
  batch, n, context = 200, 3, 30
  rng = np.random.default_rng(0)
  options = SamplingOptions(modalities=modalities, max_images=2)
  lengths = rng.integers(1, 12, batch)
  budget = np.full(batch, n) if modalities == 'image' else np.minimum(rng.integers(1, 25, batch), context - lengths)
  walk_table, walk_rules = table(max_seq_len=context, n=n), modality.make_rules([options] * batch)
  row = modality.init_state(lengths, open_codes=np.full(batch, 0 if modalities == 'image' else -1), remaining=budget)
  step = jax.jit(lambda row, token: modality.advance(row, token, walk_rules, walk_table, stop=np.zeros(batch, bool)))
  mask = jax.jit(lambda row: modality.allowed(row, walk_rules, walk_table, nothing_banned(batch)))
  tokens = []
  while (np.asarray(row.mode) != DONE).any():
    choices = np.asarray(mask(row))
    assert choices.any(axis=1).all()
    tokens.append(np.argmax(np.where(choices, rng.random(choices.shape), -1), axis=1).astype(np.int32))
    row = step(row, tokens[-1])
  written = np.stack(tokens, axis=1)
  drawn = np.asarray(row.drawn)
  assert (drawn <= budget).all() and (lengths + drawn <= context).all()
  pictures = 0
  for line, count in zip(written, drawn):
    letters = ''.join('c' if t in CODES else {BEGIN: 'B', CLOSE: 'E', END: '#', TURN: '#'}.get(t, 't') for t in line[:count])
    assert (line[count:] == PAD).all()
    if modalities == 'image':
      assert letters == 'c' * n
      continue
    assert letters.count('BcccE') == letters.count('B') == letters.count('E') <= 2
    assert letters.count('c') == n * letters.count('B')
    assert '#' not in letters[:-1]
    pictures += letters.count('B')
  assert (pictures > 0) == (modalities == 'mixed')


def test_rows_of_different_rules_share_a_batch():
  parts = [MIXED, TEXT_ONLY, PICTURE]
  stacked = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
  rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), state(TEXT), state(TEXT), state(IMAGE, codes=1))
  masks = np.asarray(modality.allowed(rows, stacked, table(), nothing_banned(3)))
  assert [set(np.flatnonzero(mask)) for mask in masks] == [WRITTEN | {END, TURN, BEGIN}, WRITTEN | {END, TURN}, CODES]
  assert dataclasses.is_dataclass(stacked)
