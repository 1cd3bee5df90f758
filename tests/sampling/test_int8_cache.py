"""The sampler with keys and values in int8: rows stay independent, pictures are guided, and moving streams about changes no bit."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions
from chameleon_jax.models.transformer.cache import init_cache
from chameleon_jax.models.transformer.model import Transformer, decoding_params
from chameleon_jax.presets import tiny_transformer, tiny_vocabulary
from chameleon_jax.sampling import loop
from chameleon_jax.sampling.engine import Engine, model_functions
from chameleon_jax.sampling.stream_pool import StreamPool
from chameleon_jax.tokens.vocabulary import Vocabulary

CONFIG = tiny_transformer(max_seq_len=48, init_std=0.3, scan_layers=False)
V = Vocabulary(tiny_vocabulary())
N = 4
OPTIONS = [
  SamplingOptions(max_new_tokens=14, greedy=True, image_greedy=True),  # a guided picture, then text
  SamplingOptions(max_new_tokens=9, modalities='text', temperature=1.0, seed=5),
  SamplingOptions(modalities='image', image_temperature=1.0, seed=2),
]


@functools.cache
def params():
  return decoding_params(nn.meta.unbox(Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']), CONFIG)


def make_engine(**keywords):
  return Engine(CONFIG, params(), V, n_image_tokens=N, cache_dtype='int8', **keywords)


def prompts():
  t = V.text_start
  rows = [0, t, t + 5, V.begin_image], [0, V.begin_image, 4, 9, 30, 7, V.end_image, t + 2], [0, *range(t, t + 17)]
  return [np.array(row, np.int32) for row in rows]


def written(engine, rows):
  return [row.tolist() for row in engine.generate_tokens([prompts()[row] for row in rows], [OPTIONS[row] for row in rows])]


@pytest.fixture(scope='module')
def together():
  return written(make_engine(), range(3))


def logits_of(tokens):
  """After a stream, through a new cache in int8 that is filled at once."""
  padded = np.full((1, CONFIG.max_seq_len), V.pad, np.int32)
  padded[0, : len(tokens)] = tokens
  return np.asarray(_through_a_cache()(params(), padded)[0, len(tokens) - 1])


@functools.cache
def _through_a_cache():
  model = Transformer(CONFIG)
  return jax.jit(lambda params, tokens: model.apply({'params': params}, tokens, cache=init_cache(CONFIG, 1, CONFIG.max_seq_len, 'int8'))[0])


def test_rows_are_those_of_a_sampler_that_computes_all_anew(together, reference):
  for row, (prompt, options) in enumerate(zip(prompts(), OPTIONS)):
    assert together[row] == reference(logits_of, prompt, options, row=row, vocabulary=V, n=N, max_seq_len=CONFIG.max_seq_len)
  assert V.is_image[together[0][:N]].all() and together[0][N] == V.end_image and len(together[0]) > N + 2 and len(together[2]) == N


def test_a_row_does_not_depend_on_the_rows_beside_it(together):
  """The first row beside the two, beside itself twice, and alone."""
  engine = make_engine()
  tickets = [engine.submit(prompts()[0], OPTIONS[0], row=0) for _ in range(3)]
  lines = {ticket: [] for ticket in tickets}
  while engine.pending:
    for progress in engine.advance():
      lines[progress.ticket] += progress.tokens.tolist()
  assert list(lines.values()) == [together[0]] * 3
  assert written(make_engine(max_rows=1), [0]) == together[:1]


def test_types_of_cache_do_not_share_programs():
  kinds = [Engine(CONFIG, params(), V, n_image_tokens=N, cache_dtype=dtype) for dtype in (None, 'int8', 'bfloat16', 'int8')]
  functions = [engine._functions for engine in kinds]
  assert functions[1] is functions[3] and len({id(function) for function in functions}) == 3
  assert len({id(function.compiled) for function in functions}) == 3
  made = [function.make_cache(1, 2) for function in functions]
  types = [{leaf.dtype.name for leaf in jax.tree.leaves(cache)} for cache in made]
  assert types == [{'float32'}, {'int8', 'float32'}, {'bfloat16'}, {'int8', 'float32'}]


def test_streams_that_are_moved_set_aside_and_brought_back_keep_every_bit():
  """Of the slots that have been filled."""
  functions = model_functions(CONFIG, 'int8')
  pool = StreamPool(functions.make_cache, forward=functions.forward, max_slots=CONFIG.max_seq_len, known=set())
  assert pool._slot_bytes == 2 * CONFIG.n_layers * CONFIG.n_kv_heads * (CONFIG.d_head + 4)
  tokens = [np.asarray(prompt) for prompt in prompts()]

  def held(stream):
    return [np.asarray(leaf)[stream.index, :, : stream.filled] for leaf in jax.tree.leaves(pool.cache)]

  pool.make_room(4, 20)
  streams = [pool.add(row, kind, tokens[row]) for row, kind in enumerate((loop.STREAM_F, loop.STREAM_I, loop.STREAM_F))]
  pool.fill(params())
  before = [held(stream) for stream in streams]
  assert {leaf.dtype.name for leaf in before[0]} == {'int8', 'float32'} and all(leaf.any() for leaf in before[0])
  pool.make_room(5, 40)  # more streams, more slots
  assert (pool.n_streams, pool.slots) == (8, 48)
  after = [held(stream) for stream in streams]
  pool.release(streams[0])
  pool.make_room(0, 20, idle=[streams[1]])
  assert pool.n_streams == 1 and streams[1].place is None
  after_moving = held(streams[2])
  pool.make_room(1, 20)
  pool.bring_back(streams[1])
  seen = [*after, after_moving, held(streams[1]), held(streams[2])]
  for leaves, expected in zip(seen, [*before, before[2], before[1], before[2]], strict=True):
    for leaf, other in zip(leaves, expected, strict=True):
      np.testing.assert_array_equal(leaf, other)
