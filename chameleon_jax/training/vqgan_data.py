"""Pictures for the image tokenizer's training: held in memory, drawn in an order that is a function of seed and step.

So there is no iterator state to save: step s of a resumed run sees the pictures that it would have seen. For sets that fit in
memory; knows nothing of codes.
"""

import pathlib

import numpy as np

from chameleon_jax.array_types import Pictures
from chameleon_jax.data.sources.emoji_world import EmojiWorld
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.images import load_image, preprocess

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp')
VALIDATION_SHARE = 20  # of a folder without splits every 20th picture is held out


def load_pictures(source: str, split: str, *, resolution: int) -> Pictures:
  """uint8 [n, resolution, resolution, 3] of a source.

  'emoji' is the shipped emoji world; anything else is a folder of picture files, scaled and cropped as the tokenizer wants,
  with subfolders `train` and `validation`, or without, and then every 20th file by name is held out.

  Raises:
    DataError: no such folder, no picture in it, or the emoji world at another resolution than its own.
  """
  if source == 'emoji':
    pictures = EmojiWorld.load(split).pictures
    side = pictures.shape[1]
    if side != resolution:
      raise DataError(f'emoji pictures have {side} pixels a side, model.resolution is {resolution}; set it to {side}')
    return pictures
  root = pathlib.Path(source)
  if not root.is_dir():
    raise DataError(f'source {source!r} is neither "emoji" nor a folder; set config.source')
  if (root / split).is_dir():
    files = _picture_files(root / split)
  else:
    files = [file for i, file in enumerate(_picture_files(root)) if (i % VALIDATION_SHARE == 0) == (split == 'validation')]
  if not files:
    raise DataError(f'no {split} pictures ({", ".join(SUFFIXES)}) under {root}; set config.source')
  return np.stack([preprocess(load_image(file), resolution) for file in files])


def _picture_files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(file for file in folder.rglob('*') if file.suffix.lower() in SUFFIXES)


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
  """Rows of the batch of a step: consecutive pieces of one fresh permutation an epoch, across epoch borders.

  Example: n = 5, batch 2: steps 0, 1 take four rows of permutation 0, step 2 its last row and the first of permutation 1.
  """
  positions = step * batch_size + np.arange(batch_size)
  epochs = positions // n
  permutations = {epoch: np.random.default_rng((seed, epoch)).permutation(n) for epoch in np.unique(epochs).tolist()}
  return np.array([permutations[epoch][position % n] for epoch, position in zip(epochs.tolist(), positions.tolist())])


def augment(pictures: Pictures, *, seed: int, step: int, horizontal_flip: bool, max_shift: int) -> Pictures:
  """Mirrors each picture with chance 1/2 and moves it by up to `max_shift` pixels, filling with its border."""
  if not horizontal_flip and max_shift == 0:
    return pictures
  rng = np.random.default_rng((seed, 1, step))
  out = pictures
  if horizontal_flip:
    out = np.where(rng.random(len(out))[:, None, None, None] < 0.5, out[:, :, ::-1], out)
  if max_shift:
    h, w = out.shape[1:3]
    shifts = rng.integers(-max_shift, max_shift + 1, (len(out), 2))
    rows = np.clip(np.arange(h) + shifts[:, :1], 0, h - 1)
    columns = np.clip(np.arange(w) + shifts[:, 1:], 0, w - 1)
    out = out[np.arange(len(out))[:, None, None], rows[:, :, None], columns[:, None, :]]
  return out
