"""Closed forms of guidance, penalty and top-p; order of the steps; keys."""

import jax
import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions
from chameleon_jax.sampling import logits as drawing


def settings(batch=1, **options):
  return drawing.make_settings([SamplingOptions(**options)] * batch)


def no_guidance(**options):
  return SamplingOptions(guidance_text=1.0, guidance_image=1.0, **options)


def test_guidance_formula():
  f, i, u = (np.array([values], np.float32) for values in ([1.0, 5.0, -2.0], [0.5, 1.0, 3.0], [2.0, -1.0, 0.0]))
  mixed = drawing.guide(f, i, u, settings(guidance_text=3.0, guidance_image=1.2))
  np.testing.assert_allclose(mixed, u + 1.2 * (i - u) + 3.0 * (f - i), rtol=1e-6)
  np.testing.assert_allclose(mixed[0, 0], 2 + 1.2 * -1.5 + 3 * 0.5, rtol=1e-6)


def test_guidance_of_one_is_the_full_stream():
  rng = np.random.default_rng(0)
  f, i, u = rng.normal(size=(3, 2, 5)).astype(np.float32)
  np.testing.assert_allclose(drawing.guide(f, i, u, settings(2, guidance_text=1.0, guidance_image=1.0)), f, atol=1e-6)


def test_guidance_without_pictures_in_the_prompt_needs_two_streams():
  rng = np.random.default_rng(0)
  f, u = rng.normal(size=(2, 2, 5)).astype(np.float32)
  mixed = drawing.guide(f, u, u, settings(2, guidance_text=3.0, guidance_image=7.0))
  np.testing.assert_allclose(mixed, u + 3.0 * (f - u), atol=1e-5)


def test_penalty_example():
  logits = np.array([[3.0, -1.0, 4.0]], np.float32)
  seen = np.array([[True, True, False]])
  np.testing.assert_array_equal(drawing.penalise(logits, seen, np.array([2.0], np.float32)), [[1.5, -2.0, 4.0]])
  barred = np.array([[-np.inf, 0.0, 1.0]], np.float32)
  np.testing.assert_array_equal(drawing.penalise(barred, np.ones((1, 3), bool), np.array([2.0], np.float32)), [[-np.inf, 0.0, 0.5]])


@pytest.mark.parametrize(('p', 'kept'), [(0.4, 1), (0.5001, 2), (0.74, 2), (0.9 - 1e-4, 3), (0.91, 4), (1.0, 4)])
def test_top_p_example(p, kept):
  probabilities = np.array([[0.15, 0.5, 0.1, 0.25]], np.float32)
  order = [1, 3, 0, 2]
  stays = np.isfinite(drawing.keep_top_p(np.log(probabilities), np.array([p], np.float32)))[0]
  assert set(np.flatnonzero(stays)) == set(order[:kept])


def test_top_p_is_the_ascending_rule_of_the_release():
  """Sort ascending, remove while the running sum is at most 1 - p; row by row, with -inf in it."""
  rng = np.random.default_rng(1)
  logits = (3 * rng.normal(size=(50, 40))).astype(np.float32)
  logits[rng.random(logits.shape) < 0.3] = -np.inf
  p = rng.uniform(0.05, 0.999, 50).astype(np.float32)
  stays = np.isfinite(drawing.keep_top_p(logits, p))
  for row in range(50):
    order = np.argsort(logits[row])
    probabilities = np.exp(logits[row, order].astype(np.float64))
    running = np.cumsum(probabilities / probabilities.sum())
    assert set(np.flatnonzero(stays[row])) == {order[k] for k in range(40) if running[k] > 1 - p[row] or k == 39}


def test_top_p_keeps_ties_together():
  stays = np.isfinite(drawing.keep_top_p(np.zeros((1, 4), np.float32), np.array([0.3], np.float32)))
  assert stays.all()


def process(logits, *, in_image, seen=None, allowed=None, options):
  logits = np.asarray(logits, np.float32)
  batch = len(in_image)
  seen = np.zeros((batch, logits.shape[1]), bool) if seen is None else np.array(seen)
  allowed = np.ones((batch, logits.shape[1]), bool) if allowed is None else np.array(allowed)
  return np.asarray(
    drawing.process(
      logits,
      allowed,
      np.array(in_image),
      seen,
      settings=drawing.make_settings([options] * batch),
      steps=drawing.make_steps([options], guided=options.guided),
    )
  )


def test_text_and_picture_rows_take_their_own_steps():
  options = no_guidance(repetition_penalty=2.0, temperature=0.5, image_temperature=4.0, top_p=1.0, image_top_p=1.0)
  scores = process([[1.0, -1.0, 4.0]] * 2, in_image=[False, True], seen=[[True, True, False]] * 2, options=options)
  np.testing.assert_allclose(scores, [[1.0, -4.0, 8.0], [0.25, -0.25, 1.0]])


def test_only_picture_rows_are_guided():
  options = SamplingOptions(guidance_text=2.0, guidance_image=1.0, repetition_penalty=1.0, greedy=True, image_greedy=True)
  full, image, none = [[1.0, 2.0]] * 2, [[0.5, 0.5]] * 2, [[9.0, 9.0]] * 2
  scores = process([*full, *image, *none], in_image=[False, True], options=options)
  np.testing.assert_allclose(scores, [[1.0, 2.0], [1.5, 3.5]])


