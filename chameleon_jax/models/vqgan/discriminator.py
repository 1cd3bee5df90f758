"""PatchGAN discriminator (spec training.md 2.4): one realness logit per overlapping patch.

Kernel 4, `n_layers` strided layers, BatchNorm except first and last, LeakyReLU 0.2, kernels N(0, 0.02). BatchNorm uses the
statistics of the batch it sees, over all devices, and keeps no running means: the discriminator never runs outside training.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from chameleon_jax.array_types import Array, Pixels
from chameleon_jax.config import DiscriminatorConfig

NORM_EPS = 1e-5
MAX_MULTIPLIER = 8


class BatchNorm(nn.Module):
  """Normalises each channel over batch and positions; scale born N(1, 0.02)."""

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    def scale_init(key: Array, shape: tuple[int, ...]) -> Array:
      return 1 + 0.02 * jax.random.normal(key, shape)

    scale = self.param('scale', nn.with_logical_partitioning(scale_init, ('norm',)), (x.shape[-1],))
    bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)), (x.shape[-1],))
    mean = jnp.mean(x, axis=(0, 1, 2))
    variance = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))
    return (x - mean) * (jax.lax.rsqrt(variance + NORM_EPS) * scale) + bias


class Discriminator(nn.Module):
  """Pixels [B, H, W, 3] in [-1, 1] -> logits [B, h, w, 1] and the activations of every hidden layer."""

  config: DiscriminatorConfig

  def _conv(self, features: int, stride: int, *, bias: bool, out_axis: str | None = 'conv_out', name: str) -> nn.Conv:
    return nn.Conv(
      features,
      (4, 4),
      strides=(stride, stride),
      padding=((1, 1), (1, 1)),
      use_bias=bias,
      kernel_init=nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None, 'conv_in', out_axis)),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (out_axis,)),
      name=name,
    )

  @nn.compact
  def __call__(self, pixels: Pixels) -> tuple[Float[Array, 'B h w 1'], tuple[Array, ...]]:
    config = self.config
    x = nn.leaky_relu(self._conv(config.base_channels, 2, bias=True, name='conv_0')(pixels), 0.2)
    activations = [x]
    for i in range(1, config.n_layers + 1):
      stride = 2 if i < config.n_layers else 1
      x = self._conv(config.base_channels * min(2**i, MAX_MULTIPLIER), stride, bias=False, name=f'conv_{i}')(x)
      x = nn.leaky_relu(BatchNorm(name=f'norm_{i}')(x), 0.2)
      activations.append(x)
    return self._conv(1, 1, bias=True, out_axis=None, name='conv_out')(x), tuple(activations)
