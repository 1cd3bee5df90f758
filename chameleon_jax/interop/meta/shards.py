"""The rank files of a Meta checkpoint as one network: which slice of which tensor is where, merged when it is read (spec model.md 2.3).

    wq of 4 heads over 2 ranks      consolidated.00  rows of heads 0 1      -> rows of heads 0 1 2 3 -> [D, 4, H]
                                    consolidated.01  rows of heads 2 3
    q_normalization.weight          consolidated.00  [H]                    -> [2, H] -> heads 0 1 take rank 0's, 2 3 rank 1's
                                    consolidated.01  [H]
    norms of the residual stream    the same in every rank, or the checkpoint is refused when they are read

A rank may hold `attention.wqkv` (its rows of q, then k, then v) and `feed_forward.w13` in place of the separate names. Released files
carry the separate ones. Does not know: where the files lie, the argument files' form.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_jax.config import TransformerConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.files.pickle_reader import brief
from chameleon_jax.interop.files.pth import LazyTensor
from chameleon_jax.interop.lazy import TensorSource, TensorSpec
from chameleon_jax.interop.mapping import META_RULES, Rule, rules_for, transformer_specs
from chameleon_jax.interop.meta.files import CheckedPth, spec_of
from chameleon_jax.interop.meta.params import Sizes

# Fused name -> the separate names whose rows it holds in this order.
FUSED: dict[str, tuple[str, ...]] = {
    'attention.wqkv.weight': ('attention.wq.weight', 'attention.wk.weight', 'attention.wv.weight'),
    'feed_forward.w13.weight': ('feed_forward.w1.weight', 'feed_forward.w3.weight'),
}
FUSED_NAME = re.compile(r'(layers\.\d{1,6}\.)(attention\.wqkv\.weight|feed_forward\.w13\.weight)')


@dataclass(frozen=True)
class Piece:
  """What one rank holds of a tensor: a tensor of its file, or some rows of a fused one."""

  tensor: LazyTensor
  rows: slice | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the values."""
    shape = tuple(self.tensor.shape)
    return shape if self.rows is None else (self.rows.stop - self.rows.start, *shape[1:])

  def read(self) -> np.ndarray:
    """The values."""
    values = self.tensor.read()
    return values if self.rows is None else values[self.rows]


@dataclass(frozen=True)
class Shards:
  """All ranks.

  Attributes:
    labels: name of each rank's file without its ending, `consolidated` or `consolidated.00`.
    pieces: name -> piece of each rank, fused ones taken apart.
    names: names of the tensors as they stand in rank 0's file.
  """

  labels: tuple[str, ...]
  pieces: tuple[Mapping[str, Piece], ...]
  names: tuple[str, ...]

  def check_count(self, where: str) -> None:
    """Checks that there are as many shards as the first one's shapes ask for: it has the whole final norm, and its part of each row of
    the embedding.

    Raises:
      CheckpointError: there are more or fewer, or those two tensors do not tell.
    """
    norm, embedding = (self.pieces[0][name].shape if name in self.pieces[0] else () for name in ('norm.weight', 'tok_embeddings.weight'))
    if len(norm) != 1 or len(embedding) != 2 or not embedding[1] or not norm[0] or norm[0] % embedding[1]:
      shapes = f'{self.labels[0]}.pth has norm.weight {list(norm)} and tok_embeddings.weight {list(embedding)}'
      raise CheckpointError(f'{where}: nothing tells how many shards there are: no file gives model_parallel_size, and {shapes}')
    needed = norm[0] // embedding[1]
    if needed != len(self.labels):
      there = f'{where} has {len(self.labels)} shards'
      message = f'{there}, but their shapes are those of a checkpoint in {needed} ({embedding[1]} of {norm[0]} channels in each)'
      missing = f'download those up to consolidated.{needed - 1:02d}.pth' if needed > len(self.labels) else 'keep those of one checkpoint'
      raise CheckpointError(f'{message}; {missing}')

  def sizes(self) -> Sizes:
    """The network's sizes, from the first rank's shapes and the number of ranks.

    Raises:
      CheckpointError: a tensor is missing or has another number of axes, or a layer is missing.
    """
    first, n = self.pieces[0], len(self.pieces)

    def shape(name: str) -> tuple[int, int]:
      if name not in first:
        there = ', '.join(map(brief, list(first)[:4])) or 'nothing'
        raise CheckpointError(f"{self.labels[0]}.pth has no tensor {name} (it has {there}); it is damaged or not in Meta's form")
      if len(first[name].shape) != 2 or 0 in first[name].shape:
        raise CheckpointError(f'{self.labels[0]}.pth: {name} has shape {list(first[name].shape)}, not two axes')
      return (first[name].shape[0], first[name].shape[1])

    layers = {int(match[1]) for name in first if (match := re.match(r'layers\.(\d{1,6})\.', name))}
    gap = next((index for index in range(len(layers)) if index not in layers), None)
    if gap is not None or not layers:
      raise CheckpointError(f'{self.labels[0]}.pth has {len(layers)} layers but none of number {gap or 0}; download it again')
    norm = first.get('layers.0.attention.q_normalization.weight')
    if norm is not None and len(norm.shape) != 1:
      raise CheckpointError(f'{self.labels[0]}.pth: layers.0.attention.q_normalization.weight has shape {list(norm.shape)}, not one axis')
    return Sizes(
        vocab_size=shape('tok_embeddings.weight')[0],
        d_model=shape('tok_embeddings.weight')[1] * n,
        n_layers=len(layers),
        q_rows=shape('layers.0.attention.wo.weight')[1] * n,
        kv_rows=shape('layers.0.attention.wk.weight')[0] * n,
        d_ff=shape('layers.0.feed_forward.w2.weight')[1] * n,
        d_head=None if norm is None else norm.shape[0],
    )


