"""Shapes, parameter counts, order of codes and independence of decode, on tiny configs."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import VQGANConfig
from chameleon_jax.errors import ImageError
from chameleon_jax.models.vqgan import model as vqgan
from chameleon_jax.models.vqgan.model import VQGAN

TINY = VQGANConfig(
  resolution=16, n_codes=8, d_code=4, z_channels=6, base_channels=8, channel_multipliers=(1, 2), n_res_blocks=1, patch_size=2, norm_groups=4
)


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(1)
  abstract = nn.unbox(jax.eval_shape(VQGAN(TINY).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3))))['params']
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32), abstract)


def pictures(n: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


def count(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_released_parameter_counts():
  abstract = jax.eval_shape(VQGAN(VQGANConfig()).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32))['params']
  assert {name: count(nn.unbox(part)) for name, part in abstract.items()} == {
    'encoder': 27_194_880,
    'decoder': 39_294_851,
    'quantize': 2_097_152,
    'quant_conv': 65_792,
    'post_quant_conv': 65_792,
  }
  up_3 = nn.unbox(abstract)['decoder']['up_3']
  assert up_3['block_0']['nin_shortcut']['kernel'].shape == (1, 1, 512, 256)
  assert up_3['upsample']['conv']['kernel'].shape == (3, 3, 256, 256)
  assert set(nn.unbox(abstract)['encoder']['down_4']) == {'block_0', 'block_1'}
  assert set(nn.unbox(abstract)['decoder']['mid']['attn_1']) == {'norm', 'q', 'k', 'v', 'proj_out'}


def test_released_grid():
  config = VQGANConfig()
  codes, z = jax.eval_shape(
    lambda key, x: VQGAN(config).init_with_output(key, x, method='encode')[0],
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32),
  )
  assert codes.shape == (1, 32, 32) and codes.dtype == jnp.int32
  assert z.shape == (1, 32, 32, 256)


def test_every_parameter_has_axes():
  abstract = jax.eval_shape(VQGAN(TINY).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params']
  leaves = jax.tree.leaves(abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)


def test_pass_agrees_with_encode_and_decode(params):
  pixels = vqgan.to_pixels(pictures(2))
  out = VQGAN(TINY).apply({'params': params}, pixels)
  codes, z = VQGAN(TINY).apply({'params': params}, pixels, method='encode')
  assert out.reconstruction.shape == (2, 16, 16, 3) and out.codes.shape == (2, 4, 4)
  np.testing.assert_array_equal(out.codes, codes)
  np.testing.assert_allclose(out.z, z, rtol=1e-6)
  np.testing.assert_array_equal(out.z_q, np.asarray(params['quantize']['embedding'])[np.asarray(codes)])
  decoder_only = {name: params[name] for name in ('quantize', 'post_quant_conv', 'decoder')}
  decoded = VQGAN(TINY).apply({'params': decoder_only}, codes, method='decode')
  np.testing.assert_allclose(out.reconstruction, decoded, atol=1e-5)
  last = {'decoder': {'conv_out': params['decoder']['conv_out']}}
  np.testing.assert_allclose(VQGAN(TINY).apply({'params': last}, out.features, method='to_pixels'), out.reconstruction, atol=1e-6)


def test_unquantized_pass_feeds_latents_to_the_decoder(params):
  pixels = vqgan.to_pixels(pictures(1))
  out = VQGAN(TINY).apply({'params': params}, pixels, quantized=False)
  np.testing.assert_allclose(out.reconstruction, VQGAN(TINY).apply({'params': params}, out.z, method='decode_latents'), atol=1e-6)


def test_batches_give_the_codes_of_one_batch_in_row_major_order(params):
  images = pictures(5)
  codes = vqgan.encode_pictures(TINY, params, images, batch_size=2)
  grid, _ = VQGAN(TINY).apply({'params': params}, vqgan.to_pixels(images), method='encode')
  assert codes.shape == (5, 16) and codes.dtype == np.int32
  np.testing.assert_array_equal(codes[3, 1 * 4 + 2], grid[3, 1, 2])
  np.testing.assert_array_equal(codes, np.asarray(grid).reshape(5, 16))
  decoded = vqgan.decode_codes(TINY, params, codes, batch_size=2)
  assert decoded.shape == (5, 16, 16, 3) and decoded.dtype == np.uint8
  pixels = np.asarray(VQGAN(TINY).apply({'params': params}, grid, method='decode'))
  expected = np.rint((np.clip(pixels, -1, 1) + 1) * 127.5)
  assert np.abs(decoded.astype(int) - expected).max() <= 1  # a rounding tie may fall either way in another batch size
  assert np.mean(decoded != expected) < 0.01


def test_empty_batches(params):
  assert vqgan.encode_pictures(TINY, params, pictures(0)).shape == (0, 16)
  assert vqgan.decode_codes(TINY, params, np.zeros((0, 16), np.int32)).shape == (0, 16, 16, 3)


def test_bad_pictures_and_codes(params):
  with pytest.raises(ImageError, match='uint8'):
    vqgan.encode_pictures(TINY, params, np.zeros((1, 8, 8, 3), np.uint8))
  with pytest.raises(ImageError, match='16 codes'):
    vqgan.decode_codes(TINY, params, np.zeros((1, 15), np.int32))
  with pytest.raises(ImageError, match=r'0\.\.7'):
    vqgan.decode_codes(TINY, params, np.full((1, 16), 8, np.int32))


def test_pixel_conversion_round_trip():
  values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
  np.testing.assert_array_equal(vqgan.to_pictures(vqgan.to_pixels(values)), values)
  np.testing.assert_array_equal(vqgan.to_pictures(np.array([-3.0, -1, 0.002, 1, 3])), [0, 0, 128, 255, 255])


def test_bfloat16_keeps_latents_in_float32(params):
  config = dataclasses.replace(TINY, dtype='bfloat16')
  _, z = VQGAN(config).apply({'params': params}, vqgan.to_pixels(pictures(1)), method='encode')
  _, z32 = VQGAN(TINY).apply({'params': params}, vqgan.to_pixels(pictures(1)), method='encode')
  assert z.dtype == jnp.float32
  np.testing.assert_allclose(z, z32, atol=0.1)
