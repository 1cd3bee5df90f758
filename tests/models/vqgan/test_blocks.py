"""Blocks against numpy: folding, resampling, norm, attention."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.config import VQGANConfig
from chameleon_jax.models.vqgan import blocks

CONFIG = VQGANConfig(
  resolution=8, n_codes=4, d_code=4, z_channels=4, base_channels=4, channel_multipliers=(1, 2), n_res_blocks=1, patch_size=1, norm_groups=2
)


def random(*shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def run(module, x):
  variables = nn.unbox(module.init(jax.random.key(0), x))
  return variables['params'], np.asarray(module.apply(variables, x))


def naive_conv(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
  """Cross-correlation of an already padded picture, in loops."""
  size = kernel.shape[0]
  rows, columns = (x.shape[1] - size) // stride + 1, (x.shape[2] - size) // stride + 1
  out = np.zeros((x.shape[0], rows, columns, kernel.shape[-1]))
  for i in range(rows):
    for j in range(columns):
      patch = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
      out[:, i, j] = np.einsum('bhwc,hwcd->bd', patch, kernel)
  return out


def test_space_to_depth_drawn_example():
  folded = blocks.space_to_depth(jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None], 2)
  np.testing.assert_array_equal(folded, np.array([1.0, 2, 3, 4]).reshape(1, 1, 1, 4))


def test_depth_to_space_is_the_inverse():
  x = random(2, 8, 12, 3)
  for p in (1, 2, 4):
    folded = blocks.space_to_depth(x, p)
    assert folded.shape == (2, 8 // p, 12 // p, 3 * p * p)
    np.testing.assert_array_equal(blocks.depth_to_space(folded, p), x)


def test_downsample_pads_right_and_bottom_only():
  x = random(1, 4, 4, 4)
  params, y = run(blocks.Downsample(CONFIG, 4), x)
  expected = naive_conv(np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))), np.asarray(params['conv']['kernel']), 2)
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_upsample_repeats_then_convolves():
  x = random(1, 3, 3, 4)
  params, y = run(blocks.Upsample(CONFIG, 4), x)
  big = np.kron(np.asarray(x), np.ones((1, 2, 2, 1)))
  expected = naive_conv(np.pad(big, ((0, 0), (1, 1), (1, 1), (0, 0))), np.asarray(params['conv']['kernel']), 1)
  np.testing.assert_allclose(y, expected, atol=1e-5)


def numpy_norm(x: np.ndarray, groups: int) -> np.ndarray:
  b, h, w, c = x.shape
  g = x.reshape(b, h * w, groups, c // groups)
  g = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + 1e-6)
  return g.reshape(x.shape)


def test_group_norm_against_numpy_and_flax():
  x = 3 + 2 * random(2, 4, 6, 8)
  affine = {'scale': random(8) + 1, 'bias': random(8)}
  ours = blocks.GroupNorm(CONFIG).apply({'params': affine}, x)
  expected = numpy_norm(np.asarray(x, np.float64), 2) * np.asarray(affine['scale']) + np.asarray(affine['bias'])
  np.testing.assert_allclose(ours, expected, atol=1e-5)
  plain = nn.GroupNorm(num_groups=2, epsilon=1e-6)
  weighted = lambda norm, params, x: jnp.sum(norm.apply({'params': params}, x) * random(*x.shape))
  gradients = [jax.grad(functools.partial(weighted, norm), (0, 1))(affine, x) for norm in (blocks.GroupNorm(CONFIG), plain)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *gradients)


def test_res_block_against_numpy():
  x = random(2, 4, 4, 4)
  params, y = run(blocks.ResBlock(CONFIG, 4, 8), x)
  silu = lambda t: t / (1 + np.exp(-t))  # noqa: E731
  pad = ((0, 0), (1, 1), (1, 1), (0, 0))
  h = naive_conv(np.pad(silu(numpy_norm(np.asarray(x), 2)), pad), np.asarray(params['conv1']['kernel']), 1)
  h = naive_conv(np.pad(silu(numpy_norm(h, 2)), pad), np.asarray(params['conv2']['kernel']), 1)
  np.testing.assert_allclose(y, h + np.asarray(x) @ np.asarray(params['nin_shortcut']['kernel'])[0, 0], atol=1e-4)
  assert 'nin_shortcut' not in run(blocks.ResBlock(CONFIG, 4, 4), x)[0]


def test_attention_against_numpy():
  x = random(1, 2, 3, 4)
  params, y = run(blocks.AttentionBlock(CONFIG, 4), x)
  kernel = {name: np.asarray(params[name]['kernel'])[0, 0] for name in ('q', 'k', 'v', 'proj_out')}
  flat = numpy_norm(np.asarray(x), 2).reshape(6, 4)
  scores = (flat @ kernel['q']) @ (flat @ kernel['k']).T / 2  # sqrt(4 channels)
  weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  np.testing.assert_allclose(y, np.asarray(x) + (weights @ (flat @ kernel['v']) @ kernel['proj_out']).reshape(1, 2, 3, 4), atol=1e-5)