def test_truncation_comes_after_masking_and_temperature():
  # Among tokens 1 and 2, at temperature 2, the odds are e^1 : 1, so p = 0.75 keeps both; at temperature 1 it would keep one.
  options = no_guidance(temperature=2.0, top_p=0.75, repetition_penalty=1.0)
  scores = process([[9.0, 2.0, 0.0]], in_image=[False], allowed=[[False, True, True]], options=options)
  np.testing.assert_allclose(scores, [[-np.inf, 1.0, 0.0]])
  colder = process(
    [[9.0, 2.0, 0.0]],
    in_image=[False],
    allowed=[[False, True, True]],
    options=no_guidance(temperature=1.0, top_p=0.75, repetition_penalty=1.0),
  )
  np.testing.assert_allclose(colder, [[-np.inf, 2.0, -np.inf]])


def test_steps_left_out_are_those_without_effect():
  steps = drawing.make_steps([no_guidance(greedy=True, image_greedy=True, repetition_penalty=1.0)], guided=False)
  assert steps == drawing.DrawSteps(guided=False, penalised=False, random=False, truncated=False)
  assert drawing.make_steps([SamplingOptions()], guided=True) == drawing.DrawSteps(guided=True, penalised=True, random=True, truncated=True)
  assert not drawing.make_steps([SamplingOptions(modalities='image')], guided=True).penalised
  assert not drawing.make_steps([SamplingOptions(modalities='text', greedy=True)], guided=False).random
  mates = [SamplingOptions(modalities='text', greedy=True), SamplingOptions(modalities='text', top_p=1.0)]
  assert drawing.make_steps(mates, guided=False) == drawing.DrawSteps(guided=False, penalised=True, random=True, truncated=False)


def draw(scores, *, options, in_image=None, keys=None, drawn=0):
  batch = len(scores)
  return np.asarray(
    drawing.draw(
      np.asarray(scores, np.float32),
      np.zeros(batch, bool) if in_image is None else np.array(in_image),
      drawing.row_keys(options.seed, np.arange(batch)) if keys is None else keys,
      np.full(batch, drawn),
      settings=drawing.make_settings([options] * batch),
      steps=drawing.make_steps([options], guided=options.guided),
    )
  )


def test_draws_follow_the_softmax():
  batch, p = 4000, np.array([0.5, 0.3, 0.2])
  tokens = draw(np.tile([*np.log(p), -np.inf], (batch, 1)), options=SamplingOptions())
  counts = np.bincount(tokens, minlength=4)
  assert counts[3] == 0
  assert np.abs(counts[:3] / batch - p).max() < 4 * np.sqrt(0.25 / batch)  # four standard deviations


def test_greedy_for_text_and_pictures_apart():
  scores = np.tile([1.0, 1.1, 0.9], (200, 1))
  in_image = np.arange(200) < 100
  tokens = draw(scores, options=SamplingOptions(greedy=True), in_image=in_image)
  assert (tokens[100:] == 1).all() and len(set(tokens[:100])) == 3
  tokens = draw(scores, options=SamplingOptions(image_greedy=True), in_image=in_image)
  assert (tokens[:100] == 1).all() and len(set(tokens[100:])) == 3


def test_a_rows_draw_depends_on_seed_row_and_count_only():
  scores = np.random.default_rng(0).normal(size=(6, 50))
  options = SamplingOptions(seed=3)
  together = draw(scores, options=options, drawn=7)
  keys = drawing.row_keys(3, np.arange(6))
  alone = [draw(scores[i : i + 1], options=options, keys=keys[i : i + 1], drawn=7)[0] for i in range(6)]
  assert together.tolist() == alone
  flat = np.zeros((1, 1000))
  variants = [
    draw(flat, options=options, keys=drawing.row_keys(s, np.array([r])), drawn=d)[0]
    for s, r, d in ((3, 0, 0), (4, 0, 0), (3, 1, 0), (3, 0, 1))
  ]
  assert len(set(variants)) == 4
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 1), 7)
  weights = np.exp(scores[1])  # fewer ids than groups: each is a group of its own
  expected = np.flatnonzero(np.cumsum(weights) > float(jax.random.uniform(key, (2,))[0]) * weights.sum())[0]
  assert together[1] == expected


@pytest.mark.parametrize('n_ids', [50, 256, 1000])
def test_draws_have_the_probabilities_of_the_softmax(n_ids):
  """A chi-square of 20,000 draws, and never an id of probability 0."""
  rng = np.random.default_rng(n_ids)
  scores = np.where(rng.random(n_ids) < 0.6, -np.inf, rng.normal(size=n_ids))
  p = np.exp(scores) / np.exp(scores).sum()
  n = 20_000
  counts = np.bincount(draw(np.tile(scores, (n, 1)), options=SamplingOptions(seed=1)), minlength=n_ids)
  kept = p > 0
  assert counts[~kept].sum() == 0
  chi_square, freedom = np.sum((counts[kept] - n * p[kept]) ** 2 / (n * p[kept])), kept.sum() - 1
  assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)
