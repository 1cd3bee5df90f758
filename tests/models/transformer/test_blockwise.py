"""Which blocks are visited. The values are tested in test_attention.py."""

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.models.transformer.blockwise import attend_blockwise, first_blocks


def test_first_blocks_are_the_drawn_ones():
  np.testing.assert_array_equal(first_blocks(jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]]), 2), [0, 0, 1, 1])


def test_first_blocks_serve_every_row_of_the_batch():
  rows = jnp.array([[1, 1, 2, 2, 3, 3, 0, 0], [1, 1, 1, 2, 2, 2, 2, 0]])
  np.testing.assert_array_equal(first_blocks(rows[:1], 2), [0, 1, 2, 3])
  np.testing.assert_array_equal(first_blocks(rows, 2), [0, 0, 1, 1])


def test_no_needed_block_is_left_out_whatever_the_ids():
  rng = np.random.default_rng(0)
  for _ in range(50):
    rows = rng.integers(0, 4, (2, 12)).astype(np.int32)
    starts = np.asarray(first_blocks(jnp.asarray(rows), 3))
    attends = (rows[:, :, None] == rows[:, None, :]) & np.tril(np.ones((12, 12), bool))
    for block, start in enumerate(starts):
      assert start <= block and not attends[:, 3 * block : 3 * block + 3, : 3 * start].any()


def test_scores_are_never_held_whole():
  """The largest array of forward and backward holds blocks, not T x T scores."""
  q, k = jnp.zeros((1, 2, 1, 256, 4)), jnp.zeros((1, 2, 256, 4))
  loss = lambda q, k, v: attend_blockwise(32, q, k, v, jnp.ones((1, 256), jnp.int32)).sum()
  compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2 * 256 * 256
