"""Vector quantizer: the nearest codebook entry of every latent (spec model.md 4.5).

Holds the codebook and the lookup in both directions; how the codebook learns (gradient or running means) is the
business of training. No normalisation of latents or codes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from chameleon_jax.array_types import AnyArray, Array
from chameleon_jax.config import VQGANConfig


def distances(z: Float[Array, 'n Z'], codebook: Float[AnyArray, 'M Z']) -> Float[Array, 'n M']:
  """Squared distance less |z|^2, which does not change the order: |e|^2 - 2 z e, in float32 at full precision."""
  z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
  products = jnp.matmul(z, codebook.T, precision=jax.lax.Precision.HIGHEST)
  return jnp.sum(jnp.square(codebook), axis=-1) - 2 * products


def nearest_codes(z: Float[Array, '*grid Z'], codebook: Float[AnyArray, 'M Z']) -> Int[Array, '*grid']:
  """Index of the nearest code, the first one on a tie; int32, shape of `z` without its last axis."""
  flat = z.reshape(-1, z.shape[-1])
  return jnp.argmin(distances(flat, codebook), axis=-1).astype(jnp.int32).reshape(z.shape[:-1])


def straight_through(z: Float[Array, '*grid Z'], z_q: Float[Array, '*grid Z']) -> Float[Array, '*grid Z']:
  """Value of `z_q`, gradient of `z`."""
  return z + jax.lax.stop_gradient(z_q - z)


class Quantizer(nn.Module):
  """The codebook [n_codes, d_code], born uniform in (-1/n_codes, 1/n_codes)."""

  config: VQGANConfig

  def setup(self):
    n, d = self.config.n_codes, self.config.d_code

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
      return jax.random.uniform(key, shape, dtype, minval=-1 / n, maxval=1 / n)

    self.embedding = self.param('embedding', nn.with_logical_partitioning(init, ('code', 'code_dim')), (n, d))

  def nearest(self, z: Float[Array, '*grid Z']) -> Int[Array, '*grid']:
    """Codes of latents."""
    return nearest_codes(z, self.embedding)

  def lookup(self, codes: Int[AnyArray, '*grid']) -> Float[Array, '*grid Z']:
    """Codebook entries, float32."""
    return jnp.take(self.embedding, codes, axis=0)
