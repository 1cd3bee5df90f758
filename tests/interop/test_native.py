"""Model folders: what is written is read back, and what cannot be read says why."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import native


def _random_like(boxed):
  """Arrays of the abstract tree's shapes with values no initialiser gives."""
  abstract = nn.meta.unbox(boxed)
  leaves, tree = jax.tree.flatten(abstract)
  rng = np.random.default_rng(0)
  return tree.unflatten([rng.normal(size=leaf.shape).astype(leaf.dtype) for leaf in leaves])


@pytest.fixture(scope='module')
def parts():
  transformer, vqgan = presets.tiny_transformer(), presets.tiny_vqgan()
  return native.ModelParts(
      transformer_config=transformer,
      transformer_params=_random_like(native.abstract_transformer(transformer)),
      vqgan_config=vqgan,
      vqgan_params=_random_like(native.abstract_vqgan(vqgan)),
      vocabulary=presets.tiny_vocabulary(),
  )


@pytest.fixture
def folder(parts, tmp_path):
  native.save_model(tmp_path / 'model', parts)
  return tmp_path / 'model'


def test_round_trip_is_exact(parts, folder):
  loaded = native.load_model(folder)
  assert loaded.transformer_config == parts.transformer_config
  assert loaded.vqgan_config == parts.vqgan_config
  assert loaded.vocabulary == parts.vocabulary
  assert loaded.text_tokenizer is None
  for name in ('transformer_params', 'vqgan_params'):
    jax.tree.map(np.testing.assert_array_equal, getattr(parts, name), getattr(loaded, name))
  assert [path.name for path in folder.parent.iterdir()] == ['model'], 'nothing may be left beside the folder'


def test_storing_in_float16_rounds_and_loads_as_float32(parts, tmp_path):
  native.save_model(tmp_path / 'half', parts, dtype='float16')
  loaded = native.load_model(tmp_path / 'half')
  for ours, theirs in zip(jax.tree.leaves(parts.transformer_params), jax.tree.leaves(loaded.transformer_params)):
    assert theirs.dtype == np.float32
    np.testing.assert_array_equal(ours.astype(np.float16).astype(np.float32), theirs)


def test_saving_replaces_a_model_folder_and_nothing_else(parts, folder, tmp_path):
  native.save_model(folder, native.ModelParts(vocabulary=parts.vocabulary))
  assert native.load_model(folder).transformer_params is None
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'thesis.txt').write_text('years of work')
  with pytest.raises(CheckpointError, match='is not a model folder'):
    native.save_model(tmp_path / 'other', parts)
  assert (tmp_path / 'other' / 'thesis.txt').exists()


def test_a_failure_while_writing_keeps_the_old_folder(parts, folder, monkeypatch):
  def full_disk(path, tree):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(native, 'save_tree', full_disk)
  with pytest.raises(CheckpointError, match='No space left'):
    native.save_model(folder, parts)
  assert native.load_model(folder).transformer_config == parts.transformer_config
  assert [path.name for path in folder.parent.iterdir()] == ['model']


def _edit(folder, change):
  config = json.loads((folder / 'config.json').read_text())
  change(config)
  (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize(
    'change, fragment',
    [
        (lambda c: c.update(format='other'), 'not of this project'),
        (lambda c: c.update(version=99), 'has version 99'),
        (lambda c: c['transformer'].update(n_wheels=4), "no field 'n_wheels'"),
        (lambda c: c['transformer'].update(d_ff=48), r'has shape .* asks for'),
        (lambda c: c['transformer'].update(qk_norm=False), 'has the unknown parameter'),
        (lambda c: c['transformer'].update(vocab_size=256), 'asks for|token ids'),
    ],
)
def test_a_config_that_does_not_fit_is_named(folder, change, fragment):
  _edit(folder, change)
  with pytest.raises(CheckpointError, match=fragment):
    native.load_model(folder)


def test_missing_and_foreign_folders(tmp_path):
  with pytest.raises(CheckpointError, match='does not exist'):
    native.load_model(tmp_path / 'nowhere')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(CheckpointError, match='no model folder'):
    native.load_model(tmp_path / 'empty')
  (tmp_path / 'empty' / 'config.json').write_text('{')
  with pytest.raises(CheckpointError, match='not valid JSON'):
    native.load_model(tmp_path / 'empty')


def test_parts_that_disagree_are_refused(parts):
  with pytest.raises(CheckpointError, match='32 codes, the vocabulary 16'):
    native.check_fit(
        native.ModelParts(vqgan_config=parts.vqgan_config, vocabulary=VocabularyConfig(size=128, n_codes=16, n_sentinels=0, n_reserved=2)),
        where='here',
    )
