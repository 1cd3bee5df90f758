"""Weights in int8: the bound on what rounding costs, the product they stand for, and the network around it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from chameleon_jax.config import MeshConfig
from chameleon_jax.models.transformer import quantization
from chameleon_jax.models.transformer.linear import linear
from chameleon_jax.models.transformer.model import Transformer, decoding_params, dequantize_params, quantize_params, unstack_layers
from chameleon_jax.models.transformer.quantization import QuantizedKernel, contracted_axes, dequantize, quantize
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.presets import tiny_transformer

CONFIG = tiny_transformer(n_layers=2, init_std=0.3, max_seq_len=16)
KERNELS = {'q_proj': (16, 4, 8), 'o_proj': (4, 8, 16), 'up_proj': (16, 24), 'lm_head': (16, 40), 'embedding': (40, 16)}


def draw(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope='module')
def params():
  shapes = nn.meta.unbox(jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


@pytest.mark.parametrize(('place', 'kind'), [(np.asarray, np.ndarray), (jnp.asarray, jax.Array)])
@pytest.mark.parametrize('name', KERNELS)
def test_no_weight_moves_by_more_than_half_a_step(name, place, kind):
  weights, axes = draw(KERNELS[name]), contracted_axes(name)
  kernel = quantize(place(weights), axes)
  assert isinstance(kernel.values, kind) and isinstance(kernel.scale, kind)  # they stay where they lie
  kernel = jax.device_get(kernel)
  step = np.expand_dims(kernel.scale, axes)
  assert kernel.values.dtype == np.int8 and kernel.values.shape == weights.shape and kernel.shape == weights.shape
  assert kernel.scale.dtype == np.float32 and kernel.scale.ndim == weights.ndim - len(axes)
  np.testing.assert_array_equal(np.abs(kernel.values.astype(int)).max(axes), 127)  # every channel uses its whole range
  np.testing.assert_allclose(step, np.abs(weights).max(axes, keepdims=True) / 127, rtol=1e-6)
  moved = np.abs(weights.astype(np.float64) - kernel.values.astype(np.float64) * step)
  assert (moved <= step * (0.5 + 127 * 2.0**-23)).all()  # the second term: 127 steps, divided and rounded in float32
  assert moved.max() > 0.3 * step.min()  # not exact by accident


def test_a_channel_of_nought_and_one_of_tiny_weights():
  kernel = quantize(np.array([[0, 1e-42, 3], [0, -1e-42, -6]], np.float32), (0,))
  assert np.isfinite(kernel.scale).all() and (kernel.scale > 0).all()
  np.testing.assert_array_equal(dequantize(kernel, (0,))[:, 0], 0)
  np.testing.assert_allclose(dequantize(kernel, (0,))[:, 2], [3, -6], atol=6 / 127 / 2)


@pytest.mark.parametrize('place', [np.asarray, jnp.asarray], ids=['numpy', 'jax'])
@pytest.mark.filterwarnings('error')
def test_a_channel_that_is_not_finite_says_so_in_its_scale(place):
  kernel = quantize(place(np.array([[1, np.nan, 3], [2, 0, -np.inf]], np.float32)), (0,))
  np.testing.assert_array_equal(np.isfinite(kernel.scale), [True, False, False])


def test_whole_steps_come_back_exactly():
  weights = np.array([[127, -3], [-64, 127], [5, 0]], np.float32) * np.array([0.5, 0.25], np.float32)
  kernel = quantize(weights, (0,))
  np.testing.assert_array_equal(kernel.scale, [0.5, 0.25])
  np.testing.assert_array_equal(dequantize(kernel, (0,)), weights)


@pytest.mark.parametrize('rows', [1, 3, 4, 5], ids='{} rows'.format)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['q_proj', 'o_proj', 'up_proj'])
def test_the_product_is_that_of_the_weights_it_stands_for(name, dtype, rows):
  """Against float64; the operands are exact in both types, so only the sums round."""
  axes = contracted_axes(name)
  kernel = quantize(draw(KERNELS[name]), axes)
  x = np.asarray(jnp.asarray(draw((rows, 1, *KERNELS[name][: len(axes)]), 1), dtype), np.float64)
  y = jax.jit(lambda x, kernel: linear(x, kernel, len(axes), dtype, out_dtype='float32'))(jnp.asarray(x, dtype), kernel)
  weights = np.expand_dims(kernel.scale.astype(np.float64), axes) * kernel.values
  expected, size = (np.tensordot(f(x), f(weights), len(axes)) for f in (np.asarray, np.abs))
  assert y.dtype == jnp.float32
  assert (np.abs(y - expected) <= 33 * 2.0**-24 * size).all()  # at most 32 terms, and the scale


def test_which_parameters_are_quantized(params):
  quantized = quantize_params(params, CONFIG)
  layer = quantized['layers_1']
  leaves = {**layer['attention'], **layer['feed_forward'], 'embedding': quantized['embedding'], 'lm_head': quantized['lm_head']}
  is_int8 = {name: isinstance(leaf, QuantizedKernel) for name, leaf in leaves.items()}
  assert is_int8 == {name: name not in ('q_norm', 'k_norm') for name in leaves}
  assert layer['attention']['q_proj'].scale.shape == (CONFIG.n_heads, CONFIG.d_head)
  assert quantized['embedding'].scale.shape == (CONFIG.vocab_size,)
  again = quantize_params(quantized, dataclasses.replace(CONFIG, scan_layers=False))
  assert jax.tree.all(jax.tree.map(np.array_equal, again, quantized))
  assert jax.tree.structure(dequantize_params(quantized)) == jax.tree.structure(unstack_layers(params))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_logits_are_those_of_the_weights_they_stand_for_and_near_those_of_the_originals(params, dtype):
  config = dataclasses.replace(CONFIG, dtype=dtype, scan_layers=False)
  quantized = quantize_params(params, CONFIG)
  tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 8))
  apply = jax.jit(lambda params: Transformer(config).apply({'params': params}, tokens)[0])
  original, rounded, stood_for = map(apply, (unstack_layers(params), decoding_params(quantized, config), dequantize_params(quantized)))
  same = {'float32': 1e-5, 'bfloat16': 2e-2}[dtype]  # in bfloat16 the weights stood for are rounded once more
  assert np.linalg.norm(rounded - stood_for) <= same * np.linalg.norm(original)
  # A product is off by a share of about 127 ** -1 / 12 ** 0.5 * max|w| / rms(w), less than 0.007 here, and 14 follow one another.
  assert np.linalg.norm(rounded - original) <= 0.05 * np.linalg.norm(original)
  assert np.linalg.norm(rounded - original) > 1e-3 * np.linalg.norm(original)


def test_an_adapter_goes_on_top_of_quantized_weights():
  kernel = quantize(draw((16, 24)), (0,))
  adapter = {'a': jnp.asarray(draw((16, 2), 1)), 'b': jnp.asarray(draw((2, 24), 2))}
  x = jnp.asarray(draw((3, 16), 3))
  y = linear(x, jax.tree.map(jnp.asarray, kernel), 1, 'float32', adapter=adapter)
  np.testing.assert_allclose(y, x @ (dequantize(kernel, (0,)) + adapter['a'] @ adapter['b']), rtol=1e-4, atol=1e-4)


def test_the_scale_lies_as_its_axes_do():
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
  kernel = NamedSharding(mesh, PartitionSpec('fsdp', 'tensor', None))
  out = NamedSharding(mesh, PartitionSpec('tensor', None, 'fsdp'))
  assert quantization.quantized_shardings(kernel, (0,)).scale.spec == PartitionSpec('tensor', None)
  assert quantization.quantized_shardings(out, (0, 1)).scale.spec == PartitionSpec('fsdp')
  assert quantization.quantized_shardings(NamedSharding(mesh, PartitionSpec(('tensor', 'fsdp'))), (1,)).scale.spec[0] == ('tensor', 'fsdp')
