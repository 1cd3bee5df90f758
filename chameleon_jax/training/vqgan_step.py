"""One update of the image tokenizer: autoencoder, codebook, and from its start step the discriminator.

A pure function of (state, pictures, key). Whether the adversarial part runs is decided outside, per step, and gives two
programs: before its start it costs nothing. Sources: spec training.md 2.4 (objective, adaptive weight, EMA codebook) and
2.3 (re-seeding dead codes from recent latents).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from chameleon_jax.array_types import AnyArray, Array, Params
from chameleon_jax.config import ImageTokenizerTrainConfig, VQLossConfig
from chameleon_jax.models.vqgan.discriminator import Discriminator
from chameleon_jax.models.vqgan.model import VQGAN, to_pixels
from chameleon_jax.models.vqgan.perceptual import make_perceptual
from chameleon_jax.partitioning import constrain
from chameleon_jax.training import vqgan_losses as losses
from chameleon_jax.training.vqgan_state import VQGANState

Metrics = dict[str, Array]
TrainStep = Callable[[VQGANState, Any, Array], tuple[VQGANState, Metrics]]


def make_vqgan_train_step(
  config: ImageTokenizerTrainConfig,
  optimizer: optax.GradientTransformation,
  discriminator_optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  adversarial: bool,
) -> TrainStep:
  """Returns step(state, pictures uint8 [B, H, W, 3], key) -> (state, metrics), compiled; the old state is given up.

  `adversarial` adds the generator and discriminator terms (config.loss.discriminator_weight must be positive).
  """
  model, discriminator = VQGAN(config.model), Discriminator(config.discriminator)
  perceptual = make_perceptual(config.loss)
  weights = config.loss

  def reconstruction_loss(pixels: Array, reconstruction: Array) -> tuple[Array, Metrics]:
    difference = reconstruction.astype(jnp.float32) - pixels
    l1, l2 = jnp.mean(jnp.abs(difference)), jnp.mean(jnp.square(difference))
    total = weights.l1_weight * l1 + weights.l2_weight * l2
    metrics = {'l1': l1, 'l2': l2}
    if perceptual is not None:
      metrics['perceptual'] = perceptual(pixels, reconstruction.astype(jnp.float32))
      total += weights.perceptual_weight * metrics['perceptual']
    return total, metrics

  def objective(params: Params, d_params: Params, pixels: Array, step: Array, key: Array) -> tuple[Array, tuple[Any, Metrics]]:
    quantized = step >= weights.quantize_start
    out = model.apply({'params': params}, pixels, quantized=quantized, deterministic=False, rngs={'dropout': key})
    nll, metrics = reconstruction_loss(pixels, out.reconstruction)
    code = losses.code_loss(
      out.z,
      out.z_q,
      commitment_weight=config.model.commitment_weight,
      codebook_weight=config.model.codebook_weight if weights.quantizer == 'gradient' else 0.0,
    )
    total = nll + jnp.where(quantized, code, 0.0)
    metrics |= {'reconstruction': nll, 'code': code}
    if weights.entropy_weight > 0:
      codebook = params['quantize']['embedding']
      codebook = codebook if weights.quantizer == 'gradient' else jax.lax.stop_gradient(codebook)
      metrics['entropy'] = losses.entropy_loss(out.z, codebook, temperature=weights.entropy_temperature)
      total += weights.entropy_weight * metrics['entropy']
    if adversarial:
      d_params = jax.lax.stop_gradient(d_params)
      fake, fake_activations = discriminator.apply({'params': d_params}, out.reconstruction)
      generator = losses.generator_loss(fake)
      scale = _adaptive_weight(params, d_params, jax.lax.stop_gradient(out.features), pixels)
      total += scale * generator
      metrics |= {'generator': generator, 'adaptive_weight': scale}
      if weights.feature_matching_weight > 0:
        _, real_activations = discriminator.apply({'params': d_params}, pixels)
        metrics['feature_matching'] = losses.feature_matching_loss(real_activations, fake_activations)
        total += weights.feature_matching_weight * metrics['feature_matching']
    metrics['loss'] = total
    return total, (out, metrics)

  def _adaptive_weight(params: Params, d_params: Params, features: Array, pixels: Array) -> Array:
    """Two gradients with respect to the decoder's last kernel only: nothing below it is differentiated."""
    last = params['decoder']['conv_out']

    def redo(kernel: Array) -> Array:
      return model.apply({'params': {'decoder': {'conv_out': {**last, 'kernel': kernel}}}}, features, method='to_pixels')

    def nll(kernel: Array) -> Array:
      return reconstruction_loss(pixels, redo(kernel))[0]

    def generator(kernel: Array) -> Array:
      return losses.generator_loss(discriminator.apply({'params': d_params}, redo(kernel))[0])

    return losses.adaptive_weight(jax.grad(nll)(last['kernel']), jax.grad(generator)(last['kernel']), weights.discriminator_weight)

  def discriminator_objective(d_params: Params, pixels: Array, reconstruction: Array) -> tuple[Array, Metrics]:
    real, _ = discriminator.apply({'params': d_params}, pixels)
    fake, _ = discriminator.apply({'params': d_params}, jax.lax.stop_gradient(reconstruction))
    loss = losses.hinge_loss(real, fake)
    return loss, {'discriminator': loss, 'logits_real': jnp.mean(real), 'logits_fake': jnp.mean(fake)}

  def step(state: VQGANState, pictures: UInt8[AnyArray, 'B H W 3'], key: Array) -> tuple[VQGANState, Metrics]:
    dropout_key, revive_key = jax.random.split(jax.random.fold_in(key, state.step))
    pixels = constrain(to_pixels(pictures), 'batch', None, None, None)
    (_, (out, metrics)), gradient = jax.value_and_grad(objective, has_aux=True)(
      state.params, state.discriminator, pixels, state.step, dropout_key
    )
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics['gradient_norm'] = optax.global_norm(gradient)

    d_params, d_opt_state = state.discriminator, state.discriminator_opt_state
    if adversarial:
      (_, d_metrics), d_gradient = jax.value_and_grad(discriminator_objective, has_aux=True)(d_params, pixels, out.reconstruction)
      d_updates, d_opt_state = discriminator_optimizer.update(d_gradient, d_opt_state, d_params)
      d_params = optax.apply_updates(d_params, d_updates)
      metrics |= d_metrics

    counts = losses.code_counts(out.codes, config.model.n_codes)
    metrics |= {'codes_in_batch': jnp.mean(counts > 0), 'perplexity': losses.perplexity(counts)}
    codebook, statistics = update_codebook(
      weights,
      old=state.params['quantize']['embedding'],
      new=params['quantize']['embedding'],
      state=state,
      z=out.z.reshape(-1, config.model.d_code),
      codes=out.codes.reshape(-1),
      counts=counts,
      key=revive_key,
    )
    metrics['codes_alive'] = jnp.mean(statistics['usage'] >= weights.revive_below)
    params = {**params, 'quantize': {'embedding': codebook}}
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      discriminator=d_params,
      discriminator_opt_state=d_opt_state,
      average=average_params(state.average, params, state.step, config.average_decay),
      **statistics,
    )
    return state, metrics

  compiled = jax.jit(step, donate_argnums=0)

  def run(state: VQGANState, pictures: AnyArray, key: Array) -> tuple[VQGANState, Metrics]:
    with jax.set_mesh(mesh):
      return compiled(state, pictures, key)

  return run


