"""Rotary position embedding, half-split convention (that of the Hugging Face port).

Channel i of a head is paired with channel i + H/2. With a_i = p * theta^(-2i/H), i = 0 .. H/2 - 1, and p the
position (begin_sequence is 0):

  y[i]       = x[i] cos a_i       - x[i + H/2] sin a_i
  y[i + H/2] = x[i + H/2] cos a_i + x[i] sin a_i

Meta's checkpoints pair neighbours (2i, 2i + 1) instead; the two differ by a permutation of the channels of q_proj,
k_proj and both head norms, `ours[j] = meta[2j], ours[j + H/2] = meta[2j + 1]`, which the converter applies once
(arXiv 2104.09864; spec model.md 1.5). Angles, sines and products are float32.

Does not know: segments or caches; the caller says where every token stands.
"""

import jax.numpy as jnp
from jaxtyping import Float

from chameleon_jax.array_types import Array, Positions

Rotation = tuple[Float[Array, 'B T half'], Float[Array, 'B T half']]


def rotation(positions: Positions, d_head: int, theta: float) -> Rotation:
  """Returns float32 (cos a, sin a), each [B, T, d_head / 2]."""
  frequencies = theta ** (-jnp.arange(0, d_head, 2, dtype=jnp.float32) / d_head)
  angles = jnp.asarray(positions, jnp.float32)[..., None] * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, 'B T N H'], turn: Rotation) -> Float[Array, 'B T N H']:
  """Turns the channel pairs of every head by the angles of its token; float32 in and out.

  With H = 4, theta = 1 and position p both pairs turn by p radians:

    rotate([1, 0, 0, 0]) = [cos p, 0, sin p, 0]
    rotate([0, 0, 0, 1]) = [0, -sin p, 0, cos p]
  """
  cos, sin = (part[:, :, None, :] for part in turn)
  low, high = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
