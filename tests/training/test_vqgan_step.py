"""The tokenizer's update: codebook statistics against numpy, gradients against the written objective, sharding.

Compiling a step costs seconds, so the tests share three configs.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chameleon_jax.config import DiscriminatorConfig, ImageTokenizerTrainConfig, MeshConfig, VQGANConfig, VQLossConfig
from chameleon_jax.models.vqgan.discriminator import Discriminator
from chameleon_jax.models.vqgan.model import VQGAN, to_pixels
from chameleon_jax.models.vqgan.perceptual import multiscale_distance
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.training.vqgan_losses import entropy_loss
from chameleon_jax.training.vqgan_state import abstract_state, make_initial_state
from chameleon_jax.training.vqgan_step import average_params, make_vqgan_train_step

MODEL = VQGANConfig(
  resolution=16, n_codes=8, d_code=4, z_channels=8, base_channels=8, channel_multipliers=(1,), n_res_blocks=1, patch_size=4, norm_groups=4
)
BASE = ImageTokenizerTrainConfig(model=MODEL, discriminator=DiscriminatorConfig(base_channels=8, n_layers=1), batch_size=8)
GRADIENT = dataclasses.replace(
  BASE, loss=VQLossConfig(l2_weight=0.5, discriminator_weight=0.0, entropy_weight=0.1, entropy_temperature=1.0)
)
EMA = dataclasses.replace(
  BASE,
  loss=VQLossConfig(
    perceptual='none',
    quantizer='ema',
    ema_decay=0.9,
    ema_eps=1e-2,
    quantize_start=2,
    revive_every=3,
    revive_below=1.0,
    discriminator_weight=0.8,
  ),
)
ADVERSARIAL = dataclasses.replace(
  BASE, average_decay=0.9, loss=VQLossConfig(perceptual='none', quantizer='ema', discriminator_weight=0.8, feature_matching_weight=0.3)
)
SGD = optax.sgd(0.1)
ONE_DEVICE = MeshConfig(fsdp=1)


def mesh_of(config: MeshConfig):
  return make_mesh(config, jax.devices()[:1] if config == ONE_DEVICE else None)


@functools.cache
def step_of(config, adversarial: bool, mesh_config: MeshConfig):
  return make_vqgan_train_step(config, SGD, SGD, mesh_of(mesh_config), adversarial=adversarial)


@functools.cache
def initial(config):
  """A state at step 0 with random parameters from numpy: compiling a real start would take seconds."""
  rng = np.random.default_rng(1)
  state = abstract_state(config, SGD, SGD, mesh_of(ONE_DEVICE))
  draw = lambda leaf: np.asarray(rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), np.float32)
  zeros = lambda leaf: np.zeros(leaf.shape, leaf.dtype)
  state = dataclasses.replace(jax.tree.map(zeros, state), params=jax.tree.map(draw, state.params))
  state = dataclasses.replace(state, discriminator=jax.tree.map(draw, state.discriminator), code_counts=np.ones(8, np.float32))
  average = state.params if state.average is not None else None
  return dataclasses.replace(state, code_sums=state.params['quantize']['embedding'].copy(), average=average)


def batch() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)


def run(config, state, *, adversarial=False, mesh_config=ONE_DEVICE):
  """Host copy of the state after one step, and the metrics."""
  state, metrics = step_of(config, adversarial, mesh_config)(jax.tree.map(jnp.asarray, state), batch(), jax.random.key(1))
  return jax.device_get(state), {name: float(value) for name, value in metrics.items()}


@functools.partial(jax.jit, static_argnames='quantized')
def forward(params, *, quantized=True):
  return VQGAN(MODEL).apply({'params': params}, to_pixels(batch()), quantized=quantized)


def latents(params) -> np.ndarray:
  return np.asarray(forward(params).z).reshape(-1, 4)


def distance_to_latents(codebook, params) -> np.ndarray:
  """For each code the largest component of its difference to the nearest latent."""
  return np.abs(latents(params)[:, None] - codebook).max(-1).min(0)


def test_gradient_quantizer_follows_the_gradient_of_the_written_objective():
  before = initial(GRADIENT)
  after, metrics = run(GRADIENT, before)

  @jax.jit
  @jax.value_and_grad
  def objective(params):
    out = forward(params)
    difference = out.reconstruction - to_pixels(batch())
    nll = jnp.abs(difference).mean() + 0.5 * jnp.square(difference).mean() + multiscale_distance(to_pixels(batch()), out.reconstruction)
    stop = jax.lax.stop_gradient
    code = jnp.square(out.z - stop(out.z_q)).mean() + 0.25 * jnp.square(stop(out.z) - out.z_q).mean()
    return nll + code + 0.1 * entropy_loss(out.z, params['quantize']['embedding'], temperature=1.0)

  loss, gradient = objective(before.params)
  assert metrics['loss'] == pytest.approx(float(loss), rel=1e-4)
  expected = jax.tree.map(lambda p, g: p - 0.1 * g, before.params, gradient)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.params, expected)
  assert not np.array_equal(after.params['quantize']['embedding'], before.params['quantize']['embedding'])
  assert int(after.step) == 1 and after.average is None and after.discriminator == {}


def test_ema_codebook_against_numpy():
  before = dataclasses.replace(initial(EMA), step=np.array(6, np.int32))  # neither seeding nor revival is due
  after, _ = run(EMA, before)
  out = jax.device_get(forward(before.params))
  z, codes = out.z.reshape(-1, 4), out.codes.reshape(-1)
  counts = np.bincount(codes, minlength=8)
  sums = np.stack([z[codes == i].sum(0) for i in range(8)])
  n = 0.9 * before.code_counts + 0.1 * counts
  m = 0.9 * before.code_sums + 0.1 * sums
  smoothed = (n + 1e-2) / (n.sum() + 8 * 1e-2) * n.sum()
  np.testing.assert_allclose(after.code_counts, n, rtol=1e-5)
  np.testing.assert_allclose(after.code_sums, m, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(after.params['quantize']['embedding'], m / smoothed[:, None], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(after.usage, 0.1 * counts, rtol=1e-5)


def test_dead_codes_are_put_on_latents():
  usage = np.array([5, 0, 5, 5, 5, 0, 5, 5], np.float32)
  before = dataclasses.replace(initial(EMA), step=np.array(5, np.int32), usage=usage)  # step 6 of the run: due
  embedding = before.params['quantize']['embedding'] + 100  # far away: nobody is hit but code 0 or so
  before = dataclasses.replace(before, params=before.params | {'quantize': {'embedding': embedding}}, code_sums=embedding.copy())
  after, _ = run(EMA, before)
  winner = np.unique(np.asarray(forward(before.params).codes))
  dead = [code for code in (1, 5) if code not in winner]
  codebook = after.params['quantize']['embedding']
  on_latents = distance_to_latents(codebook, before.params) < 1e-5
  assert dead and list(np.flatnonzero(on_latents)) == dead
  np.testing.assert_array_equal(after.code_counts[dead], 1)
  np.testing.assert_allclose(after.code_sums[dead], codebook[dead])
  np.testing.assert_allclose(after.usage[dead], 2.0)


def test_before_quantization_latents_reach_the_decoder_then_all_codes_are_put_on_latents():
  before = initial(EMA)
  after, metrics = run(EMA, before)
  reconstruction = forward(before.params, quantized=False).reconstruction
  assert metrics['l1'] == pytest.approx(float(jnp.abs(reconstruction - to_pixels(batch())).mean()), rel=1e-4)
  assert metrics['loss'] == pytest.approx(metrics['reconstruction'], rel=1e-6)  # no code loss yet
  seeded, _ = run(EMA, after)
  assert distance_to_latents(seeded.params['quantize']['embedding'], after.params).max() < 1e-5
  _, metrics = run(EMA, seeded)
  assert metrics['loss'] > metrics['reconstruction']


def test_before_its_start_the_discriminator_rests():
  after, metrics = run(EMA, initial(EMA))
  jax.tree.map(np.testing.assert_array_equal, initial(EMA).discriminator, after.discriminator)
  assert 'generator' not in metrics


def test_adversarial_step_against_full_gradients():
  before = initial(ADVERSARIAL)
  after, metrics = run(ADVERSARIAL, before, adversarial=True)
  discriminator = Discriminator(ADVERSARIAL.discriminator)
  pixels = to_pixels(batch())

  def judge(d_params, y):
    return discriminator.apply({'params': d_params}, y)[0]

  def last_kernel_gradient(term):
    def value(kernel):
      params = jax.tree.map(lambda x: x, before.params)
      params['decoder']['conv_out']['kernel'] = kernel
      return term(forward(params).reconstruction)

    return float(jnp.linalg.norm(jax.jit(jax.grad(value))(before.params['decoder']['conv_out']['kernel'])))

  nll = last_kernel_gradient(lambda y: jnp.abs(y - pixels).mean())
  generator = last_kernel_gradient(lambda y: -judge(before.discriminator, y).mean())
  weight = 0.8 * nll / (generator + 1e-4)
  assert metrics['adaptive_weight'] == pytest.approx(weight, rel=1e-3)
  fake = forward(before.params).reconstruction
  assert metrics['generator'] == pytest.approx(float(-judge(before.discriminator, fake).mean()), rel=1e-3, abs=1e-5)
  total = metrics['reconstruction'] + metrics['code'] + weight * metrics['generator'] + 0.3 * metrics['feature_matching']
  assert metrics['loss'] == pytest.approx(total, rel=1e-3)

  @jax.jit
  @jax.grad
  def hinge(d_params):
    return 0.5 * (jax.nn.relu(1 - judge(d_params, pixels)).mean() + jax.nn.relu(1 + judge(d_params, fake)).mean())

  expected = jax.tree.map(lambda p, g: p - 0.1 * g, before.discriminator, hinge(before.discriminator))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), after.discriminator, expected)


@pytest.mark.skipif(len(jax.devices()) < 8, reason='needs 8 devices')
def test_same_step_on_eight_devices():
  """Batch statistics (EMA sums, batch norm, means) run over the whole batch on any mesh."""
  one, metrics_one = run(ADVERSARIAL, initial(ADVERSARIAL), adversarial=True)
  mesh_config = MeshConfig(data=2, fsdp=4)
  mesh = mesh_of(mesh_config)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(ADVERSARIAL, SGD, SGD, mesh))
  state = jax.device_put(initial(ADVERSARIAL), shardings)
  eight, metrics_eight = step_of(ADVERSARIAL, True, mesh_config)(state, batch(), jax.random.key(1))
  for name, value in metrics_one.items():
    assert float(metrics_eight[name]) == pytest.approx(value, rel=1e-3, abs=1e-4), name
  eight = jax.device_get(eight)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one.params, eight.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one.discriminator, eight.discriminator)
  np.testing.assert_allclose(one.code_counts, eight.code_counts, rtol=1e-5)


@pytest.mark.skipif(len(jax.devices()) < 8, reason='needs 8 devices')
def test_eight_steps_on_eight_devices(optimised_programs):
  """The sums of the running-means codebook are those of all devices, also where codes are re-seeded from latents of others."""
  mesh_config = MeshConfig(data=2, fsdp=4)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(EMA, SGD, SGD, mesh_of(mesh_config)))
  states = {ONE_DEVICE: jax.tree.map(jnp.asarray, initial(EMA)), mesh_config: jax.device_put(initial(EMA), shardings)}
  rng = np.random.default_rng(3)
  step_of.cache_clear()
  for _ in range(8):
    pictures = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    losses = {}
    for config in states:
      states[config], metrics = step_of(EMA, False, config)(states[config], pictures, jax.random.key(1))
      losses[config] = float(metrics['loss'])
    assert losses[mesh_config] == pytest.approx(losses[ONE_DEVICE], rel=1e-5)  # rounding grows at this rate: 1.4e-5 at step 10
  one, eight = jax.device_get(states[ONE_DEVICE]), jax.device_get(states[mesh_config])
  np.testing.assert_allclose(eight.code_counts, one.code_counts, rtol=1e-5)
  np.testing.assert_allclose(eight.code_sums, one.code_sums, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(eight.params['quantize']['embedding'], one.params['quantize']['embedding'], rtol=1e-4, atol=1e-5)
  assert (one.code_counts != 1).all()  # every code was hit


def test_initial_state():
  state = make_initial_state(GRADIENT, SGD, SGD, mesh_of(ONE_DEVICE))
  kernel, codebook = np.asarray(state.params['encoder']['conv_in']['kernel']), np.asarray(state.params['quantize']['embedding'])
  bound = 1 / np.sqrt(3 * 3 * 48)
  assert bound / 2 < np.abs(kernel).max() <= bound and np.abs(codebook).max() <= 1 / 8
  np.testing.assert_array_equal(state.code_sums, codebook)
  np.testing.assert_array_equal(state.params['decoder']['norm_out']['scale'], 1)
  again = make_initial_state(GRADIENT, SGD, SGD, mesh_of(ONE_DEVICE))
  other = make_initial_state(dataclasses.replace(GRADIENT, seed=1), SGD, SGD, mesh_of(ONE_DEVICE))
  np.testing.assert_array_equal(again.params['encoder']['conv_in']['kernel'], kernel)
  assert not np.array_equal(other.params['encoder']['conv_in']['kernel'], kernel)


@pytest.mark.skipif(len(jax.devices()) < 8, reason='needs 8 devices')
def test_kernels_and_their_moments_are_sharded():
  state = abstract_state(GRADIENT, optax.adam(1e-3), SGD, make_mesh(MeshConfig(data=2, fsdp=4)))
  wanted = jax.sharding.PartitionSpec(None, None, None, 'fsdp')
  assert state.params['encoder']['conv_in']['kernel'].sharding.spec == wanted
  assert state.opt_state[0].mu['encoder']['conv_in']['kernel'].sharding.spec == wanted
  assert not any(isinstance(leaf, nn.LogicallyPartitioned) for leaf in jax.tree.leaves(state))


def test_average_params():
  params = {'a': jnp.array(4.0), 'quantize': {'embedding': jnp.array(7.0)}}
  average = {'a': jnp.array(0.0), 'quantize': {'embedding': jnp.array(0.0)}}
  early = average_params(average, params, jnp.array(0), 0.9)
  assert float(early['a']) == pytest.approx(4 * 0.9)  # decay (1 + 0) / (10 + 0)
  late = average_params(average, params, jnp.array(1000), 0.9)
  assert float(late['a']) == pytest.approx(0.4) and float(late['quantize']['embedding']) == 7
  assert average_params(average, params, jnp.array(0), None) is None
