"""Allowed tokens, order of the logits steps and the distributions that tokens are drawn from: the package against the reference.

Rounding apart, two things may differ: of equal logits at the edge of top-p the package keeps all, the release those that its sort puts
last; and an id whose place in the running sum is within rounding of 1 - p may fall to either side.
"""

import dataclasses

import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions, VocabularyConfig
from chameleon_jax.sampling import logits as drawing
from chameleon_jax.sampling import modality
from chameleon_jax.tokens.vocabulary import Vocabulary
from tests.sampling import meta_reference as meta
from tests.sampling.meta_model import CONFIG, PICTURE, PROMPTS, N, T, V, make_engine, network, released

LONG = CONFIG.max_seq_len
SMALL = Vocabulary(VocabularyConfig(size=16, n_codes=4, n_sentinels=0, n_reserved=1))  # codes 4 to 7, end_turn 10, text from 11


def table(vocabulary=V, *, n=N, max_seq_len=LONG):
  return modality.token_table(vocabulary, n_image_tokens=n, max_seq_len=max_seq_len)


def allowed_by_package(row, options, *, tokens=None, open_codes=-1):
  tokens = tokens or table()
  remaining = np.array([tokens.max_seq_len - len(row)])
  state = modality.init_state(np.array([len(row)]), open_codes=np.array([open_codes]), remaining=remaining)
  banned = np.zeros((1, len(tokens.kind)), bool)
  return np.flatnonzero(np.asarray(modality.allowed(state, modality.make_rules([options]), tokens, banned))[0]).tolist()


def processed(logits, row, options, *, allowed, in_image=False):
  """The package's processed logits [V] of one row; `logits` [V], or [3, V] where a picture is guided."""
  logits = np.atleast_2d(np.asarray(logits, np.float32))
  size = logits.shape[1]
  mask, seen = np.zeros((1, size), bool), np.zeros((1, size), bool)
  mask[0, list(allowed)] = True
  seen[0, list(row)] = True
  settings, steps = drawing.make_settings([options]), drawing.make_steps([options], guided=len(logits) == 3)
  return np.asarray(drawing.process(logits, mask, np.array([in_image]), seen, settings=settings, steps=steps))[0]


def kept(scores):
  return np.flatnonzero(np.isfinite(scores)).tolist()


# ---------------------------------------------------------------------------------------------- allowed


@pytest.mark.parametrize('modalities', ['text', 'mixed'])
@pytest.mark.parametrize('length', [1, 30, LONG - N - 3, LONG - N - 2, LONG - 1])
def test_allowed_in_text(modalities, length):
  options = SamplingOptions.meta(modalities)
  row = [V.begin_sequence, *[T] * (length - 1)]
  plain = dataclasses.replace(released(options), text=meta.TextOptions(1.0, 1.0, 1.0))
  theirs = kept(meta.process_text(np.zeros(V.size), row, V, plain))
  assert allowed_by_package(row, options) == theirs
  opens = modalities == 'mixed' and length < LONG - N - 2
  barred = {T + 3, T + 50}
  assert theirs == [V.end_sequence, *([V.begin_image] if opens else []), *(token for token in range(T, V.size) if token not in barred)]
  assert V.end_turn not in theirs and V.pad not in theirs


def test_allowed_in_pictures():
  options = SamplingOptions.meta('image', top_p=1.0, temperature=1.0)
  row = [V.begin_sequence, V.begin_image, 4]
  theirs = kept(meta.process_image(*np.zeros((3, V.size)), V, released(options).image))
  assert theirs == allowed_by_package(row, options, open_codes=1) == list(range(4, 36))
  assert allowed_by_package(row, SamplingOptions.meta('mixed'), open_codes=N) == [V.end_image]  # forced


