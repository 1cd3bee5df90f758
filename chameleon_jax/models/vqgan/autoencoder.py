"""Encoder and decoder of the image tokenizer (spec model.md 4.3 and 4.4).

Maps pixels in [-1, 1] to a grid of latents and back; knows nothing of codes. Level i has
`channel_multipliers[i] * base_channels` channels and 1 / 2^i of the patch grid's side. Source: the released
architecture, plus `patch_size`, which trades the finest levels for p x p pixels per position.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from chameleon_jax.array_types import Array, Pixels
from chameleon_jax.config import VQGANConfig
from chameleon_jax.models.vqgan import blocks

PIXEL_CHANNELS = 3


class Encoder(nn.Module):
  """Pixels [B, H, W, 3] -> latents [B, h, w, z_channels]."""

  config: VQGANConfig

  def setup(self):
    config = self.config
    widths = [m * config.base_channels for m in config.channel_multipliers]
    before = [config.base_channels, *widths[:-1]]
    last = len(widths) - 1
    self.conv_in = blocks.conv(config.base_channels, 3, config.dtype)
    self.down = [blocks.Level(config, before[i], widths[i], config.n_res_blocks, 'down' if i < last else None) for i in range(len(widths))]
    self.mid = blocks.MiddleBlock(config, widths[-1])
    self.norm_out = blocks.GroupNorm(config)
    self.conv_out = blocks.conv(config.z_channels, 3, config.dtype)

  def __call__(self, pixels: Pixels, *, deterministic: bool = True) -> Float[Array, 'B h w Z']:
    x = self.conv_in(blocks.space_to_depth(jnp.asarray(pixels), self.config.patch_size))
    for level in self.down:
      x = level(x, deterministic=deterministic)
    x = self.mid(x, deterministic=deterministic)
    return self.conv_out(nn.silu(self.norm_out(x)))


class Decoder(nn.Module):
  """Latents [B, h, w, z_channels] -> pixels [B, H, W, 3], not clamped.

  `up` is indexed by resolution as in the release, so it runs from the last entry to the first. The network is cut
  before its last convolution (`features`, `to_pixels`) because the adversarial weight needs gradients there only.
  """

  config: VQGANConfig

  def setup(self):
    config = self.config
    widths = [m * config.base_channels for m in config.channel_multipliers]
    self.conv_in = blocks.conv(widths[-1], 3, config.dtype)
    self.mid = blocks.MiddleBlock(config, widths[-1])
    before = [*widths[1:], widths[-1]]  # width that comes in from the level that runs before
    self.up = [blocks.Level(config, before[i], widths[i], config.n_res_blocks + 1, 'up' if i else None) for i in range(len(widths))]
    self.norm_out = blocks.GroupNorm(config)
    self.conv_out = blocks.conv(PIXEL_CHANNELS * config.patch_size**2, 3, config.dtype, out_axis=None)

  def features(self, z: Float[Array, 'B h w Z'], *, deterministic: bool = True) -> Float[Array, 'B h2 w2 C']:
    """Everything before the last convolution."""
    x = self.mid(self.conv_in(z), deterministic=deterministic)
    for level in reversed(self.up):
      x = level(x, deterministic=deterministic)
    return nn.silu(self.norm_out(x))

  def to_pixels(self, features: Float[Array, 'B h2 w2 C']) -> Pixels:
    """The last convolution."""
    return blocks.depth_to_space(self.conv_out(features), self.config.patch_size)

  def __call__(self, z: Float[Array, 'B h w Z'], *, deterministic: bool = True) -> Pixels:
    return self.to_pixels(self.features(z, deterministic=deterministic))