def gather(files: Sequence[CheckedPth]) -> Shards:
  """Looks the tensors of all ranks up.

  Raises:
    CheckpointError: a file is no flat dict, its fused tensors do not split, or the ranks fuse different ones.
  """
  labels = tuple(Path(file.path).name.removesuffix('.pth') for file in files)
  pieces = []
  fused: list[set[str]] = []
  for file in files:
    if not isinstance(file.tree, dict):
      raise CheckpointError(f"{file.path} holds {brief(file.tree)}, not a dict of tensors; it is not in Meta's form")
    tensors = file.tensors()
    fused.append({name for name in tensors if FUSED_NAME.fullmatch(name)})
    if fused[-1] != fused[0]:
      name = min(fused[-1] ^ fused[0])
      raise CheckpointError(f'{name} is in some shards only ({files[0].path}, {file.path}); they are not of one checkpoint')
    pieces.append(_taken_apart(tensors, str(file.path)))
  return Shards(labels, tuple(pieces), tuple(files[0].tensors()))


def transformer_source(shards: Shards, config: TransformerConfig, where: str) -> TensorSource:
  """The network's tensors under our names, each assembled when it is read.

  Raises:
    CheckpointError: a rank lacks a tensor or has it in another shape or type; on reading, if the file is damaged or a tensor
      that every rank repeats is not the same in all.
  """
  n = len(shards.labels)
  for count, what in ((config.n_heads, 'query heads'), (config.n_kv_heads, 'key/value heads')):
    if count % n:
      raise CheckpointError(f'{where}: {count} {what} do not split over {n} shards; they are not of one checkpoint')
  shapes = transformer_specs(config)
  specs, parts = {}, {}
  for rule in rules_for(META_RULES, config):
    dtype = _check(shards, rule, config, where)
    specs[rule.ours] = TensorSpec(shapes[rule.ours], dtype)
    parts[rule.ours] = (rule, [pieces[rule.theirs] for pieces in shards.pieces])

  def read(name: str) -> np.ndarray:
    rule, pieces = parts[name]
    return rule.to_ours(_merged(rule, pieces, where), config)

  return TensorSource(specs, read)


def extra_tensors(shards: Shards, config: TransformerConfig) -> TensorSource:
  """The tensors of every rank that the network has no place for, as 'consolidated.00/NAME'."""
  known = {rule.theirs for rule in rules_for(META_RULES, config)}
  found: dict[str, LazyTensor] = {}
  for label, pieces in zip(shards.labels, shards.pieces):
    found |= {f'{label}/{name}': piece.tensor for name, piece in pieces.items() if name not in known}
  return TensorSource({name: spec_of(tensor) for name, tensor in found.items()}, lambda name: found[name].read())


