"""The loss against its formula in numpy float64, and its cut into pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.errors import ConfigError
from chameleon_jax.training.losses import LossSums, Modalities, next_token_loss, sums_of_logits

IMAGES = (4, 8)  # ids of image codes
V, B, T, D = 12, 2, 6, 5


@pytest.fixture
def inputs():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(B, T, D)).astype(np.float32)
  kernel = rng.normal(size=(D, V)).astype(np.float32)
  targets = np.array([[4, 7, 8, 3, 0, 1], [5, 5, 11, 2, 1, 1]], np.int32)
  weights = np.array([[1, 1, 1, 0.5, 0, 0], [0, 1, 1, 1, 0, 0]], np.float32)
  return hidden, kernel, targets, weights


def _expected(hidden, kernel, targets, weights, *, z_loss, text_weight, image_weight):
  logits = hidden.astype(np.float64) @ kernel.astype(np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  ce = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  is_image = (targets >= IMAGES[0]) & (targets < IMAGES[1])
  w = weights * np.where(is_image, image_weight, text_weight)
  mean = lambda x, w: (x * w).sum() / w.sum()
  return {
      'loss': mean(ce, w) + z_loss * mean(log_z**2, w),
      'loss_text': mean(ce, weights * ~is_image),
      'loss_image': mean(ce, weights * is_image),
      'z': mean(log_z, weights),
      'logit_norm': mean(np.sqrt((logits**2).sum(-1)), weights),
  }


@pytest.mark.parametrize('chunks', [1, 2, 3, 6])
@pytest.mark.parametrize(('text_weight', 'image_weight'), [(1.0, 1.0), (1.0, 0.25), (2.0, 0.0)])
def test_loss_is_the_formula(inputs, chunks, text_weight, image_weight):
  hidden, kernel, targets, weights = inputs
  modalities = Modalities(IMAGES, text_weight=text_weight, image_weight=image_weight)
  objective, sums = next_token_loss(
    lambda h: h @ kernel, jnp.asarray(hidden), targets, weights, modalities=modalities, z_loss=0.1, chunks=chunks
  )
  expected = _expected(*inputs, z_loss=0.1, text_weight=text_weight, image_weight=image_weight)
  found = {'loss': sums.loss(0.1), **sums.metrics()}
  assert found.keys() == expected.keys()
  assert float(objective) == pytest.approx(expected['loss'] * float(sums.weight), rel=1e-5)
  for name, value in expected.items():
    assert float(found[name]) == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize('chunks', [1, 3])
def test_gradient_is_that_of_the_formula(inputs, chunks):
  hidden, kernel, targets, weights = inputs

  def loss(hidden, kernel):
    modalities = Modalities(IMAGES)
    summed, sums = next_token_loss(lambda h: h @ kernel, hidden, targets, weights, modalities=modalities, z_loss=0.1, chunks=chunks)
    return summed / sums.weight

  got = jax.grad(loss, argnums=(0, 1))(jnp.asarray(hidden), jnp.asarray(kernel))
  # d loss / d logits = w / sum(w) * (softmax - onehot + z_loss * 2 logZ softmax)
  logits = hidden.astype(np.float64) @ kernel
  log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
  softmax = np.exp(logits - log_z)
  by_logits = (weights / weights.sum())[..., None] * (softmax * (1 + 0.1 * 2 * log_z) - np.eye(V)[targets])
  np.testing.assert_allclose(got[0], by_logits @ kernel.T, atol=1e-6)
  np.testing.assert_allclose(got[1], np.einsum('btd,btv->dv', hidden, by_logits), atol=1e-6)


def test_chunks_never_hold_all_logits(inputs):
  """The largest array of the compiled gradient is smaller than the logits of all positions."""
  vocabulary, length = 512, 64
  hidden = jnp.ones((1, length, 4))
  targets = jnp.zeros((1, length), jnp.int32)
  weights = jnp.ones((1, length))

  def loss(kernel, chunks):
    modalities = Modalities(IMAGES)
    return next_token_loss(lambda h: h @ kernel, hidden, targets, weights, modalities=modalities, z_loss=1e-5, chunks=chunks)[0]

  def temporary_bytes(chunks):
    gradient = jax.jit(jax.grad(lambda kernel: loss(kernel, chunks)))
    return gradient.lower(jnp.ones((4, vocabulary))).compile().memory_analysis().temp_size_in_bytes

  assert temporary_bytes(1) >= 4 * length * vocabulary
  assert temporary_bytes(16) < 4 * length * vocabulary / 2


def _products(jaxpr):
  """Matrix products of a program, those inside its loops counted once."""
  return sum(
    (eqn.primitive.name == 'dot_general') + sum(_products(inner) for inner in jax.core.jaxprs_in_params(eqn.params)) for eqn in jaxpr.eqns
  )


def test_pieces_are_projected_once_and_a_frozen_projection_has_no_gradient(inputs):
  """Logits, gradient of the hidden states, gradient of the projection: three products where it trains, two where it does not."""
  hidden, kernel, targets, weights = map(jnp.asarray, inputs)

  def loss(kernel, hidden):
    return next_token_loss(lambda h: h @ kernel, hidden, targets, weights, modalities=Modalities(IMAGES), z_loss=0.1, chunks=3)[0]

  whole = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(kernel, hidden)
  assert _products(whole.jaxpr) == 3
  frozen = jax.make_jaxpr(jax.grad(loss, argnums=1))(kernel, hidden)
  assert _products(frozen.jaxpr) == 2
  by_hidden = jax.grad(loss, argnums=1)(kernel, hidden)
  np.testing.assert_array_equal(by_hidden, jax.grad(loss, argnums=(0, 1))(kernel, hidden)[1])


def test_a_missing_modality_is_not_a_number_and_does_no_harm():
  sums = sums_of_logits(jnp.zeros((1, 2, V)), np.array([[9, 10]], np.int32), np.ones((1, 2), np.float32), Modalities(IMAGES))
  assert float(sums.loss(0.0)) == pytest.approx(np.log(V))
  assert float(sums.metrics()['loss_text']) == pytest.approx(np.log(V))
  assert np.isnan(float(sums.metrics()['loss_image']))


def test_nothing_to_learn_gives_zero_loss():
  sums = sums_of_logits(jnp.zeros((1, 2, V)), np.array([[9, 10]], np.int32), np.zeros((1, 2), np.float32), Modalities(IMAGES))
  assert float(sums.loss(1.0)) == 0.0


def test_sums_add_up(inputs):
  hidden, kernel, targets, weights = inputs
  whole = sums_of_logits(jnp.asarray(hidden @ kernel), targets, weights, Modalities(IMAGES))
  parts = LossSums.zeros()
  for row in range(B):
    rows = slice(row, row + 1)
    parts = parts + sums_of_logits(jnp.asarray(hidden[rows] @ kernel), targets[rows], weights[rows], Modalities(IMAGES))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, parts)


def test_chunks_must_divide_the_row(inputs):
  hidden, kernel, targets, weights = inputs
  with pytest.raises(ConfigError, match='loss_chunks 4 does not divide rows of 6'):
    next_token_loss(lambda h: h @ kernel, jnp.asarray(hidden), targets, weights, modalities=Modalities(IMAGES), chunks=4)
