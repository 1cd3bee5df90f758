"""AdamW, Muon or Adafactor with the learning-rate schedule and clipping (arXiv 2405.09818, sections 2.3 and 3; 2502.16982; 1804.04235).

Bytes of state for a parameter that trains, beside 4 of the parameter and 4 of its gradient:

    name        momentum_dtype   bytes   of
    adamw       None, float32    8       two moments
    adamw       bfloat16         6       the first one in two bytes
    muon        -                4       momentum of hidden matrices; 8 elsewhere
    adafactor   None             ~0      a matrix [n, m] has n + m numbers: 0.004 bytes for 4,096 x 11,008; 4 where no two axes reach 128
    adafactor   bfloat16         ~2      and momentum; float32: ~4

What optax 0.2.8 does not offer is moments of 8 bits (block-wise quantised Adam, arXiv 2110.02861).

Weight decay touches matrices only: embeddings, projections and convolution kernels. Scales and biases, and
every parameter of a norm, are left alone; they are told apart by name, since scanned layers stack vectors
into matrices.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from chameleon_jax.array_types import AnyArray, Array, Params, PyTree
from chameleon_jax.config import OptimizerConfig
from chameleon_jax.partitioning import RULES, constrain, on_one_cpu
from chameleon_jax.training.state import unboxed


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


def _names(path: tuple) -> list[str]:
  """Names along a path of a parameter tree; 'value' is that of a box."""
  return [name for name in jax.tree_util.keystr(path, simple=True, separator='/').split('/') if name != 'value']


def decayed(params: Params) -> PyTree:
  """Booleans in the form of `params`: whether weight decay applies.

  Example:
    layers/attention/q_proj True    layers/attention_norm/weight False    embedding True    layers/attention/q_norm/bias False
  """

  def decays(path: tuple, leaf: PyTree) -> bool:
    names = _names(path)
    return leaf.ndim >= 2 and names[-1] not in ('bias', 'scale') and not any('norm' in name for name in names)

  return jax.tree_util.tree_map_with_path(decays, params)


# The transformer's hidden matrices: names of their input axes and of their output axes, see `partitioning.RULES`.
_MATRICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'q_proj': (('embed',), ('heads', 'd_head')),
    **dict.fromkeys(('k_proj', 'v_proj'), (('embed',), ('kv_heads', 'd_head'))),
    'o_proj': (('heads', 'd_head'), ('embed',)),
    **dict.fromkeys(('gate_proj', 'up_proj'), (('embed',), ('mlp',))),
    'down_proj': (('mlp',), ('embed',)),
}


def matrices(params: Params) -> PyTree:
  """Axes of each parameter that Muon orthogonalises as `MuonDimensionNumbers`, None for every other, in the form of `params`.

  Hidden projections are matrices; embedding, output projection, norms and convolutions are not (arXiv 2502.16982, section 2).
  """

  def axes(path: tuple, leaf: PyTree) -> optax.contrib.MuonDimensionNumbers | None:
    found = _MATRICES.get(_names(path)[-1])
    if found is None:
      return None
    first = leaf.ndim - len(found[0]) - len(found[1])  # scanned layers are stacks of matrices
    middle = first + len(found[0])
    return optax.contrib.MuonDimensionNumbers(tuple(range(first, middle)), tuple(range(middle, leaf.ndim)))

  return jax.tree_util.tree_map_with_path(axes, params)


def _orthogonalised_momentum(beta: float) -> optax.GradientTransformation:
  """`optax.contrib.scale_by_muon`: its state and its values, in less memory on a mesh.

  Optax's own has every device gather whole stacks of layers and work on all of them. Here, one stack after the other,

      momentum, gradient     [L, D / fsdp, F]   a piece of every layer
      orthogonalised         [L / fsdp, D, F]   some layers whole, filled up with zeros where fsdp does not divide L
      update                 [L, D / fsdp, F]
  """
  whole = optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=matrices, mu_dtype=jnp.float32)

  def update(updates: PyTree, state: PyTree, params: Params | None = None) -> tuple[PyTree, PyTree]:
    if on_one_cpu():
      return whole.update(updates, state, params)
    count = optax.safe_increment(state.count)
    form: PyTree = jax.tree.structure(updates)
    moments: list[Array] = form.flatten_up_to(state.mu)
    found: list[Array] = []
    for place, (path, gradient) in enumerate(jax.tree_util.tree_leaves_with_path(updates)):
      mu = moments[place]
      if found:  # not before the one before is done, or all are in memory at once
        gradient, mu, found[-1] = jax.lax.optimization_barrier((gradient, mu, found[-1]))
      mu = jax.lax.optimization_barrier(optax.tree.update_moment(gradient, mu, beta, 1))  # else old and new are needed to the end
      ahead = beta * optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
      ahead += (1 - beta) * optax.tree.bias_correction(gradient, beta, count)
      moments[place] = mu
      found.append(_orthogonalised(ahead, _names(path)[-1], state))
    return form.unflatten(found), state._replace(count=count, mu=form.unflatten(moments))

  return optax.GradientTransformation(whole.init, update)


def _orthogonalised(stack: Array, name: str, state: PyTree) -> Array:
  """A matrix, or a stack of them whose layers are spread over the devices meanwhile; by optax, with the momentum switched off."""
  alone = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=matrices)
  axes = [axis for side in _MATRICES[name] for axis in side]
  stacked = stack.ndim > len(axes)
  if stacked:
    pieces = ('layers', *axes)
    stack, n_layers = constrain(stack, *pieces), len(stack)
    mesh = jax.sharding.get_abstract_mesh()
    stack = jnp.pad(stack, [(0, -n_layers % (1 if mesh.empty else mesh.shape['fsdp']))] + [(0, 0)] * len(axes))
    stack = constrain(stack, 'whole_layers', *(None if axis == 'embed' else axis for axis in axes))
  nothing = state._replace(count=jnp.zeros_like(state.count), mu={name: jnp.zeros_like(stack)})
  found = alone.update({name: stack}, nothing)[0][name]
  return constrain(found, *pieces)[:n_layers] if stacked else found


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
  """Orthogonalised momentum for the hidden matrices, scaled to the root mean square of Adam's updates; Adam for the rest."""

  def scaled(update: AnyArray, axes: optax.contrib.MuonDimensionNumbers) -> AnyArray:
    sides = (math.prod(update.shape[axis] for axis in side) for side in axes)
    return update * (0.2 * math.sqrt(max(sides)))

  orthogonal = optax.chain(
      _orthogonalised_momentum(config.muon_beta),
      optax.stateless(lambda updates, _: jax.tree.map(scaled, updates, matrices(updates))),
  )

  def labels(params: Params) -> PyTree:
    is_matrix = lambda path, _: 'matrix' if _names(path)[-1] in _MATRICES else 'other'
    return jax.tree_util.tree_map_with_path(is_matrix, params)

  return optax.partition({'matrix': orthogonal, 'other': _adam(config)}, labels)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
  return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps, mu_dtype=jnp.dtype(config.momentum_dtype or 'float32'))


