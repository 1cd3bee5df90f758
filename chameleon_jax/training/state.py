"""What a training step changes: the update count, the parameters and the optimizer's moments.

Parameters are born with axis names and boxed; the boxes tell the layout and are taken off before anything
is stored, so states and checkpoints hold plain arrays.
"""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from chameleon_jax.array_types import Array, Params, PyTree
from chameleon_jax.errors import CheckpointError
from chameleon_jax.partitioning import AnyMesh, place, shardings_of
from chameleon_jax.training.trainable import FULL, Tuning


@flax.struct.dataclass
class TrainState:
  """One point of a run. Fields are annotated loosely because shapes and shardings come in this form too."""

  step: PyTree  # int32 scalar, updates done
  params: Params  # those that train, see `training/trainable.py`
  opt_state: PyTree


def _init_boxed(model: nn.Module, optimizer: optax.GradientTransformation, key: Array, tuning: Tuning = FULL) -> TrainState:
  params, _ = tuning.split(model.init(key, jnp.zeros((1, 2), jnp.int32))['params'], key)
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def unboxed(tree: PyTree) -> PyTree:
  """The arrays without their boxes. Unlike flax's `unbox` it adds no constraints, so it works on shapes under a mesh too."""
  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  return jax.tree.map(lambda leaf: leaf.value if is_box(leaf) else leaf, tree, is_leaf=is_box)


@functools.lru_cache(maxsize=8)
def _abstract_boxed(model: nn.Module, optimizer: optax.GradientTransformation, tuning: Tuning = FULL) -> TrainState:
  return jax.eval_shape(lambda key: _init_boxed(model, optimizer, key, tuning), jax.random.key(0))


@functools.lru_cache(maxsize=8)
def _frozen_boxed(model: nn.Module, tuning: Tuning) -> PyTree:
  return jax.eval_shape(lambda key: tuning.split(model.init(key, jnp.zeros((1, 2), jnp.int32))['params'], key)[1], jax.random.key(0))


def state_shardings(model: nn.Module, optimizer: optax.GradientTransformation, mesh: AnyMesh, tuning: Tuning = FULL) -> PyTree:
  """Shardings of every array of the state, in the form of an unboxed `TrainState`."""
  return shardings_of(_abstract_boxed(model, optimizer, tuning), mesh)


def abstract_state(model: nn.Module, optimizer: optax.GradientTransformation, mesh: AnyMesh, tuning: Tuning = FULL) -> TrainState:
  """Shapes, types and shardings of the state, without an array."""
  return _with_shardings(_abstract_boxed(model, optimizer, tuning), mesh)


def abstract_frozen(model: nn.Module, mesh: AnyMesh, tuning: Tuning) -> Params | None:
  """Shapes, types and shardings of the parameters that do not train, None where all do."""
  return _with_shardings(_frozen_boxed(model, tuning), mesh)


def _with_shardings(boxed: PyTree, mesh: AnyMesh) -> PyTree:
  plain, shardings = unboxed(boxed), shardings_of(boxed, mesh)
  return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), plain, shardings)


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    key: Array,
    params: Params | None = None,
    tuning: Tuning = FULL,
) -> TrainState:
  """A state at step 0, every array made directly on its devices.

  Args:
    model: a module whose `init` takes tokens.
    optimizer: makes the moments.
    mesh: the devices.
    key: for the initial parameters.
    params: parameters to start from instead, plain arrays; those that train.
    tuning: which ones do. Where some do not, `params` must be given.

  Raises:
    CheckpointError: `params` do not have the names and shapes of the model.
  """
  shardings = state_shardings(model, optimizer, mesh, tuning)
  with jax.set_mesh(mesh):
    if params is None:
      return jax.jit(lambda key: unboxed(_init_boxed(model, optimizer, key)), out_shardings=shardings)(key)
    abstract = abstract_state(model, optimizer, mesh, tuning)
    _check_fit(params, abstract.params)
    placed = jax.tree.map(lambda leaf, like: place(leaf, like.sharding, like.dtype), params, abstract.params)

    def start(params: Params) -> TrainState:
      return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))

    return jax.jit(start, out_shardings=shardings)(placed)


def init_frozen(model: nn.Module, mesh: Mesh, params: Params, tuning: Tuning, *, key: Array) -> tuple[Params, Params]:
  """(parameters to train, plain arrays for `init_state`; the frozen ones, on their devices).

  Args:
    model: the network.
    mesh: the devices.
    params: all parameters, plain arrays.
    tuning: what trains; one that freezes something.
    key: for what starts anew.

  Raises:
    CheckpointError: `params` do not have the names and shapes of the model.
    ConfigError: the tuning names what is not there.
  """
  whole = jax.eval_shape(lambda key: unboxed(model.init(key, jnp.zeros((1, 2), jnp.int32))['params']), key)
  _check_fit(params, whole)
  trained, frozen = tuning.split(params, key)
  like = abstract_frozen(model, mesh, tuning)
  return trained, jax.tree.map(lambda leaf, like: jax.device_put(jnp.asarray(leaf, like.dtype), like.sharding), frozen, like)


def _check_fit(params: Params, like: Params) -> None:
  def shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

  given, wanted = shapes(params), shapes(like)
  for name in sorted(given.keys() | wanted.keys()):
    if given.get(name) != wanted.get(name):
      raise CheckpointError(
          f'the parameters to start from do not fit the model: {name!r} has shape {given.get(name)}, config.model wants {wanted.get(name)}'
      )
