"""The image tokenizer: encoder, 1x1 maps into and out of the codebook, quantizer, decoder.

A code is an index in the codebook; what integer stands for it in a sequence is the business of `tokens/`. Codes of
a picture are in row-major order: index = row * grid + column. Source: spec model.md 4.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from chameleon_jax.array_types import AnyArray, Array, CodeGrid, Codes, Params, Pictures, Pixels
from chameleon_jax.config import VQGANConfig
from chameleon_jax.errors import ImageError
from chameleon_jax.models.vqgan import autoencoder, blocks, quantizer


@flax.struct.dataclass
class VQGANOutput:
  """What training needs of one pass.

  reconstruction [B, H, W, 3] (not clamped), codes int32 [B, h, w], z and z_q [B, h, w, d_code] float32 (z_q without
  straight-through), features: the decoder's activations before its last convolution. Fields are untyped because the same
  struct holds arrays, host copies and shapes.
  """

  reconstruction: Any
  codes: Any
  z: Any
  z_q: Any
  features: Any


class VQGAN(nn.Module):
  """Parameter folders: encoder, quant_conv, quantize, post_quant_conv, decoder.

  Submodules are built lazily: `decode` needs only quantize, post_quant_conv and decoder.
  """

  config: VQGANConfig

  def setup(self):
    self.encoder = autoencoder.Encoder(self.config)
    self.quant_conv = blocks.conv(self.config.d_code, 1, self.config.dtype, out_axis='code_dim')
    self.quantize = quantizer.Quantizer(self.config)
    self.post_quant_conv = blocks.conv(self.config.z_channels, 1, self.config.dtype)
    self.decoder = autoencoder.Decoder(self.config)

  def latents(self, pixels: Pixels, *, deterministic: bool = True) -> Float[Array, 'B h w Z']:
    """Latents before quantization, float32."""
    return self.quant_conv(self.encoder(pixels, deterministic=deterministic)).astype(jnp.float32)

  def encode(self, pixels: Pixels) -> tuple[Int[Array, 'B h w'], Float[Array, 'B h w Z']]:
    """Pixels in [-1, 1] -> codes and latents before quantization."""
    z = self.latents(pixels)
    return self.quantize.nearest(z), z

  def decode(self, codes: CodeGrid) -> Pixels:
    """Codes -> pixels, not clamped."""
    return self.decode_latents(self.quantize.lookup(codes))

  def decode_latents(self, z_q: Float[Array, 'B h w Z'], *, deterministic: bool = True) -> Pixels:
    """Codebook entries -> pixels, not clamped."""
    return self.decoder(self.post_quant_conv(z_q), deterministic=deterministic)

  def to_pixels(self, features: Float[Array, 'B h2 w2 C']) -> Pixels:
    """The decoder's last convolution alone; needs only decoder/conv_out."""
    return self.decoder.to_pixels(features)

  def __call__(self, pixels: Pixels, *, quantized: bool | Bool[Array, ''] = True, deterministic: bool = True) -> VQGANOutput:
    """One training pass; with `quantized` False (it may be traced) the decoder sees the latents themselves."""
    z = self.latents(pixels, deterministic=deterministic)
    codes = self.quantize.nearest(jax.lax.stop_gradient(z))
    z_q = self.quantize.lookup(codes)
    z_in = jnp.where(quantized, quantizer.straight_through(z, z_q), z)
    features = self.decoder.features(self.post_quant_conv(z_in), deterministic=deterministic)
    return VQGANOutput(reconstruction=self.decoder.to_pixels(features), codes=codes, z=z, z_q=z_q, features=features)


_PIXEL_VALUES = (np.arange(256) / 255.0 * 2.0 - 1.0).astype(np.float32)  # in float64, then rounded once (spec model.md 7.1)


def to_pixels(pictures: AnyArray) -> Array:
  """uint8 0..255 -> float32 [-1, 1], on the device; bit-equal to `tokens.images.to_float`."""
  return jnp.take(_PIXEL_VALUES, jnp.asarray(pictures), axis=0)