def test_the_last_begin_image_of_the_release():
  """With 4,096 places and 1,024 codes: index 3,069, never 3,070."""
  vocabulary = Vocabulary(VocabularyConfig())
  options = SamplingOptions.meta('mixed')
  settings = meta.Options(text=meta.TextOptions(top_p=1.0), image=meta.ImageOptions())
  for length, may in ((3069, True), (3070, False)):
    row = [0] * length
    theirs = kept(meta.process_text(np.zeros(vocabulary.size), row, vocabulary, settings))
    assert theirs == allowed_by_package(row, options, tokens=table(vocabulary, n=1024, max_seq_len=4096))
    assert (8197 in theirs) == may and 8710 not in theirs


# ------------------------------------------------------------------------------------ order of the steps

TEXT = SamplingOptions.meta('text', repetition_penalty=1.0, temperature=1.0, top_p=1.0)
A, B, C, D = 11, 12, 13, 14  # text of SMALL
ALLOWED = [SMALL.end_sequence, A, B, C, D, 15]


def logits(**values):
  """Logits of SMALL: those named, all others far below."""
  scores = np.full(SMALL.size, -30.0)
  for name, value in values.items():
    scores[{'A': A, 'B': B, 'C': C, 'D': D, 'code': 4, 'other': 5, 'third': 6, 'turn': 10}[name]] = value
  return scores


def steps_of_text(scores, row, text, order):
  """The reference's processors in another order, to see that the order matters."""
  for name in order:
    if name == 'allow':
      scores = meta.allow_only(scores, ALLOWED)
    elif name == 'penalty':
      scores = meta.repetition_penalty(scores, row, text.repetition_penalty)
    elif name == 'temperature':
      scores = scores / text.temperature
    else:
      scores = meta.top_p(scores, text.top_p)
  return scores


@pytest.mark.parametrize(
  ('values', 'settings', 'wrong', 'right_kept', 'wrong_kept'),
  [
    # a special id takes most of the probability: top-p before allow-only leaves nothing
    ({'turn': 5.0, 'A': 1.0, 'B': 0.9}, {'top_p': 0.9}, ['penalty', 'temperature', 'top_p', 'allow'], [A, B], []),
    # A has been written: penalised first it no longer crowds out B
    ({'A': 4.0, 'B': 1.5}, {'top_p': 0.8, 'repetition_penalty': 2.0}, ['allow', 'top_p', 'penalty', 'temperature'], [A, B], [A]),
    # a high temperature first lets C into the nucleus, a low one drives B out
    ({'A': 3.0, 'B': 1.0, 'C': 0.5}, {'top_p': 0.8, 'temperature': 4.0}, ['allow', 'top_p', 'penalty', 'temperature'], [A, B, C], [A]),
    ({'A': 2.0, 'B': 1.0, 'C': 0.0}, {'top_p': 0.8, 'temperature': 0.5}, ['allow', 'top_p', 'penalty', 'temperature'], [A], [A, B]),
  ],
)
def test_order_in_text(values, settings, wrong, right_kept, wrong_kept):
  options = dataclasses.replace(TEXT, **settings)
  row, scores = [SMALL.begin_sequence, A], logits(**values)
  theirs = meta.process_text(scores, row, SMALL, dataclasses.replace(released(options), max_seq_len=64))
  ours = processed(scores, row, options, allowed=ALLOWED)
  other = steps_of_text(scores, row, released(options).text, wrong)
  assert kept(theirs) == kept(ours) == right_kept and kept(other) == wrong_kept
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)
  right = steps_of_text(scores, row, released(options).text, ['allow', 'penalty', 'temperature', 'top_p'])
  np.testing.assert_array_equal(right, theirs)


def test_penalty_and_temperature_commute():
  """Both only scale, so no result can tell their order; nor can a softmax before the mix of guidance, which only shifts."""
  rng = np.random.default_rng(0)
  text = meta.TextOptions(1.7, 0.6, 0.9)
  scores, row = rng.normal(size=SMALL.size) * 3, [A, C, 4]
  orders = ['allow', 'penalty', 'temperature', 'top_p'], ['allow', 'temperature', 'penalty', 'top_p']
  one, other = (steps_of_text(scores, row, text, order) for order in orders)
  np.testing.assert_allclose(one, other, rtol=1e-12)
  streams = rng.normal(size=(3, SMALL.size)) * 3
  image = meta.ImageOptions()
  raw = meta.guide(*streams, image)
  normalised = meta.guide(*(np.log(meta.softmax(stream)) for stream in streams), image)
  np.testing.assert_allclose(meta.softmax(raw), meta.softmax(normalised), rtol=1e-9)


