"""The patch discriminator: known parameter count and grid, and its batch norm against numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.config import DiscriminatorConfig
from chameleon_jax.models.vqgan.discriminator import BatchNorm, Discriminator


def test_parameter_count_and_grid_of_the_default():
  """2,765,633 is the count of the 3-layer PatchGAN with BatchNorm that taming trains; 256 px give 30 x 30 logits."""
  shapes = jax.eval_shape(Discriminator(DiscriminatorConfig()).init_with_output, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))
  (logits, activations), variables = shapes
  layers = {
    'conv_0': 4 * 4 * 3 * 64 + 64,
    'conv_1': 4 * 4 * 64 * 128,
    'norm_1': 2 * 128,
    'conv_2': 4 * 4 * 128 * 256,
    'norm_2': 2 * 256,
    'conv_3': 4 * 4 * 256 * 512,
    'norm_3': 2 * 512,
    'conv_out': 4 * 4 * 512 + 1,
  }
  assert {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in nn.unbox(variables)['params'].items()} == layers
  assert logits.shape == (1, 30, 30, 1)
  assert [a.shape[1:] for a in activations] == [(128, 128, 64), (64, 64, 128), (32, 32, 256), (31, 31, 512)]


def test_kernels_are_born_with_deviation_0_02():
  discriminator = Discriminator(DiscriminatorConfig(base_channels=16, n_layers=2))
  params = nn.unbox(discriminator.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3))))['params']
  assert abs(float(jnp.std(params['conv_2']['kernel'])) - 0.02) < 0.001
  assert abs(float(jnp.mean(params['norm_2']['scale'])) - 1) < 0.02


def test_batch_norm_against_numpy():
  x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (4, 5, 6, 2)), jnp.float32)
  scale, bias = np.array([2.0, 0.5]), np.array([1.0, -1.0])
  y = BatchNorm().apply({'params': {'scale': scale, 'bias': bias}}, x)
  x = np.asarray(x)
  expected = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5) * scale + bias
  np.testing.assert_allclose(y, expected, atol=1e-5)
