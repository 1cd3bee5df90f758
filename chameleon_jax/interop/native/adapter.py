"""Adapters in files: what a LoRA run leaves beside its model, and what is added to base weights when they are read.

    DIR/adapter.json     format, version, rank, alpha, and the base weights it belongs to: path and fingerprint
    DIR/tensors/         one Orbax tree: layers_0/attention/q_proj/{a, b} .., in the shapes of `training/lora.py`, not stacked
    DIR/checksums.json   as in a model folder

A folder that holds adapter_config.json is read too: the form of Hugging Face's `peft` (`huggingface.peft`).

The fingerprint tells other weights apart, in whichever format or float type they are stored: a checksum of each tensor, over as many
values as 65,536, the same places every time. It is no proof against a changed single weight.
"""

import dataclasses
import json
import math
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from chameleon_jax.config import TransformerConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.lazy import LazyModel, TensorSource, TensorSpec
from chameleon_jax.interop.mapping import transformer_specs
from chameleon_jax.interop.native.checksums import check_files, read_checksums, write_checksums
from chameleon_jax.interop.staging import staged
from chameleon_jax.interop.trees import flat, nested
from chameleon_jax.training.lora import TARGETS, added, pair_shapes
from chameleon_jax.training.tree_files import load_tree, save_tree

FILE = 'adapter.json'
FORMAT, VERSION = 'chameleon_jax.adapter', 1
PEFT_FILE = 'adapter_config.json'
_TENSORS = 'tensors'
_SAMPLES = 1 << 16
Pair = tuple[np.ndarray, np.ndarray]


def fingerprint(values: np.ndarray) -> int:
  """Checksum of a tensor's shape and of 65,536 of its values as float32, of all where they are fewer."""
  flat_values = values.reshape(-1)
  if flat_values.size > _SAMPLES:
    flat_values = flat_values[np.random.default_rng(0).integers(flat_values.size, size=_SAMPLES)]
  sampled = np.ascontiguousarray(flat_values, np.float32) + np.float32(0)  # -0 becomes 0
  return zlib.crc32(sampled.tobytes(), zlib.crc32(repr(tuple(map(int, values.shape))).encode()))


@dataclasses.dataclass(frozen=True)
class Base:
  """Which weights an adapter was trained beside: where they lay, and the fingerprint of each tensor by its unrolled name."""

  path: str
  tensors: Mapping[str, int]

  @property
  def fingerprint(self) -> str:
    """One for all, eight hexadecimal digits."""
    return f'{zlib.crc32(json.dumps(dict(sorted(self.tensors.items()))).encode()):08x}'


@dataclasses.dataclass(frozen=True)
class Adapter:
  """Pairs (A, B) by the unrolled name of their projection, such as 'layers_0/attention/q_proj' or 'lm_head'.

  `base` is None where it is not known (`peft` records no fingerprint).
  """

  rank: int
  alpha: float
  pairs: Mapping[str, Pair]
  base: Base | None = None


def unrolled(adapters: Any) -> dict[str, Pair]:
  """The pairs of an adapter tree of arrays, stacked or not, layer by layer, as float32 in host memory."""
  leaves = {name: np.asarray(leaf, np.float32) for name, leaf in flat(adapters).items()}
  pairs: dict[str, Pair] = {}
  for name in sorted({name.rpartition('/')[0] for name in leaves}):
    a, b = leaves[f'{name}/a'], leaves[f'{name}/b']
    if not name.startswith('layers/'):
      pairs[name] = a, b
      continue
    pairs |= {f'layers_{index}/{name.removeprefix("layers/")}': (a[index], b[index]) for index in range(len(a))}
  return pairs


