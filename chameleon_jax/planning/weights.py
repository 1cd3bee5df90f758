"""What the weights of a training run take on one device of a mesh, without a device: trained, frozen, gradients, the optimizer's.

All of it from `jax.eval_shape` of the training state, with the run's own optimizer and its own split into trained and frozen, and
`shard_shape` of its shardings on an abstract mesh: nothing is a model or an estimate, but for which copies a compiler makes
(`WeightBytes.copies`).

Does not know: activations and moments of a step (`memory.py`), nor speeds.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from chameleon_jax.array_types import PyTree
from chameleon_jax.config import FineTuneConfig, OptimizerConfig, TrainConfig, TransformerConfig
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.planning.layout import Layout, bytes_per_device
from chameleon_jax.training.optimizer import make_optimizer, matrices
from chameleon_jax.training.state import abstract_frozen, abstract_state
from chameleon_jax.training.trainable import Tuning

Leaves = list[tuple[list[str], jax.ShapeDtypeStruct]]  # names along the path, and what lies there


@dataclasses.dataclass(frozen=True)
class WeightBytes:
  """Bytes on the fullest device.

  Attributes:
    parameters: master weights; those that train.
    optimizer: what the optimizer keeps of them, and its counters.
    gradients: of one backward pass, laid out as the parameters.
    frozen: parameters that are only read.
    copies: of the device's share of the layers' matrices in the compute type, where they are kept in another one; and of attention
      projections, [D, N, H], that are not gathered and that a gradient passes: the TPU compiler lays them out anew.
  """

  parameters: int
  optimizer: int
  gradients: int
  frozen: int = 0
  copies: int = 0

  @property
  def state(self) -> int:
    """What an update reads and writes."""
    return self.parameters + self.optimizer

  @property
  def resident(self) -> int:
    """What stays between two steps."""
    return self.state + self.frozen


@dataclasses.dataclass(frozen=True)
class WholeGradients:
  """Bytes of float32 gradients on a device before those that share a batch add them up; 0 of what does not train.

  Attributes:
    feed_forward: of one layer, of what lies there.
    head: of the output projection; of all its rows, also where only some train.
    embedding: of the whole table, however it is split.
  """

  feed_forward: int
  head: int
  embedding: int


@functools.lru_cache(maxsize=4)
def _optimizer(config: OptimizerConfig, n_steps: int) -> optax.GradientTransformation:
  return make_optimizer(config, n_steps)  # one object, so that the state is traced once for all meshes


@functools.lru_cache(maxsize=64)
def _plain(model: TransformerConfig) -> TransformerConfig:
  """Without what decides programs and not parameters, so that what is cached serves all of them."""
  return dataclasses.replace(model, remat='none', dropout=0.0, sequence_parallel=False)


def _named(tree: PyTree) -> Leaves:
  """Leaves with the names along their paths."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator='/').split('/'), leaf) for path, leaf in leaves]


@functools.lru_cache(maxsize=4096)
def _weight_bytes(model: TransformerConfig, optimizer: OptimizerConfig, fine_tune: FineTuneConfig, layout: Layout) -> WeightBytes:
  network, tuning, mesh = Transformer(model), Tuning(fine_tune), layout.mesh()
  state = abstract_state(network, _optimizer(optimizer, 1000), mesh, tuning)
  frozen = abstract_frozen(network, mesh, tuning)
  compute, below = jnp.dtype(model.dtype), _below_head(_named(state.params))

  def copied(names: list[str], leaf: jax.ShapeDtypeStruct) -> bool:
    in_product = names[-1].endswith('_proj') or (names[-1] in ('a', 'b') and names[-2].endswith('_proj'))
    laid_out_anew = 'attention' in names and layout.fsdp == 1 and below
    return names[0].startswith('layers') and in_product and (leaf.dtype != compute or laid_out_anew)

  copies = [
      jax.ShapeDtypeStruct(leaf.shape, compute, sharding=leaf.sharding)
      for tree in (state.params, frozen)
      for names, leaf in _named(tree)
      if copied(names, leaf)
  ]
  parameters = bytes_per_device(state.params)
  return WeightBytes(parameters, bytes_per_device(state.opt_state), parameters, bytes_per_device(frozen), bytes_per_device(copies))


