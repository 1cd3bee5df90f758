"""Checkpoints of every format: told apart by their files, put on the devices, stacked for training; and what a wrong folder is told."""

import dataclasses
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import MeshConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import native, opening
from chameleon_jax.interop.lazy import NO_DECODER, NO_IMAGE_TOKENIZER, LazyModel, TensorSource, TensorSpec
from chameleon_jax.interop.mapping import transformer_specs
from chameleon_jax.interop.opening import detect_format, load_for_training, load_parts, load_tokenizers, open_checkpoint
from chameleon_jax.interop.trees import flat
from chameleon_jax.models.transformer.model import unstack_layers
from chameleon_jax.partitioning import make_mesh

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
MODELS = GOLDEN / 'models'


def a_model(dtype=np.float32, *, format='meta', **config):
  """A transformer whose tensors tell which of them were read."""
  rng = np.random.default_rng(0)
  transformer = presets.tiny_transformer(scan_layers=False, **config)
  values = {name: rng.normal(size=shape).astype(dtype) for name, shape in transformer_specs(transformer).items()}
  specs = {name: TensorSpec(value.shape, value.dtype) for name, value in values.items()}
  return LazyModel(path='here', format=format, transformer_config=transformer, transformer=TensorSource(specs, values.__getitem__))


# ------------------------------------------------------------------------------------------------ opening


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('meta_7b_like', 'meta'),
        ('meta_30b_like', 'meta'),
        ('meta_fused', 'meta'),
        ('hf_7b_like', 'huggingface'),
        ('hf_30b_like', 'huggingface'),
        ('anole_like', 'huggingface'),
        ('lumina_like', 'huggingface'),
    ],
)
def test_the_files_tell_the_format(name, expected):
  assert detect_format(MODELS / name) == expected
  with open_checkpoint(MODELS / name) as model:
    assert model.format == expected
    assert list(model.transformer.specs) == list(transformer_specs(model.transformer_config))


def test_our_own_folder_and_folders_that_are_none(tiny_model_folder, tmp_path):
  assert detect_format(tiny_model_folder) == 'orbax'
  assert detect_format(tmp_path) is None and detect_format(tmp_path / 'nothing') is None
  for text in ('{', '[]', '{"format": "other"}', '\x00'):
    (tmp_path / 'config.json').write_text(text)
    assert detect_format(tmp_path) is None


def test_a_folder_further_up_names_the_checkpoint_below(tiny_model_folder, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(tiny_model_folder, run / 'model')
  (run / 'config.json').write_text('{"model": {}}')
  (run / 'checkpoints').mkdir()
  with pytest.raises(CheckpointError, match=rf'{run} is no checkpoint, but it holds one: give {run}/model$'):
    open_checkpoint(run)
  with pytest.raises(CheckpointError, match=rf'holds one: give {run}/model$'):
    open_checkpoint(tmp_path)
  with pytest.raises(CheckpointError, match=r'it holds 7: give one of .*anole_like, .*meta_fused$'):
    open_checkpoint(MODELS)


def test_an_unknown_folder_is_told_what_was_looked_for(tmp_path):
  for index in range(10):
    (tmp_path / f'file{index}').write_text('')
  with pytest.raises(CheckpointError, match=r'params.json .*Meta.*Hugging Face.*found file0, .* and 2 more') as raised:
    open_checkpoint(tmp_path)
  assert '\n' not in str(raised.value)
  with pytest.raises(CheckpointError, match='is a file; give the folder that holds it'):
    open_checkpoint(tmp_path / 'file0')
  with pytest.raises(CheckpointError, match='does not exist'):
    open_checkpoint(tmp_path / 'nowhere')
  with pytest.raises(CheckpointError, match='tokenizer folder .*nowhere does not exist'):
    open_checkpoint(MODELS / 'hf_7b_like', tokenizer=tmp_path / 'nowhere')


def test_a_tokenizer_folder_gives_the_parts_that_are_missing(tmp_path):
  with open_checkpoint(MODELS / 'lumina_like') as alone, open_checkpoint(MODELS / 'lumina_like', tokenizer=GOLDEN / 'tokenizer') as whole:
    assert alone.vqgan is None
    assert whole.format == 'huggingface' and whole.text_tokenizer.to_json() == alone.text_tokenizer.to_json()
    assert any(name.startswith('decoder/') for name in whole.vqgan.specs)
    assert NO_IMAGE_TOKENIZER in alone.notes and not {NO_IMAGE_TOKENIZER, NO_DECODER} & set(whole.notes), 'what was added is not missed'
    assert whole.vqgan.read('quantize/embedding').shape == (whole.vqgan_config.n_codes, whole.vqgan_config.d_code)


def test_a_decoder_is_taken_from_an_image_tokenizer_with_the_same_codebook(tmp_path):
  """The port of the release lacks the decoder that vqgan.ckpt holds."""
  from chameleon_jax.interop.convert import convert

  convert(MODELS / 'meta_7b_like', tmp_path / 'port', 'huggingface')
  with open_checkpoint(tmp_path / 'port') as half, open_checkpoint(MODELS / 'meta_7b_like') as meta:
    assert not any(name.startswith('decoder/') for name in half.vqgan.specs)
    with open_checkpoint(tmp_path / 'port', tokenizer=GOLDEN / 'tokenizer') as whole:
      assert NO_DECODER in half.notes and NO_DECODER not in whole.notes
      assert set(whole.vqgan.specs) == set(meta.vqgan.specs)
      for name in meta.vqgan.specs:
        np.testing.assert_array_equal(whole.vqgan.read(name), meta.vqgan.read(name))
  with pytest.raises(CheckpointError, match='have different codebooks|are of different sizes'):
    open_checkpoint(MODELS / 'hf_7b_like', tokenizer=GOLDEN / 'tokenizer')


# ------------------------------------------------------------------------------------------- to the devices


@pytest.mark.parametrize(
    ('stored', 'format', 'dtype', 'expected'),
    [
        (np.float32, 'meta', None, 'float32'),
        (ml_dtypes.bfloat16, 'meta', None, 'bfloat16'),
        (np.float16, 'huggingface', None, 'float32'),
        (ml_dtypes.bfloat16, 'meta', 'float32', 'float32'),
        (np.float32, 'orbax', 'bfloat16', 'bfloat16'),
    ],
)
def test_the_types_of_loaded_weights(stored, format, dtype, expected):
  model = a_model(stored, format=format)
  parts = load_parts(model, dtype=dtype)
  assert (parts.transformer_config.dtype, parts.transformer_config.param_dtype) == (expected, expected)
  for name, leaf in flat(parts.transformer_params).items():
    np.testing.assert_array_equal(leaf, model.transformer.read(name).astype(jnp.dtype(expected)))


def test_our_own_config_decides_by_itself():
  model = a_model(np.float16, format='orbax')
  model = dataclasses.replace(model, transformer_config=dataclasses.replace(model.transformer_config, dtype='bfloat16', scan_layers=True))
  parts = load_parts(model)
  assert parts.transformer_config == dataclasses.replace(model.transformer_config, scan_layers=False)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(parts.transformer_params)} == {'float32'}


