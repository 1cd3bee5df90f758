"""The pool of cache rows: sizes, pieces of prompts, setting aside and bringing back; on the scripted model, whose cache is the tokens."""

import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions
from chameleon_jax.sampling import guidance, loop, stream_pool
from tests.sampling.scripted import CONTEXT, FUNCTIONS, V, example_prompts, make_engine, scripts


def make_pool(**keywords):
  return stream_pool.StreamPool(FUNCTIONS.make_cache, forward=FUNCTIONS.forward, max_slots=CONTEXT, known=set(), **keywords)


def held(pool, stream):
  """Tokens of a stream, as far as they have been filled in."""
  return np.asarray(pool.cache)[stream.index, 0, : stream.filled, 0].tolist()


@pytest.mark.parametrize(('n', 'multiple', 'expected'), [(1, 1, 1), (3, 1, 4), (16, 1, 16), (17, 1, 32), (1, 4, 4), (9, 4, 16), (5, 3, 6)])
def test_size(n, multiple, expected):
  assert stream_pool.size(n, multiple=multiple) == expected


@pytest.mark.parametrize(('n', 'expected'), [(0, 1), (1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (17, 64)])
def test_power_of_four(n, expected):
  assert stream_pool.power_of_four(n) == expected


def test_pieces_of_prompts_of_many_lengths():
  pool = make_pool(piece=32)
  pool.make_room(4, CONTEXT)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, V.size, n) for n in (0, 1, 32, 50)]
  made = [pool.add(row, loop.STREAM_F, prompt) for row, prompt in enumerate(prompts)]
  rounds = 1
  while pool.fill(scripts()):
    rounds += 1
  assert rounds == 2
  assert [held(pool, stream) for stream in made] == [prompt.tolist() for prompt in prompts]


def test_growing_shrinking_and_setting_aside_keep_what_streams_hold():
  pool = make_pool()
  prompts = [np.arange(n, n + 5) for n in range(5)]
  pool.make_room(2, 20)
  assert (pool.n_streams, pool.slots) == (2, 32)
  made = [pool.add(0, loop.STREAM_F, prompts[0]), pool.add(1, loop.STREAM_I, prompts[1])]
  pool.fill(scripts())
  pool.make_room(3, 50)  # more streams, more slots (the context's 60, no power of two)
  assert (pool.n_streams, pool.slots) == (8, 60)
  made += [pool.add(owner, loop.STREAM_F, prompts[owner]) for owner in (2, 3, 4)]
  pool.fill(scripts())
  for stream in made[2:]:
    pool.release(stream)
  pool.make_room(0, 20, idle=[made[1]])  # one stream of eight is left: the cache shrinks, the idle one is set aside
  assert pool.n_streams == 1 and made[1].place is None and held(pool, made[0]) == prompts[0].tolist()
  pool.make_room(1, 20)
  pool.bring_back(made[1])
  assert [held(pool, stream) for stream in made[:2]] == [prompt.tolist() for prompt in prompts[:2]]
  for stream in made:
    pool.release(stream)
  pool.forget_size()
  assert pool.n_streams == 0 and pool.cache is None


def test_idle_streams_stay_where_nothing_is_gained():
  pool = make_pool()
  pool.make_room(2, 20)
  idle = pool.add(0, loop.STREAM_I, np.arange(3))
  pool.add(0, loop.STREAM_F, np.arange(3))
  pool.make_room(0, 20, idle=[idle])
  assert idle.place is not None, 'one stream has never been a size of this pool, and half is not a quarter'


def test_a_long_prompt_is_filled_while_the_others_go_on():
  options = SamplingOptions(max_new_tokens=20, modalities='text', greedy=True, stop_at_end_turn=False, banned_tokens=(V.end_sequence,))
  long = np.array([V.begin_sequence, *[V.text_start] * 38])
  engine = make_engine(max_prompt_piece=8)
  short, late = engine.submit(example_prompts()[0], options), engine.submit(long, options)
  first = {}
  lines = {short: [], late: []}
  for turn in range(100):
    for progress in engine.advance(2):
      first.setdefault(progress.ticket, turn)
      lines[progress.ticket] += progress.tokens.tolist()
    if not engine.pending:
      break
  assert first[short] == 0 and first[late] == 4  # 38 tokens in pieces of 8: the fifth turn can decode
  expected = make_engine().generate_tokens([example_prompts()[0], long], options)
  assert [lines[short], lines[late]] == [row.tolist() for row in expected]


def test_a_heavy_cache_grows_with_its_rows_and_shrinks_as_they_end(monkeypatch):
  """The tokens are those of a cache that has all its slots from the start."""
  prompts = [*example_prompts(), *example_prompts()]
  options = [SamplingOptions(max_new_tokens=n, seed=3) for n in (4, 9, 16, 21, 25, 28, 30, 40)]
  options = [options[row % len(options)] for row in range(len(prompts))]
  usual = make_engine().generate_tokens(prompts, options)
  monkeypatch.setattr(guidance, 'LEAST_STEPS', 1)  # the context is shorter than the usual 64
  sizes = []
  resize = stream_pool.StreamPool._resize

  def seen(pool, n, slots):
    resize(pool, n, slots)
    sizes.append((pool.n_streams, pool.slots))

  monkeypatch.setattr(stream_pool.StreamPool, '_resize', seen)
  engine = make_engine()
  engine._pool._light_bytes = 0
  assert [row.tolist() for row in engine.generate_tokens(prompts, options)] == [row.tolist() for row in usual]
  most = max(n for n, _ in sizes)
  assert {slots for _, slots in sizes} == {32, CONTEXT} and sizes[0][1] == 32  # grew
  assert sizes[-1][0] <= most // 4 and most // 2 in {n for n, _ in sizes}  # by halves


def test_slots_of_light_and_heavy_caches():
  light, heavy = make_pool(light_bytes=1 << 30), make_pool(light_bytes=0)
  for pool in (light, heavy):
    pool.make_room(4, 20, finally_slots=CONTEXT)
  assert (light.slots, heavy.slots) == (CONTEXT, 32)
  assert light.steps_within([(20, CONTEXT)]) == CONTEXT  # no end before the context's
  assert heavy.steps_within([(20, CONTEXT), (25, 30)]) == 12 and heavy.steps_within([(25, 30)]) == CONTEXT
  rows = [heavy.add(row, loop.STREAM_F, np.arange(row, row + 20)) for row in range(4)]
  heavy.fill(scripts())
  heavy.make_room(0, 40, finally_slots=CONTEXT)
  assert heavy.slots == CONTEXT  # of 60, no power of two
  for row in rows[:2]:
    heavy.release(row)
  heavy.make_room(0, 40)
  assert heavy.n_streams == 2 and [held(heavy, row) for row in rows[2:]] == [list(range(n, n + 20)) for n in (2, 3)]