def weight_bytes(config: TrainConfig, layout: Layout) -> WeightBytes:
  """Of a training run on a mesh, whatever its optimizer and whatever it freezes; call `misfit` first."""
  optimizer = dataclasses.replace(config.optimizer, accumulate_steps=1)
  return _weight_bytes(_plain(config.model), optimizer, config.fine_tune, layout)


def _trained(model: TransformerConfig, fine_tune: FineTuneConfig, layout: Layout) -> Leaves:
  return _named(abstract_state(Transformer(model), optax.identity(), layout.mesh(), Tuning(fine_tune)).params)


def whole_gradients(config: TrainConfig, layout: Layout) -> WholeGradients:
  """Of a training run on a mesh; only its tensor axis splits them."""
  return _whole_gradients(_plain(config.model), config.fine_tune, layout.tensor)


@functools.lru_cache(maxsize=256)
def _whole_gradients(model: TransformerConfig, fine_tune: FineTuneConfig, tensor: int) -> WholeGradients:
  found = {'feed_forward': 0, 'head': 0, 'embedding': 0}
  for names, leaf in _trained(model, fine_tune, Layout(1, 1, tensor)):
    size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
    if 'feed_forward' in names:
      found['feed_forward'] += size // model.n_layers
    elif names == ['lm_head']:
      found['head'] = model.d_model * model.vocab_size // tensor * 4
    elif names[0] == 'lm_head':
      found['head'] += size
    elif names[0] == 'embedding':
      found['embedding'] = math.prod(leaf.shape) * 4
  return WholeGradients(**found)


def orthogonalised(config: TrainConfig, layout: Layout) -> int:
  """Entries that a device has of the largest stack of matrices while Muon orthogonalises it, 0 without Muon.

  Scanned layers are one stack, whose layers the fsdp axis then divides; the tensor axis divides each matrix.
  """
  model, largest = _plain(config.model), 0
  if config.optimizer.name != 'muon':
    return largest
  params = abstract_state(Transformer(model), optax.identity(), Layout(1, 1, 1).mesh(), Tuning(config.fine_tune)).params
  axes = dict(jax.tree_util.tree_leaves_with_path(matrices(params), is_leaf=lambda found: isinstance(found, MuonDimensionNumbers)))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if path in axes:
      matrix = math.prod(leaf.shape[axis] for side in axes[path] for axis in side)
      largest = max(largest, -(-math.prod(leaf.shape) // matrix // layout.fsdp) * matrix // layout.tensor)
  return largest


@dataclasses.dataclass(frozen=True)
class Trained:
  """Weights of the whole model that take part in products and have a gradient.

  Attributes:
    layers: matrices of all layers.
    head: the output projection.
    thin: adapters, of the layers and of the head, beside the matrices above.
    below: whether anything trains below the head, so that a backward pass runs through the layers.
  """

  layers: int
  head: int
  thin: int
  below: bool


def trained_weights(config: TrainConfig) -> Trained:
  """Of a training run."""
  return _trained_weights(_plain(config.model), config.fine_tune)


@functools.lru_cache(maxsize=16)
def _trained_weights(model: TransformerConfig, fine_tune: FineTuneConfig) -> Trained:
  sizes = {'layers': 0, 'head': 0, 'thin': 0}
  leaves = _trained(model, fine_tune, Layout(1, 1, 1))
  for names, leaf in leaves:
    if names[-1] in ('a', 'b'):
      sizes['thin'] += math.prod(leaf.shape)
    elif names[-1].endswith('_proj'):
      sizes['layers'] += math.prod(leaf.shape)
    elif names[0] == 'lm_head':
      sizes['head'] = model.d_model * model.vocab_size  # of all rows, also where only some train
  return Trained(**sizes, below=_below_head(leaves))


def _below_head(leaves: Leaves) -> bool:
  """Whether any of the trained leaves lies below the head."""
  return any(names[0] not in ('lm_head', 'final_norm') for names, _ in leaves)
