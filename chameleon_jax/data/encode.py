"""Pictures -> codes, for data that is tokenized on this machine.

A small world of pictures is encoded once, at the start of a run, into a table with a row for each picture; a
large corpus is encoded offline; anything else as its documents are drawn. Does not know documents or tokens.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from chameleon_jax.array_types import Params, Pictures
from chameleon_jax.config import VQGANConfig
from chameleon_jax.data.sources.emoji_world import EmojiWorld
from chameleon_jax.models.vqgan.model import encode_pictures
from chameleon_jax.tokens import images

Encoder = Callable[[Sequence[np.ndarray]], np.ndarray]

_WITHOUT_PICTURES = ('emoji_text',)


def make_encoder(config: VQGANConfig, params: Params) -> Encoder:
  """Returns `encode(pictures) -> int32 [k, n_image_tokens]`, codes row by row.

  The pictures are uint8 [H, W, 3] of any size; those that are not `resolution` square are scaled and cropped.
  """
  size = (config.resolution, config.resolution, 3)

  def encode(pictures: Sequence[np.ndarray]) -> np.ndarray:
    fitted = [picture if picture.shape == size else images.preprocess(picture, config.resolution) for picture in pictures]
    return encode_pictures(config, params, np.stack(fitted))

  return encode


def world_pictures(source_names: Iterable[str]) -> Pictures | None:
  """All pictures of the in-memory world that the sources draw from, in the order of `make_source(codes=...)`; None without one.

  The part of a source's name before the first underscore is its world: 'emoji_pairs' draws from 'emoji'.
  """
  worlds = {name.split('_')[0] for name in source_names if name not in _WITHOUT_PICTURES}
  return EmojiWorld.load('all').pictures if 'emoji' in worlds else None
