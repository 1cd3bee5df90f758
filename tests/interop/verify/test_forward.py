"""The stages of a forward pass: they are the model, and they tell where two models part."""

import dataclasses

import numpy as np
import pytest

from chameleon_jax.interop.verify import forward as verify_forward
from chameleon_jax.interop.verify import verify
from chameleon_jax.models.transformer.model import Transformer
from tests.interop.verified_models import CONFIG, TRANSFORMER, changed, failing, faults, model, noise, row, source_of


@pytest.mark.parametrize('position', ['pre', 'post'])
def test_a_norm_in_the_wrong_place_is_found(position):
  right = dataclasses.replace(CONFIG, norm_position=position)
  wrong = dataclasses.replace(CONFIG, norm_position='post' if position == 'pre' else 'pre')
  report = verify(model(config=right), model(config=wrong))
  assert failing(report) == ['transformer config', 'activations (relative)', 'logits (unit scale)', 'logits (KL, nats)']
  assert row(report, 'transformer config').where == f"norm_position: {position} in A, {wrong.norm_position} in B"
  assert faults(report) == ['norm_position']
  assert row(report, 'activations (relative)').where.startswith('layers_0')


@pytest.mark.parametrize('field, value', [('norm_eps', 1e-2), ('rope_theta', 500.0)])
def test_other_settings_are_named(field, value):
  report = verify(model(), model(config=dataclasses.replace(CONFIG, **{field: value})))
  assert field in row(report, 'transformer config').where and 'logits (unit scale)' in failing(report)


@pytest.mark.parametrize('position', ['pre', 'post'])
@pytest.mark.parametrize(
    'leaf, stage, part',
    [
        ('embedding', 'embedding', ''),
        ('layers_0/attention/q_proj', 'layers_0', 'first in queries'),
        ('layers_1/attention/q_norm/bias', 'layers_1', 'first in queries'),
        ('layers_1/attention/k_proj', 'layers_1', 'first in keys'),
        ('layers_1/attention/v_proj', 'layers_1', 'first in attention (v_proj'),
        ('layers_0/attention/o_proj', 'layers_0', 'first in attention (v_proj'),
        ('layers_1/attention_norm/weight', 'layers_1', 'first in attention_norm'),
        ('layers_1/ffn_norm/weight', 'layers_1', 'first in ffn_norm'),
        ('layers_0/feed_forward/gate_proj', 'layers_0', 'first in feed_forward'),
        ('final_norm/weight', 'final_norm', ''),
    ],
)
def test_the_first_layer_and_the_part_of_it_are_named(position, leaf, stage, part):
  config = dataclasses.replace(CONFIG, norm_position=position)
  report = verify(model(config=config, vqgan=None), model(changed(leaf, noise), config=config, vqgan=None))
  found = row(report, 'activations (relative)')
  assert found.status == 'fail' and found.where.startswith(stage) and part in found.where
  assert [stage['stage'] for stage in found.details['stages']] == ['embedding', 'layers_0', 'layers_1', 'final_norm']


def test_the_stages_are_the_model():
  """The layer-by-layer pass gives what the whole network gives."""
  tokens = np.arange(24).reshape(2, 12) % CONFIG.vocab_size
  for position in ('pre', 'post'):
    config = dataclasses.replace(CONFIG, norm_position=position, scan_layers=False)
    params = verify_forward.read_tree(source_of(TRANSFORMER), 'float32')
    expected, _ = Transformer(config).apply({'params': params}, tokens)
    found = verify_forward.logits_of(model(config=config), tokens, 'float32')
    np.testing.assert_allclose(found, expected, atol=1e-5)
