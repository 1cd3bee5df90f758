"""Model folders tensor by tensor: names, types and origin survive, and only one group is in memory."""

import dataclasses
import json
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import native
from chameleon_jax.interop.lazy import LazyModel, Origin, TensorSource, TensorSpec
from chameleon_jax.interop.mapping import transformer_specs, vqgan_specs
from chameleon_jax.interop.native import lazy as native_lazy
from chameleon_jax.interop.trees import flat, nested
from chameleon_jax.models.transformer.model import stack_layers
from chameleon_jax.training.tree_files import save_tree

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def source(values):
  return TensorSource({name: TensorSpec(value.shape, value.dtype) for name, value in values.items()}, values.__getitem__)


def draw(shapes, dtype):
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def a_model(dtype=np.float32, **config):
  transformer = presets.tiny_transformer(scan_layers=False, **config)
  vqgan = presets.tiny_vqgan()
  return LazyModel(
      path='made up',
      format='meta',
      transformer_config=transformer,
      transformer=source(draw(transformer_specs(transformer), dtype)),
      vqgan_config=vqgan,
      vqgan=source(draw(vqgan_specs(vqgan), np.float32)),
      vocabulary=presets.tiny_vocabulary(),
  )


def written(folder, model, **options):
  folder.mkdir()
  native_lazy.write_native(folder, model, **options)
  return folder


def assert_same(model, other):
  for part in ('transformer', 'vqgan'):
    ours, theirs = getattr(model, part), getattr(other, part)
    assert dict(ours.specs) == dict(theirs.specs)
    for name in ours.specs:
      a, b = ours.read(name), theirs.read(name)
      assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name


@pytest.mark.parametrize('dtype', [np.float32, BFLOAT16, np.float16])
def test_what_is_written_is_read_back_bit_by_bit_in_its_type(tmp_path, dtype):
  model = a_model(dtype)
  with native_lazy.open_native(written(tmp_path / 'model', model)) as opened:
    assert_same(model, opened)
    assert opened.format == 'orbax' and opened.origin.format == 'orbax' and not opened.origin.extras.specs
    assert opened.vocabulary == model.vocabulary and opened.vqgan_config == model.vqgan_config
    kept = 'bfloat16' if dtype == BFLOAT16 else 'float32'
    assert (opened.transformer_config.param_dtype, opened.transformer_config.dtype) == (kept, kept)
  parts = native.load_model(tmp_path / 'model')
  assert {leaf.dtype.name for leaf in jax.tree.leaves(parts.transformer_params)} == {kept}


def test_both_ways_to_write_a_folder_give_the_same(tmp_path):
  model = a_model()
  params = nested({name: model.transformer.read(name) for name in model.transformer.specs})
  vqgan_params = nested({name: model.vqgan.read(name) for name in model.vqgan.specs})
  config = dataclasses.replace(model.transformer_config, scan_layers=True)
  parts = native.ModelParts(config, stack_layers(params), model.vqgan_config, vqgan_params, model.vocabulary)
  native.save_model(tmp_path / 'saved', parts)
  with native_lazy.open_native(tmp_path / 'saved') as opened:
    assert_same(model, opened)
    assert opened.transformer_config.scan_layers
    copy = written(tmp_path / 'copy', opened)
  jax.tree.map(np.testing.assert_array_equal, native.load_model(copy).transformer_params, parts.transformer_params)


@pytest.mark.parametrize('scan_layers', [True, False])
def test_version_1_opens_under_unrolled_names(tmp_path, scan_layers):
  model = a_model(np.float16)
  params = nested({name: model.transformer.read(name) for name in model.transformer.specs})
  if scan_layers:
    params = jax.tree.map(np.asarray, stack_layers(params))
  save_tree(tmp_path / 'transformer', params)
  config = dataclasses.asdict(dataclasses.replace(model.transformer_config, scan_layers=scan_layers))
  (tmp_path / 'config.json').write_text(json.dumps({'format': 'chameleon_jax', 'version': 1, 'transformer': config}))
  with native_lazy.open_native(tmp_path) as opened:
    assert_same(dataclasses.replace(model, vqgan=model.transformer), dataclasses.replace(opened, vqgan=opened.transformer))
    assert opened.vqgan is None and opened.vocabulary is None


def test_origin_survives(tmp_path):
  extras = {
      'consolidated.00/rope.freqs': np.arange(4, dtype=np.float32).astype(ml_dtypes.bfloat16),
      'vqgan.ckpt/loss.logvar': np.array(0.5, np.float32),
      'vqgan.ckpt//global_step': np.array([7, 8], np.int64),
      'vqgan.ckpt/empty': np.zeros((0, 3), np.float16),
  }
  files = {'params.json': b'{"dim": 32}', 'vqgan.yaml': b'model: {}\n\xff'}
  model = dataclasses.replace(a_model(), origin=Origin('meta', 4, files, source(extras)))
  folder = written(tmp_path / 'model', model)
  for _ in range(2):  # a copy of the folder keeps them too
    with native_lazy.open_native(folder) as opened:
      assert (opened.origin.format, opened.origin.n_shards, opened.origin.files) == ('meta', 4, files)
      assert opened.origin.extras.specs == source(extras).specs
      for name, value in extras.items():
        found = opened.origin.extras.read(name)
        assert found.dtype == value.dtype and found.tobytes() == value.tobytes()
      folder = folder if folder.name == 'copy' else written(tmp_path / 'copy', opened)


