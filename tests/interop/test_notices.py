"""What lies beside converted weights: licences and the notice."""

import dataclasses
import shutil

import pytest

from chameleon_jax.interop.convert import convert
from chameleon_jax.interop.lazy import Origin
from chameleon_jax.interop.notices import LICENCES, notice
from chameleon_jax.interop.opening import open_checkpoint
from tests.interop.conversions import GOLDEN, META, MODELS, a_copy


def test_licences_go_along_and_a_notice_says_where_weights_came_from(tmp_path):
  source = a_copy(tmp_path)
  (source / 'LICENSE').write_text('the terms')
  (source / 'USE_POLICY.md').write_text('the policy')
  convert(source, tmp_path / 'ours', 'orbax')
  assert (tmp_path / 'ours' / 'LICENSE').read_text() == 'the terms'
  assert (tmp_path / 'ours' / 'USE_POLICY.md').read_text() == 'the policy'
  text = (tmp_path / 'ours' / 'NOTICE.txt').read_text()
  for part in ("Hugging Face's Chameleon form", 'preprocessor_config.json', 'chameleon_jax 0.', 'Chameleon Research License'):
    assert part in text
  convert(source, tmp_path / 'again', 'orbax')
  assert (tmp_path / 'again' / 'NOTICE.txt').read_text() == text, 'the same source gives the same notice'
  convert(tmp_path / 'ours', tmp_path / 'back', 'huggingface')
  assert (tmp_path / 'back' / 'NOTICE.txt').read_text() == text, 'the same origin is told once'
  assert (tmp_path / 'back' / 'LICENSE').read_text() == 'the terms'


@pytest.mark.parametrize('inside', ['models/7b', ''])
def test_licences_of_the_release_lie_beside_models_and_tokenizer(tmp_path, inside):
  data = tmp_path / 'project' / 'data'
  shutil.copytree(META, data / 'models' / '7b')
  shutil.copytree(GOLDEN / 'tokenizer', data / 'tokenizer')
  (data / 'LICENSE').write_text('the terms')
  (data / 'tokenizer' / 'NOTICE').write_text('of the tokenizer')
  (data / 'models' / '7b' / 'USE_POLICY.md').write_text('the nearest')
  (data / 'USE_POLICY.md').write_text('further off')
  (tmp_path / 'project' / 'LICENSE.txt').write_text('of the project around it')
  convert(data / inside, tmp_path / 'ours', 'orbax')
  found = {path.name: path.read_text() for pattern in LICENCES for path in (tmp_path / 'ours').glob(pattern) if path.name != 'NOTICE.txt'}
  policy = 'the nearest' if inside else 'further off'
  assert found == {'LICENSE': 'the terms', 'NOTICE': 'of the tokenizer', 'USE_POLICY.md': policy}


def test_a_licence_above_weights_in_no_such_layout_is_not_theirs(tmp_path):
  source = a_copy(tmp_path)
  (tmp_path / 'LICENSE').write_text('of the project around it')
  convert(source, tmp_path / 'ours', 'orbax')
  assert not (tmp_path / 'ours' / 'LICENSE').exists()


def test_a_notice_of_the_source_goes_on(tmp_path):
  source = a_copy(tmp_path, MODELS / 'anole_like')
  (source / 'NOTICE.txt').write_text('Weights by somebody.\n')
  convert(source, tmp_path / 'ours', 'orbax')
  assert (tmp_path / 'ours' / 'NOTICE.txt').read_text().startswith('Weights by somebody.\n\nThe weights in this folder were converted')


def test_our_own_weights_need_no_notice(tiny_model_folder, tmp_path):
  convert(tiny_model_folder, tmp_path / 'copy', 'orbax')
  assert not (tmp_path / 'copy' / 'NOTICE.txt').exists()


def test_the_notice_names_files_of_the_source_and_none_of_ours():
  with open_checkpoint(META) as model:
    text = notice(model)
    assert 'params.json' in text and 'vqgan.yaml' in text and '.tree.json' not in text
    assert notice(dataclasses.replace(model, origin=Origin())) is None
