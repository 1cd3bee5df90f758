"""The parity certificate of two checkpoints: what passes, what fails, and where it says that a failure starts."""

import dataclasses
import hashlib
import json
import weakref

import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.lazy import LazyModel
from chameleon_jax.interop.verify import forward as verify_forward
from chameleon_jax.interop.verify import outputs as verify_outputs
from chameleon_jax.interop.verify import verify
from tests.interop.verified_models import (
  CONFIG,
  IMAGE_TOKENIZER,
  TRANSFORMER,
  changed,
  draw_transformer,
  failing,
  faults,
  model,
  row,
  source_of,
)


def test_the_same_weights_pass_every_check():
  report = verify(model(), model())
  assert report.passed and not report.findings
  assert row(report, 'transformer tensors').value == f'{len(TRANSFORMER)} equal, 0 differ'
  assert row(report, 'activations (relative)').value == 0 and row(report, 'logits (unit scale)').value == 0
  assert row(report, 'codes').value == '100.00% equal' and row(report, 'decoded pictures (levels)').value == 0
  assert row(report, 'tokens of the codes').status == 'pass'
  assert {row.status for row in report.rows} == {'pass', 'info'}
  assert [row.name for row in report.rows if row.status == 'info'] == ['text tokenizer', 'preprocessing', 'effect of the scaling']
  assert set(report.tensors['transformer']) == set(TRANSFORMER)


def test_the_table_and_the_json_hold_the_same_rows():
  report = verify(model(name='one'), model(changed('layers_1/feed_forward/up_proj', lambda x: x + 1), name='two'))
  lines = report.format().splitlines()
  assert lines[0] == 'A = one (orbax)' and lines[1] == 'B = two (orbax)' and lines[-1] == 'verified: FAIL'
  written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
  assert written['passed'] is False and written['a'] == 'one (orbax)'
  assert [row['name'] for row in written['rows']] == [line.split('|')[1].strip() for line in lines if line.startswith('| ')][1:]
  differ = [name for name, sides in written['tensors']['transformer'].items() if sides['a'] != sides['b']]
  assert differ == ['layers_1/feed_forward/up_proj']


def test_a_hash_is_that_of_the_float32_bytes():
  report = verify(model(), model())
  expected = hashlib.sha256(TRANSFORMER['lm_head'].astype('<f4').tobytes()).hexdigest()
  assert report.tensors['transformer']['lm_head'] == {'a': expected, 'b': expected}


def test_one_ulp_in_one_tensor_fails_the_hash_alone_and_passes_with_a_tolerance():
  def nudge(x):
    x = x.copy()
    x[place] = np.nextafter(x[place], np.float32(np.inf))
    return x

  name = 'layers_1/feed_forward/down_proj'
  place = np.unravel_index(np.abs(TRANSFORMER[name]).argmax(), TRANSFORMER[name].shape)  # the largest has the largest last place
  other = model(changed(name, nudge))
  report = verify(model(), other)
  assert failing(report) == ['transformer tensors'] and not report.findings
  found = row(report, 'transformer tensors')
  assert found.where.startswith(name) and f'at [{place[0]}, {place[1]}]' in found.where
  assert 0 < row(report, 'logits (unit scale)').value < verify_outputs.LOGITS_LIMIT
  assert 'layers_1, first in feed_forward' in row(report, 'activations (relative)').where
  report = verify(model(), other, tolerance=1e-6)
  assert report.passed and row(report, 'transformer tensors').value == f'{len(TRANSFORMER) - 1} equal, 1 differ'


def test_a_smaller_type_is_named_and_passes_when_both_are_rounded():
  rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in TRANSFORMER.items()}
  report = verify(model(), model(rounded))
  assert not report.passed and faults(report) == ['rounded'] and 'bfloat16' in report.findings[0].sentence
  assert verify(model(), model(rounded), dtype='bfloat16').passed
  widened = {name: value.astype(np.float32) for name, value in rounded.items()}
  assert verify(model(rounded), model(widened)).passed


def test_a_signed_zero_counts_as_a_difference():
  zeros = dict(TRANSFORMER) | {'final_norm/weight': np.zeros_like(TRANSFORMER['final_norm/weight'])}
  report = verify(model(zeros), model(zeros | {'final_norm/weight': -zeros['final_norm/weight']}))
  assert failing(report) == ['transformer tensors']


# ----------------------------------------------------------------------- parts that are not there


ENCODER = {name: value for name, value in IMAGE_TOKENIZER.items() if not name.startswith(('decoder/', 'post_quant_conv/'))}


def test_a_missing_decoder_does_not_fail_and_stands_in_the_verdict():
  report = verify(model(), model(vqgan=ENCODER))
  assert report.passed and report.format().endswith('\nverified: PASS; not compared: picture decoder')
  written = json.loads(json.dumps(report.to_dict()))
  assert written['not_compared'] == ['picture decoder'] and written['passed'] is True
  assert {'transformer tensors', 'image tokenizer tensors', 'logits (unit scale)', 'codes', 'vocabulary'} <= set(written['compared'])
  assert 'decoded pictures (levels)' not in written['compared']
  assert row(report, 'picture decoder').where == 'B holds none' and row(report, 'decoded pictures (levels)').status == 'info'
  assert row(report, 'image tokenizer tensors').value == f'{len(ENCODER)} equal, 0 differ'
  broken = {name: value + (name == 'quant_conv/bias') for name, value in ENCODER.items()}
  report = verify(model(), model(vqgan=broken))
  assert not report.passed and report.verdict == 'verified: FAIL; not compared: picture decoder'
  report = verify(model(vqgan=ENCODER), model(vqgan=ENCODER))
  assert report.verdict == 'verified: PASS' and row(report, 'decoded pictures (levels)').where == 'neither side holds a picture decoder'


