"""The forms with fewer products against the plain ones: results, gradients, and where they are chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.vqgan import convolution

SAME = ((1, 1), (1, 1))


def random(*shape: int, seed: int = 0) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def kernel_of(width: int, out: int) -> jax.Array:
  return random(3, 3, width, out, seed=1) / np.sqrt(9 * width)


same = functools.partial(convolution.plain, strides=(1, 1), padding=SAME)


@pytest.mark.parametrize(
  ('fast', 'reference', 'shape'),
  [
    (convolution.winograd, same, (2, 8, 12, 5)),
    (convolution.winograd, same, (2, 64, 64, 3)),  # picture by picture
    (convolution.phases, convolution.upsampled, (2, 5, 6, 5)),
  ],
)
def test_results_and_gradients_are_those_of_the_plain_form(fast, reference, shape):
  x, kernel = random(*shape), kernel_of(shape[-1], 7)
  y, gradients = jax.jit(jax.vjp, static_argnums=0)(reference, x, kernel)
  other, others = jax.jit(jax.vjp, static_argnums=0)(fast, x, kernel)
  np.testing.assert_allclose(other, y, atol=1e-5)
  dy = random(*y.shape, seed=2)
  for ours, theirs in zip(others(dy), gradients(dy)):
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, float(jnp.abs(theirs).max())))


def test_winograd_is_exact_where_float64_shows_it():
  """The three matrices are an identity, not an approximation: F(4, 3) of unit vectors."""
  inputs, kernels, outputs = convolution._matrices()
  for place in range(6):
    for tap in range(3):
      y = outputs @ (kernels[:, tap] * inputs[:, place])
      np.testing.assert_allclose(y, [float(output + tap == place) for output in range(4)], atol=1e-10)


def forms(function, x, kernel, *arguments) -> set[str]:
  """Which fast form a trace holds, told by its products: `winograd` has matrix products, `phases` 2x2 kernels."""
  text = str(jax.make_jaxpr(lambda x, kernel: function(x, kernel, *arguments))(x, kernel))
  return {name for name, sign in (('winograd', 'dot_general'), ('phases', '[2,2,')) if sign in text}


@pytest.mark.parametrize(
  ('shape', 'size', 'strides', 'padding', 'expected'),
  [
    ((1, 32, 32, 64), 3, (1, 1), SAME, {'winograd'}),
    ((1, 32, 32, 32), 3, (1, 1), SAME, set()),  # few channels
    ((9, 16, 16, 64), 3, (1, 1), SAME, set()),  # a small grid
    ((1, 34, 32, 64), 3, (1, 1), SAME, set()),  # no whole tiles
    ((1, 32, 32, 64), 3, (2, 2), ((0, 1), (0, 1)), set()),
    ((1, 32, 32, 64), 1, (1, 1), ((0, 0), (0, 0)), set()),
  ],
)
def test_where_winograd_is_chosen(shape, size, strides, padding, expected):
  x, kernel = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct((size, size, shape[-1], 64), jnp.bfloat16)
  assert forms(convolution.convolve, x, kernel, strides, padding) == expected


def test_where_phases_are_chosen():
  kernel = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)
  assert forms(convolution.convolve_upsampled, jax.ShapeDtypeStruct((1, 16, 16, 64), jnp.float32), kernel) == {'phases'}
  assert forms(convolution.convolve_upsampled, jax.ShapeDtypeStruct((1, 8, 8, 64), jnp.float32), kernel) == set()


def test_other_platforms_and_several_devices_keep_the_plain_forms(monkeypatch):
  x, kernel = jax.ShapeDtypeStruct((2, 32, 32, 64), jnp.float32), jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)
  mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    assert forms(convolution.convolve, x, kernel, (1, 1), SAME) == forms(convolution.convolve_upsampled, x, kernel) == set()
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert forms(convolution.convolve, x, kernel, (1, 1), SAME) == forms(convolution.convolve_upsampled, x, kernel) == set()


def test_bfloat16_is_multiplied_in_float32_and_rounded_once():
  x, kernel = random(1, 32, 32, 64).astype(jnp.bfloat16), kernel_of(64, 64).astype(jnp.bfloat16)
  y = jax.jit(lambda x, kernel: convolution.convolve(x, kernel, (1, 1), SAME))(x, kernel)
  wide = jax.jit(same)(x.astype(jnp.float32), kernel.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), wide, atol=1e-4, rtol=2**-8)
