"""Does the mesh fit the model and the batch? Asked before anything is compiled, answered in one line.

Arrays are split into equal pieces: nothing is padded, and nothing is copied to make a number fit. That includes grouped
key/value heads: there must be at least `mesh.tensor` of them. Copies of them would need gradients that are added up and
moments that are kept equal, for a case that fewer tensor and more fsdp devices serve as well.

Does not know whether it fits into memory.
"""

import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax

from chameleon_jax.array_types import PyTree
from chameleon_jax.config import ImageTokenizerTrainConfig, TrainConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.partitioning import AXES, AnyMesh, shardings_of


def check_mesh(config: TrainConfig, mesh: AnyMesh) -> None:
  """Checks a run of the transformer.

  Raises:
    ConfigError: one line with every number that the mesh does not divide, the keys to change, and what would fit.
  """
  problems = [*_tensor_problems(config, mesh), *_fsdp_problems(config, mesh), *_batch_problems(config, mesh)]
  if problems:
    raise ConfigError(f'config.mesh ({_sizes(mesh)}) does not fit: {"; ".join(problems)}')


def check_image_tokenizer_mesh(config: ImageTokenizerTrainConfig, mesh: AnyMesh, boxed: PyTree) -> None:
  """Checks a run of the image tokenizer.

  Args:
    config: the run.
    mesh: its devices.
    boxed: abstract parameters with their axis names.

  Raises:
    ConfigError: as above.
  """
  if mesh.shape['tensor'] > 1:
    raise ConfigError(f'config.mesh.tensor is {mesh.shape["tensor"]}, but the image tokenizer has nothing to split over it; set it to 1')
  rows = mesh.shape['data'] * mesh.shape['fsdp']
  if config.batch_size % rows:
    advice = _nearest('config.batch_size', config.batch_size, rows)
    raise ConfigError(f'batch_size {config.batch_size} does not split over {rows} devices (data x fsdp); {advice}')
  check_parameters(boxed, mesh)


def check_parameters(boxed: PyTree, mesh: AnyMesh) -> None:
  """Checks every parameter, whatever model it is of.

  Raises:
    ConfigError: names the first that does not split evenly.
  """
  shardings = shardings_of(boxed, mesh)
  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
  for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
    shape = (leaf.value if is_box(leaf) else leaf).shape
    for size, axes in zip(shape, sharding.spec):
      names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
      pieces = math.prod(mesh.shape[name] for name in names)
      if size % pieces:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        raise ConfigError(
            f'config.mesh ({_sizes(mesh)}) does not fit: parameter {name!r} has {size} channels along an axis that {" x ".join(names)} '
            f'splits into {pieces}; make config.mesh.{names[-1]} a divisor of {size}, and config.mesh.data larger'
        )


def _sizes(mesh: AnyMesh) -> str:
  return ', '.join(f'{axis}={mesh.shape[axis]}' for axis in AXES)


def _tensor_problems(config: TrainConfig, mesh: AnyMesh) -> Iterator[str]:
  tensor, model = mesh.shape['tensor'], config.model
  named: dict[str, Any] = {f'model.{name}': getattr(model, name) for name in ('n_heads', 'n_kv_heads', 'd_ff', 'vocab_size')}
  if model.sequence_parallel:
    named['data.seq_len'] = config.data.seq_len
  wrong = [f'config.{name} {size}' for name, size in named.items() if size % tensor]
  if wrong:
    why = ' (key/value heads are split, never copied)' if model.n_kv_heads % tensor else ''
    yield f'config.mesh.tensor {tensor} does not divide {" and ".join(wrong)}{why}; {_divisors(math.gcd(*named.values()))} would'


def _fsdp_problems(config: TrainConfig, mesh: AnyMesh) -> Iterator[str]:
  fsdp, tensor, model = mesh.shape['fsdp'], mesh.shape['tensor'], config.model
  if model.d_model % fsdp:
    yield f'config.mesh.fsdp {fsdp} does not divide config.model.d_model {model.d_model}; {_divisors(model.d_model)} would'
  if model.vocab_size % (fsdp * tensor) and model.vocab_size % tensor == 0:
    pieces = f'config.mesh.tensor x fsdp = {fsdp * tensor}'
    yield f'{pieces} does not divide config.model.vocab_size {model.vocab_size}; {_divisors(model.vocab_size)} would'


def _batch_problems(config: TrainConfig, mesh: AnyMesh) -> Iterator[str]:
  shards, accumulate, rows = mesh.shape['data'] * mesh.shape['fsdp'], config.optimizer.accumulate_steps, config.data.batch_size
  if rows % (shards * accumulate):
    pieces = f'config.mesh.data x fsdp {shards} times config.optimizer.accumulate_steps {accumulate}'
    yield f'config.data.batch_size {rows} is not a multiple of {pieces}; {_nearest("it", rows, shards * accumulate)}'


def _nearest(what: str, number: int, step: int) -> str:
  below, above = number - number % step, number - number % step + step
  return f'set {what} to {above}' if below == 0 else f'set {what} to {below} or {above}'


def _divisors(number: int, most: int = 8) -> str:
  """The largest few divisors up to 1,024, in words."""
  found = [n for n in range(1, min(number, 1024) + 1) if number % n == 0][-most:]
  return ' or '.join([', '.join(map(str, found[:-1])), str(found[-1])] if len(found) > 1 else [str(found[0])])
