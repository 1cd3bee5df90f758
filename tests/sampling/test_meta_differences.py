"""Where the package departs from the released sampler on purpose, each departure shown with what both write (architecture.md 4)."""

import dataclasses

import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions
from chameleon_jax.errors import PromptError
from tests.sampling import meta_reference as meta
from tests.sampling.meta_model import CONFIG, PROMPTS, N, T, V, expected, network, released, stops, written


def reference(prompts, options, **factors):
  """The released sampler's rows, uncut."""
  return meta.rows_of(meta.generate(network(**factors), V, prompts, released(options)), len(prompts))


def greedy(modalities, **settings):
  return SamplingOptions.meta(modalities, greedy=True, **settings)


def test_a_row_ends_at_its_own_stop_token():
  """The release draws on until every row has ended; its reader throws the rest away."""
  options = greedy('text', max_new_tokens=24)
  theirs = reference(PROMPTS[:3], options, end_sequence=3.0)
  ours = written(PROMPTS[:3], options, end_sequence=3.0)
  assert len({len(row) for row in theirs}) == 1 and len({len(row) for row in ours}) == 3
  assert [meta.cut(row, stops(options)) for row in theirs] == ours
  assert max(len(row) for row in ours) == len(theirs[0]) < 24  # the last one to end ended the batch


def test_rows_may_end_with_different_stop_tokens():
  """The release asks for the same one in all rows, and here runs to its limit."""
  options = greedy('text', max_new_tokens=24)
  prompts = [PROMPTS[0], PROMPTS[2]]
  plain = reference(prompts, options)
  first = next(token for token in plain[0] if token not in plain[1])
  second = next(token for token in plain[1] if token not in plain[0])
  options = dataclasses.replace(options, stop_tokens=(first, second))
  theirs, ours = reference(prompts, options), written(prompts, options)
  assert theirs == plain and [len(row) for row in theirs] == [24, 24]
  assert ours == [plain[0][: plain[0].index(first) + 1], plain[1][: plain[1].index(second) + 1]]
  assert max(len(row) for row in ours) < 24


def test_the_longest_prompt_limits_no_other_row():
  options = greedy('text', max_new_tokens=24)
  prompts = [PROMPTS[0], [*PROMPTS[2], *range(T, T + 72)]]
  left = CONFIG.max_seq_len - len(prompts[1])
  theirs = reference(prompts, options, end_sequence=0.5)
  ours = written(prompts, options, end_sequence=0.5)
  assert [len(row) for row in theirs] == [left, left] and 0 < left < 24
  assert [len(row) for row in ours] == [24, left]
  assert [row[:left] for row in ours] == theirs


def test_max_new_tokens_counts_everything():
  """The release counts text only, from the last picture on, and opens pictures that its limit would not hold."""
  options, factors = greedy('mixed', max_new_tokens=12), {'begin_image': 3.0}
  (long,) = expected(PROMPTS[:1], greedy('mixed'), **factors)
  (theirs,), (ours,) = reference(PROMPTS[:1], options, **factors), written(PROMPTS[:1], options, **factors)
  assert long[:8].count(V.begin_image) == 1  # opened where both see room for it
  assert theirs == long[: len(theirs)] and len(theirs) > 12 == len(ours)
  same = next((index for index, (one, other) in enumerate(zip(theirs, ours)) if one != other), 12)
  assert same >= 8 and (same == 12 or theirs[same] == V.begin_image)


def test_begin_image_needs_room_in_max_new_tokens():
  """`remaining >= n + 2`; the release looks at the context alone."""
  (long,) = expected([PROMPTS[0]], greedy('mixed'), begin_image=3.0)
  at = long.index(V.begin_image)
  for room in (N + 1, N + 2):  # tokens left where it would be drawn
    options = greedy('mixed', max_new_tokens=at + room)
    (theirs,), (ours,) = reference([PROMPTS[0]], options, begin_image=3.0), written([PROMPTS[0]], options, begin_image=3.0)
    assert theirs[at] == V.begin_image and ours[:at] == theirs[:at]
    if room == N + 2:
      assert ours == long[: at + room] and ours[-1] == V.end_image
    else:
      assert V.begin_image not in ours and len(ours) == at + room


def test_text_and_pictures_of_many_prompts():
  options = greedy('mixed')
  with pytest.raises(ValueError, match='one prompt'):
    reference(PROMPTS, options)
  assert len(written(PROMPTS, options, begin_image=3.0)) == len(PROMPTS)


def test_a_picture_must_fit():
  """The release checks nothing and writes past the context."""
  prompt = [V.begin_sequence, *[T] * (CONFIG.max_seq_len - N)]
  picture = meta.ImageDecoder(lambda tokens: np.zeros(V.size), V, [prompt], released(greedy('image')))
  for _ in range(N):
    picture.step(None)
  assert len(picture.full[0]) == CONFIG.max_seq_len + 2
  with pytest.raises(PromptError):
    written([prompt], greedy('image'))
  assert len(reference([PROMPTS[0]], greedy('image', max_new_tokens=N - 1))[0]) == N
  with pytest.raises(PromptError):
    written([PROMPTS[0]], greedy('image', max_new_tokens=N - 1))


def test_a_prompt_that_ends_in_begin_image():
  """Asked for both, the release begins with text whatever the prompt ends in."""
  prompt = [*PROMPTS[0], V.begin_image]
  options = greedy('mixed')
  (theirs,), (ours,) = reference([prompt], options), written([prompt], options)
  assert V.is_text[theirs[0]]
  assert ours[:N] == expected([prompt], greedy('image'))[0] and ours[N] == V.end_image
  after = [*prompt, *ours[: N + 1]]
  assert ours[N + 1 :] == expected([after], options)[0]