def test_the_note_on_suppressed_pictures_comes_with_every_load(tmp_path):
  files = {'consolidate_params.json': b'{"src": "x_noimggen"}'}
  folder = written(tmp_path / 'model', dataclasses.replace(a_model(), origin=Origin('meta', 1, files)))
  with native_lazy.open_native(folder) as opened:
    (note,) = opened.notes
    assert 'image output is suppressed' in note


def test_an_image_tokenizer_without_decoder(tmp_path):
  model = a_model()
  encoder = {name: model.vqgan.read(name) for name in model.vqgan.specs if not name.startswith('decoder/')}
  with native_lazy.open_native(written(tmp_path / 'model', dataclasses.replace(model, vqgan=source(encoder)))) as opened:
    assert set(opened.vqgan.specs) == set(encoder)
    assert opened.notes == ('the image tokenizer has no decoder: pictures can be read, not drawn',)


def test_the_type_of_the_transformer_can_be_changed(tmp_path):
  model = a_model()
  with native_lazy.open_native(written(tmp_path / 'half', model, dtype='bfloat16')) as opened:
    for name in model.transformer.specs:
      np.testing.assert_array_equal(opened.transformer.read(name), model.transformer.read(name).astype(BFLOAT16))
    assert opened.transformer_config.param_dtype == 'bfloat16'
    assert {spec.dtype for spec in opened.vqgan.specs.values()} == {np.dtype('f4')}
  values = {name: model.transformer.read(name) for name in model.transformer.specs}
  values['lm_head'] = values['lm_head'] * 1e6
  with pytest.raises(CheckpointError, match='values that float16 cannot hold'):
    written(tmp_path / 'too_small', dataclasses.replace(model, transformer=source(values)), dtype='float16')


def test_a_group_is_read_once_and_alone(tmp_path, monkeypatch):
  folder = written(tmp_path / 'model', a_model(n_layers=3))
  loaded, load_tree = [], native_lazy.load_tree
  monkeypatch.setattr(native_lazy, 'load_tree', lambda path: loaded.append(path.name) or load_tree(path))
  with native_lazy.open_native(folder) as opened:
    for name in opened.transformer.specs:
      opened.transformer.read(name)
  assert loaded == ['embedding', 'layers_0', 'layers_1', 'layers_2', 'final_norm', 'lm_head']


def test_writing_holds_one_group(tmp_path):
  model = a_model(n_layers=4)
  living, most = set(), 0

  def read(name):
    nonlocal most
    values = np.array(model.transformer.read(name))
    living.add(name)
    most = max(most, len(living))
    weakref.finalize(values, living.discard, name)
    return values

  written(tmp_path / 'model', dataclasses.replace(model, transformer=TensorSource(model.transformer.specs, read)))
  layer = sum(name.startswith('layers_0/') for name in model.transformer.specs)
  assert most == layer and len(model.transformer.specs) > 4 * layer


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c.update(origin={'format': 'elsewhere', 'n_shards': 1}), "origin of format 'elsewhere'"),
        (lambda c: c.update(origin=['meta']), "'origin' must hold format and n_shards"),
        (lambda c: c.update(origin={'format': 'meta', 'n_shards': 0}), 'with 0 shards'),
        (lambda c: c.update(transformer=[1]), "'transformer' is no object"),
        (lambda c: c['transformer'].update(d_ff=48), 'has shape .* asks for'),
        (lambda c: c['transformer'].update(n_layers=1), 'unknown parameter layers_1'),
        (lambda c: c['vqgan'].update(n_codes=64), 'asks for'),
    ],
)
def test_a_config_that_does_not_fit_is_named_before_a_tensor_is_read(tmp_path, change, message):
  folder = written(tmp_path / 'model', a_model())
  config = json.loads((folder / 'config.json').read_text())
  change(config)
  (folder / 'config.json').write_text(json.dumps(config))
  with pytest.raises(CheckpointError, match=message):
    native_lazy.open_native(folder)


def test_a_model_that_lacks_a_tensor_is_refused(tmp_path):
  model = a_model()
  values = {name: model.transformer.read(name) for name in model.transformer.specs if name != 'lm_head'}
  with pytest.raises(CheckpointError, match='lacks parameter lm_head'):
    written(tmp_path / 'model', dataclasses.replace(model, transformer=source(values)))


def test_a_file_of_the_origin_cannot_leave_the_folder(tmp_path):
  with pytest.raises(CheckpointError, match='no plain file name'):
    written(tmp_path / 'model', dataclasses.replace(a_model(), origin=Origin('meta', 1, {'../escape.json': b''})))
  assert [path.name for path in tmp_path.iterdir()] == ['model']


def test_damaged_values_are_an_error_of_one_line(tmp_path):
  folder = written(tmp_path / 'model', a_model())
  data = max((folder / 'transformer' / 'lm_head').rglob('*'), key=lambda path: path.stat().st_size if path.is_file() else 0)
  data.write_bytes(data.read_bytes()[:100])
  with pytest.raises(CheckpointError) as raised, native_lazy.open_native(folder) as opened:
    opened.transformer.read('lm_head')
  assert '\n' not in str(raised.value)


def test_flat_and_nested_are_inverse():
  leaves = {'a/b/c': 1, 'a/d': 2, 'e': 3}
  assert flat(nested(leaves)) == leaves
