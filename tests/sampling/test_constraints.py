"""Fixed codes of a picture: the drawn examples, what holds for any picture, and every error."""

import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions
from chameleon_jax.errors import PromptError
from chameleon_jax.sampling.constraints import inpaint, mask_from_pixels, outpaint, variation

_ = None


def test_inpaint_example():
  codes = np.array([[5, 6, 7], [8, 9, 3]], np.int32)
  mask = np.array([[0, 1, 0], [0, 1, 1]], bool)
  expected = (5, _, 7, 8, _, _)
  for given in (codes, codes.ravel(), codes.ravel().tolist()):
    assert inpaint(given, mask.ravel()) == expected
  assert inpaint(codes, mask) == inpaint(codes.ravel(), mask) == inpaint(codes, mask.ravel().tolist()) == expected
  assert all(code is None or type(code) is int for code in inpaint(codes, mask))  # no numpy scalars in the options
  assert SamplingOptions(fixed_codes=inpaint(codes, mask)).fixed_codes == expected


def test_inpaint_may_free_everything():
  assert inpaint([0, 1], [True, True]) == (_, _)


def test_outpaint_example():
  expected = (_, _, _, _, _, _, 5, 6, _, _, 7, 8)
  assert outpaint([5, 6, 7, 8], (2, 2), (3, 4), top=1, left=2) == expected
  assert outpaint(np.array([[5, 6], [7, 8]]), (2, 2), (3, 4), top=1, left=2) == expected


@pytest.mark.parametrize(
  ('top', 'left', 'expected'),
  [
    (0, -1, (6, _, 8, _)),
    (0, 1, (_, 5, _, 7)),
    (-1, 0, (7, 8, _, _)),
    (1, 0, (_, _, 5, 6)),
    (1, 1, (_, _, _, 5)),
    (-1, -1, (8, _, _, _)),
    (1, -1, (_, _, 6, _)),
  ],
)
def test_shift_example_and_its_other_ways(top, left, expected):
  assert outpaint([5, 6, 7, 8], (2, 2), (2, 2), top=top, left=left) == expected


def test_shift_along_the_full_side_only():
  """One row of three codes in a grid of two rows of three: it fits each row, and may move sideways."""
  assert outpaint([5, 6, 7], (1, 3), (2, 3), top=1, left=1) == (_, _, _, _, 5, 6)
  with pytest.raises(PromptError, match='top is 2; a side of 1 codes in a grid with one of 2 goes from 0 to 1'):
    outpaint([5, 6, 7], (1, 3), (2, 3), top=2, left=1)


def test_outpaint_keeps_code_zero():
  assert outpaint([0], (1, 1), (1, 2), top=0, left=0) == (0, _)


def test_variation_example():
  assert variation([5, 6, 7, 8], keep=0.5, seed=0) == (5, _, 7, _)
  assert variation(np.array([[5, 6], [7, 8]]), keep=0.25, seed=0) == (_, _, 7, _)


