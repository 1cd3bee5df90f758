"""Meta's argument files: how they are merged, what they must agree with, and what is written into them."""

import dataclasses
import json

import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.meta.params import (
    Sizes,
    argument_files,
    ffn_width,
    image_output_note,
    merge,
    port_output_note,
    transformer_config,
    with_defaults,
)

F4 = np.dtype('f4')
SIZES = Sizes(vocab_size=64, d_model=32, n_layers=2, q_rows=32, kv_rows=16, d_ff=96, d_head=4)


def files_of(params, consolidate=None):
  files = {'params.json': json.dumps(params).encode()}
  return files if consolidate is None else files | {'consolidate_params.json': json.dumps(consolidate).encode()}


def config_of(params, consolidate=None, sizes=SIZES):
  return transformer_config(files_of({'multiple_of': 16} | params, consolidate), sizes, 'folder')


def test_later_objects_win_and_unknown_fields_count_for_nothing():
  params = {'dim': 1, 'n_layers': 1, 'n_heads': 1, 'x': 'y', 'model': {'n_layers': 2, 'n_heads': 2, 'y': 1}}
  files = files_of(params, {'n_heads': 3, 'src': 'a'})
  assert merge(files, 'folder') == {'dim': 1, 'n_layers': 2, 'n_heads': 3}
  assert with_defaults({'dim': 7})['dim'] == 7 and with_defaults({})['rope_theta'] == 10000.0
  assert with_defaults({})['model_parallel_size'] == 1 and with_defaults({})['swin_norm'] is False


def test_inner_widths():
  assert ffn_width(4096, None, 256) == 11008 and ffn_width(8192, None, 256) == 22016
  assert ffn_width(4096, 1.3, 1024) == 14336


def test_the_tensors_decide_and_the_file_must_agree():
  config, notes = config_of({})
  assert (config.n_heads, config.n_kv_heads, config.d_head, config.d_ff, config.norm_position) == (8, 4, 4, 96, 'pre') and notes == ()
  assert config.max_seq_len == 4096 and config.norm_eps == config.qk_norm_eps == 1e-5
  for name, value in {'dim': 31, 'n_layers': 3, 'n_heads': 4, 'n_kv_heads': 8, 'vocab_size': 63, 'qk_normalization': False}.items():
    with pytest.raises(CheckpointError, match=f'folder: the argument files give {name} {value}, the tensors'):
      config_of({name: value})
  assert config_of({'vocab_size': -1, 'n_kv_heads': None})[0] == config


def test_another_inner_width_is_a_note():
  config, notes = config_of({'multiple_of': 256})
  assert config.d_ff == 96 and len(notes) == 1 and 'inner width of 256, the tensors have 96' in notes[0]


@pytest.mark.parametrize(
    'params, fragment',
    [
        ({'norm_eps': 'x'}, "argument norm_eps is 'x', which is no value for it"),
        ({'norm_eps': 0}, 'argument norm_eps'),
        ({'norm_eps': float('nan')}, 'argument norm_eps'),
        ({'rope_theta': -1.0}, 'argument rope_theta'),
        ({'swin_norm': 1}, 'argument swin_norm'),
        ({'multiple_of': 2.5}, 'argument multiple_of'),
        ({'multiple_of': None}, 'argument multiple_of'),
        ({'n_heads': True}, 'argument n_heads'),
        ({'n_layers': 10**20}, 'argument n_layers'),
        ({'model': []}, '"model" is a list, not an object'),
        ({'chameleon_jax': {'max_seq_len': 0}}, "max_seq_len is '0', which is no length"),
    ],
)
def test_values_that_are_none(params, fragment):
  with pytest.raises(CheckpointError, match=fragment) as caught:
    config_of(params)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('data', [b'', b'[1]', b'{"a": ', b'\xff', b'[' * 100000])
def test_files_that_are_no_json_object(data):
  with pytest.raises(CheckpointError, match='folder/params.json') as caught:
    merge({'params.json': data}, 'folder')
  assert '\n' not in str(caught.value)


def test_without_params_json():
  with pytest.raises(CheckpointError, match='has no params.json; the order of the norms'):
    merge({}, 'folder')


def test_sizes_that_fit_no_network():
  for change, fragment in (
      ({'q_rows': 30}, 'do not split into heads of 4'),
      ({'d_model': 64}, '32 query rows and width 64'),
      ({'d_head': 0}, 'do not split into heads'),
      ({'kv_rows': 12}, 'n_heads 8 is not a multiple of n_kv_heads 3'),
  ):
    with pytest.raises(CheckpointError, match=fragment):
      config_of({}, sizes=dataclasses.replace(SIZES, **change))


def test_files_that_still_say_the_same_are_kept_and_others_changed_where_they_differ():
  config, _ = config_of({'n_kv_heads': 4, 'n_heads': 8})
  params, late = {'seed': 1, 'multiple_of': 16, 'n_heads': 8, 'qk_normalization': True}, {'n_kv_heads': 4, 'dim': 32, 'n_layers': 2}
  base = files_of(params, late | {'dtype': 'fp32'})
  assert argument_files(config, 1, F4, base) == base
  wider = dataclasses.replace(config, n_kv_heads=2, norm_position='post', max_seq_len=64)
  files = argument_files(wider, 2, np.dtype('f2'), base)
  assert json.loads(files['params.json']) == params | {'swin_norm': True, 'chameleon_jax': {'max_seq_len': 64}}
  assert json.loads(files['consolidate_params.json']) == late | {'n_kv_heads': 2, 'dtype': 'fp16', 'model_parallel_size': 2}
  again, _ = transformer_config(files, dataclasses.replace(SIZES, kv_rows=8), 'folder')
  assert again == wider


def test_new_files_of_the_released_sizes():
  files = argument_files(dataclasses.replace(presets.chameleon_34b(), param_dtype='bfloat16'), 4, np.dtype('f4'), {})
  model = json.loads(files['params.json'])['model']
  assert (model['multiple_of'], model['ffn_dim_multiplier'], model['n_kv_heads'], model['swin_norm']) == (256, None, 8, True)
  assert json.loads(files['consolidate_params.json']) == {'model_parallel_size': 4, 'dtype': 'fp32', 'tokenizer_path': None}


def test_the_note_on_pictures():
  assert len(image_output_note(files_of({}, {'tgt': 'x_noimggen_y'}))) == 1
  assert image_output_note(files_of({}, {'tgt': 'x', 'tokenizer_path': 'noimggen'})) == ()
  assert image_output_note({}) == image_output_note({'consolidate_params.json': b'{'}) == ()


def test_the_port_in_the_sizes_of_the_release_gets_the_note_too():
  for config, name in ((presets.chameleon_7b(), '7b'), (presets.chameleon_34b(), '30b')):
    (note,) = port_output_note(config, decoder=False)
    assert name in note and 'image output is suppressed' in note and 'Anole' in note
    assert port_output_note(config, decoder=True) == (), 'Anole has one'
  assert port_output_note(presets.tiny_transformer(), decoder=False) == ()
