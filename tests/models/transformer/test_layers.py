"""Norms and dropout of a layer against closed forms."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.models.transformer import rope
from chameleon_jax.models.transformer.layers import HeadNorm, Layer, RMSNorm

CONFIG = presets.tiny_transformer()


def test_rms_norm():
  x = np.random.default_rng(0).standard_normal((1, 3, 32)).astype(np.float32) * 5
  weight = np.linspace(0.5, 2, 32, dtype=np.float32)
  ours = RMSNorm(CONFIG).apply({'params': {'weight': weight}}, jnp.asarray(x))
  np.testing.assert_allclose(ours, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight, rtol=1e-5)


def test_rms_norm_rounds_once():
  """Inside it is float32 whatever comes in: bfloat16 in, exact result rounded at the end."""
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 32)), jnp.bfloat16)
  weight = np.linspace(0.5, 2, 32, dtype=np.float32)
  ours = RMSNorm(dataclasses.replace(CONFIG, dtype='bfloat16')).apply({'params': {'weight': weight}}, x)
  exact = np.asarray(x, np.float64)
  exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * weight
  assert ours.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16), np.float32))


def test_head_norm_has_parameters_per_head_and_population_variance():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, 3, 4, 8)).astype(np.float32)
  weight, bias = rng.standard_normal((2, 4, 8)).astype(np.float32)
  ours = HeadNorm(CONFIG, 4, 'heads').apply({'params': {'weight': weight, 'bias': bias}}, jnp.asarray(x))
  expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize('norm_position', ['pre', 'post'])
def test_dropout_acts_on_both_branches_before_the_residual_sum(norm_position):
  """out - x = a / keep or 0, plus f / keep or 0: with the feed-forward switched off, one branch at a time is seen."""
  config = dataclasses.replace(CONFIG, dropout=0.25, norm_position=norm_position, max_seq_len=512)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 256, 32)), jnp.float32)
  positions = jnp.tile(jnp.arange(256), (4, 1))
  inputs = (x, None, rope.rotation(positions, config.d_head, config.rope_theta), positions, None)
  params = nn.meta.unbox(jax.jit(lambda key: Layer(config).init(key, *inputs, True)['params'])(jax.random.key(0)))

  @jax.jit
  def run(params):
    whole, _ = Layer(config).apply({'params': params}, *inputs, True)
    dropped, _ = Layer(config).apply({'params': params}, *inputs, False, rngs={'dropout': jax.random.key(1)})
    return whole - x, dropped - x

  for silent, kernel in (('feed_forward', 'down_proj'), ('attention', 'o_proj')):
    one_branch = {**params, silent: {**params[silent], kernel: jnp.zeros_like(params[silent][kernel])}}
    branch, seen = (np.asarray(part) for part in run(one_branch))
    kept = np.abs(seen) > 0
    np.testing.assert_allclose(seen[kept], branch[kept] / 0.75, rtol=2e-3, atol=2e-5)
    assert abs(kept.mean() - 0.75) < 0.01  # standard error 0.0024
    assert abs(kept.mean(axis=(0, 1)) - 0.75).max() < 0.08 and abs(kept.mean(axis=(0, 2)) - 0.75).max() < 0.2
