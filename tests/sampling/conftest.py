"""A second sampler, written for reading: Python lists, one row at a time, every token's logits computed anew.

It shares nothing with the package but the vocabulary's ids and jax's random numbers. Tests run the device loop and
this one on the same model and compare tokens.
"""

import jax
import numpy as np
import pytest


def _drawn(scores, key):
  """Two uniform numbers invert two cumulative sums: of the groups of ids equal modulo 256, and inside the group."""
  uniform = np.asarray(jax.random.uniform(key, (2,)))
  weights = np.exp((scores - np.max(scores)).astype(np.float64))
  group = _inverse([weights[start::256].sum() for start in range(min(256, len(weights)))], uniform[0])
  return group + 256 * _inverse(weights[group::256], uniform[1])


def _inverse(weights, uniform):
  return next(place for place, total in enumerate(np.cumsum(weights)) if total > uniform * np.sum(weights))


def _top_p(scores: np.ndarray, p: float) -> np.ndarray:
  """As the release describes it: sort ascending, remove while the running sum is <= 1 - p, keep at least one."""
  order = np.argsort(scores, kind='stable')
  probabilities = np.exp(scores[order] - scores.max())
  probabilities /= probabilities.sum()
  removed = order[:-1][np.cumsum(probabilities)[:-1] <= 1 - p]
  scores = scores.copy()
  scores[removed] = -np.inf
  return scores


def generate(logits_of, prompt, options, *, row, vocabulary, n, max_seq_len):
  """New tokens of one row. `logits_of(list of tokens) -> [V]` sees a whole stream."""
  v = vocabulary
  tokens = [int(token) for token in prompt]
  start = len(tokens)
  picture = None  # codes of the open picture, None in text
  for i, token in enumerate(tokens):
    if token == v.begin_image and all(v.is_image[later] for later in tokens[i + 1 :]):
      picture = len(tokens) - i - 1
  if options.modalities == 'image' and picture is None:
    tokens, picture, start = [*tokens, v.begin_image], 0, start + 1
  opened = 0 if picture is None else 1
  key = jax.random.fold_in(jax.random.key(options.seed), row)
  new = []
  while len(new) < options.max_new_tokens and len(tokens) < max_seq_len:
    inside = picture is not None
    scores = np.array(logits_of(tokens), np.float32)
    if inside and options.guided:
      of_pictures = [t for t in tokens if v.is_image[t] or t in (v.begin_sequence, v.begin_image, v.end_image)]
      last = len(tokens) - 1 - tokens[::-1].index(v.begin_image)
      i, u = np.array(logits_of(of_pictures)), np.array(logits_of([v.begin_sequence, *tokens[last:]]))
      scores = u + np.float32(options.guidance_image) * (i - u) + np.float32(options.guidance_text) * (scores - i)
    if inside:
      choices = set(np.flatnonzero(v.is_image)) if picture < n else {v.end_image}
    else:
      choices = set(np.flatnonzero(v.is_text)) | {v.end_sequence}
      if options.stop_at_end_turn:
        choices.add(v.end_turn)
      room = options.max_new_tokens - len(new) >= n + 2 and len(tokens) < max_seq_len - (n + 2)
      room = room and max_seq_len - len(tokens) >= n + 2
      if options.modalities == 'mixed' and room and (options.max_images is None or opened < options.max_images):
        choices.add(v.begin_image)
    for token in range(v.size):
      if token not in choices:
        scores[token] = -np.inf
    if not inside:
      for token in set(tokens):
        scores[token] = scores[token] * options.repetition_penalty if scores[token] < 0 else scores[token] / options.repetition_penalty
    if options.image_greedy if inside else options.greedy:
      token = int(np.argmax(scores))
    else:
      scores = scores / np.float32(options.image_temperature if inside else options.temperature)
      scores = _top_p(scores, options.image_top_p if inside else options.top_p)
      token = _drawn(scores, jax.random.fold_in(key, len(new)))
    tokens.append(token)
    new.append(token)
    if token == v.begin_image:
      picture, opened = 0, opened + 1
    elif token == v.end_image:
      picture = None
    elif inside:
      picture += 1
      if options.modalities == 'image' and picture == n:
        break
    elif token in (v.end_sequence, v.end_turn):
      break
  return new


@pytest.fixture(scope='session')
def reference():
  """The slow sampler; see the top of this file."""
  return generate
