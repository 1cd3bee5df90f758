"""A tiny network that the package's sampler and the reference of the released one both run, for the tests that compare them."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.config import SamplingOptions
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.presets import tiny_transformer, tiny_vocabulary
from chameleon_jax.sampling.engine import Engine
from chameleon_jax.tokens.vocabulary import Vocabulary
from tests.sampling import meta_reference as meta

N = 4  # codes of a picture
CONFIG = tiny_transformer(max_seq_len=96, init_std=0.3)  # weights large enough that the context decides
T = tiny_vocabulary().text_start
V = Vocabulary(tiny_vocabulary(), barred_text=(T + 3, T + 50))
SURE = 1e-4  # a lead of the best id, in float32 logits of size 10, that no rounding turns round


@functools.cache
def params(begin_image: float = 1.0, end_sequence: float = 1.0):
  """Random float32 parameters; the two factors make begin_image and end_sequence as frequent as a test wants them."""
  drawn = nn.meta.unbox(Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params'])
  head = np.array(drawn['lm_head'])
  head[:, V.begin_image] *= begin_image
  head[:, V.end_sequence] *= end_sequence
  return {**drawn, 'lm_head': jnp.asarray(head)}


@functools.cache
def _forward():
  model = Transformer(CONFIG)
  return jax.jit(lambda params, tokens, last: model.apply({'params': params}, tokens)[0][0, last])


def network(**factors) -> meta.LogitsOf:
  """`logits_of` of the reference: the whole row through the transformer, nothing kept; what stands behind a token, it cannot see."""

  def logits_of(tokens):
    row = np.full((1, CONFIG.max_seq_len), V.pad, np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(_forward()(params(**factors), row, len(tokens) - 1))

  return logits_of


@functools.cache
def make_engine(**factors) -> Engine:
  """The sampler under test."""
  return Engine(CONFIG, params(**factors), V, n_image_tokens=N)


def released(options: SamplingOptions) -> meta.Options:
  """The same settings for the reference. Its `max_gen_len` is no total: see the table at its top."""
  text = meta.TextOptions(options.repetition_penalty, options.temperature, options.top_p, options.greedy)
  image = meta.ImageOptions(
    options.guidance_text, options.guidance_image, options.image_temperature, options.image_top_p, options.image_greedy
  )
  return meta.Options(
    text=None if options.modalities == 'image' else text,
    image=None if options.modalities == 'text' else image,
    max_seq_len=CONFIG.max_seq_len,
    max_gen_len=options.max_new_tokens,
    extra_eos=options.stop_tokens,
    n_image_tokens=N,
  )


def stops(options: SamplingOptions) -> list[int]:
  """Ids at which a row ends."""
  return [V.end_sequence, *options.stop_tokens]


def expected(prompts: Sequence[Sequence[int]], options: SamplingOptions, **factors) -> list[list[int]]:
  """The reference's rows up to their stop tokens: one batch, or where the release takes one prompt only, one by one."""
  batches = [[prompt] for prompt in prompts] if options.modalities == 'mixed' else [prompts]
  rows = []
  for batch in batches:
    steps = meta.generate(network(**factors), V, batch, released(options))
    for index, row in enumerate(meta.rows_of(steps, len(batch))):
      kept = meta.cut(row, stops(options))
      assert not kept or min(meta.margins(steps, index)[: len(kept)]) > SURE, 'a tie: this prompt decides nothing'
      rows.append(kept)
  return rows


def written(prompts: Sequence[Sequence[int]], options: SamplingOptions | list[SamplingOptions], **factors) -> list[list[int]]:
  """The package's rows."""
  found = make_engine(**factors).generate_tokens([np.array(prompt, np.int32) for prompt in prompts], options)
  return [row.tolist() for row in found]


PICTURE = [V.begin_image, 4, 9, 30, 7, V.end_image]
OTHER = [V.begin_image, 30, 30, 11, 5, V.end_image]
PROMPTS = [  # of unequal length; without a picture, with one, with two, next to nothing
  [V.begin_sequence, T, T + 5, V.end_turn],
  [V.begin_sequence, *PICTURE, T + 2, V.end_turn],
  [V.begin_sequence, *range(T, T + 17), V.end_turn],
  [V.begin_sequence, T + 9, *PICTURE, T + 40, *OTHER, T + 1],
  [V.begin_sequence],
]