def average_params(average: Params | None, params: Params, step: Array, decay: float | None) -> Params | None:
  """decay * average + (1 - decay) * params, with decay at most (1 + step) / (10 + step) so that early weights fade.

  The codebook is copied: it is a running mean already, or jumps where a code is re-seeded.
  """
  if average is None or decay is None:
    return None
  d = jnp.minimum(decay, (1 + step) / (10 + step))
  mean = jax.tree.map(lambda a, p: d * a + (1 - d) * p, average, params)
  return {**mean, 'quantize': params['quantize']}


def update_codebook(
  config: VQLossConfig,
  *,
  old: Float[Array, 'M Z'],
  new: Float[Array, 'M Z'],
  state: VQGANState,
  z: Float[Array, 'n Z'],
  codes: Array,
  counts: Float[Array, 'M'],
  key: Array,
) -> tuple[Float[Array, 'M Z'], dict[str, Array]]:
  """Returns the codebook after this step and its statistics (fields of the state).

  `new` is the codebook after the gradient step, used as it is by the 'gradient' quantizer. The EMA quantizer takes
  N <- d N + (1 - d) n, m <- d m + (1 - d) sum z, e = m / N' with N' = (N + eps) / (sum N + M eps) * sum N. Every
  `revive_every` steps the codes under `revive_below` hits a step are put on random latents of this batch; just before
  quantization starts (at step 0 if it starts there), all codes are.
  """
  d = config.ema_decay
  usage = d * state.usage + (1 - d) * counts
  code_counts, code_sums, codebook = state.code_counts, state.code_sums, new
  if config.quantizer == 'ema':
    sums = jnp.zeros_like(old).at[codes].add(z)
    code_counts = d * code_counts + (1 - d) * counts
    code_sums = d * code_sums + (1 - d) * sums
    total = jnp.sum(code_counts)
    smoothed = (code_counts + config.ema_eps) / (total + len(counts) * config.ema_eps) * total
    codebook = code_sums / smoothed[:, None]
  if config.revive_every is not None:
    first = state.step == max(config.quantize_start - 1, 0)
    due = first | ((state.step + 1) % config.revive_every == 0)
    dead = due & (first | (usage < config.revive_below))

    def revive() -> tuple[Array, Array, Array, Array]:
      order = jax.random.permutation(key, len(z))
      seeds = jnp.take(z, jnp.take(order, jnp.arange(len(dead)) % len(z)), axis=0)
      return (
        jnp.where(dead[:, None], seeds, codebook),
        jnp.where(dead, 1.0, code_counts),
        jnp.where(dead[:, None], seeds, code_sums),
        jnp.where(dead, 2 * config.revive_below, usage),  # time to find followers before the next look
      )

    codebook, code_counts, code_sums, usage = jax.lax.cond(due, revive, lambda: (codebook, code_counts, code_sums, usage))
  return codebook, {'code_counts': code_counts, 'code_sums': code_sums, 'usage': usage}
