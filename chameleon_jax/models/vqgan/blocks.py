"""Building blocks of the image tokenizer: convolution, norm, residual block, attention, resampling.

Knows nothing of codes, losses or tokens. Layout is NHWC; kernels are [kh, kw, in, out]. Submodule names follow the
keys of the released checkpoint (spec model.md 4.2 and 4.6), so that a table of rules can rename them.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from chameleon_jax.array_types import Array
from chameleon_jax.config import VQGANConfig
from chameleon_jax.models.vqgan.convolution import convolve, convolve_upsampled
from chameleon_jax.partitioning import constrain

NORM_EPS = 1e-6

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the framework default that the release was trained from.
_kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')

Feature = Float[Array, 'B H W C']
Resampled = Float[Array, 'B h w C']


def conv(
  features: int,
  size: int,
  dtype: str,
  *,
  stride: int = 1,
  padding: int | tuple[tuple[int, int], tuple[int, int]] | None = None,
  out_axis: str | None = 'conv_out',
  upsampled: bool = False,
  name: str | None = None,
) -> nn.Conv:
  """Returns a size x size convolution with bias whose parameters carry logical axis names.

  `padding` None keeps the grid (size // 2 on each side). `out_axis` None keeps the output channels whole: for a few
  pixel channels, which no mesh axis divides. `upsampled` doubles the grid first, by nearest neighbour.
  """
  if padding is None:
    padding = size // 2
  if isinstance(padding, int):
    padding = ((padding, padding), (padding, padding))
  return nn.Conv(
    features,
    (size, size),
    strides=(stride, stride),
    padding=padding,
    dtype=jnp.dtype(dtype),
    kernel_init=nn.with_logical_partitioning(_kernel_init, (None, None, 'conv_in', out_axis)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (out_axis,)),
    conv_general_dilated=convolve_upsampled if upsampled else convolve,
    name=name,
  )


class GroupNorm(nn.Module):
  """Normalises `norm_groups` groups of channels over all positions, eps 1e-6, with an affine map; statistics in float32.

  Sums are taken channel by channel and meet in a product with the table of who shares a group, so that the rest is one
  scale and one shift of every channel: a pass of its own, into which XLA draws neither the sums nor the root.
  """

  config: VQGANConfig

  @nn.compact
  def __call__(self, x: Feature) -> Feature:
    batch, height, width, channels = x.shape
    scale = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, ('norm',)), (channels,))
    bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)), (channels,))
    size = channels // self.config.norm_groups
    group = jnp.arange(channels) // size
    shares = (group[:, None] == group[None, :]).astype(jnp.float32) / (height * width * size)
    wide = x.astype(jnp.float32)
    sums = jnp.stack([wide.sum((1, 2)), jnp.square(wide).sum((1, 2))])
    mean, mean_square = jnp.matmul(sums, shares, precision=jax.lax.Precision.HIGHEST)
    factor = jax.lax.rsqrt(jnp.maximum(mean_square - jnp.square(mean), 0) + NORM_EPS) * scale
    shift = bias - mean * factor
    return (wide * factor[:, None, None] + shift[:, None, None]).astype(self.config.dtype)


def space_to_depth(x: Float[Array, 'B H W c'], patch_size: int) -> Float[Array, 'B h w C']:
  """Folds p x p pixels into channels: [B, H, W, c] -> [B, H/p, W/p, p*p*c], ordered (row, column, channel).

  Example with p = 2 and one channel: [[a, b], [c, d]] becomes one position with channels (a, b, c, d).
  """
  if patch_size == 1:
    return x
  b, h, w, c = x.shape
  p = patch_size
  return x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // p, w // p, p * p * c)


def depth_to_space(x: Float[Array, 'B h w C'], patch_size: int) -> Float[Array, 'B H W c']:
  """Inverse of `space_to_depth`."""
  if patch_size == 1:
    return x
  b, h, w, c = x.shape
  p = patch_size
  return x.reshape(b, h, w, p, p, c // (p * p)).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * p, w * p, c // (p * p))


class ResBlock(nn.Module):
  """x + conv2(dropout(swish(norm2(conv1(swish(norm1(x))))))), with a 1x1 shortcut where the width changes."""

  config: VQGANConfig
  in_channels: int
  out_channels: int

  def setup(self):
    self.norm1 = GroupNorm(self.config)
    self.conv1 = conv(self.out_channels, 3, self.config.dtype)
    self.norm2 = GroupNorm(self.config)
    self.dropout = nn.Dropout(self.config.dropout)
    self.conv2 = conv(self.out_channels, 3, self.config.dtype)
    if self.in_channels != self.out_channels:
      self.nin_shortcut = conv(self.out_channels, 1, self.config.dtype)

  def __call__(self, x: Feature, *, deterministic: bool = True) -> Float[Array, 'B H W C2']:
    h = self.conv1(nn.silu(self.norm1(x)))
    h = self.dropout(nn.silu(self.norm2(h)), deterministic=deterministic)
    h = self.conv2(h)
    shortcut = x if self.in_channels == self.out_channels else self.nin_shortcut(x)
    return constrain(shortcut + h, 'batch', None, None, None)


class AttentionBlock(nn.Module):
  """Single-head attention over all positions of the grid, with 1x1 projections and a residual."""

  config: VQGANConfig
  channels: int

  def setup(self):
    self.norm = GroupNorm(self.config)
    self.q = conv(self.channels, 1, self.config.dtype)
    self.k = conv(self.channels, 1, self.config.dtype)
    self.v = conv(self.channels, 1, self.config.dtype)
    self.proj_out = conv(self.channels, 1, self.config.dtype)

  def __call__(self, x: Feature) -> Feature:
    b, h, w, c = x.shape
    y = self.norm(x)
    q, k, v = (projection(y).reshape(b, h * w, c) for projection in (self.q, self.k, self.v))
    scores = jnp.einsum('bqc,bkc->bqk', q, k, preferred_element_type=jnp.float32) * c**-0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return x + self.proj_out(jnp.einsum('bqk,bkc->bqc', weights, v).reshape(b, h, w, c))


class MiddleBlock(nn.Module):
  """Residual block, attention, residual block at the coarsest grid."""

  config: VQGANConfig
  channels: int

  def setup(self):
    self.block_1 = ResBlock(self.config, self.channels, self.channels)
    self.attn_1 = AttentionBlock(self.config, self.channels)
    self.block_2 = ResBlock(self.config, self.channels, self.channels)

  def __call__(self, x: Feature, *, deterministic: bool = True) -> Feature:
    x = self.block_1(x, deterministic=deterministic)
    return self.block_2(self.attn_1(x), deterministic=deterministic)


class Downsample(nn.Module):
  """Halves the grid: zero padding on the right and bottom only, then a 3x3 convolution of stride 2."""

  config: VQGANConfig
  channels: int

  def setup(self):
    self.conv = conv(self.channels, 3, self.config.dtype, stride=2, padding=((0, 1), (0, 1)))

  def __call__(self, x: Feature) -> Resampled:
    return self.conv(x)


class Upsample(nn.Module):
  """Doubles the grid: nearest neighbour, then a 3x3 convolution."""

  config: VQGANConfig
  channels: int

  def setup(self):
    self.conv = conv(self.channels, 3, self.config.dtype, upsampled=True)

  def __call__(self, x: Feature) -> Resampled:
    return self.conv(x)


class Level(nn.Module):
  """The residual blocks of one resolution and the resampling after them (None at the last level)."""

  config: VQGANConfig
  in_channels: int
  out_channels: int
  n_blocks: int
  resample: Literal['down', 'up'] | None

  def setup(self):
    widths = [self.in_channels] + [self.out_channels] * self.n_blocks
    self.block = [ResBlock(self.config, widths[i], widths[i + 1]) for i in range(self.n_blocks)]
    if self.resample == 'down':
      self.downsample = Downsample(self.config, self.out_channels)
    elif self.resample == 'up':
      self.upsample = Upsample(self.config, self.out_channels)

  def __call__(self, x: Feature, *, deterministic: bool = True) -> Float[Array, 'B H2 W2 C2']:
    for block in self.block:
      x = block(x, deterministic=deterministic)
    if self.resample == 'down':
      return self.downsample(x)
    if self.resample == 'up':
      return self.upsample(x)
    return x