def test_guidance_comes_before_top_p():
  """By f alone the nucleus is one code; the mix lets the second in and puts it first."""
  options = SamplingOptions.meta('image', temperature=1.0, top_p=0.6, guidance_text=2.0, guidance_image=1.0)
  streams = [logits(code=3.0, other=2.0), logits(code=3.0, other=1.0), logits(code=3.0, other=1.0)]
  theirs = meta.process_image(*streams, SMALL, released(options).image)
  ours = processed(streams, [], options, allowed=range(4, 8), in_image=True)
  assert kept(theirs) == kept(ours) == [4, 5] and kept(meta.top_p(meta.allow_only(streams[0], range(4, 8)), 0.6)) == [4]
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_penalty_once_for_each_id():
  options = dataclasses.replace(TEXT, repetition_penalty=2.0)
  scores, row = logits(A=3.0, B=-1.0, C=4.0), [SMALL.begin_sequence, A, A, A, B, 4]
  theirs = meta.process_text(scores, row, SMALL, dataclasses.replace(released(options), max_seq_len=64))
  ours = processed(scores, row, options, allowed=ALLOWED)
  assert [theirs[A], theirs[B], theirs[C], theirs[4]] == [1.5, -2.0, 4.0, -np.inf]
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_top_p_of_equal_logits():
  """p = 0.6 of four equals: the release keeps three of them (2.4 rounded up), the package all four."""
  options = dataclasses.replace(TEXT, top_p=0.6)
  scores = logits(A=1.0, B=1.0, C=1.0, D=1.0)
  assert kept(meta.top_p(meta.allow_only(scores, [A, B, C, D]), 0.6)) == [B, C, D]
  assert kept(processed(scores, [], options, allowed=[A, B, C, D])) == [A, B, C, D]
  apart = logits(A=1.0, B=1.001, C=1.002, D=1.003)
  assert kept(processed(apart, [], options, allowed=[A, B, C, D])) == [B, C, D]


def test_top_p_keeps_one():
  options = dataclasses.replace(TEXT, top_p=1e-6)
  scores = logits(A=1.0, B=1.5)
  assert kept(meta.top_p(scores, 1e-6)) == kept(processed(scores, [], options, allowed=ALLOWED)) == [B]


# --------------------------------------------------------------------------------------- distributions


def on_the_edge(scores, p):
  """Whether a running sum of probabilities lies within rounding of 1 - p."""
  sums = np.cumsum(np.sort(meta.softmax(scores)))
  return bool((np.abs(sums - (1 - p)) < 1e-5).any())


def random_options(rng, *, modalities, guided):
  scales = rng.uniform(-1, 4, 2).tolist() if guided else (1.0, 1.0)
  return SamplingOptions.meta(
    modalities,
    repetition_penalty=rng.uniform(0.7, 2.5),
    temperature=rng.uniform(0.2, 2.0),
    top_p=float(rng.choice([0.3, 0.8, 0.9, 0.99, 1.0])),
    guidance_text=scales[0],
    guidance_image=scales[1],
  )


