"""A mesh that does not fit is refused before the first step, in one line with keys, numbers and what would fit."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh

from chameleon_jax import presets
from chameleon_jax.config import DataConfig, DiscriminatorConfig, ImageTokenizerTrainConfig, OptimizerConfig, TrainConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.interop.native import abstract_transformer, abstract_vqgan
from chameleon_jax.partitioning import AXES
from chameleon_jax.training.mesh_checks import check_image_tokenizer_mesh, check_mesh, check_parameters

CONFIG = TrainConfig(model=presets.tiny_transformer(), vocabulary=presets.tiny_vocabulary(), data=DataConfig(seq_len=32, batch_size=8))
IMAGES = ImageTokenizerTrainConfig(model=presets.tiny_vqgan(), discriminator=DiscriminatorConfig(base_channels=8, n_layers=1), batch_size=8)


def _mesh(*sizes):
  return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def _error(check, *arguments):
  with pytest.raises(ConfigError) as raised:
    check(*arguments)
  assert '\n' not in str(raised.value)
  return str(raised.value)


@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_meshes_that_fit(sizes):
  check_mesh(CONFIG, _mesh(*sizes))
  check_parameters(abstract_transformer(CONFIG.model), _mesh(*sizes))


def test_key_value_heads_are_not_copied():
  line = _error(check_mesh, CONFIG, _mesh(1, 2, 4))
  assert 'config.mesh (data=1, fsdp=2, tensor=4) does not fit: config.mesh.tensor 4 does not divide config.model.n_kv_heads 2' in line
  assert line.endswith('(key/value heads are split, never copied); 1 or 2 would')


def test_every_size_that_tensor_splits_is_named():
  model = dataclasses.replace(CONFIG.model, n_heads=6, n_kv_heads=6, d_ff=63, vocab_size=129)
  vocabulary = dataclasses.replace(CONFIG.vocabulary, size=129)
  line = _error(check_mesh, dataclasses.replace(CONFIG, model=model, vocabulary=vocabulary), _mesh(1, 1, 4))
  assert 'not divide config.model.n_heads 6 and config.model.n_kv_heads 6 and config.model.d_ff 63 and config.model.vocab_size 129' in line
  assert line.endswith('1 or 3 would')  # the common divisors of 6, 63 and 129


def test_the_length_of_a_row_counts_where_it_is_split():
  odd = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, seq_len=31))
  check_mesh(odd, _mesh(1, 4, 2))
  split = dataclasses.replace(odd, model=dataclasses.replace(odd.model, sequence_parallel=True))
  assert 'config.mesh.tensor 2 does not divide config.data.seq_len 31; 1 would' in _error(check_mesh, split, _mesh(1, 4, 2))


def test_width_and_table_split_over_fsdp():
  wide = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, batch_size=24))
  line = _error(check_mesh, wide, _mesh(1, 24, 1))
  assert 'config.mesh.fsdp 24 does not divide config.model.d_model 32; 1, 2, 4, 8, 16 or 32 would' in line
  assert 'config.mesh.tensor x fsdp = 24 does not divide config.model.vocab_size 128' in line


@pytest.mark.parametrize(
    ('batch', 'accumulate', 'sizes', 'advice'),
    [(12, 1, (2, 4, 1), 'set it to 8 or 16'), (3, 1, (4, 1, 1), 'set it to 4'), (8, 3, (1, 1, 1), 'set it to 6 or 9')],
)
def test_rows_split_over_data_fsdp_and_microbatches(batch, accumulate, sizes, advice):
  config = dataclasses.replace(
      CONFIG, data=dataclasses.replace(CONFIG.data, batch_size=batch), optimizer=OptimizerConfig(accumulate_steps=accumulate)
  )
  line = _error(check_mesh, config, _mesh(*sizes))
  assert f'config.data.batch_size {batch} is not a multiple of config.mesh.data x fsdp {sizes[0] * sizes[1]} times' in line
  assert f'config.optimizer.accumulate_steps {accumulate}; {advice}' in line


def test_all_problems_stand_in_one_line():
  line = _error(check_mesh, dataclasses.replace(CONFIG, data=DataConfig(seq_len=32, batch_size=9)), _mesh(2, 1, 4))
  assert 'n_kv_heads 2' in line and '; config.data.batch_size 9' in line


def test_the_image_tokenizer():
  boxed = abstract_vqgan(IMAGES.model)
  check_image_tokenizer_mesh(IMAGES, _mesh(2, 4, 1), boxed)
  assert 'config.mesh.tensor is 2, but the image tokenizer has nothing' in _error(check_image_tokenizer_mesh, IMAGES, _mesh(2, 2, 2), boxed)
  line = _error(check_image_tokenizer_mesh, IMAGES, _mesh(3, 1, 1), boxed)
  assert line.startswith('batch_size 8 does not split over 3 devices (data x fsdp); set config.batch_size to 6 or 9')
  many = dataclasses.replace(IMAGES, batch_size=32)
  line = _error(check_image_tokenizer_mesh, many, _mesh(1, 32, 1), boxed)
  assert "parameter 'decoder/conv_in/kernel' has 32 channels" not in line  # 32 channels do split
  assert 'splits into 32; make config.mesh.fsdp a divisor of 16, and config.mesh.data larger' in line


def test_a_mesh_of_devices_is_as_good_as_an_abstract_one():
  devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
  check_mesh(CONFIG, Mesh(devices, AXES))
