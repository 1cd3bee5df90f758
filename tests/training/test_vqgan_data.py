"""Order, augmentation and sources of the tokenizer's training pictures."""

import numpy as np
import pytest

from chameleon_jax.errors import DataError
from chameleon_jax.tokens.images import save_png
from chameleon_jax.training import vqgan_data


def test_every_epoch_sees_every_picture_once():
  """The drawn example: n = 5, batch 2; five steps are two epochs."""
  rows = np.concatenate([vqgan_data.batch_indices(5, 2, seed=3, step=step) for step in range(5)])
  assert sorted(rows[:5]) == [0, 1, 2, 3, 4] and sorted(rows[5:]) == [0, 1, 2, 3, 4]
  assert list(rows[:5]) != list(rows[5:])
  np.testing.assert_array_equal(vqgan_data.batch_indices(5, 2, seed=3, step=2), rows[4:6])


def test_batch_may_be_larger_than_the_set():
  rows = vqgan_data.batch_indices(3, 7, seed=0, step=0)
  assert sorted(rows[:3]) == [0, 1, 2] and sorted(rows[3:6]) == [0, 1, 2]


def test_augment():
  pictures = np.arange(2 * 6 * 6 * 3, dtype=np.uint8).reshape(2, 6, 6, 3)
  assert vqgan_data.augment(pictures, seed=0, step=0, horizontal_flip=False, max_shift=0) is pictures
  flipped = np.concatenate([vqgan_data.augment(pictures, seed=0, step=s, horizontal_flip=True, max_shift=0) for s in range(8)])
  same = [np.array_equal(f, pictures[i % 2]) for i, f in enumerate(flipped)]
  mirrored = [np.array_equal(f, pictures[i % 2][:, ::-1]) for i, f in enumerate(flipped)]
  assert all(a != b for a, b in zip(same, mirrored)) and any(same) and any(mirrored)
  moved = vqgan_data.augment(pictures, seed=0, step=1, horizontal_flip=False, max_shift=2)
  padded = np.pad(pictures, ((0, 0), (2, 2), (2, 2), (0, 0)), mode='edge')
  for i in range(2):
    windows = [padded[i, y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
    assert any(np.array_equal(moved[i], window) for window in windows)
  np.testing.assert_array_equal(moved, vqgan_data.augment(pictures, seed=0, step=1, horizontal_flip=False, max_shift=2))


def test_folder_without_splits_holds_out_every_20th(tmp_path):
  for i in range(22):
    save_png(tmp_path / f'{i:02}.png', np.full((8, 8, 3), i, np.uint8))
  train = vqgan_data.load_pictures(str(tmp_path), 'train', resolution=8)
  validation = vqgan_data.load_pictures(str(tmp_path), 'validation', resolution=8)
  assert sorted(validation[:, 0, 0, 0]) == [0, 20]
  assert len(train) == 20 and train.dtype == np.uint8


def test_folder_with_splits(tmp_path):
  for split, value in (('train', 1), ('validation', 2)):
    (tmp_path / split).mkdir()
    save_png(tmp_path / split / 'a.png', np.full((16, 8, 3), value, np.uint8))
  assert vqgan_data.load_pictures(str(tmp_path), 'validation', resolution=8).shape == (1, 8, 8, 3)


def test_bad_sources(tmp_path):
  with pytest.raises(DataError, match='neither "emoji" nor a folder'):
    vqgan_data.load_pictures(str(tmp_path / 'absent'), 'train', resolution=8)
  with pytest.raises(DataError, match='no train pictures'):
    vqgan_data.load_pictures(str(tmp_path), 'train', resolution=8)
  with pytest.raises(DataError, match='model.resolution is 32'):
    vqgan_data.load_pictures('emoji', 'train', resolution=32)