_FACTORED_FROM = 128  # optax factors the two largest axes of an array where both have at least this size


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
  """Factored second moments with their own schedule of decay, updates of root mean square 1 at most, momentum where it is asked for.

  Not scaled by the size of the parameters, so that `learning_rate` means what it does for AdamW.
  """
  factored = optax.scale_by_factored_rms(min_dim_size_to_factor=_FACTORED_FROM)
  steps = [optax.GradientTransformation(lambda params: _boxed_factors(factored.init(unboxed(params)), params), factored.update)]
  steps.append(optax.clip_by_block_rms(1.0))
  if config.momentum_dtype is not None:
    steps.append(optax.ema(config.beta1, debias=False, accumulator_dtype=jnp.dtype(config.momentum_dtype)))
  return optax.chain(*steps)


def _boxed_factors(state: PyTree, params: Params) -> PyTree:
  """The factors with the axis names that are left of their parameter's, where `params` are boxed; optax knows no boxes.

      up_proj [L, D, F] of (layers, embed, mlp)    v_row [L, D] (layers, embed)    v_col [L, F] (layers, mlp)    v [1]
  """
  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)

  def boxed(param: PyTree, value: AnyArray, dropped: int) -> PyTree:
    """`dropped`: which of the two factored axes is missing, the largest (-1) or the one before (-2)."""
    if not is_box(param):
      return value
    names, shape = param.names, param.value.shape
    if value.shape == (1,) != shape:
      names = (None,)  # a place holder of one number
    elif value.shape != shape:
      axis = int(np.argsort(shape)[dropped])
      names = names[:axis] + names[axis + 1 :]
    return nn.LogicallyPartitioned(value, names, rules=RULES)

  def each(values: PyTree, dropped: int) -> PyTree:
    return jax.tree.map(lambda param, value: boxed(param, value, dropped), params, values, is_leaf=is_box)

  return state._replace(v_row=each(state.v_row, -1), v_col=each(state.v_col, -2), v=each(state.v, 0))


_SCALINGS = {'adamw': _adam, 'muon': _muon, 'adafactor': _adafactor}


def make_optimizer(config: OptimizerConfig, n_steps: int) -> optax.GradientTransformation:
  """Returns clipping by global norm, the moments of `config.name`, decoupled weight decay on matrices, and the schedule."""
  steps = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
  steps += [
      _SCALINGS[config.name](config),
      optax.add_decayed_weights(config.weight_decay, mask=decayed),
      optax.scale_by_learning_rate(make_schedule(config, n_steps)),
  ]
  return optax.chain(*steps)
