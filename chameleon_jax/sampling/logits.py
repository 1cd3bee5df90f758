"""From raw logits to the next token: the released sampler's steps in the released order, row by row.

    rows in text        rows in a picture
    ------------        -----------------
                        guidance: u + s_image (i - u) + s_text (f - i)
    allow-only          allow-only
    repetition penalty
    temperature         temperature
    top-p               top-p
    softmax, draw       softmax, draw         (or the largest logit where greedy)

f, i and u are the raw logits of three streams: the whole row; its pictures alone; the open picture alone
(`loop.py` says how they come about). Both scales at 1 give f. "No begin_image near the end" of the release
is part of allow-only (`modality.allowed`). Settings are arrays per row, so changing one compiles nothing.

Every row draws with its own key, folded from (seed, row, number of tokens drawn): what a row draws does not
depend on which rows share its batch.

This file knows no model and no vocabulary. Source: spec model.md 8.2 and 8.3.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from chameleon_jax.array_types import AnyArray, Array
from chameleon_jax.config import SamplingOptions

Scores = Float[AnyArray, 'B V']

_GROUPS = 256


@flax.struct.dataclass
class DrawSettings:
  """Numbers of the draw, each [B]; `SamplingOptions` says what they mean."""

  temperature: Float[AnyArray, ' B']
  top_p: Float[AnyArray, ' B']
  repetition_penalty: Float[AnyArray, ' B']
  greedy: Bool[AnyArray, ' B']
  image_temperature: Float[AnyArray, ' B']
  image_top_p: Float[AnyArray, ' B']
  image_greedy: Bool[AnyArray, ' B']
  guidance_text: Float[AnyArray, ' B']
  guidance_image: Float[AnyArray, ' B']


@dataclasses.dataclass(frozen=True)
class DrawSteps:
  """Which steps exist in a compiled program. A step left out is one that would change nothing.

  Attributes:
    guided: pictures mix three streams.
    penalised: some row has a repetition penalty other than 1.
    random: some row draws at random; otherwise the largest logit wins and no random number is made.
    truncated: some row has a top-p below 1 and draws at random.
  """

  guided: bool
  penalised: bool
  random: bool
  truncated: bool

  def covers(self, other: 'DrawSteps') -> bool:
    """Whether a program with these steps also does for rows that need `other`: the same streams, and no step missing."""
    pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
    return self.guided == other.guided and all(mine or not theirs for mine, theirs in pairs)

  @property
  def count(self) -> int:
    """Number of steps."""
    return sum(dataclasses.astuple(self))


def make_settings(options: Sequence[SamplingOptions]) -> DrawSettings:
  """The settings of each row (numpy)."""
  names = [field.name for field in dataclasses.fields(DrawSettings)]
  kinds = {name: bool if name.endswith('greedy') else np.float32 for name in names}
  return DrawSettings(**{name: np.array([getattr(o, name) for o in options], kinds[name]) for name in names})


def make_steps(options: Sequence[SamplingOptions], *, guided: bool) -> DrawSteps:
  """The steps that a batch of `options` needs; `guided`: whether any row is inside a guided picture."""
  text = [o for o in options if o.modalities != 'image']
  image = [o for o in options if o.modalities != 'text']
  random_text, random_image = [o for o in text if not o.greedy], [o for o in image if not o.image_greedy]
  return DrawSteps(
    guided=guided,
    penalised=any(o.repetition_penalty != 1 for o in text),
    random=bool(random_text or random_image),
    truncated=any(o.top_p < 1 for o in random_text) or any(o.image_top_p < 1 for o in random_image),
  )


def guide(full: Scores, image: Scores, none: Scores, settings: DrawSettings) -> Scores:
  """Mixes raw logits: `u + s_image (i - u) + s_text (f - i)`, without a softmax before it."""
  return none + settings.guidance_image[:, None] * (image - none) + settings.guidance_text[:, None] * (full - image)


def penalise(logits: Scores, seen: Bool[AnyArray, 'B V'], penalty: Float[AnyArray, ' B']) -> Scores:
  """Repetition penalty p on the ids in `seen`: a negative logit times p, others divided by p.

  Example, p = 2:   logits  [3, -1, 4]   seen [yes, yes, no]   ->   [1.5, -2, 4]
  """
  p = penalty[:, None]
  return jnp.where(seen, jnp.where(logits < 0, logits * p, logits / p), logits)


def keep_top_p(logits: Scores, top_p: Float[AnyArray, ' B']) -> Scores:
  """Sets to -inf what lies outside the smallest set of most likely tokens whose probability reaches `top_p`.

  A token stays iff the tokens strictly more likely than it sum to less than p; the most likely one always
  stays. Tokens of equal logit stay or go together (the release keeps those its sort happens to put last).

      probabilities  0.5  0.25  0.15  0.1
      more likely    0    0.5   0.75  0.9
      p = 0.9        stay stay  stay  go

  Nothing is sorted: the least weight that stays is found by halving the range of non-negative float32 values, whose bit
  patterns are ordered like the values, in 30 sums. On a CPU this takes 1 ms where sorting 16 x 4,096 logits takes 15.
  """
  weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))  # in [0, 1], the largest is 1
  target = top_p * jnp.sum(weights, axis=-1)

  def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    goes, stays = bounds  # bit patterns: a token of weight `stays` stays, one of `goes` goes
    middle = (goes + stays) >> 1
    threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
    more_likely = jnp.sum(jnp.where(weights > threshold[:, None], weights, 0), axis=-1)
    enough = more_likely < target
    return jnp.where(enough, goes, middle), jnp.where(enough, middle, stays)

  one = jax.lax.bitcast_convert_type(jnp.ones_like(target), jnp.int32)
  _, stays = jax.lax.fori_loop(0, 30, halve, (jnp.full_like(one, -1), one))  # the bits of 1.0 are below 2 ** 30
  least = jax.lax.bitcast_convert_type(stays, jnp.float32)
  return jnp.where((weights >= least[:, None]) | (top_p[:, None] >= 1), logits, -jnp.inf)


def process(
  logits: Float[AnyArray, 'R V'],
  allowed: Bool[AnyArray, 'B V'],
  in_image: Bool[AnyArray, ' B'],
  seen: Bool[AnyArray, 'B V'],
  *,
  settings: DrawSettings,
  steps: DrawSteps,
) -> Scores:
  """The logits from which a token is drawn, -inf where none may be.

  Args:
    logits: raw logits; R = B, or 3 B when guided, ordered [full x B | pictures alone x B | open picture alone x B].
    allowed: the tokens each row may draw, from `modality.allowed`.
    in_image: rows inside a picture.
    seen: ids that each row holds so far, prompt and image codes included.
    settings: per row.
    steps: which steps to run.
  """
  scores = logits
  if steps.guided:
    full, image, none = jnp.split(logits, 3)
    scores = jnp.where(in_image[:, None], guide(full, image, none, settings), full)
  scores = jnp.where(allowed, scores, -jnp.inf)
  if steps.penalised:
    scores = jnp.where(in_image[:, None], scores, penalise(scores, seen, settings.repetition_penalty))
  if steps.random:
    scores = scores / jnp.where(in_image, settings.image_temperature, settings.temperature)[:, None]
  if steps.truncated:
    scores = keep_top_p(scores, jnp.where(in_image, settings.image_top_p, settings.top_p))
  return scores


_fold_in_each = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))  # one call: every request makes its key


def row_keys(seed: int, rows: Int[np.ndarray, ' B']) -> Key[Array, ' B']:
  """One key per row, folded from the seed and the row's number in the request."""
  return _fold_in_each(jax.random.key(seed), jnp.asarray(rows))


