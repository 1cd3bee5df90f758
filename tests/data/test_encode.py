"""Pictures become codes in batches, whatever their number and size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax import presets
from chameleon_jax.data.encode import encoder_fingerprint, make_batch_encoder, make_encoder, world_pictures
from chameleon_jax.models.vqgan.model import VQGAN
from chameleon_jax.tokens import images
from chameleon_jax.training.state import unboxed


def test_codes_do_not_depend_on_the_batch():
  config = presets.tiny_vqgan()
  network = VQGAN(config)
  params = unboxed(jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params'])
  pictures = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
  found = make_encoder(config, params)(list(pictures))
  assert found.shape == (5, 16)
  assert found.dtype == np.int32
  expected = jax.jit(lambda x: network.apply({'params': params}, x, method='encode')[0])(images.to_float(pictures))
  np.testing.assert_array_equal(found, np.asarray(expected).reshape(5, -1))
  large = np.kron(pictures[0], np.ones((2, 2, 1), np.uint8))
  encode = make_encoder(config, params)
  np.testing.assert_array_equal(encode([large])[0], encode([images.preprocess(large, 16)])[0])
  np.testing.assert_array_equal(make_batch_encoder(config, params)(pictures[:4]), found[:4])


def test_the_fingerprint_is_of_what_decides_the_codes():
  config = presets.tiny_vqgan()
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(VQGAN(config).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params']
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), unboxed(abstract))
  found = encoder_fingerprint(config, params)
  assert make_encoder(config, params).fingerprint == found
  assert encoder_fingerprint(config, {name: part for name, part in params.items() if name != 'decoder'}) == found
  assert encoder_fingerprint(dataclasses.replace(config, dropout=0.5, dtype='bfloat16'), params) == found
  assert encoder_fingerprint(dataclasses.replace(config, n_codes=config.n_codes * 2), params) != found
  for part in ('encoder', 'quant_conv', 'quantize'):
    changed = {**params, part: jax.tree.map(lambda leaf: leaf * 2, params[part])}
    assert encoder_fingerprint(config, changed) != found


def test_the_world_is_told_by_the_name():
  assert world_pictures(['emoji_text']) is None
  assert world_pictures(['counting_pairs']) is None
  pictures = world_pictures(['emoji_text', 'emoji_pairs'])
  assert pictures.shape[1:] == (64, 64, 3)
  assert len(pictures) > 3000
