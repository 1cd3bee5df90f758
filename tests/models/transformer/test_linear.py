"""The matrix product and its gradients in all shapes, types and places it is used in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import MeshConfig
from chameleon_jax.models.transformer import linear as linear_module
from chameleon_jax.models.transformer.linear import linear, one_row
from chameleon_jax.models.transformer.quantization import QuantizedKernel
from chameleon_jax.partitioning import make_mesh

SHAPES = {
    'q_proj': ((2, 3, 16), (16, 4, 8), 1),
    'o_proj': ((2, 3, 4, 8), (4, 8, 16), 2),
    'mlp': ((2, 3, 16), (16, 24), 1),
    'one_row': ((1, 1, 16), (16, 4, 8), 1),
    'one_row_two_axes': ((1, 1, 4, 8), (4, 8, 16), 2),
    'wide': ((64, 128), (128, 256), 1),
}


def draw(shape, seed):
  """Small whole numbers: exact in bfloat16, and so are their sums in float32."""
  return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', SHAPES)
def test_product_and_gradients_are_exact_on_whole_numbers(name, dtype):
  shape, kernel_shape, dims = SHAPES[name]
  x, kernel = draw(shape, 0), draw(kernel_shape, 1)
  lead = shape[: len(shape) - dims]
  dy = draw((*lead, *kernel_shape[dims:]), 2)
  y, pullback = jax.vjp(jax.jit(lambda x, kernel: linear(x, kernel, dims, dtype, out_dtype='float32')), x, kernel)
  dx, dkernel = pullback(jnp.asarray(dy))
  n_rows, n_contracted = np.prod(lead), np.prod(kernel_shape[:dims])
  rows, matrix, columns = x.reshape(n_rows, -1), kernel.reshape(n_contracted, -1), dy.reshape(n_rows, -1)
  assert y.dtype == dx.dtype == dkernel.dtype == jnp.float32
  np.testing.assert_array_equal(y, (rows @ matrix).reshape(dy.shape))
  np.testing.assert_array_equal(dx, (columns @ matrix.T).reshape(shape))
  np.testing.assert_array_equal(dkernel, (rows.T @ columns).reshape(kernel_shape))


def test_types_of_result_and_gradients_follow_the_arguments():
  x, kernel = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 3), jnp.float32)
  y, pullback = jax.vjp(lambda x, kernel: linear(x, kernel, 1, 'bfloat16'), x, kernel)
  assert y.dtype == jnp.bfloat16
  assert [g.dtype for g in pullback(y)] == [jnp.bfloat16, jnp.float32]


def test_sums_are_float32():
  """256 + 256 ones: a bfloat16 accumulator would stop at 256."""
  y = linear(jnp.ones((2, 512)), jnp.ones((512, 8)), 1, 'bfloat16', out_dtype='float32')
  np.testing.assert_array_equal(y, np.full((2, 8), 512.0))


@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2)], ids=str)
def test_weight_gradient_inside_a_mesh(sizes):
  x, kernel = jnp.asarray(draw((8, 16, 32), 0)), jnp.asarray(draw((32, 64), 1))
  mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
  with jax.set_mesh(mesh):
    gradient = jax.jit(jax.grad(lambda kernel: jnp.sum(linear(x, kernel, 1, 'bfloat16', out_dtype='float32'))))(kernel)
  np.testing.assert_array_equal(gradient, np.repeat(np.asarray(x).sum((0, 1))[:, None], 64, axis=1))


@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'int8'])
def test_one_row_against_float64(kind):
  """Both factors are exact in float32, so the bound is that of 88 float32 additions and one rounding a product."""
  rng = np.random.default_rng(1)
  kernel = jnp.asarray(rng.integers(-127, 128, (11, 8, 24)) if kind == 'int8' else rng.standard_normal((11, 8, 24)), kind)
  x = jnp.asarray(rng.standard_normal((1, 1, 11, 8)), 'bfloat16')
  exact_x, exact_kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  y = jax.jit(one_row, static_argnums=2)(x, kernel, 2)
  expected, size = (np.tensordot(f(exact_x), f(exact_kernel), 2) for f in (np.asarray, np.abs))
  assert y.shape == (1, 1, 24) and y.dtype == jnp.float32
  assert (np.abs(y - expected) <= 89 * 2.0**-24 * size).all()


@pytest.mark.parametrize(('rows', 'kind'), [(1, 'bfloat16'), (2, 'bfloat16'), (1, 'int8'), (2, 'int8')])
def test_when_the_product_of_one_row_is_chosen(monkeypatch, rows, kind):
  called = []
  monkeypatch.setattr(linear_module, 'one_row', lambda *args: called.append(args) or one_row(*args))
  kernel = jnp.ones((16, 8), kind)
  kernel = QuantizedKernel(kernel, jnp.ones(8)) if kind == 'int8' else kernel
  trace = functools.partial(jax.eval_shape, lambda x: linear(x, kernel, 1, 'bfloat16'))
  trace(jnp.ones((rows, 16)))
  assert bool(called) == (rows == 1)
  called.clear()
  with jax.set_mesh(make_mesh(MeshConfig(1, 2, 4))):
    trace(jnp.ones((rows, 16)))
  assert not called


@pytest.mark.parametrize('kind', ['bfloat16', 'int8'])
def test_a_decode_loop_does_not_keep_a_wider_copy_of_the_kernel(kind):
  """XLA would convert the kernel in front of the loop, once and in float32."""
  kernel = jnp.ones((64, 4096), kind)
  kernel = QuantizedKernel(kernel, jnp.ones(4096)) if kind == 'int8' else kernel

  def loop(x, kernel):
    return jax.lax.fori_loop(0, 9, lambda _, x: linear(x, kernel, 1, 'bfloat16')[:, :64] + x, x)

  memory = jax.jit(loop).lower(jnp.ones((1, 64), 'bfloat16'), kernel).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 64 * 4096 * 4
