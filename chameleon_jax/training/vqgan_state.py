"""What a run of the image tokenizer's training carries from step to step, and how it is born.

Knows the networks and the optimisers, not the losses. Everything is one pytree, so a checkpoint holds all of it.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from chameleon_jax.array_types import Array, Params, PyTree
from chameleon_jax.config import ImageTokenizerTrainConfig
from chameleon_jax.models.vqgan.discriminator import Discriminator
from chameleon_jax.models.vqgan.model import VQGAN
from chameleon_jax.partitioning import shardings_of
from chameleon_jax.training.state import unboxed


@flax.struct.dataclass
class VQGANState:
  """step int32; params and opt_state of the autoencoder and the discriminator; the codebook's statistics.

  discriminator is empty when its weight is 0. average is the running mean of params, None when it is off.
  code_counts [M] and code_sums [M, Z] are the running means of N_i and m_i of the EMA codebook; usage [M] is the
  exponential mean of hits a step, for either kind of codebook. Fields are untyped because the same struct holds arrays,
  shapes and shardings.
  """

  step: Any
  params: Params
  opt_state: PyTree
  discriminator: Params
  discriminator_opt_state: PyTree
  code_counts: Any
  code_sums: Any
  usage: Any
  average: Params | None

  @property
  def best_params(self) -> Params:
    """The averaged weights where there are any: for evaluation and export."""
    return self.params if self.average is None else self.average


def make_initial_state(
  config: ImageTokenizerTrainConfig,
  optimizer: optax.GradientTransformation,
  discriminator_optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  params: Params | None = None,
) -> VQGANState:
  """State at step 0, born sharded on the mesh. `params` replaces the random start of the autoencoder."""
  boxed = functools.partial(_boxed_state, config, optimizer, discriminator_optimizer)
  key = jax.random.key(config.seed)  # an argument, not a constant: one compiled program serves every seed
  shardings = shardings_of(jax.eval_shape(boxed, key, params), mesh)
  with jax.set_mesh(mesh):
    return jax.jit(lambda key, params: unboxed(boxed(key, params)), out_shardings=shardings)(key, params)


def abstract_state(
  config: ImageTokenizerTrainConfig,
  optimizer: optax.GradientTransformation,
  discriminator_optimizer: optax.GradientTransformation,
  mesh: Mesh,
) -> VQGANState:
  """Shapes, types and shardings of the state: what a checkpoint is restored into."""
  boxed = jax.eval_shape(functools.partial(_boxed_state, config, optimizer, discriminator_optimizer), jax.random.key(0), None)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), unboxed(boxed), shardings_of(boxed, mesh)
  )


def _boxed_state(
  config: ImageTokenizerTrainConfig,
  optimizer: optax.GradientTransformation,
  discriminator_optimizer: optax.GradientTransformation,
  key: Array,
  params: Params | None,
) -> VQGANState:
  """The state whose parameters still carry their logical axes (boxes)."""
  model = config.model
  key, discriminator_key = jax.random.split(key)
  pixels = jnp.zeros((1, model.resolution, model.resolution, 3), jnp.float32)
  boxed = VQGAN(model).init(key, pixels)['params']
  if params is not None:
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    boxed = jax.tree.map(lambda box, value: box.replace_boxed(value), boxed, params, is_leaf=is_box)
  discriminator: Params = {}
  if config.loss.discriminator_weight > 0:
    discriminator = Discriminator(config.discriminator).init(discriminator_key, pixels)['params']
  counts = jnp.ones((model.n_codes,), jnp.float32)
  return VQGANState(
    step=jnp.zeros((), jnp.int32),
    params=boxed,
    opt_state=optimizer.init(boxed),
    discriminator=discriminator,
    discriminator_opt_state=discriminator_optimizer.init(discriminator),
    code_counts=counts,
    code_sums=unboxed(boxed)['quantize']['embedding'] * counts[:, None],
    usage=jnp.zeros((model.n_codes,), jnp.float32),
    average=boxed if config.average_decay is not None else None,
  )
