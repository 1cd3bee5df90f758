"""A scripted model for the sampler: its logits hash the tokens in a stream up to the query's slot.

So they are right only if every stream holds exactly its own tokens at exactly its own positions. Its cache is the token ids
themselves, as an array [R, 1, S, 1] like a transformer's.
"""

import functools

import jax.numpy as jnp
import numpy as np

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.presets import tiny_transformer
from chameleon_jax.sampling.engine import Engine, ModelFunctions
from chameleon_jax.tokens.vocabulary import Vocabulary

V = Vocabulary(VocabularyConfig(size=40, n_codes=8, n_sentinels=1, n_reserved=2))
N, CONTEXT = 4, 60
_PRIME = 97


@functools.cache
def scripts():
  """Weights [V, slots] of the hash, and logits [prime, V] for each of its values."""
  rng = np.random.default_rng(0)
  table = rng.normal(size=(_PRIME, V.size)).astype(np.float32) * 2
  table[:, V.begin_image] += 3  # pictures often
  table[:, [V.end_sequence, V.end_turn]] -= 3  # and long rows
  return rng.integers(1, _PRIME, size=(V.size, 2 * CONTEXT)).astype(np.int32), table


def scripted_logits(tokens):
  """Logits after a whole stream, in numpy."""
  weights, table = scripts()
  return table[sum(int(weights[token, slot]) for slot, token in enumerate(tokens)) % _PRIME]


def _forward(params, tokens, positions, cache):
  """'Hidden states' are the hashes [R, T, 1]."""
  weights, _ = params
  rows = jnp.arange(tokens.shape[0])
  held = cache[:, 0, :, 0].at[rows[:, None], positions].set(tokens, mode='drop')
  slots = jnp.arange(held.shape[1])
  terms = weights[held, slots][:, None] * (slots <= positions[:, :, None])
  return (terms.sum(axis=2) % _PRIME)[..., None], held[:, None, :, None]


def _unembed(params, hidden):
  return params[1][hidden[..., 0]]


def _make_cache(streams, slots):
  return jnp.full((streams, 1, slots, 1), V.unknown, jnp.int32)


FUNCTIONS = ModelFunctions(_forward, _unembed, _make_cache)


def make_engine(*, table=None, max_rows=64, **keywords):
  """An engine over the scripted model; `table` [prime, V] replaces its logits."""
  weights, usual = scripts()
  config = tiny_transformer(max_seq_len=CONTEXT, vocab_size=V.size)
  params = (jnp.asarray(weights), jnp.asarray(usual if table is None else table))
  return Engine(config, params, V, n_image_tokens=N, max_rows=max_rows, functions=FUNCTIONS, **keywords)


def example_prompts():
  """Four prompts of different length, one with a picture in it."""
  first = V.text_start
  picture = [V.begin_image, 4, 5, 6, 7, V.end_image]
  rows = [
    [V.begin_sequence, first, first + 1, V.end_turn],
    [V.begin_sequence, *picture, first + 2, V.end_turn],
    [V.begin_sequence],
    [V.begin_sequence, *range(first, first + 9), V.end_turn],
  ]
  return [np.array(row, np.int32) for row in rows]
