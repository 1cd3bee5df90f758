"""config.json in every spelling, and the networks it may describe that are none of ours."""

import dataclasses

import pytest

from chameleon_jax import presets
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.huggingface import config as huggingface_config
from tests.interop.tiny_huggingface import (
  CONFIG,
  VQ,
)


def read(changes=(), vq=()):
  values = CONFIG | dict(changes) | {'vq_config': CONFIG['vq_config'] | dict(vq)}
  return huggingface_config.transformer_config(values, 'config.json'), huggingface_config.vqgan_config(values, 'config.json')


def test_both_spellings_are_read():
  expected = read()
  assert expected[1] == VQ
  old = {name: CONFIG['vq_config'][name] for name in ('embed_dim', 'resolution', 'num_res_blocks')}
  old |= {'n_embed': 16, 'z_channels': 16, 'ch': 32, 'ch_mult': [1, 2], 'double_z': False, 'out_ch': 3, 'attn_resolutions': None}
  assert huggingface_config.vqgan_config({'vq_config': old}, 'c') == VQ
  assert read(vq=old)[1] == VQ, 'side by side'
  assert huggingface_config.vqgan_config({}, 'c') == presets.vqgan_512()
  for changes in (
      {'rope_theta': None, 'rope_parameters': {'rope_theta': 10000.0, 'rope_type': 'default'}},
      {'rope_parameters': {'rope_theta': 10000, 'rope_type': 'default'}, 'rope_scaling': None},
      {'rope_theta': None},
      {'rope_scaling': {'type': 'default'}},
      {'head_dim': 8},
  ):
    assert read(changes)[0] == expected[0], changes
  assert read({'rope_theta': None, 'rope_parameters': {'rope_theta': 1e6}})[0].rope_theta == 1e6
  assert read({'num_key_value_heads': None})[0].n_kv_heads == 4
  assert read({'swin_norm': True, 'rms_norm_eps': 1e-6})[0].norm_position == 'post'
  assert read({'rms_norm_eps': 1e-6})[0].qk_norm_eps == 1e-5, 'whatever the other eps'
  seven = huggingface_config.transformer_config({}, 'c')
  assert dataclasses.replace(seven, dropout=0.1, dtype='bfloat16', remat='full', scan_layers=True) == presets.chameleon_7b()


def test_networks_that_are_none_of_ours_are_refused_by_name():
  for changes, message in (
      ({'attention_bias': True}, 'attention_bias is .True.; the released networks have no biases'),
      ({'mlp_bias': True}, 'mlp_bias'),
      ({'tie_word_embeddings': True}, 'tie_word_embeddings'),
      ({'hidden_act': 'gelu'}, 'only silu is known'),
      ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "rope_scaling.type is 'linear'; only unscaled rotary embeddings"),
      ({'rope_parameters': {'rope_type': 'yarn'}}, "rope_parameters.rope_type is 'yarn'"),
      ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'ours turns all channels'),
      ({'rope_parameters': {'rope_theta': 5.0}}, 'rope_theta and rope_parameters.rope_theta mean the same but differ'),
      ({'rope_parameters': 'default'}, 'rope_parameters must be an object'),
      ({'rope_theta': 0}, 'rope_theta is'),
      ({'rope_theta': 10**400}, 'must be a number'),
      ({'rms_norm_eps': float('nan')}, 'must be a number'),
      ({'hidden_size': 30}, 'not a multiple of num_attention_heads'),
      ({'hidden_size': 0}, 'hidden_size must be a whole number from 1'),
      ({'num_hidden_layers': 2.0}, 'num_hidden_layers must be a whole number'),
      ({'num_attention_heads': True}, 'num_attention_heads must be a whole number'),
      ({'vocab_size': 10**30}, 'vocab_size must be a whole number'),
      ({'num_key_value_heads': 3}, 'n_heads 4 is not a multiple of n_kv_heads 3'),
      ({'head_dim': 7}, 'd_head 7 must be even'),
      ({'swin_norm': 'yes'}, 'swin_norm must be true or false'),
  ):
    with pytest.raises(CheckpointError, match=message):
      read(changes)
  for changes, message in (
      ({'attn_resolutions': [16]}, 'attn_resolutions is .*; ours has attention in the middle block alone'),
      ({'double_latent': True}, 'double_latent'),
      ({'double_z': True}, 'mean the same but differ|double_latent'),
      ({'attn_type': 'none'}, 'only vanilla is known'),
      ({'in_channels': 1}, 'RGB'),
      ({'out_ch': 4}, 'RGB'),
      ({'n_embed': 17}, 'num_embeddings and n_embed mean the same but differ'),
      ({'ch_mult': [1, 2, 2]}, 'channel_multiplier and ch_mult mean the same'),
      ({'channel_multiplier': []}, 'channel_multiplier must be a list of 1 to 16'),
      ({'channel_multiplier': [1] * 99}, 'channel_multiplier must be a list of 1 to 16'),
      ({'channel_multiplier': [1, 'a']}, 'channel_multiplier must be a whole number'),
      ({'base_channels': 33}, 'do not split into 32 groups'),
      ({'resolution': 17}, 'not a multiple of the downsampling factor'),
      ({'dropout': 2}, 'must lie in'),
  ):
    with pytest.raises(CheckpointError, match=message) as caught:
      read(vq=changes)
    assert 'vq_config' in str(caught.value)
