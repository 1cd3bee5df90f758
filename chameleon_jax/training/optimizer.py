"""AdamW with its learning-rate schedule and clipping (arXiv 2405.09818, sections 2.3 and 3).

Weight decay touches matrices only: embeddings, projections and convolution kernels. Scales and biases, and
every parameter of a norm, are left alone; they are told apart by name, since scanned layers stack vectors
into matrices.
"""

import jax
import jax.numpy as jnp
import optax

from chameleon_jax.array_types import AnyArray, Array, Params, PyTree
from chameleon_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, n_steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the number of updates done so far.

  With peak p, warm-up w and u = (step - w) / (n_steps - w):
    step < w:      p (step + 1) / w
    exponential:   p (exp(-k u) - exp(-k)) / (1 - exp(-k)), k = `decay_rate`: shifted so that it ends at 0
    cosine:        p (1 + cos(pi u)) / 2
    constant:      p
  and `end_fraction` e lifts the decay: p (e + (1 - e) shape(u)).
  """
  peak, warmup, k, end = config.learning_rate, config.warmup_steps, config.decay_rate, config.end_fraction

  def schedule(step: AnyArray | int) -> Array:
    step = jnp.asarray(step, jnp.float32)
    u = jnp.clip((step - warmup) / max(1, n_steps - warmup), 0.0, 1.0)
    if config.schedule == 'exponential':
      shape = (jnp.exp(-k * u) - jnp.exp(-k)) / (1 - jnp.exp(-k))
    elif config.schedule == 'cosine':
      shape = 0.5 * (1 + jnp.cos(jnp.pi * u))
    else:
      return peak * jnp.minimum(1.0, (step + 1) / max(1, warmup))
    return jnp.where(step < warmup, peak * (step + 1) / max(1, warmup), peak * (end + (1 - end) * shape))

  return schedule


def decayed(params: Params) -> PyTree:
  """Booleans in the form of `params`: whether weight decay applies.

  Example:
    layers/attention/q_proj True    layers/attention_norm/weight False    embedding True    layers/attention/q_norm/bias False
  """

  def decays(path: tuple, leaf: PyTree) -> bool:
    names = [name for name in jax.tree_util.keystr(path, simple=True, separator='/').split('/') if name != 'value']  # 'value': of a box
    return leaf.ndim >= 2 and names[-1] not in ('bias', 'scale') and not any('norm' in name for name in names)

  return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig, n_steps: int) -> optax.GradientTransformation:
  """Returns clipping by global norm, Adam moments in float32, decoupled weight decay on matrices, and the schedule."""
  steps = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
  steps += [
      optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps, mu_dtype=jnp.float32),
      optax.add_decayed_weights(config.weight_decay, mask=decayed),
      optax.scale_by_learning_rate(make_schedule(config, n_steps)),
  ]
  return optax.chain(*steps)
