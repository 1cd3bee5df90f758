"""Model folders: what is written is read back, and what cannot be read says why."""

import dataclasses
import json
import pathlib
import time

import flax.linen as nn
import jax
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import native
from chameleon_jax.interop.opening import open_checkpoint
from chameleon_jax.models.transformer.model import stack_layers, unstack_layers
from chameleon_jax.tokens.text_json import JsonText
from chameleon_jax.training.tree_files import load_tree, save_tree

TOKENIZER = pathlib.Path(__file__).parents[2] / 'golden' / 'tokenizer' / 'text_tokenizer.json'


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

  monkeypatch.setattr('chameleon_jax.interop.native.folder.save_tree', full_disk)
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


@pytest.mark.parametrize('value', [10**9, 10**40, 1 << 24, 5000])
@pytest.mark.parametrize('field', ['n_layers', 'n_res_blocks', 'd_model', 'vocab_size', 'n_heads', 'd_head', 'n_codes', 'base_channels'])
def test_an_absurd_size_is_refused_at_once(folder, field, value):
  _edit(folder, lambda c: c['transformer' if field in c['transformer'] else 'vqgan'].update({field: value}))
  for load in (native.load_model, open_checkpoint):
    before = time.process_time()
    with pytest.raises(CheckpointError) as caught:
      load(folder)
    assert time.process_time() - before < 3 and '\n' not in str(caught.value) and len(str(caught.value)) < 500


def test_absurd_layers_of_version_1_are_refused_at_once(parts, tmp_path):
  for index, form in enumerate((parts, unstacked(parts))):
    folder = tmp_path / str(index)
    write_version_1(folder, form)
    _edit(folder, lambda c: c['transformer'].update(n_layers=1 << 24))
    for load in (native.load_model, open_checkpoint):
      with pytest.raises(CheckpointError, match='config.json asks for 16777216 layers, 2 are there'):
        load(folder)


def test_a_config_of_many_megabytes_is_not_read(folder):
  (folder / 'config.json').write_text(' ' * (2 << 20) + '{}')
  with pytest.raises(CheckpointError, match='2097154 bytes, more than the 1048576 read here'):
    native.load_model(folder)


def test_a_type_that_cannot_hold_a_value_is_refused(parts, tmp_path):
  params = jax.tree.map(lambda leaf: leaf, parts.transformer_params)
  params['lm_head'] = np.full_like(params['lm_head'], 1e6)
  with pytest.raises(CheckpointError, match='float16 cannot hold'):
    native.save_model(tmp_path / 'half', dataclasses.replace(parts, transformer_params=params), dtype='float16')
  assert list(tmp_path.iterdir()) == []


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


def write_version_1(folder, parts):
  """What this package wrote before layers lay by themselves."""
  save_tree(folder / 'transformer', parts.transformer_params)
  save_tree(folder / 'image_tokenizer', parts.vqgan_params)
  names = {'transformer': parts.transformer_config, 'vqgan': parts.vqgan_config, 'vocabulary': parts.vocabulary}
  config = {'format': 'chameleon_jax', 'version': 1} | {name: dataclasses.asdict(part) for name, part in names.items()}
  (folder / 'config.json').write_text(json.dumps(config))


def unstacked(parts):
  """The same model with a layer's arrays apart."""
  config = dataclasses.replace(parts.transformer_config, scan_layers=False)
  return dataclasses.replace(parts, transformer_config=config, transformer_params=unstack_layers(parts.transformer_params))


@pytest.mark.parametrize('form', [lambda parts: parts, unstacked])
def test_version_1_still_loads(parts, tmp_path, form):
  write_version_1(tmp_path / 'old', form(parts))
  loaded = native.load_model(tmp_path / 'old')
  assert loaded.transformer_config == form(parts).transformer_config
  for name in ('transformer_params', 'vqgan_params'):
    jax.tree.map(np.testing.assert_array_equal, getattr(form(parts), name), getattr(loaded, name))