def joined(arrays: Sequence[np.ndarray], axis: int) -> np.ndarray:
  """Arrays of one type side by side; they are moved as integers, which is many times faster for bfloat16."""
  dtype = arrays[0].dtype
  return np.concatenate([array.view(f'u{dtype.itemsize}') for array in arrays], axis=axis).view(dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether two arrays of one type and shape hold the same bits; a not-a-number equals itself."""
  integers = f'u{a.itemsize}'
  return bool(np.array_equal(a.view(integers), b.view(integers)))


def _taken_apart(tensors: Mapping[str, LazyTensor], where: str) -> dict[str, Piece]:
  """Pieces by separate name, in the file's order."""
  pieces: dict[str, Piece] = {}
  for name, tensor in tensors.items():
    match = FUSED_NAME.fullmatch(name)
    if not match:
      parts = {name: Piece(tensor)}
    else:
      layer, kind = match[1], match[2]
      rows = _fused_rows(tensors, layer, kind, where)
      if len(tensor.shape) != 2 or sum(rows) != tensor.shape[0]:
        raise CheckpointError(f'{where}: {name} has shape {list(tensor.shape)}, which does not split into rows of {", ".join(FUSED[kind])}')
      ends = np.cumsum([0, *rows]).tolist()
      parts = {f'{layer}{part}': Piece(tensor, slice(ends[i], ends[i + 1])) for i, part in enumerate(FUSED[kind])}
    for part in parts:
      if part in pieces:
        raise CheckpointError(f'{where} holds {part} twice, by itself and in a fused tensor; it is damaged')
    pieces |= parts
  return pieces


def _fused_rows(tensors: Mapping[str, LazyTensor], layer: str, kind: str, where: str) -> list[int]:
  """Rows of each part of a fused tensor in one rank."""
  total = tensors[layer + kind].shape[0] if tensors[layer + kind].shape else 0
  if kind == 'feed_forward.w13.weight':
    return [total // 2] * 2
  output = tensors.get(f'{layer}attention.wo.weight')
  if output is None or len(output.shape) != 2:
    raise CheckpointError(f'{where} has no tensor {layer}attention.wo.weight of two axes; it is damaged')
  q = output.shape[1]
  if q > total:
    return [total + 1]
  return [q, (total - q) // 2, (total - q) // 2]


def _rank_shape(rule: Rule, config: TransformerConfig, n: int) -> tuple[int, ...]:
  shape = rule.shape(config)
  if not isinstance(rule.axis, int):
    return shape
  return tuple(size // n if axis == rule.axis else size for axis, size in enumerate(shape))


def _check(shards: Shards, rule: Rule, config: TransformerConfig, where: str) -> np.dtype:
  """The tensor's type, which like its shape must be the same in all ranks."""
  expected = _rank_shape(rule, config, len(shards.labels))
  dtype: Any = None
  for label, pieces in zip(shards.labels, shards.pieces):
    piece = pieces.get(rule.theirs)
    if piece is None:
      raise CheckpointError(f'{where}/{label}.pth has no tensor {rule.theirs}; it is damaged or of another checkpoint')
    if piece.shape != expected:
      got = list(piece.shape)
      raise CheckpointError(f'{where}/{label}.pth: {rule.theirs} has shape {got}, expected {list(expected)}; it is of another checkpoint')
    kind = piece.tensor.dtype
    dtype = kind if dtype is None else dtype
    if kind.name not in ('float32', 'bfloat16', 'float16', 'float64') or kind != dtype:
      usual = f'{dtype} in the first shard' if kind != dtype else 'floating numbers'
      raise CheckpointError(f'{where}/{label}.pth: {rule.theirs} is {kind}, not {usual}; it is damaged or of another checkpoint')
  return dtype


def _merged(rule: Rule, pieces: Sequence[Piece], where: str) -> np.ndarray:
  """The full tensor of theirs; for 'rank' the ranks' tensors stacked."""
  if rule.axis == 'rank':
    return np.stack([piece.read() for piece in pieces])
  if isinstance(rule.axis, int):
    return pieces[0].read() if len(pieces) == 1 else _side_by_side([piece.read for piece in pieces], pieces[0], rule.axis)
  first = pieces[0].read()
  for rank, piece in enumerate(pieces[1:], 1):
    if not same_bits(first, piece.read()):
      raise CheckpointError(f'{where}: {rule.theirs} must be the same in every shard, but 0 and {rank} differ; download them again')
  return first


def _side_by_side(reads: Sequence[Callable[[], np.ndarray]], like: Piece, axis: int) -> np.ndarray:
  """`joined`, with one rank read at a time."""
  dtype, size = like.tensor.dtype, like.shape[axis]
  shape = tuple(n * len(reads) if i == axis else n for i, n in enumerate(like.shape))
  full = np.empty(shape, f'u{dtype.itemsize}')
  for rank, read in enumerate(reads):
    place = (slice(None),) * axis + (slice(rank * size, (rank + 1) * size),)
    full[place] = read().view(full.dtype)
  return full.view(dtype)