def save_adapter(path: str | os.PathLike[str], adapter: Adapter) -> None:
  """Writes an adapter folder, replacing an adapter that is there.

  Raises:
    CheckpointError: `path` exists and is no adapter folder, or writing failed (nothing is left behind).
  """
  target = pathlib.Path(path).absolute()
  if target.exists() and not (target / FILE).exists() and any(target.iterdir()):
    raise CheckpointError(f'{target} exists and is no adapter folder; choose another path')
  base = None if adapter.base is None else {'path': adapter.base.path, 'tensors': dict(adapter.base.tensors)}
  header = {'format': FORMAT, 'version': VERSION, 'rank': adapter.rank, 'alpha': adapter.alpha, 'base': base}
  try:
    with staged(target) as folder:
      leaves = {f'{name}/{side}': value for name, pair in adapter.pairs.items() for side, value in zip('ab', pair)}
      save_tree(folder / _TENSORS, nested(leaves))
      (folder / FILE).write_text(json.dumps(header, indent=1) + '\n', encoding='utf-8')
      write_checksums(folder)
  except OSError as error:
    raise CheckpointError(f'adapter folder {target} could not be written: {error}') from error


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
  """Reads an adapter folder, ours or one of `peft`.

  Raises:
    CheckpointError: it is missing, damaged, or no adapter.
  """
  folder = pathlib.Path(path).absolute()
  if (folder / PEFT_FILE).is_file() and not (folder / FILE).is_file():
    from chameleon_jax.interop.huggingface.peft import load_peft

    return load_peft(folder)
  if not (folder / FILE).is_file():
    missing = 'does not exist' if not folder.exists() else f'is no adapter: it holds neither {FILE} nor {PEFT_FILE}'
    raise CheckpointError(f'adapter folder {folder} {missing}')
  try:
    header = json.loads((folder / FILE).read_text(encoding='utf-8'))
    if header['format'] != FORMAT or header['version'] != VERSION:
      raise CheckpointError(f'{folder / FILE} has format {header["format"]!r} version {header["version"]!r}; this program reads {FORMAT} 1')
    rank, alpha, base = int(header['rank']), float(header['alpha']), header['base']
    base = None if base is None else Base(str(base['path']), {str(name): int(value) for name, value in base['tensors'].items()})
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise CheckpointError(f'{folder / FILE} is damaged ({type(error).__name__}: {error}); copy the folder again') from error
  checksums = read_checksums(folder)
  for inside in (FILE, _TENSORS):
    check_files(folder, inside, checksums)
  leaves = flat(load_tree(folder / _TENSORS))
  names = {name.rpartition('/')[0] for name in leaves}
  if set(leaves) != {f'{name}/{side}' for name in names for side in 'ab'}:
    raise CheckpointError(f'{folder / _TENSORS} holds {sorted(leaves)[0]} without its partner; copy the folder again')
  return Adapter(rank, alpha, {name: (leaves[f'{name}/a'], leaves[f'{name}/b']) for name in sorted(names)}, base)


def fitted(adapter: Adapter, config: TransformerConfig, *, where: str) -> Adapter:
  """The adapter with every pair in the shapes of a network; one of `peft` has matrices, whose heads are not told apart.

  Raises:
    CheckpointError: a pair belongs to no projection of the network, or has another size.
  """
  shapes = transformer_specs(config)
  pairs: dict[str, Pair] = {}
  for name, (a, b) in adapter.pairs.items():
    if name not in shapes or name.split('/')[-1] not in TARGETS:
      raise CheckpointError(f'{where} is of another model: it has a pair for {name}, which the base weights lack')
    expected = pair_shapes(name, shapes[name], adapter.rank)
    if (a.size, b.size) != tuple(map(math.prod, expected)) or a.shape[-1] != adapter.rank:
      found = f'the pair of {name} has shapes {a.shape} and {b.shape}, not {expected[0]} and {expected[1]}'
      raise CheckpointError(f'{where} is of another model: {found}')
    pairs[name] = a.reshape(expected[0]), b.reshape(expected[1])
  return dataclasses.replace(adapter, pairs=pairs)


def with_adapter(model: LazyModel, path: str | os.PathLike[str], *, dtype: str | None = None) -> LazyModel:
  """The open checkpoint with an adapter added in: each projection is W + alpha / rank A B as it is read.

  The sum is rounded to the type of W, unless float32 is what `dtype` or the config of a model folder asks for.

  Raises:
    CheckpointError: there is no transformer, or the adapter is damaged or of another model. Reading a tensor raises it too where the
      base weights are not those the adapter was trained beside.
  """
  source = model.transformer
  if model.transformer_config is None or source is None:
    raise CheckpointError(f'{model.path} holds no transformer for the adapter {path}')
  adapter = fitted(load_adapter(path), model.transformer_config, where=f'adapter {path}')
  scale = adapter.alpha / adapter.rank
  widens = (dtype or (model.format == 'orbax' and model.transformer_config.param_dtype)) == 'float32'

  def stored(name: str, spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.shape, np.dtype(np.float32)) if widens and name in adapter.pairs else spec

  specs = {name: stored(name, spec) for name, spec in source.specs.items()}

  def read(name: str) -> np.ndarray:
    values = source.read(name)
    if adapter.base is not None and adapter.base.tensors.get(name) != fingerprint(values):
      raise CheckpointError(
          f'adapter {path} was trained beside the weights of {adapter.base.path} (fingerprint {adapter.base.fingerprint}); '
          f'those of {model.path} differ in {name}: give the base it belongs to'
      )
    if name not in adapter.pairs:
      return values
    return np.asarray(added(values, *adapter.pairs[name], scale)).astype(specs[name].dtype)

  return dataclasses.replace(model, transformer=TensorSource(specs, read))