class Letters:
  """A text tokenizer."""

  n_pieces = 300

  def encode(self, text):
    return [ord(letter) % 256 for letter in text]

  def decode(self, pieces):
    raise NotImplementedError

  def save(self, path):
    raise NotImplementedError


@pytest.mark.parametrize('part', ['image tokenizer', 'vocabulary', 'text tokenizer', 'transformer'])
@pytest.mark.parametrize('flipped', [False, True])
def test_a_part_on_one_side_alone_fails_unless_it_is_excused(part, flipped):
  whole = {'text_tokenizer': Letters()}
  lack = {'vqgan' if part == 'image tokenizer' else part.replace(' ', '_'): None}
  sides = [model(**whole), model(**whole | lack)][:: -1 if flipped else 1]
  report = verify(*sides)
  (name,) = failing(report)
  a_part = f'{"an" if part[0] == "i" else "a"} {part}'
  assert row(report, name).where.startswith(f'only {"B" if flipped else "A"} holds {a_part}') and '--partial' in row(report, name).where
  assert report.verdict == f'verified: FAIL; not compared: {part}' and 'no fault that is known' not in report.format()
  report = verify(*sides, partial=True)
  assert report.passed and report.verdict == f'verified: PASS; not compared: {part}'
  assert report.not_compared == (part,) and name not in report.compared


def test_what_neither_side_holds_is_no_gap():
  report = verify(model(vqgan=None, vocabulary=None), model(vqgan=None, vocabulary=None))
  assert report.verdict == 'verified: PASS' and row(report, 'image tokenizer config').where == 'neither side holds an image tokenizer'


def test_a_missing_tensor_fails():
  less = {name: value for name, value in TRANSFORMER.items() if name != 'layers_1/attention/q_norm/bias'}
  report = verify(model(vqgan=None), model(less, vqgan=None))
  assert failing(report) == ['transformer tensors']
  assert row(report, 'transformer tensors').where.startswith('B lacks layers_1/attention/q_norm/bias')
  assert row(report, 'activations, logits').status == 'info'
  assert report.verdict == 'verified: FAIL; not compared: activations, logits'


def test_other_sizes_fail_and_run_nothing():
  config = dataclasses.replace(CONFIG, d_ff=CONFIG.d_ff * 2)
  report = verify(model(vqgan=None), model(draw_transformer(config), config=config, vqgan=None))
  assert 'd_ff: 64 in A, 128 in B' in row(report, 'transformer config').where
  assert 'down_proj has shape [64, 32] in A and [128, 32] in B' in row(report, 'transformer tensors').where
  assert row(report, 'activations, logits').where == 'the shapes of the tensors differ'


def test_nothing_in_common_or_nothing_to_compare_with():
  with pytest.raises(CheckpointError, match='no part in common'):
    verify(model(None, vqgan=None), model(None, vocabulary=None))
  with pytest.raises(CheckpointError, match='no part in common'):
    verify(model(vqgan=None, vocabulary=None), model(None, vocabulary=None), partial=True)
  with pytest.raises(CheckpointError, match='nothing to compare with'):
    verify(model())


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_values_that_are_no_numbers_fail(value):
  def spoil(x):
    x = x.copy()
    x[0, 0] = value
    return x

  report = verify(model(vqgan=None), model(changed('layers_0/feed_forward/gate_proj', spoil), vqgan=None))
  assert failing(report) == ['transformer tensors', 'activations (relative)', 'logits (unit scale)', 'logits (KL, nats)']
  written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
  assert next(row for row in written['rows'] if row['name'] == 'transformer tensors')['details']['max_abs'] == 'inf'


def test_activations_are_left_out_where_memory_is_short(monkeypatch):
  monkeypatch.setattr(verify_forward, 'memory_available', lambda: 1000)
  report = verify(model(), model())
  assert report.passed and '--activations=yes' in row(report, 'activations, logits, codes').where
  assert report.verdict == 'verified: PASS; not compared: activations, logits, codes'
  assert row(verify(model(), model(), activations='yes'), 'logits (unit scale)').status == 'pass'
  assert 'switched off' in row(verify(model(), model(), activations='no'), 'activations, logits, codes').where


def test_one_tensor_is_in_memory_at_a_time():
  """Reading is lazy: no source is asked for a second tensor while the first is still held by the comparison."""
  alive, most = weakref.WeakSet(), 0

  class Tracked(np.ndarray):
    __hash__ = object.__hash__

  def read(name):
    nonlocal most
    tensor = TRANSFORMER[name].copy().view(Tracked)
    alive.add(tensor)
    most = max(most, len(alive))
    return tensor

  source = dataclasses.replace(source_of(TRANSFORMER), read=read)
  tracked = LazyModel(path='x', format='orbax', transformer_config=CONFIG, transformer=source)
  assert verify(tracked, tracked, activations='no').passed
  assert most == 2
