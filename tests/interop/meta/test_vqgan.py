"""The image tokenizer's config from the tensors and vqgan.yaml, and back."""

import dataclasses
import time

import pytest
import yaml

from chameleon_jax.config import VQGANConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import mapping
from chameleon_jax.interop.meta.vqgan import vqgan_config, vqgan_yaml
from tests.interop.meta_reference import DDCONFIG, make_vqgan

SHAPES = {name: array.shape for name, array in make_vqgan().items()}
TINY = VQGANConfig(resolution=8, n_codes=32, d_code=5, z_channels=6, base_channels=32, channel_multipliers=(1, 2), n_res_blocks=1)


def document(ddconfig=DDCONFIG, **params):
  return yaml.safe_dump({'model': {'params': {'embed_dim': 5, 'n_embed': 32, 'ddconfig': ddconfig} | params}}).encode()


def refused(fragment, shapes, data):
  with pytest.raises(CheckpointError, match=fragment) as caught:
    vqgan_config(shapes, data, 'folder')
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 400


def test_with_and_without_the_yaml():
  assert vqgan_config(SHAPES, document(), 'folder') == (TINY, ())
  config, notes = vqgan_config(SHAPES, None, 'folder')
  assert config == dataclasses.replace(TINY, resolution=512)
  assert len(notes) == 1 and '512 pixels' in notes[0]
  assert vqgan_config(SHAPES, document({'resolution': 8, 'dropout': 0.25}), 'folder')[0] == dataclasses.replace(TINY, dropout=0.25)


def test_the_released_sizes_are_seen_in_the_shapes():
  released = VQGANConfig()
  shapes = {mapping.vqgan_name(name): mapping.vqgan_their_shape(name, shape) for name, shape in mapping.vqgan_specs(released).items()}
  assert vqgan_config(shapes, vqgan_yaml(released, None), 'folder') == (released, ())
  assert vqgan_config(shapes, None, 'folder')[0] == released


@pytest.mark.parametrize(
    'ddconfig, params, fragment',
    [
        ({'z_channels': 7}, {}, 'z_channels is 7, but 6 in vqgan.ckpt'),
        ({'ch': 64}, {}, 'ch is 64, but 32'),
        ({'ch_mult': [1, 1]}, {}, r'ch_mult is .*, but \(1, 2\)'),
        ({'ch_mult': 'x'}, {}, "ch_mult is 'x'"),
        ({'num_res_blocks': 2}, {}, 'num_res_blocks is 2, but 1'),
        ({}, {'n_embed': 33}, 'n_embed is 33, but 32'),
        ({}, {'embed_dim': [[1] * 50 for _ in range(50)]}, 'embed_dim is'),
        ({'double_z': True}, {}, 'double_z is True; our network knows only False'),
        ({'in_channels': 1}, {}, 'in_channels is 1'),
        ({'attn_type': 'linear'}, {}, "attn_type is 'linear'"),
        ({'resolution': None}, {}, 'resolution is None, which is no size'),
        ({'resolution': 9}, {}, 'resolution 9 is not a multiple'),
        ({'resolution': True}, {}, 'resolution is True'),
        ({'dropout': 'x'}, {}, "dropout is 'x'"),
    ],
)
def test_a_yaml_that_contradicts(ddconfig, params, fragment):
  refused(fragment, SHAPES, document(DDCONFIG | ddconfig, **params))


@pytest.mark.parametrize(
    'data',
    [
        *(b'', b'{', b'\xff\xfe', b'3', b'model: {params: {}}', b'model: {params: {ddconfig: 1}}', b'!!python/name:os.system', b'[' * 5000),
        *(b'!!bool x', b'!!int ""', b'!!timestamp x'),
    ],
)
def test_a_yaml_that_is_none(data):
  refused('folder/vqgan.yaml', SHAPES, data)


def merge_bomb(width, depth):
  """Each level merges the one before `width` times: width ** depth keys to go through."""
  lines = ['a0: &a0 {x: 1}']
  lines += [f'a{level}: &a{level} {{<<: [{", ".join([f"*a{level - 1}"] * width)}]}}' for level in range(1, depth + 1)]
  return '\n'.join(lines).encode() + b'\n' + document()


@pytest.mark.parametrize(
    'data, fragment',
    [
        (merge_bomb(9, 9), 'has more than 16 aliases'),
        (b'a: &a [x]\nb: [' + b', '.join([b'*a'] * 1000) + b']\n' + document(), 'has more than 16 aliases'),
        (b'x: ' + b'[' * 60_000 + b']' * 60_000, 'bytes, more than the 65536 read here'),
        (b'x: ' + b'[' * 30_000 + b']' * 30_000, 'has lists deeper than 32'),
        (document() + b'#' * 70_000, 'bytes, more than the 65536 read here'),
        (document(DDCONFIG | {'resolution': 10**9}), 'no size of a picture'),
        (document(DDCONFIG | {'num_res_blocks': 10**9}), 'num_res_blocks is 1000000000, but 1'),
    ],
)
def test_a_yaml_that_asks_for_too_much_is_refused_at_once(data, fragment):
  before = time.perf_counter()
  refused(fragment, SHAPES, data)
  assert time.perf_counter() - before < 2


def test_a_yaml_with_a_few_aliases_is_read():
  data = document().replace(b'resolution: 8', b'resolution: &side 8\n      y: *side')
  assert b'*side' in data and vqgan_config(SHAPES, data, 'folder')[0] == TINY


@pytest.mark.parametrize(
    'name, shape, fragment',
    [
        ('quantize.embedding.weight', None, 'has no tensor quantize.embedding.weight'),
        ('encoder.conv_out.weight', (6, 64), 'encoder.conv_out.weight has shape .*, not 4 axes'),
        ('encoder.conv_in.weight', (32, 12, 3, 3), 'pictures have 3 channels'),
        ('encoder.down.1.block.0.conv1.weight', (50, 32, 3, 3), r'levels of the encoder have \[32, 50\] channels'),
        ('encoder.down.0.attn.0.q.weight', (32, 32, 1, 1), 'encoder.down.0.attn.0.q.weight is attention inside a level'),
        ('encoder.conv_in.weight', (0, 3, 3, 3), 'not 4 axes|another architecture'),
    ],
)
def test_tensors_of_another_architecture(name, shape, fragment):
  shapes = {key: value for key, value in SHAPES.items() if key != name}
  refused(fragment, shapes if shape is None else shapes | {name: shape}, None)


def test_channels_that_do_not_split_into_groups():
  narrow = {name: tuple(16 if n == 32 else 32 if n == 64 else n for n in shape) for name, shape in SHAPES.items()}
  refused('do not split into 32 groups', narrow, None)


def test_the_yaml_is_kept_where_it_says_the_same():
  base = b'# a comment\n' + document(lossconfig={'target': 'x'})
  assert vqgan_yaml(TINY, base) == base
  changed = yaml.safe_load(vqgan_yaml(dataclasses.replace(TINY, resolution=16), base))
  ddconfig = DDCONFIG | {'resolution': 16}
  assert changed['model']['params'] == {'embed_dim': 5, 'n_embed': 32, 'lossconfig': {'target': 'x'}, 'ddconfig': ddconfig}
  fresh = yaml.safe_load(vqgan_yaml(TINY, None))['model']['params']
  assert fresh == {'embed_dim': 5, 'n_embed': 32, 'ddconfig': DDCONFIG}
