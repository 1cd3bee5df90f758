"""Low-rank adapters (LoRA, arXiv 2106.09685): W + (alpha / r) A B, with A and B trained and W left as it is.

An adapter tree has the paths of the parameter tree, and in place of a projection a pair:

  q_proj [D, N, H]   a [D, r]      b [r, N, H]       o_proj [N, H, D]   a [N, H, r]   b [r, D]
  up_proj [D, F]     a [D, r]      b [r, F]          lm_head [D, V]     a [D, r]      b [r, V]

with L in front of all where layers are stacked. `models.transformer.linear` computes x W + (x A) B where the network is given
the tree as its collection 'lora', so that in training neither the sum nor a gradient of W is ever formed.

Written here, since the libraries at hand do not carry these networks (tried in 2026): qwix 0.1.8 intercepts `lax.dot_general`; inside
the custom derivative of our bfloat16 product it fails with an UnexpectedTracerError, and of unrolled float32 layers it left the
pairs of k_proj, v_proj, gate_proj and up_proj with a gradient of exactly zero. jax-lorax had its last release in 2024.

Does not know: files, or how the rest of the model is trained.
"""

import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from chameleon_jax.array_types import AnyArray, Array, Params, PyTree
from chameleon_jax.config import FineTuneConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.partitioning import RULES

# Projection -> number of input axes, number of all axes of one layer.
_AXES = {
    **dict.fromkeys(('q_proj', 'k_proj', 'v_proj'), (1, 3)),
    'o_proj': (2, 3),
    **dict.fromkeys(('gate_proj', 'up_proj', 'down_proj', 'lm_head'), (1, 2)),
}
TARGETS = tuple(_AXES)


def pair_shapes(name: str, shape: tuple[Any, ...], rank: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  """Shapes of A and B for the projection at the path `name`, or of names of axes theirs; `shape` may begin with the number of layers."""
  inputs, ndim = _AXES[name.split('/')[-1]]
  stacked = len(shape) - ndim
  lead, split = shape[:stacked], stacked + inputs
  return (*shape[:split], rank), (*lead, rank, *shape[split:])


def init_adapters(params: Params, config: FineTuneConfig, key: Array) -> Params:
  """Adapters for every projection of `params` that `config.lora_targets` names; A B is 0.

  A is uniform in +-1 / sqrt(inputs), B zero, both float32. Where `params` are boxed the pairs are too, with the axis names of the
  projection and 'rank' for the new axis, so that they are sharded by the one table of rules.

  Raises:
    ConfigError: a target is no projection, or none of the network has the name.
  """
  unknown = sorted(set(config.lora_targets) - set(TARGETS))
  if unknown:
    raise ConfigError(f'fine_tune.lora_targets: {unknown[0]!r} is no projection; choose from {", ".join(TARGETS)}')
  found: dict[str, PyTree] = {}
  for name, leaf in flatten_dict(params, sep='/').items():
    last = name.split('/')[-1]
    if last not in config.lora_targets:
      continue
    boxed = isinstance(leaf, nn.LogicallyPartitioned)
    shape = tuple((leaf.value if boxed else leaf).shape)
    a_shape, b_shape = pair_shapes(name, shape, config.lora_rank)
    n_inputs = int(np.prod(a_shape[len(shape) - _AXES[last][1] : -1]))
    bound = n_inputs**-0.5
    pair = {
        'a': jax.random.uniform(jax.random.fold_in(key, zlib.crc32(name.encode())), a_shape, jnp.float32, -bound, bound),
        'b': jnp.zeros(b_shape, jnp.float32),
    }
    if boxed:
      names = pair_shapes(name, leaf.names, 'rank')
      pair = {side: nn.LogicallyPartitioned(pair[side], axes, rules=RULES) for side, axes in zip('ab', names)}
    found[name] = pair
  return unflatten_dict(found, sep='/')


def scaled(adapters: Params, config: FineTuneConfig) -> Params:
  """The adapters with alpha / r taken into A: the collection 'lora' of the network."""
  scale = config.lora_alpha / config.lora_rank
  pairs = flatten_dict(adapters, sep='/')
  return unflatten_dict({name: leaf * scale if name.endswith('/a') else leaf for name, leaf in pairs.items()}, sep='/')


def added(kernel: AnyArray, a: AnyArray, b: AnyArray, scale: float) -> AnyArray:
  """`kernel + scale A B` in float32, numpy for numpy and on the device for arrays of jax; the kernel may be stacked."""
  lead = a.shape[: a.ndim - _n_sides(a, b, kernel)]
  left = a.reshape(*lead, -1, a.shape[-1]).astype(jnp.float32)
  right = b.reshape(*lead, a.shape[-1], -1).astype(jnp.float32)
  return kernel.astype(jnp.float32) + (scale * (left @ right)).reshape(kernel.shape)


def _n_sides(a: AnyArray, b: AnyArray, kernel: AnyArray) -> int:
  """Axes of A behind the layers: a kernel [lead, in, out] has ndim(a) + ndim(b) - 2 - lead axes."""
  return a.ndim - (a.ndim + b.ndim - 2 - kernel.ndim)


def merged(params: Params, adapters: Params, config: FineTuneConfig) -> Params:
  """Parameters with the adapters added in, float32 where there is one."""
  pairs, scale = flatten_dict(adapters, sep='/'), config.lora_alpha / config.lora_rank

  def whole(name: str, leaf: AnyArray) -> AnyArray:
    return added(leaf, pairs[f'{name}/a'], pairs[f'{name}/b'], scale) if f'{name}/a' in pairs else leaf

  return unflatten_dict({name: whole(name, leaf) for name, leaf in flatten_dict(params, sep='/').items()}, sep='/')
