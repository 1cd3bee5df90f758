"""Derived values of the configs against the published numbers, and what the configs refuse."""

import dataclasses

import pytest

from chameleon_jax import config, presets


def test_released_vocabulary_puts_special_tokens_where_the_release_has_them():
  vocabulary = config.VocabularyConfig()
  first_reserved = 4 + vocabulary.n_codes + 2 + vocabulary.n_sentinels
  assert first_reserved == 8710  # end_turn of the release (spec model.md 5.1)
  assert vocabulary.text_start + vocabulary.n_text == 65_536


@pytest.mark.parametrize(
    'changes, downsampling, n_image_tokens',
    [
        ({}, 16, 1024),  # the release: 512 pixels, five levels
        ({'resolution': 256}, 16, 256),
        ({'resolution': 64, 'patch_size': 4, 'channel_multipliers': (1, 2)}, 8, 64),
    ],
)
def test_picture_grid(changes, downsampling, n_image_tokens):
  vqgan = dataclasses.replace(config.VQGANConfig(), **changes)
  assert (vqgan.downsampling, vqgan.n_image_tokens) == (downsampling, n_image_tokens)


@pytest.mark.parametrize(
    'make, fragment',
    [
        (lambda: config.VQGANConfig(resolution=500), 'not a multiple of the downsampling factor 16'),
        (lambda: config.VQGANConfig(base_channels=48), 'norm_groups'),
        (lambda: presets.tiny_transformer(n_kv_heads=3), 'not a multiple of n_kv_heads 3'),
        (lambda: presets.tiny_transformer(d_head=7), 'must be even'),
        (lambda: presets.tiny_transformer(dropout=1.5), r'dropout must lie in \[0, 1\]'),
        (lambda: config.VocabularyConfig(size=8000), 'leaves no room for text'),
        (lambda: config.MeshConfig(data=-1, fsdp=-1), 'only one mesh size may be -1'),
        (lambda: config.DataConfig(stages=(config.StageConfig(0.5, (('a', 1.0),)),)), 'sum to 0.5'),
        (lambda: config.StageConfig(0.5, (('a', 0.0),)), 'must be positive'),
        (lambda: config.DataConfig(batch_size=12, shards=8), 'data.batch_size 12 is not a multiple of data.shards 8'),
        (lambda: config.CheckpointConfig(every_steps=100, keep_every=250), 'keep_every 250 is not a multiple of .* 100'),
        (lambda: config.SamplingOptions(top_p=0.0), r'top_p must lie in \(0, 1\]'),
        (lambda: config.VQLossConfig(perceptual='lpips'), 'needs lpips_path'),
        (lambda: config.ImageTokenizerTrainConfig(optimizer=config.OptimizerConfig(name='muon')), 'optimizer.name must be adamw'),
        (
            lambda: config.TrainConfig(model=presets.tiny_transformer(), vocabulary=config.VocabularyConfig(), data=config.DataConfig()),
            'model.vocab_size 128 and vocabulary.size 65536 differ',
        ),
    ],
)
def test_a_bad_value_is_refused_with_its_name(make, fragment):
  with pytest.raises(ValueError, match=fragment):
    make()


def test_configs_are_values():
  assert presets.chameleon_7b() == presets.chameleon_7b()
  assert hash(presets.chameleon_7b()) == hash(presets.chameleon_7b())
  assert not config.SamplingOptions(guidance_text=1.0, guidance_image=1.0).guided
  assert config.SamplingOptions().guided
