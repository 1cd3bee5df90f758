"""Every fault that the certificate claims to find is put into a tiny checkpoint and found, and no other is."""

import numpy as np
import pytest

from chameleon_jax.interop.verify import faults as verify_faults
from chameleon_jax.interop.verify import verify
from tests.interop.verified_models import IMAGE_TOKENIZER, INJECTED, TRANSFORMER, changed, failing, faults, model


@pytest.mark.parametrize('name', INJECTED)
def test_an_injected_fault_is_found_and_no_other(name):
  values, expected, fragments = INJECTED[name]
  if name == 'transposed':
    assert values['layers_0/attention/o_proj'].shape == TRANSFORMER['layers_0/attention/o_proj'].shape
  report = verify(model(vqgan=None), model(values, vqgan=None))
  assert {'transformer tensors', 'logits (unit scale)'} <= set(failing(report))
  assert set(faults(report)) == expected
  text = ' | '.join(finding.sentence for finding in report.findings)
  for fragment in fragments:
    assert fragment in text, text
  assert '\n' not in text and f'looks like: {report.findings[0].sentence}' in report.format()


def test_different_weights_look_like_no_known_fault():
  rng = np.random.default_rng(5)
  other = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in TRANSFORMER.items()}
  report = verify(model(vqgan=None), model(other, vqgan=None))
  assert not report.findings and 'no fault that is known here' in report.format()


def test_a_codebook_that_is_rolled_is_found():
  report = verify(model(), model(vqgan=changed('quantize/embedding', lambda x: np.roll(x, 4, axis=0), part=IMAGE_TOKENIZER)))
  assert failing(report) == ['image tokenizer tensors', 'codes', 'decoded pictures (levels)']
  assert set(faults(report)) == {'code_offset'} and 'the codes are offset by 4' in report.findings[0].sentence


def test_interleaving_and_its_inverse():
  x = np.arange(12.0).reshape(2, 6)
  assert verify_faults.interleave(x)[0].tolist() == [0, 3, 1, 4, 2, 5]
  np.testing.assert_array_equal(verify_faults.deinterleave(verify_faults.interleave(x)), x)
  np.testing.assert_array_equal(verify_faults.interleave(x.T, 0), verify_faults.interleave(x).T)


@pytest.mark.parametrize(
    'b, expected',
    [
        ([0, 1, 5, 2, 3, 4], verify_faults.Shift(2, 6, -1, True)),  # drawn in the docstring
        ([0, 1, 3, 4, 5, 2], verify_faults.Shift(2, 6, 1, True)),
        ([0, 1, 1, 2, 3, 4], verify_faults.Shift(2, 6, -1, False)),
        ([0, 1, 2, 3, 4, 5], None),
        ([0, 1, 7, 8, 9, 6], None),
        ([5, 3, 0, 4, 1, 2], None),
    ],
)
def test_shifts(b, expected):
  a = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
  assert verify_faults.find_shift(a[:6], a[b], 0) == expected
  assert verify_faults.find_shift(a[:6].T, a[b].T, 1) == expected