def test_how_it_was_trained_does_not_decide_how_it_runs_here():
  """Kernels of the machine it was trained on, pieces of rows and what was recomputed."""
  model = a_model(format='orbax', attention_implementation='pallas', sequence_parallel=True, remat='full')
  assert load_parts(model).transformer_config == presets.tiny_transformer(scan_layers=False)


def test_weights_are_split_over_a_mesh_and_the_same():
  model = a_model()
  mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
  parts, alone = load_parts(model, mesh=mesh), load_parts(model)
  leaves = flat(parts.transformer_params)
  jax.tree.map(np.testing.assert_array_equal, parts.transformer_params, alone.transformer_params)
  assert all(leaf.sharding.mesh == mesh for leaf in leaves.values())
  assert leaves['layers_1/feed_forward/gate_proj'].addressable_shards[0].data.shape == (32 // 4, 64 // 2)
  assert leaves['layers_0/attention/q_proj'].addressable_shards[0].data.shape == (32 // 4, 4 // 2, 8)
  assert leaves['embedding'].addressable_shards[0].data.shape == (128 // 8, 32)


def test_a_dimension_that_does_not_divide_lies_whole_on_every_device():
  model = a_model(vocab_size=130)
  parts = load_parts(model, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))
  assert parts.transformer_params['embedding'].addressable_shards[0].data.shape == (130, 32)
  assert parts.transformer_params['lm_head'].addressable_shards[0].data.shape == (32 // 4, 130 // 2)
  np.testing.assert_array_equal(parts.transformer_params['embedding'], model.transformer.read('embedding'))


def test_one_tensor_is_read_at_a_time_and_none_of_it_is_a_view():
  model = a_model()
  buffer = np.zeros(max(spec.nbytes for spec in model.transformer.specs.values()), np.uint8)

  def read(name):  # every tensor in the same memory, as a mapped file might be remapped
    values = model.transformer.read(name)
    view = buffer[: values.nbytes].view(values.dtype).reshape(values.shape)
    view[...] = values
    return view

  parts = load_parts(dataclasses.replace(model, transformer=TensorSource(model.transformer.specs, read)))
  for name, leaf in flat(parts.transformer_params).items():
    np.testing.assert_array_equal(leaf, model.transformer.read(name))


@pytest.mark.parametrize('scan_layers', [True, False])
def test_weights_to_train_on_come_as_the_run_wants_them(scan_layers):
  folder = MODELS / 'meta_30b_like'
  parts = load_for_training(folder, scan_layers=scan_layers)
  config = parts.transformer_config
  assert config.scan_layers is scan_layers and config.norm_position == 'post'
  assert jax.tree.structure(parts.transformer_params) == jax.tree.structure(nn.meta.unbox(native.abstract_transformer(config)))
  params = unstack_layers(parts.transformer_params) if scan_layers else parts.transformer_params
  with open_checkpoint(folder) as model:
    for name, leaf in flat(params).items():
      np.testing.assert_array_equal(leaf, model.transformer.read(name))
    assert parts.vocabulary == model.vocabulary


def test_tokenizers_alone(tiny_model_folder, monkeypatch):
  read = []
  place = opening._place
  monkeypatch.setattr(opening, '_place', lambda source, dtype, shardings: read.append(len(source.specs)) or place(source, dtype, shardings))
  parts = load_tokenizers(tiny_model_folder)
  assert parts.transformer_params is None and parts.text_tokenizer is not None and len(read) == 1
  jax.tree.map(np.testing.assert_array_equal, parts.vqgan_params, native.load_model(tiny_model_folder).vqgan_params)