@pytest.mark.parametrize('guided', [False, True])
def test_distributions_of_random_states(guided):
  """A batch of rows in text and in pictures, each with settings of its own; the reference takes them one after the other."""
  rng = np.random.default_rng(guided)
  n, left_out = 600, 0
  kinds = rng.choice(['text', 'mixed', 'picture'], n)
  options = [random_options(rng, modalities='text' if kind == 'text' else 'mixed', guided=guided) for kind in kinds]
  rows = [rng.integers(0, V.size, rng.integers(1, LONG)).tolist() for _ in range(n)]
  streams = np.float32(rng.normal(size=(3, n, V.size)) * rng.choice([0.5, 2.0, 6.0], n)[:, None])

  state = modality.init_state(
    np.array([len(row) for row in rows]),
    open_codes=np.where(kinds == 'picture', 1, -1),
    remaining=np.array([LONG - len(row) for row in rows]),
  )
  allowed = modality.allowed(state, modality.make_rules(options), table(), np.zeros((n, V.size), bool))
  seen = np.stack([np.isin(np.arange(V.size), row) for row in rows])
  settings, steps = drawing.make_settings(options), drawing.make_steps(options, guided=guided)
  raw = streams.reshape(3 * n, -1) if guided else streams[0]
  ours = np.asarray(drawing.process(raw, allowed, kinds == 'picture', seen, settings=settings, steps=steps), np.float64)

  for index in range(n):
    theirs_of = process_picture if kinds[index] == 'picture' else process_text
    theirs, whole = (theirs_of(streams[:, index], rows[index], options[index], top_p=p) for p in (options[index].top_p, 1.0))
    if options[index].top_p < 1 and on_the_edge(whole, options[index].top_p):
      left_out += 1
      continue
    assert kept(ours[index]) == kept(theirs)
    np.testing.assert_allclose(meta.softmax(ours[index]), meta.softmax(theirs), atol=2e-5)
  assert left_out <= 5


def process_text(streams, row, options, *, top_p):
  settings = released(options)
  return meta.process_text(streams[0], row, V, dataclasses.replace(settings, text=dataclasses.replace(settings.text, top_p=top_p)))


def process_picture(streams, row, options, *, top_p):
  return meta.process_image(*streams, V, dataclasses.replace(released(options).image, top_p=top_p))


def test_tokens_drawn_at_random_are_possible():
  """Every token of a random run is one that the reference could have drawn there."""
  options = SamplingOptions.meta('mixed', temperature=1.3, top_p=0.8, seed=3)
  factors = {'begin_image': 3.0}
  found = make_engine(**factors).generate_tokens([np.array(prompt, np.int32) for prompt in PROMPTS], options)
  logits_of, settings, narrow = network(**factors), released(options), 0
  assert sum(V.begin_image in row for row in found) >= 3
  for prompt, new in zip(PROMPTS, found):
    row, picture, missing = list(prompt), None, 0
    for token in new.tolist():
      if missing:
        streams = [picture.full[0], picture.image[0], picture.none[0]]
        scores, missing = meta.process_image(*(logits_of(stream) for stream in streams), V, settings.image), missing - 1
        for stream in streams:
          stream.append(token)
      elif picture is not None:
        scores, picture = picture.close().scores[0], None
      else:
        scores = meta.process_text(logits_of(row), row, V, settings)
        if token == V.begin_image:
          picture, missing = meta.ImageDecoder(logits_of, V, [[*row, token]], settings), N
      assert np.isfinite(scores[token])
      narrow += np.isfinite(scores).sum() < 20
      row.append(token)
  assert narrow > 50  # steps that leave few choices


@pytest.mark.parametrize('modalities', ['text', 'image'])
def test_frequencies(modalities):
  """First tokens of many rows with different random numbers, against the reference's probabilities."""
  options = SamplingOptions.meta(modalities, temperature=1.5, top_p=0.9, max_new_tokens=1 if modalities == 'text' else N)
  prompt, n = [V.begin_sequence, *PICTURE, T + 7], 1024
  found = make_engine().generate_tokens([np.array(prompt, np.int32)] * n, options)
  counts = np.bincount([int(row[0]) for row in found], minlength=V.size)
  settings, logits_of = released(options), network()
  if modalities == 'text':
    scores = meta.process_text(logits_of(prompt), prompt, V, settings)
  else:
    scores = meta.ImageDecoder(logits_of, V, [prompt], settings).step(np.random.default_rng(0)).scores[0]
  p = meta.softmax(scores)
  assert len(kept(scores)) >= 5
  assert (counts[p == 0] == 0).all()
  deviation = np.abs(counts - n * p)[p > 0] / np.sqrt(n * p * (1 - p))[p > 0]
  assert deviation.max() < 4.5