def test_a_layer_is_a_tree_of_its_own_whether_layers_are_stacked_or_not(parts, folder, tmp_path):
  native.save_model(tmp_path / 'apart', unstacked(parts))
  groups = ['embedding', 'final_norm', 'layers_0', 'layers_1', 'lm_head']
  for written in (folder, tmp_path / 'apart'):
    assert sorted(path.name for path in (written / 'transformer').iterdir()) == groups
    layer = load_tree(written / 'transformer' / 'layers_1')
    expected = parts.transformer_params['layers']['attention']['q_proj'][1]
    np.testing.assert_array_equal(layer['layers_1']['attention']['q_proj'], expected)
  assert native.load_model(folder).transformer_config.scan_layers
  loaded = native.load_model(tmp_path / 'apart')
  jax.tree.map(np.testing.assert_array_equal, stack_layers(loaded.transformer_params), parts.transformer_params)


def test_a_changed_weight_is_refused(parts, folder):
  path = max((folder / 'transformer' / 'lm_head').rglob('*'), key=lambda path: path.stat().st_size if path.is_file() else -1)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  with pytest.raises(CheckpointError, match='lm_head.* is damaged: its checksum differs'):
    native.load_model(folder)


def test_groups_that_do_not_belong_are_named(parts, folder):
  (folder / 'checksums.json').unlink()  # which would tell first that the files differ
  (folder / 'transformer' / 'layers_1').rename(folder / 'transformer' / 'layers_2')
  with pytest.raises(CheckpointError, match='unknown parameter layers_2'):
    native.load_model(folder)
  (folder / 'transformer' / 'layers_2').rename(folder / 'layers_2')
  with pytest.raises(CheckpointError, match='no saved parameters at .*layers_1'):
    native.load_model(folder)


def test_an_image_tokenizer_may_lack_its_decoder_but_not_a_part_of_it(parts, tmp_path):
  encoder = {name: value for name, value in parts.vqgan_params.items() if name != 'decoder'}
  native.save_model(tmp_path / 'half', dataclasses.replace(parts, vqgan_params=encoder))
  loaded = native.load_model(tmp_path / 'half')
  jax.tree.map(np.testing.assert_array_equal, loaded.vqgan_params, encoder)
  decoder = {name: value for name, value in parts.vqgan_params['decoder'].items() if name != 'conv_in'}
  native.save_model(tmp_path / 'torn', dataclasses.replace(parts, vqgan_params=encoder | {'decoder': decoder}))
  with pytest.raises(CheckpointError, match='lacks parameter decoder/conv_in/bias'):
    native.load_model(tmp_path / 'torn')


def test_the_released_text_tokenizer_is_kept_in_its_own_form(tmp_path):
  text = JsonText.load(TOKENIZER)
  native.save_model(tmp_path / 'text', native.ModelParts(vocabulary=text.vocabulary_config, text_tokenizer=text))
  loaded = native.load_model(tmp_path / 'text')
  assert isinstance(loaded.text_tokenizer, JsonText) and loaded.text_tokenizer.to_json() == text.to_json()
  table = native.make_vocabulary(loaded.vocabulary, loaded.text_tokenizer)
  assert table.names == text.names
  with pytest.raises(CheckpointError, match='the text tokenizer has the token table'):
    native.make_vocabulary(VocabularyConfig(size=373, n_codes=12, n_sentinels=2, n_reserved=3), text)


@pytest.mark.parametrize(
    'part, field, value',
    [
        ('transformer', 'dtype', 'bfloat1v'),
        ('transformer', 'param_dtype', None),
        ('transformer', 'norm_position', 'qre'),
        ('transformer', 'n_layers', 2.0),
        ('transformer', 'scan_layers', 'false'),
        ('transformer', 'rope_theta', float('nan')),
        ('vqgan', 'channel_multipliers', [1, '2']),
        ('vqgan', 'dtype', 'Float32'),
        ('vocabulary', 'size', '384'),
    ],
)
def test_a_value_of_another_type_in_the_config_is_named(folder, part, field, value):
  config = json.loads((folder / 'config.json').read_text())
  config[part][field] = value
  (folder / 'config.json').write_text(json.dumps(config))
  for load in (native.load_model, open_checkpoint):
    with pytest.raises(CheckpointError, match=f'{field} cannot be'):
      load(folder)
