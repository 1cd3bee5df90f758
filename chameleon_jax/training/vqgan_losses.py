"""Objective of the image tokenizer, term by term (spec training.md 2.4 and 2.5).

Pure functions of arrays: no optimiser, no state, no network. Means run over the whole (possibly sharded) batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from chameleon_jax.array_types import AnyArray, Array, PyTree
from chameleon_jax.models.vqgan.quantizer import distances

ADAPTIVE_EPS = 1e-4
ADAPTIVE_MAX = 1e4


def code_loss(
  z: Float[Array, '*grid Z'], z_q: Float[Array, '*grid Z'], *, commitment_weight: float, codebook_weight: float
) -> Float[Array, '']:
  """commitment_weight * mean((z - sg(e))^2) + codebook_weight * mean((sg(z) - e)^2).

  The release has (1.0, 0.25), the order that taming calls legacy; the paper of VQ-VAE has (0.25, 1.0).
  """
  commitment = jnp.mean(jnp.square(z - jax.lax.stop_gradient(z_q)))
  codebook = jnp.mean(jnp.square(jax.lax.stop_gradient(z) - z_q))
  return commitment_weight * commitment + codebook_weight * codebook


def entropy_loss(z: Float[Array, '*grid Z'], codebook: Float[AnyArray, 'M Z'], *, temperature: float) -> Float[Array, '']:
  """Mean entropy of each latent's soft assignment less the entropy of the mean assignment (MAGVIT).

  Soft assignment = softmax(-distance^2 / temperature). Low when every latent is sure of its code and all codes are used
  alike; the minimum is -log(M).
  """
  logits = -distances(z.reshape(-1, z.shape[-1]), codebook) / temperature
  log_p = jax.nn.log_softmax(logits, axis=-1)
  p = jnp.exp(log_p)
  each = -jnp.mean(jnp.sum(p * log_p, axis=-1))
  mean = jnp.mean(p, axis=0)
  return each + jnp.sum(mean * jnp.log(mean + 1e-10))


def generator_loss(fake: Float[Array, '*patches']) -> Float[Array, '']:
  """-mean(D(reconstruction))."""
  return -jnp.mean(fake)


def hinge_loss(real: Float[Array, '*patches'], fake: Float[Array, '*patches']) -> Float[Array, '']:
  """Discriminator: 0.5 * (mean relu(1 - D(x)) + mean relu(1 + D(reconstruction)))."""
  return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def feature_matching_loss(real: Sequence[Array], fake: Sequence[Array]) -> Float[Array, '']:
  """Mean over layers of the mean absolute difference of the discriminator's activations; `real` gets no gradient."""
  terms = [jnp.mean(jnp.abs(jax.lax.stop_gradient(a) - b)) for a, b in zip(real, fake, strict=True)]
  return sum(terms, start=jnp.zeros(())) / len(terms)


def adaptive_weight(reconstruction_gradient: PyTree, generator_gradient: PyTree, weight: float) -> Float[Array, '']:
  """weight * clip(|grad nll| / (|grad g| + 1e-4), 0, 1e4), gradients with respect to the decoder's last kernel."""
  ratio = optax.global_norm(reconstruction_gradient) / (optax.global_norm(generator_gradient) + ADAPTIVE_EPS)
  return jax.lax.stop_gradient(weight * jnp.clip(ratio, 0, ADAPTIVE_MAX))


def code_counts(codes: Int[Array, '*grid'], n_codes: int) -> Float[Array, 'M']:
  """How often each code occurs."""
  return jnp.zeros((n_codes,), jnp.float32).at[codes.reshape(-1)].add(1.0)


def perplexity(counts: Float[Array, 'M']) -> Float[Array, '']:
  """exp(-sum p ln p) of code frequencies; between 1 and the number of codes."""
  p = counts / jnp.maximum(jnp.sum(counts), 1)
  return jnp.exp(-jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1))))
