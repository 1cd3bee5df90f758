"""What each layer does in a step: norms of gradients, updates and parameters, activations, and the z-term.

Squares are summed inside the step's own program, next to the sums that clipping and `parameter_norm` need anyway, so what is added
is one pass over the updates and a few numbers a layer; roots, ratios and names are made on the host, and only in steps that are
looked at. Without `diagnostics_every` none of it is in the program.

A parameter has a kind, told from its name, and perhaps a layer:

    embedding  attention  feed_forward  norms (QK-norms among them)  head  other (what a model may have besides)

Knows parameters as a tree of named arrays whose layers are stacked under `layers` or apart under `layers_0`, `layers_1`, ...
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.array_types import Array, PyTree
from chameleon_jax.training.losses import LossSums

KINDS = ('embedding', 'attention', 'feed_forward', 'norms', 'head', 'other')
_BESIDE = 'beside'  # the row of a kind that holds what belongs to no layer


def kind_of(path: str) -> tuple[str, int | None, bool]:
  """(kind, layer, whether layers are stacked along its first axis) of a parameter by its path.

  Example:
    'layers_3/attention/q_proj' -> ('attention', 3, False)      'layers/attention/q_norm/weight' -> ('norms', None, True)
    'final_norm/weight' -> ('norms', None, False)               'lm_head' -> ('head', None, False)
  """
  names = path.split('/')
  layer = next((int(match[1]) for match in (re.fullmatch(r'layers_(\d+)', name) for name in names) if match), None)
  stacked = layer is None and 'layers' in names
  if any('norm' in name for name in names):
    kind = 'norms'
  else:
    known = {'embedding': 'embedding', 'lm_head': 'head', 'attention': 'attention', 'feed_forward': 'feed_forward'}
    kind = next((known[name] for name in names if name in known), 'other')
  return kind, layer, stacked


def squares(tree: PyTree) -> dict[str, dict[str, Array]]:
  """Sums of squares in float32: kind -> {'layers': [L], 'beside': scalar}, whichever of the two it has. None leaves count as nothing."""
  layers: dict[str, dict[int, Array]] = {}
  stacks: dict[str, Array] = {}
  beside: dict[str, Array] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      continue
    kind, layer, stacked = kind_of(jax.tree_util.keystr(path, simple=True, separator='/'))
    square = jnp.square(leaf.astype(jnp.float32))
    if stacked:
      stacks[kind] = stacks.get(kind, jnp.zeros(())) + jnp.sum(square, axis=tuple(range(1, leaf.ndim)))
    elif layer is None:
      beside[kind] = beside.get(kind, jnp.zeros(())) + jnp.sum(square)
    else:
      own = layers.setdefault(kind, {})
      own[layer] = own.get(layer, jnp.zeros(())) + jnp.sum(square)
  n_layers = 1 + max((layer for own in layers.values() for layer in own), default=-1)
  for kind, own in layers.items():
    stacks[kind] = jnp.stack([own.get(layer, jnp.zeros(())) for layer in range(n_layers)])
  found: dict[str, dict[str, Array]] = {kind: {'layers': stack} for kind, stack in stacks.items()}
  for kind, value in beside.items():
    found.setdefault(kind, {})[_BESIDE] = value
  return found


def measure(*, gradients: PyTree, updates: PyTree, params: PyTree, sums: LossSums, z_loss: float, per_layer: Mapping[str, Array]) -> PyTree:
  """The few numbers of one step, inside its program; `figures` makes sense of them.

  Args:
    gradients: before clipping.
    updates: what is added to the parameters.
    params: after the update.
    sums: of the batch.
    z_loss: its weight.
    per_layer: diagnostics of the model, [L] each.
  """
  z_term = z_loss * sums.z_squared
  return {
      'squares': {'gradient_norm': squares(gradients), 'update_norm': squares(updates), 'parameter_norm': squares(params)},
      'loss': {
          'z_mean': sums.z / jnp.maximum(sums.text_weight + sums.image_weight, 1e-9),
          'z_loss': z_term / jnp.maximum(sums.weight, 1e-9),
          'z_loss_share': z_term / (sums.cross_entropy + z_term),
          'logit_norm': sums.logit_norm / jnp.maximum(sums.text_weight + sums.image_weight, 1e-9),
      },
      'per_layer': dict(per_layer),
  }


def figures(measured: Any) -> dict[str, float]:
  """Names and numbers of `measure`, fetched to the host.

      gradient_norm/attention               of all layers together; the same for update_norm and parameter_norm
      gradient_norm/attention/layer_03      of one layer
      gradient_norm/layer_03                of everything in it
      update_ratio/...                      update_norm / parameter_norm
      output_rms/layer_03                   of the residual stream behind the layer; so attention_logit_bound/layer_03
      z_mean, z_loss, z_loss_share, logit_norm   mean log Z, its square's term of the loss and the share of it; length of the logits
  """
  measured = jax.device_get(measured)
  found: dict[str, float] = {name: float(value) for name, value in measured['loss'].items()}
  for quantity, kinds in measured['squares'].items():
    found |= {f'{quantity}/{name}': math.sqrt(value) for name, value in _totals(kinds).items()}
  for name in [name for name in found if name.startswith('update_norm/')]:
    part = name.removeprefix('update_norm/')
    size = found[f'parameter_norm/{part}']
    found[f'update_ratio/{part}'] = found[name] / size if size > 0 else math.nan
  for name, values in measured['per_layer'].items():
    found |= {f'{name}/layer_{layer:02d}': float(value) for layer, value in enumerate(np.ravel(values))}
  return found


def _totals(kinds: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
  """Sums of squares by kind, by layer, and by both."""
  found: dict[str, float] = {}
  for kind, parts in kinds.items():
    rows = [float(value) for value in np.ravel(parts.get('layers', ()))]
    found[kind] = sum(rows) + float(parts.get(_BESIDE, 0.0))
    for layer, value in enumerate(rows):
      found[f'{kind}/layer_{layer:02d}'] = value
      found[f'layer_{layer:02d}'] = found.get(f'layer_{layer:02d}', 0.0) + value
  return found
