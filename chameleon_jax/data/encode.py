"""Pictures -> codes, for data that is tokenized on this machine.

A small world of pictures is encoded once, at the start of a run, into a table with a row for each picture; a
large corpus is encoded offline; anything else as its documents are drawn. Does not know documents or tokens.
"""

import functools
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.array_types import Array, Params, Pictures
from chameleon_jax.config import VQGANConfig
from chameleon_jax.data.sources.emoji_world import EmojiWorld
from chameleon_jax.models.vqgan.model import VQGAN, encode_pictures
from chameleon_jax.tokens import images

Encoder = Callable[[Sequence[np.ndarray]], np.ndarray]

_WITHOUT_PICTURES = ('emoji_text',)


Preprocessing = Literal['meta', 'pad', 'huggingface']  # of `tokens.images`: Meta's, the same with nothing cut off, Hugging Face's
PREPROCESSINGS: tuple[Preprocessing, ...] = ('meta', 'pad', 'huggingface')
_NOT_OF_CODES = ('dtype', 'dropout', 'commitment_weight', 'codebook_weight')  # fields that no code depends on but for rounding


class PictureEncoder:
  """`encode(pictures) -> int32 [k, n_image_tokens]`, codes row by row.

  The pictures are uint8 [H, W, 3] of any size; those that are not `resolution` square are scaled and cropped.
  """

  def __init__(self, config: VQGANConfig, params: Params):
    self.config, self.params = config, params

  def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
    size = (self.config.resolution, self.config.resolution, 3)
    fitted = [picture if picture.shape == size else images.preprocess(picture, self.config.resolution) for picture in pictures]
    return encode_pictures(self.config, self.params, np.stack(fitted))

  @functools.cached_property
  def fingerprint(self) -> str:
    """Tells image tokenizers apart that give different codes: CRC-32 of the config and of all weights but the decoder's."""
    return encoder_fingerprint(self.config, self.params)


def encoder_fingerprint(config: VQGANConfig, params: Params) -> str:
  """CRC-32 of an image tokenizer's config and of all weights but the decoder's, as float32, in hexadecimal."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  named = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}
  layout = {field: value for field, value in asdict(config).items() if field not in _NOT_OF_CODES}
  crc = zlib.crc32(json.dumps(layout, sort_keys=True).encode())
  for name in sorted(named):
    if not name.startswith(('decoder/', 'post_quant_conv/')):
      crc = zlib.crc32(np.ascontiguousarray(jax.device_get(named[name]), '<f4').tobytes(), zlib.crc32(name.encode(), crc))
  return f'{crc:08x}'


def make_encoder(config: VQGANConfig, params: Params) -> PictureEncoder:
  """The encoder of an image tokenizer for lists of pictures."""
  return PictureEncoder(config, params)


def prepared(picture: np.ndarray, config: VQGANConfig, preprocessing: Preprocessing = 'meta') -> np.ndarray:
  """A picture uint8 [H, W, 3] of any size, square as the image tokenizer takes it: uint8 [side, side, 3].

  Raises:
    ImageError: too long and thin to be resized.
  """
  side = config.resolution
  if picture.shape == (side, side, 3):
    return picture
  if preprocessing == 'pad':
    return images.preprocess(picture, side, fit='pad')
  return images.preprocess(picture, side, convention=preprocessing)


def make_batch_encoder(config: VQGANConfig, params: Params, preprocessing: Preprocessing = 'meta') -> Callable[[Pictures], Array]:
  """Returns `encode(pictures) -> int32 [B, n_image_tokens]` on the device, of prepared pictures uint8 [B, side, side, 3].

  One program for each B; it returns before the codes are there, so that the host prepares the next batch meanwhile.
  """
  return functools.partial(_compiled(config, preprocessing), jax.device_put(params))


@functools.lru_cache(maxsize=4)
def _compiled(config: VQGANConfig, preprocessing: Preprocessing) -> Callable[[Params, Pictures], Array]:
  network = VQGAN(config)
  levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
  table = np.ascontiguousarray(images.to_float(levels, 'huggingface' if preprocessing == 'huggingface' else 'meta')[:, 0])

  def encode(params: Params, pictures: Array) -> Array:
    codes, _ = network.apply({'params': params}, jnp.take(table, pictures, axis=0), method='encode')
    return codes.reshape(codes.shape[0], -1)

  return jax.jit(encode)


def world_pictures(source_names: Iterable[str]) -> Pictures | None:
  """All pictures of the in-memory world that the sources draw from, in the order of `make_source(codes=...)`; None without one.

  The part of a source's name before the first underscore is its world: 'emoji_pairs' draws from 'emoji'.
  """
  worlds = {name.split('_')[0] for name in source_names if name not in _WITHOUT_PICTURES}
  return EmojiWorld.load('all').pictures if 'emoji' in worlds else None
