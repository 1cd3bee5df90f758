"""Ties of codes, offsets between them, and what the scaling of pixel values does."""

import numpy as np
import pytest

from chameleon_jax.interop.verify import images as verify_images
from chameleon_jax.interop.verify import outputs as verify_outputs
from chameleon_jax.interop.verify import verify
from tests.interop.verified_models import IMAGE_TOKENIZER, model, row


def test_a_tie_is_excused_and_a_clear_difference_is_not():
  codebook = np.array([[0.0, 1.0], [0.0, -1.0], [4.0, 0.0]], np.float32)
  z = np.array([[1.0, 1e-6], [1.0, 0.1], [2.0, 0.0]], np.float32)
  near, other = np.array([0, 0, 0]), np.array([1, 1, 2])
  assert verify_outputs.is_tie(z, codebook, near, other).tolist() == [True, False, False]
  assert verify_outputs.is_tie(z, codebook, near, np.array([7, -1, 0])).tolist() == [False, False, True]
  found = verify_outputs.codes_row('codes', np.array([[0, 0, 2]]), np.array([[1, 0, 2]]), z[None], codebook)
  assert found.status == 'pass' and found.where == '1 of 1 differing codes tie'
  found = verify_outputs.codes_row('codes', np.array([[0, 0, 2]]), np.array([[1, 1, 2]]), z[None], codebook)
  assert found.status == 'fail' and found.where == 'picture 0, position 1: 0 and 1; 1 of 2 differing codes tie'


def test_a_codebook_of_tiny_entries_does_not_excuse_everything():
  codebook = np.array([[1e-4, 0.0], [-1e-4, 0.0]], np.float32)
  z = np.array([[1e-4, 0.0]], np.float32)
  assert not verify_outputs.is_tie(z, codebook, np.array([0]), np.array([1])).any()


def test_codes_that_tie_pass_between_two_checkpoints():
  """Two equal codebook entries: one checkpoint has them in the other order, and the tensors alone differ."""
  twice = IMAGE_TOKENIZER['quantize/embedding'].copy()
  twice[16:] = twice[:16]
  nudged = twice.copy()
  nudged[:16] = np.nextafter(nudged[:16], np.float32(np.inf))
  one, two = (model(None, IMAGE_TOKENIZER | {'quantize/embedding': value}) for value in (twice, nudged))
  report = verify(one, two)
  assert row(report, 'codes').status == 'pass' and row(report, 'codes').details['ties'] == row(report, 'codes').details['differ'] > 0


@pytest.mark.parametrize('n', [32, 8192])
def test_a_constant_between_codes_is_found(n):
  codes = np.random.default_rng(0).integers(0, n - 4, (2, 64))
  assert verify_outputs.constant_offset(codes, codes + 4, n) == 4
  assert verify_outputs.constant_offset(codes, (codes - 5) % n, n) == -5
  assert verify_outputs.constant_offset(codes, codes, n) is None
  assert verify_outputs.constant_offset(codes, np.random.default_rng(1).permutation(codes.reshape(-1)).reshape(codes.shape), n) is None


def test_the_effect_of_the_scaling_is_reported():
  found = row(verify(model(), model()), 'effect of the scaling')
  assert found.status == 'info' and found.value.endswith('% of the codes')


def test_test_pictures_are_fixed_and_cover_the_range():
  pictures = verify_images.test_pictures(16)
  assert pictures.shape == (2, 16, 16, 3) and pictures.min() == 0 and pictures.max() >= 250
  np.testing.assert_array_equal(pictures, verify_images.test_pictures(16))
