"""Pictures -> codes, for data that is tokenized on this machine.

A small world of pictures is encoded once, at the start of a run, into a table with a row for each picture; a
large corpus is encoded offline; anything else as its documents are drawn. Does not know documents or tokens.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from chameleon_jax.array_types import Codes, Params, Pictures
from chameleon_jax.config import VQGANConfig
from chameleon_jax.data.sources.emoji_world import EmojiWorld
from chameleon_jax.models.vqgan.model import VQGAN
from chameleon_jax.tokens import images

Encoder = Callable[[Sequence[np.ndarray]], np.ndarray]

_WITHOUT_PICTURES = ('emoji_text',)


def make_encoder(config: VQGANConfig, params: Params, *, batch_size: int = 64) -> Encoder:
  """Returns `encode(pictures) -> int32 [k, n_image_tokens]`, codes row by row.

  Args:
    config: the image tokenizer.
    params: its parameters.
    batch_size: pictures that run together; the last batch is filled up, so one program serves all.

  The pictures are uint8 [H, W, 3] of any size; those that are not `resolution` square are scaled and cropped.
  """
  network = VQGAN(config)
  encode_batch = jax.jit(lambda params, pixels: network.apply({'params': params}, pixels, method='encode')[0])

  def encode(pictures: Sequence[np.ndarray]) -> np.ndarray:
    size = (config.resolution, config.resolution, 3)
    fitted = [picture if picture.shape == size else images.preprocess(picture, config.resolution) for picture in pictures]
    codes = np.empty((len(fitted), config.n_image_tokens), np.int32)
    for start in range(0, len(fitted), batch_size):
      batch = np.stack(fitted[start : start + batch_size])
      filled = np.concatenate([batch, np.repeat(batch[:1], batch_size - len(batch), axis=0)])
      codes[start : start + len(batch)] = np.asarray(encode_batch(params, images.to_float(filled))).reshape(batch_size, -1)[: len(batch)]
    return codes

  return encode


def table_of_codes(pictures: Pictures, encode: Encoder) -> Codes:
  """Codes of a whole world: uint8 [k, H, W, 3] -> int32 [k, n]."""
  return encode(list(pictures))


def world_pictures(source_names: Iterable[str]) -> Pictures | None:
  """All pictures of the in-memory world that the sources draw from, in the order of `make_source(codes=...)`; None without one.

  The part of a source's name before the first underscore is its world: 'emoji_pairs' draws from 'emoji'.
  """
  worlds = {name.split('_')[0] for name in source_names if name not in _WITHOUT_PICTURES}
  return EmojiWorld.load('all').pictures if 'emoji' in worlds else None
