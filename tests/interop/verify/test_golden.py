"""Golden values: good ones pass, bad ones fail and are explained, files that are none are refused in one line."""

import dataclasses
import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.verify import forward as verify_forward
from chameleon_jax.interop.verify import verify
from chameleon_jax.models.vqgan.quantizer import nearest_codes
from chameleon_jax.tokens import images
from tests.interop.verified_models import (
    CONFIG,
    IMAGE_TOKENIZER,
    IMAGES,
    INJECTED,
    TRANSFORMER,
    VOCABULARY,
    VQGAN,
    changed,
    failing,
    faults,
    model,
    noise,
    rolled,
    row,
    source_of,
)


@functools.cache
def golden_values():
  """What this package makes of the reference: stands in for another implementation."""
  tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, (2, 10))
  stages = list(verify_forward.run_stages(model(), tokens, 'float32'))
  # Smooth ones, many: the two scalings give other codes for 7 patches in 1000.
  ramp, top = np.linspace(0, 255, 16)[None, None, :, None], np.random.default_rng(4).random((64, 1, 1, 3))
  pictures = np.broadcast_to(ramp * top, (64, 16, 16, 3)).astype(np.uint8)
  params = verify_forward.read_tree(source_of(IMAGE_TOKENIZER), 'float32')

  def encode(pixels):
    z = jnp.asarray(verify_forward.latents(VQGAN, params, pixels))
    return np.asarray(nearest_codes(z, IMAGE_TOKENIZER['quantize/embedding']))

  codes = encode(images.to_float(pictures))
  values = {'tokens': tokens, 'logits': stages[-1].output, 'pictures': pictures, 'codes': codes, 'pixels': images.to_float(pictures)}
  values |= {f'hidden_{index}': stage.output for index, stage in enumerate(stages[:-2])}
  values['codes_huggingface'] = encode(images.to_float(pictures, 'huggingface'))
  return values | {'decoded': verify_forward.decoded_pictures(VQGAN, params, codes)}


@pytest.fixture
def golden(tmp_path):
  """Writes a golden file; keyword arguments replace keys, None drops one."""

  def write(**values):
    path = tmp_path / 'golden.npz'
    np.savez(path, **{name: value for name, value in (golden_values() | values).items() if value is not None})
    return path

  return write


def test_good_golden_values_pass(golden):
  report = verify(model(), golden=golden(note=np.zeros(3)))
  assert report.passed and not report.findings
  names = ['activations (relative)', 'logits (unit scale)', 'logits (KL, nats)', 'pixel values', 'codes', 'codes (scaling of the port)']
  for name in [*names, 'decoded pictures (levels)']:
    assert row(report, f'A, golden: {name}').status == 'pass'
  stages = row(report, 'A, golden: activations (relative)').details['stages']
  assert [stage['stage'] for stage in stages] == ['embedding', 'layers_0', 'layers_1']
  assert row(report, 'golden values').where == 'unknown keys: note'
  assert report.b is None


def test_two_checkpoints_are_each_held_against_the_golden_values(golden):
  report = verify(model(), model(changed('lm_head', noise)), golden=golden())
  assert row(report, 'A, golden: logits (unit scale)').status == 'pass'
  assert row(report, 'B, golden: logits (unit scale)').status == 'fail'


@pytest.mark.parametrize('value', [-np.inf, np.finfo(np.float32).min, float(ml_dtypes.finfo(ml_dtypes.bfloat16).min), -65504.0])
def test_masked_image_columns_are_skipped(golden, value):
  logits = golden_values()['logits'].copy()
  logits[..., IMAGES] = value
  report = verify(model(), golden=golden(logits=logits))
  assert report.passed
  assert row(report, 'A, golden: logits (unit scale)').details['columns_skipped'] == VOCABULARY.n_codes
  assert row(report, 'A, golden: masked columns').value == '32 of 128'


def test_masked_columns_must_be_the_image_tokens(golden):
  logits = golden_values()['logits'].copy()
  logits[..., : VOCABULARY.n_codes] = -np.inf
  report = verify(model(), golden=golden(logits=logits))
  assert 'column 0 is masked and no image token' in row(report, 'A, golden: masked columns').where
  logits[:] = -np.inf
  assert row(verify(model(vocabulary=None), golden=golden(logits=logits)), 'A, golden: logits').status == 'fail'
  logits = golden_values()['logits'].copy()
  logits[0, 0, 7] = -np.inf  # one value, not a column
  assert 'A, golden: logits (unit scale)' in failing(verify(model(), golden=golden(logits=logits)))


@pytest.mark.parametrize(
    'values, config, expected',
    [
        (TRANSFORMER, dataclasses.replace(CONFIG, norm_position='post'), 'norm_position'),
        (INJECTED['projections'][0], CONFIG, 'qk_not_permuted'),
        (INJECTED['norms'][0], CONFIG, 'qk_norm_not_permuted'),
        (INJECTED['all of q and k'][0], CONFIG, 'qk_not_permuted'),
        (INJECTED['gate and up'][0], CONFIG, 'gate_up_swapped'),
        (INJECTED['the two norms'][0], CONFIG, 'norms_swapped'),
        (INJECTED['embedding rolled'][0], CONFIG, 'code_offset'),
        (changed('lm_head', lambda x: rolled(x, -4, axis=1)), CONFIG, 'code_offset'),
    ],
)
def test_golden_logits_tell_the_fault_by_undoing_it(golden, values, config, expected):
  report = verify(model(values, config=config), golden=golden())
  assert 'A, golden: logits (unit scale)' in failing(report)
  assert faults(report) == [expected] and 'with that undone the logits agree' in report.findings[0].sentence