def draw(
  scores: Scores,
  in_image: Bool[AnyArray, ' B'],
  keys: Key[Array, ' B'],
  drawn: Int[AnyArray, ' B'],
  *,
  settings: DrawSettings,
  steps: DrawSteps,
) -> Int[Array, ' B']:
  """Draws one token a row from the softmax of `scores` (see `process`), or takes the largest where the row is greedy.

  Of equal largest logits the first wins. A draw takes two random numbers a row, see `_invert`.
  """
  top = jnp.max(scores, axis=-1, keepdims=True)
  ids = jnp.arange(scores.shape[-1], dtype=jnp.int32)
  best = jnp.min(jnp.where(scores == top, ids, scores.shape[-1] - 1), axis=-1)  # an argmax, which XLA does not vectorise
  if not steps.random:
    return best
  step_keys = jax.vmap(jax.random.fold_in)(keys, drawn)
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(step_keys)
  sampled = _invert(jnp.exp(scores - top), uniform)
  return jnp.where(jnp.where(in_image, settings.image_greedy, settings.greedy), best, sampled)


def _invert(weights: Scores, uniform: Float[AnyArray, 'B 2']) -> Int[Array, ' B']:
  """Ids drawn in proportion to `weights`: the cumulative sum is inverted for a group of ids first, then inside the group.

  A noise for every id would be 65,536 random numbers a row: on two CPU cores 11 ms for 16 rows, where this takes 1.
  Ids are grouped by their remainder modulo `_GROUPS`, so that the sums of all groups are one vectorised pass.

      weights  1 0 | 3 0 | 0 4        two groups: sums 4 and 4; then within the first: 1 3 0
  """
  missing = -weights.shape[-1] % _GROUPS
  table = jnp.pad(weights, ((0, 0), (0, missing))).reshape(weights.shape[0], -1, _GROUPS)
  group = _first_beyond(jnp.sum(table, axis=1), uniform[:, 0])
  inside = jnp.take_along_axis(table, group[:, None, None], axis=2)[..., 0]
  return _first_beyond(inside, uniform[:, 1]) * _GROUPS + group


def _first_beyond(weights: Float[AnyArray, 'B n'], uniform: Float[AnyArray, ' B']) -> Int[Array, ' B']:
  """The first place whose cumulative weight passes `uniform` times the whole; never one of weight 0, however sums are rounded."""
  sums = jnp.cumsum(weights, axis=-1)
  passed = (sums > uniform[:, None] * jnp.max(sums, axis=-1, keepdims=True)) & (weights > 0)
  place = jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), jnp.argmax(weights, axis=-1))
  return place.astype(jnp.int32)