def to_pictures(pixels: AnyArray) -> Array:
  """float [-1, 1] -> uint8: clamped, then rounded to the nearest step, on the device."""
  return jnp.round((jnp.clip(jnp.asarray(pixels, jnp.float32), -1, 1) + 1) * 127.5).astype(jnp.uint8)


@functools.lru_cache(maxsize=8)
def _compiled(config: VQGANConfig) -> tuple[Callable[[Params, AnyArray], Array], Callable[[Params, AnyArray], Array]]:
  model = VQGAN(config)

  def encode(params: Params, pictures: AnyArray) -> Array:
    codes, _ = model.apply({'params': params}, to_pixels(pictures), method='encode')
    return codes.reshape(codes.shape[0], -1)

  def decode(params: Params, codes: AnyArray) -> Array:
    return model.apply({'params': params}, jnp.asarray(codes).reshape(-1, config.grid, config.grid), method='decode')

  return jax.jit(encode), jax.jit(decode)


def _in_batches(function: Callable[[AnyArray], Array], rows: np.ndarray, batch_size: int) -> np.ndarray:
  """Maps rows in batches of one size: `batch_size`, or the power of two that holds fewer rows, filled up with the first row.

  So log2(batch_size) + 1 programs serve any number of rows.
  """
  batch_size = min(batch_size, 1 << (len(rows) - 1).bit_length())
  parts = []
  for start in range(0, len(rows), batch_size):
    batch = rows[start : start + batch_size]
    filler = np.repeat(batch[:1], batch_size - len(batch), axis=0)
    parts.append(np.asarray(function(np.concatenate([batch, filler])))[: len(batch)])
  return np.concatenate(parts)


def encode_pictures(config: VQGANConfig, params: Params, pictures: Pictures, *, batch_size: int = 32) -> Int[np.ndarray, 'B n']:
  """Codes int32 [B, n_image_tokens] of uint8 pictures [B, H, W, 3], row-major, in batches.

  Raises:
    ImageError: the pictures are not uint8 RGB of the tokenizer's resolution.
  """
  side = config.resolution
  if pictures.ndim != 4 or pictures.shape[1:] != (side, side, 3) or pictures.dtype != np.uint8:
    got = f'{pictures.dtype} {list(pictures.shape)}'
    raise ImageError(f'pictures must be uint8 [n, {side}, {side}, 3], got {got}; prepare them with tokens.images.preprocess')
  if len(pictures) == 0:
    return np.zeros((0, config.n_image_tokens), np.int32)
  encode, _ = _compiled(config)
  return _in_batches(lambda batch: encode(params, batch), pictures, batch_size)


def decode_pixels(config: VQGANConfig, params: Params, codes: Codes, *, batch_size: int = 32) -> Float[np.ndarray, 'B H W 3']:
  """Pixels float32 [B, H, W, 3], not clamped, of codes [B, n_image_tokens], in batches; `params` needs no encoder.

  Raises:
    ImageError: a row does not hold n_image_tokens codes, or a code is out of range.
  """
  codes = np.asarray(codes)
  if codes.ndim != 2 or codes.shape[1] != config.n_image_tokens:
    raise ImageError(f'a picture has {config.n_image_tokens} codes, got an array of shape {list(codes.shape)}')
  if codes.size and (codes.min() < 0 or codes.max() >= config.n_codes):
    raise ImageError(f'codes must lie in 0..{config.n_codes - 1}, got {codes.min()}..{codes.max()}')
  if len(codes) == 0:
    return np.zeros((0, config.resolution, config.resolution, 3), np.float32)
  _, decode = _compiled(config)
  return _in_batches(lambda batch: decode(params, batch), codes.astype(np.int32), batch_size).astype(np.float32)


def decode_codes(config: VQGANConfig, params: Params, codes: Codes, *, batch_size: int = 32) -> Pictures:
  """uint8 pictures [B, H, W, 3] of codes, rounded to the nearest step (spec evaluation.md 6.7); errors as `decode_pixels`."""
  return np.asarray(to_pictures(decode_pixels(config, params, codes, batch_size=batch_size)))