def test_golden_logits_of_other_weights_have_no_explanation(golden):
  report = verify(model(changed('lm_head', noise)), golden=golden())
  assert failing(report) == ['A, golden: logits (unit scale)', 'A, golden: logits (KL, nats)'] and not report.findings


def test_the_scaling_of_the_port_is_recognised(golden):
  codes = golden_values()['codes_huggingface']
  assert (codes != golden_values()['codes']).any()
  report = verify(model(), golden=golden(codes=codes, decoded=None, pixels=images.to_float(golden_values()['pictures'], 'huggingface')))
  assert failing(report) == ['A, golden: pixel values', 'A, golden: codes']
  assert set(faults(report)) == {'rescale'} and len(report.findings) == 2
  assert all('0.0078' in finding.sentence for finding in report.findings)


def test_an_offset_of_golden_codes_is_recognised(golden):
  shifted = golden(codes=np.minimum(golden_values()['codes'] + 4, 31), codes_huggingface=None, decoded=None)
  report = verify(model(None), golden=shifted, partial=True)
  assert failing(report) == ['A, golden: codes'] and faults(report) == ['code_offset'] and 'offset by 4' in report.findings[0].sentence


@pytest.mark.parametrize('levels, status', [(1, 'pass'), (2, 'fail')])
def test_decoded_pictures_may_be_off_by_one_level(golden, levels, status):
  decoded = golden_values()['decoded'].astype(int)
  decoded[1, 2, 3, 0] += levels if decoded[1, 2, 3, 0] < 128 else -levels
  found = row(verify(model(), golden=golden(decoded=decoded.astype(np.uint8))), 'A, golden: decoded pictures (levels)')
  assert found.status == status and found.value == levels and found.where == 'picture 1, row 2, column 3, channel 0'


def test_wrong_hidden_values_name_the_layer(golden):
  report = verify(model(), golden=golden(hidden_2=golden_values()['hidden_2'] + 1e-2))
  assert failing(report) == ['A, golden: activations (relative)']
  assert row(report, 'A, golden: activations (relative)').where.startswith('layers_1')


def test_a_golden_file_without_pictures_or_a_model_without_a_part_is_fine(golden):
  keys = dict.fromkeys(('pictures', 'pixels', 'codes', 'codes_huggingface', 'decoded', 'hidden_0', 'hidden_1', 'hidden_2'))
  report = verify(model(), golden=golden(**keys))
  assert report.passed and not any('codes' in row.name for row in report.rows if row.name.startswith('A, golden'))
  report = verify(model(vqgan=None), golden=golden())
  assert failing(report) == ['A, golden: image tokenizer'] and report.verdict == 'verified: FAIL; not compared: image tokenizer'
  report = verify(model(vqgan=None), golden=golden(), partial=True)
  assert report.verdict == 'verified: PASS; not compared: image tokenizer'
  report = verify(model(None), golden=golden())
  assert failing(report) == ['A, golden: transformer']
  encoder = {name: value for name, value in IMAGE_TOKENIZER.items() if not name.startswith('decoder/')}
  assert verify(model(vqgan=encoder), golden=golden()).verdict == 'verified: PASS; not compared: picture decoder'
  with pytest.raises(CheckpointError, match='no part in common'):
    verify(model(None, vocabulary=None), golden=golden(**keys))


@pytest.mark.parametrize(
    'values, fragment',
    [
        (lambda good: {'logits': good['logits'][..., :-1]}, 'logits has shape [2, 10, 127], there asks for [2, 10, 128]'),
        (lambda good: {'logits': good['logits'].astype(int)}, 'logits must be floating numbers of 3 axes'),
        (lambda good: {'tokens': good['tokens'] + 100}, 'tokens run from'),
        (lambda good: {'tokens': None}, "'logits' without the 'tokens'"),
        (lambda good: {'hidden_3': good['hidden_2']}, 'hidden_3 is behind the last layer'),
        (lambda good: {'hidden_0': good['hidden_0'][:, :4]}, 'hidden_0 has shape'),
        (lambda good: {'codes': good['codes'][:, :9]}, 'codes has shape'),
        (lambda good: {'codes': good['codes'] + 30}, 'the model knows 0 to 31'),
        (lambda good: {'pictures': good['pictures'].astype(np.float32)}, 'pictures must be uint8'),
        (lambda good: {'decoded': good['decoded'][:, :8]}, 'decoded has shape'),
        (lambda good: {'tokens': np.zeros((0, 4), int)}, 'not empty'),
    ],
)
def test_golden_values_that_do_not_fit_are_one_line(golden, values, fragment):
  with pytest.raises(CheckpointError) as error:
    verify(model(), golden=golden(**values(golden_values())))
  assert fragment in str(error.value) and '\n' not in str(error.value) and 'golden.npz' in str(error.value)


def test_golden_files_that_are_none(tmp_path, golden):
  path = tmp_path / 'x.npz'
  for write, fragment in (
      (lambda: None, 'cannot be read'),
      (lambda: path.write_bytes(b'no zip at all'), 'no sound .npz'),
      (lambda: path.write_bytes(golden().read_bytes()[:-700]), 'no sound .npz'),
      (lambda: np.save(path.open('wb'), np.zeros(3)), 'a single array'),
      (lambda: np.savez(path, tokens=np.array([{'a': 1}], dtype=object)), 'no sound .npz'),
      (lambda: np.savez(path, tokens=golden_values()['tokens']), 'hold nothing to compare'),
  ):
    write()
    with pytest.raises(CheckpointError) as error:
      verify(model(), golden=path)
    assert fragment in str(error.value) and '\n' not in str(error.value)