def test_variation_keeps_that_share_and_nests():
  codes = np.arange(1024)
  kept = {keep: {i for i, code in enumerate(variation(codes, keep=keep, seed=3)) if code is not None} for keep in (0.0, 0.3, 0.7, 0.9999)}
  assert [len(kept[keep]) for keep in (0.0, 0.3, 0.7, 0.9999)] == [0, 307, 717, 1023]
  assert kept[0.3] < kept[0.7] < kept[0.9999]
  assert all(code in (i, None) for i, code in enumerate(variation(codes, keep=0.7, seed=3)))
  # Spread over the picture: no quarter holds less than a fifth or more than three tenths of them.
  assert all(0.2 < sum(i // 256 == quarter for i in kept[0.7]) / 717 < 0.3 for quarter in range(4))


def test_variation_repeats_and_differs_by_seed():
  runs = [variation(np.arange(64), keep=0.5, seed=seed) for seed in (1, 1, 2)]
  assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize('dtype', [np.uint8, bool])
def test_mask_from_pixels_example(dtype):
  mask = np.array([[0, 0, 0, 9], [0, 0, 0, 0], [0, 0, 9, 9], [9, 0, 9, 9]], np.uint8).astype(dtype)
  found = mask_from_pixels(mask, (2, 2))
  assert found.dtype == bool
  assert found.tolist() == [[False, True], [True, True]]


def test_a_pixel_frees_exactly_its_cell():
  """Sides that differ: 6 x 4 pixels in 3 x 1 codes."""
  for row in range(6):
    for column in range(4):
      mask = np.zeros((6, 4), bool)
      mask[row, column] = True
      assert mask_from_pixels(mask, (3, 1)).ravel().tolist() == [row // 2 == i for i in range(3)]


def test_from_painted_pixels_to_options():
  mask = np.zeros((4, 4), np.uint8)
  mask[3, 3] = 255
  assert inpaint(np.array([1, 2, 3, 4]), mask_from_pixels(mask, (2, 2))) == (1, 2, 3, _)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: inpaint([1, -2], [True, False]), 'code -2 is negative'),
    (lambda: inpaint([1, 2], [True]), r'the mask has shape \[1\] and the codes \[2\]'),
    (lambda: inpaint(np.ones((2, 3), int), np.ones((3, 2), bool)), r'the mask has shape \[3, 2\] and the codes \[2, 3\]'),
    (lambda: inpaint([1, 2], np.ones((1, 2, 1), bool)), 'give one entry a code'),
    (lambda: inpaint([1, 2], [False, False]), 'the mask marks no code'),
    (lambda: inpaint([1, 2], np.array([0, 255], np.uint8)), 'must be boolean'),
    (lambda: inpaint([], np.zeros(0, bool)), 'must be integers'),
    (lambda: inpaint(np.array([0.5, 1.0]), [True, False]), 'must be integers .*got float64'),
    (lambda: inpaint(np.ones((1, 2, 2), int), np.ones(4, bool)), r'\[1, 2, 2\]'),
    (lambda: outpaint([1, 2, 3], (2, 2), (4, 4), top=0, left=0), 'do not fill source_grid 2 x 2'),
    (lambda: outpaint(np.ones((1, 4), int), (2, 2), (4, 4), top=0, left=0), 'do not fill source_grid 2 x 2'),
    (lambda: outpaint([1, 2], (1, 2), (1, 1), top=0, left=0), 'does not fit a grid'),
    (lambda: outpaint([1, 2], (1, 2), (1, 4), top=0, left=3), 'left is 3; a side of 2 codes in a grid with one of 4 goes from 0 to 2'),
    (lambda: outpaint([1, 2], (1, 2), (1, 4), top=0, left=-1), 'left is -1'),
    (lambda: outpaint([1, 2], (1, 2), (1, 2), top=0, left=2), 'goes from -1 to 1'),
    (lambda: outpaint([1, 2], (1, 2), (1, 2), top=0, left=0), 'nothing would be drawn'),
    (lambda: outpaint([1, -1], (1, 2), (2, 2), top=0, left=0), 'code -1 is negative'),
    (lambda: outpaint([1], (1, 1), (0, 2), top=0, left=0), 'grid is 0 x 2'),
    (lambda: outpaint([1], (-1, -1), (2, 2), top=0, left=0), 'source_grid is -1 x -1'),
    (lambda: variation([1, 2], keep=1.0, seed=0), r'keep must lie in \[0, 1\), got 1.0'),
    (lambda: variation([1, 2], keep=-0.1, seed=0), 'keep must lie'),
    (lambda: variation([1, 2], keep=float('nan'), seed=0), 'keep must lie'),
    (lambda: variation([1, 2], keep=0.5, seed=-1), 'seed must not be negative'),
    (lambda: variation([1, -2], keep=0.5, seed=0), 'code -2 is negative'),
    (lambda: mask_from_pixels(np.ones((4, 4, 3), np.uint8), (2, 2)), r'got uint8 \[4, 4, 3\]'),
    (lambda: mask_from_pixels(np.ones((4, 4)), (2, 2)), 'got float64'),
    (lambda: mask_from_pixels(np.ones((4, 5), bool), (2, 2)), 'the mask has 4 x 5 pixels, no multiple of the 2 x 2 codes'),
    (lambda: mask_from_pixels(np.ones((1, 4), bool), (2, 2)), 'resize it'),
    (lambda: mask_from_pixels(np.ones((0, 4), bool), (2, 2)), 'no multiple'),
    (lambda: mask_from_pixels(np.ones((4, 4), bool), (0, 2)), 'grid is 0 x 2'),
    (lambda: mask_from_pixels(np.zeros((4, 4), np.uint8), (2, 2)), 'the mask marks no pixel'),
  ],
)
def test_errors(call, message):
  with pytest.raises(PromptError, match=message) as error:
    call()
  assert '\n' not in str(error.value)
