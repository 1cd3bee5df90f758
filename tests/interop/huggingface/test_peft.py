"""Adapters in the form of peft: one that peft wrote gives its logits; what is written is as it writes it; what else scales is refused."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import chameleon_jax
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.safetensors_file import SafetensorsFile
from chameleon_jax.interop.huggingface.peft import save_peft
from chameleon_jax.interop.native.adapter import Adapter, fitted, load_adapter, save_adapter

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / 'golden'
BASE, PEFT = GOLDEN / 'models' / 'hf_30b_like', GOLDEN / 'peft'


@pytest.fixture(scope='module')
def model():
  return chameleon_jax.load(BASE, adapter=PEFT, dtype='float32')


@pytest.mark.filterwarnings('ignore:.*decoder')
def test_an_adapter_of_peft_gives_the_logits_of_peft(model):
  values = np.load(PEFT / 'logits.npz')
  found = np.asarray(model.logits(values['tokens']))[:, :, values['kept']]
  assert np.abs(values['tuned'] - values['plain']).max() > 1
  np.testing.assert_allclose(found, values['tuned'], atol=2e-4)


def test_it_is_written_as_peft_writes_it(model, tmp_path):
  adapter = fitted(load_adapter(PEFT), model.config, where='adapter')
  save_adapter(tmp_path / 'ours', adapter)
  save_peft(tmp_path / 'theirs', load_adapter(tmp_path / 'ours'))
  ours, theirs = (SafetensorsFile(folder / 'adapter_model.safetensors') for folder in (tmp_path / 'theirs', PEFT))
  assert ours.specs.keys() == theirs.specs.keys() and len(ours.specs) == 2 * 7 * 2
  for name in ours.specs:
    np.testing.assert_array_equal(ours.read(name), np.asarray(theirs.read(name), np.float32))
  config = json.loads((tmp_path / 'theirs' / 'adapter_config.json').read_text())
  assert (config['peft_type'], config['r'], config['lora_alpha']) == ('LORA', 2, 5.0)
  assert config['target_modules'] == sorted(['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'])
  with pytest.raises(CheckpointError, match='exists; choose another path'):
    save_peft(tmp_path / 'theirs', adapter)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'use_rslora': True}, 'use_rslora is not read here'),
        ({'alpha_pattern': {'q_proj': 3}}, 'alpha_pattern is not read here'),
        ({'bias': 'all'}, 'bias is not read here'),
        ({'peft_type': 'IA3'}, "peft_type 'IA3' is not read here"),
        ({'r': 3}, 'is not whole, or not of rank 3'),
        ({'r': 'two'}, 'is damaged'),
    ],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path, change, message):
  folder = tmp_path / 'peft'
  shutil.copytree(PEFT, folder)
  config = json.loads((folder / 'adapter_config.json').read_text()) | change
  (folder / 'adapter_config.json').write_text(json.dumps(config))
  with pytest.raises(CheckpointError, match=message):
    load_adapter(folder)


def test_missing_weights_and_foreign_modules(tmp_path):
  folder = tmp_path / 'peft'
  shutil.copytree(PEFT, folder)
  (folder / 'adapter_model.safetensors').unlink()
  with pytest.raises(CheckpointError, match='lacks adapter_model.safetensors'):
    load_adapter(folder)
  pair = np.zeros((64, 2), np.float32), np.zeros((2, 64), np.float32)
  other = Adapter(2, 4.0, {'layers_7/feed_forward/up_proj': pair})
  with pytest.raises(CheckpointError, match='has a pair for layers_7/feed_forward/up_proj, which the base weights lack'):
    fitted(other, chameleon_jax.load(BASE).config, where='adapter x')
