"""Every term against its formula in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.training import vqgan_losses as losses


def test_code_loss_value_and_gradients():
  z, e = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 4.0]])
  value, (gradient_z, gradient_e) = jax.value_and_grad(
    lambda a, b: losses.code_loss(a, b, commitment_weight=1.0, codebook_weight=0.25), argnums=(0, 1)
  )(z, e)
  assert float(value) == pytest.approx(1.25 * 2.5)  # 1.25 mse: the released order
  np.testing.assert_allclose(gradient_z, [[-1.0, -2.0]])  # 1.0 * 2 (z - e) / 2
  np.testing.assert_allclose(gradient_e, [[0.25, 0.5]])


def test_entropy_loss_extremes():
  """Latents on their own codes reach -log(M); latents all on one code reach 0."""
  codebook = jnp.eye(4)
  assert float(losses.entropy_loss(codebook, codebook, temperature=0.01)) == pytest.approx(-np.log(4), abs=1e-4)
  assert float(losses.entropy_loss(jnp.tile(codebook[:1], (4, 1)), codebook, temperature=0.01)) == pytest.approx(0, abs=1e-4)


def test_entropy_loss_against_numpy():
  rng = np.random.default_rng(0)
  z, e = rng.normal(size=(5, 3)), rng.normal(size=(7, 3))
  logits = -np.square(z[:, None] - e).sum(-1) / 0.5
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = -(p * np.log(p)).sum(-1).mean() + (p.mean(0) * np.log(p.mean(0))).sum()
  value = losses.entropy_loss(jnp.asarray(z, jnp.float32), jnp.asarray(e, jnp.float32), temperature=0.5)
  assert float(value) == pytest.approx(expected, abs=1e-4)


def test_adversarial_losses():
  real, fake = jnp.array([2.0, 0.5]), jnp.array([-3.0, 0.5])
  assert float(losses.hinge_loss(real, fake)) == pytest.approx(0.5 * (0.25 + 0.75))
  assert float(losses.generator_loss(fake)) == pytest.approx(1.25)
  assert float(losses.feature_matching_loss([jnp.ones(2), jnp.zeros(4)], [jnp.zeros(2), jnp.full(4, 3.0)])) == pytest.approx(2.0)
  assert float(jax.grad(lambda a: losses.feature_matching_loss([a], [jnp.ones(())]))(jnp.zeros(()))) == 0


def test_adaptive_weight():
  nll, generator = jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])
  assert float(losses.adaptive_weight(nll, generator, 0.8)) == pytest.approx(0.8 * 5 / 2.0001)
  assert float(losses.adaptive_weight(nll, jnp.zeros(2), 0.8)) == pytest.approx(0.8 * 1e4)  # 5 / 1e-4 is cut
  gradient = jax.grad(lambda g: losses.adaptive_weight(nll, g, 0.8))(generator)
  np.testing.assert_array_equal(gradient, 0)


def test_counts_and_perplexity():
  counts = losses.code_counts(jnp.array([[0, 2], [2, 2]]), 4)
  np.testing.assert_array_equal(counts, [1, 0, 3, 0])
  assert float(losses.perplexity(counts)) == pytest.approx(np.exp(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75))), rel=1e-5)
