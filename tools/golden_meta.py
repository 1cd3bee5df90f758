"""The language model in Meta's layout, for `make_golden.py`: tiny random checkpoints, and the network in plain torch to run them.

Written from the published facts alone (spec model.md 1, 2): interleaved rotary pairs, one pair of q and k norms per rank, both orders of
norm and block. Ranks run one after the other: column-parallel outputs stay with their rank, row-parallel ones are added up.
Does not know: the package that these values test.
"""

import dataclasses
import hashlib
import json
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

SEED = 20240516
N_TOKENS = 384
GRID = np.arange(-3, 4)

Tensors = dict[str, Any]  # name -> torch.Tensor; None for a `rope.freqs` that holds nothing


def draw(name: str, shape: Sequence[int], values: np.ndarray) -> torch.Tensor:
  """Float32 tensor of entries of `values`, the same for the same name wherever it runs."""
  rng = np.random.RandomState(zlib.crc32(f'{SEED}/{name}'.encode()))  # the one numpy stream that is promised never to change
  return torch.tensor(np.asarray(values, np.float32)[rng.randint(0, len(values), tuple(shape))])


def scale(fan_in: int) -> float:
  """Power of two next to the step at which GRID has variance 1 / fan_in."""
  return float(2.0 ** np.round(np.log2(0.5 / np.sqrt(fan_in))))


@dataclasses.dataclass(frozen=True)
class MetaArgs:
  """One layout; fields are those of `params.json` unless said otherwise."""

  name: str  # of the folder
  dim: int
  n_layers: int
  n_heads: int
  n_kv_heads: int | None
  multiple_of: int
  swin_norm: bool
  model_parallel_size: int = 1
  ffn_dim_multiplier: float | None = None
  norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  dtype: str = 'bfloat16'  # of the tensors
  fused: bool = False  # `wqkv` and `w13` in place of their parts

  @property
  def kv_heads(self) -> int:
    """Key heads."""
    return self.n_kv_heads or self.n_heads

  @property
  def head_dim(self) -> int:
    """Channels of a head."""
    return self.dim // self.n_heads

  @property
  def ffn_dim(self) -> int:
    """Width of the feed-forward block (spec model.md 1.2)."""
    width = int(2 * (4 * self.dim) / 3)
    if self.ffn_dim_multiplier is not None:
      width = int(self.ffn_dim_multiplier * width)
    return -(-width // self.multiple_of) * self.multiple_of


def norm_values(rank: int) -> tuple[np.ndarray, np.ndarray]:
  """Weights and biases of the q and k norms of a rank: far from 1 and 0, and from those of any other rank."""
  return 0.75 + 0.25 * rank + GRID / 16, (-1) ** rank * (0.25 + 0.25 * rank) + GRID / 16


def draw_shards(args: MetaArgs) -> list[Tensors]:
  """The flat dict of each rank."""
  fine = 2.0**-13 if args.dtype == 'float32' else 0.0  # below the precision of bfloat16
  norm = 1 + GRID / 8 + GRID * fine
  qkv = {'wq': args.n_heads, 'wk': args.kv_heads, 'wv': args.kv_heads}
  size, rows, width, dtype = args.model_parallel_size, args.head_dim, args.dim, getattr(torch, args.dtype)
  shards: list[Tensors] = [{} for _ in range(size)]

  def split(name: str, shape: Sequence[int], axis: int | None, values: np.ndarray) -> None:
    full = draw(f'{args.name}/{name}', shape, values).to(dtype)
    for shard, part in zip(shards, [full] * size if axis is None else full.chunk(size, axis)):
      shard[name] = part.clone()

  split('tok_embeddings.weight', (N_TOKENS, width), 1, GRID / 2)
  for layer in range(args.n_layers):
    at = f'layers.{layer}.'
    for name, heads in qkv.items():
      split(f'{at}attention.{name}.weight', (heads * rows, width), 0, GRID * scale(width))
    split(f'{at}attention.wo.weight', (width, args.n_heads * rows), 1, GRID * scale(width))
    for part in ('q_normalization', 'k_normalization'):
      for rank, shard in enumerate(shards):
        for kind, values in zip(('weight', 'bias'), norm_values(rank)):
          name = f'{at}attention.{part}.{kind}'
          shard[name] = draw(f'{args.name}/{name}/{rank}', (rows,), values + GRID * fine).to(dtype)
    split(f'{at}feed_forward.w1.weight', (args.ffn_dim, width), 0, GRID * scale(width))
    split(f'{at}feed_forward.w3.weight', (args.ffn_dim, width), 0, GRID * scale(width))
    split(f'{at}feed_forward.w2.weight', (width, args.ffn_dim), 1, GRID * scale(args.ffn_dim))
    split(f'{at}attention_norm.weight', (width,), None, norm)
    split(f'{at}ffn_norm.weight', (width,), None, norm)
  split('norm.weight', (width,), None, norm)
  split('output.weight', (N_TOKENS, width), 0, GRID * scale(width))
  frequencies = args.rope_theta ** (-torch.arange(0, rows, 2) / rows)
  for shard in shards:
    if args.fused:
      _fuse(shard, args.n_layers)
    # Its true form is not established; one known writer stores None.
    shard['rope.freqs'] = None if args.fused else frequencies.to(dtype)
  return shards


def _fuse(shard: Tensors, n_layers: int) -> None:
  for layer in range(n_layers):
    for whole, parts in (('attention.wqkv', ('wq', 'wk', 'wv')), ('feed_forward.w13', ('w1', 'w3'))):
      at = f'layers.{layer}.{whole.split(".")[0]}.'
      shard[f'layers.{layer}.{whole}.weight'] = torch.cat([shard.pop(f'{at}{part}.weight') for part in parts])


def separate(args: MetaArgs, shard: Tensors) -> Tensors:
  """A shard with `wq`, `wk`, `wv`, `w1` and `w3` by themselves."""
  found = dict(shard)
  local = [heads * args.head_dim // args.model_parallel_size for heads in (args.n_heads, args.kv_heads, args.kv_heads)]
  for name in shard:
    for whole, parts in (('wqkv', ('wq', 'wk', 'wv')), ('w13', ('w1', 'w3'))):
      if f'.{whole}.' in name:
        value = found.pop(name)
        pieces = value.split(local) if whole == 'wqkv' else value.chunk(2)
        found |= {name.replace(whole, part): piece for part, piece in zip(parts, pieces)}
  return found


def forward(args: MetaArgs, shards: list[Tensors], tokens: torch.Tensor, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
  """Residual stream [B, T, D] after the embedding and after each layer, and logits [B, T, V]; all computed in `dtype`."""
  ranks = [{name: value.to(dtype) for name, value in separate(args, shard).items() if value is not None} for shard in shards]

  def rms(x: torch.Tensor, name: str) -> torch.Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + args.norm_eps) * ranks[0][name]

  x = torch.cat([rank['tok_embeddings.weight'][tokens] for rank in ranks], -1)
  stream = [x]
  for layer in range(args.n_layers):
    at = f'layers.{layer}.'
    if args.swin_norm:
      x = x + rms(sum_of(_attention(args, rank, at, x) for rank in ranks), f'{at}attention_norm.weight')
      x = x + rms(sum_of(_feed_forward(rank, at, x) for rank in ranks), f'{at}ffn_norm.weight')
    else:
      y = rms(x, f'{at}attention_norm.weight')
      x = x + sum_of(_attention(args, rank, at, y) for rank in ranks)
      y = rms(x, f'{at}ffn_norm.weight')
      x = x + sum_of(_feed_forward(rank, at, y) for rank in ranks)
    stream.append(x)
  y = rms(x, 'norm.weight')
  return stream, torch.cat([y @ rank['output.weight'].T for rank in ranks], -1)


def sum_of(parts: Any) -> torch.Tensor:
  """What the all-reduce does."""
  return torch.stack(list(parts)).sum(0)


def _attention(args: MetaArgs, rank: Tensors, at: str, x: torch.Tensor) -> torch.Tensor:
  local = [heads // args.model_parallel_size for heads in (args.n_heads, args.kv_heads, args.kv_heads)]
  projections = [rank[f'{at}attention.{name}.weight'] for name in ('wq', 'wk', 'wv')]
  q, k, v = ((x @ w.T).unflatten(-1, (heads, args.head_dim)).transpose(1, 2) for w, heads in zip(projections, local))  # [B, heads, T, hd]
  q, k = (
    _rotate(functional.layer_norm(y, (args.head_dim,), rank[f'{name}.weight'], rank[f'{name}.bias'], 1e-5), args.rope_theta)
    for y, name in ((q, f'{at}attention.q_normalization'), (k, f'{at}attention.k_normalization'))
  )
  group = local[0] // local[1]
  k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
  scores = q @ k.transpose(-1, -2) / args.head_dim**0.5
  future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
  context = scores.masked_fill(future, float('-inf')).softmax(-1) @ v
  return context.transpose(1, 2).flatten(2) @ rank[f'{at}attention.wo.weight'].T


def _rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
  """Turns the pairs of channels (2i, 2i + 1) of [B, heads, T, hd] by position * theta^(-2i / hd)."""
  length, size = x.shape[-2:]
  angle = torch.arange(length, dtype=x.dtype)[:, None] * theta ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
  even, odd = x[..., 0::2], x[..., 1::2]
  return torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1).flatten(-2)


def _feed_forward(rank: Tensors, at: str, x: torch.Tensor) -> torch.Tensor:
  w1, w3, w2 = (rank[f'{at}feed_forward.{name}.weight'] for name in ('w1', 'w3', 'w2'))
  return functional.silu(x @ w1.T) * (x @ w3.T) @ w2.T


def write_checkpoint(args: MetaArgs, shards: list[Tensors], folder: pathlib.Path) -> None:
  """Writes consolidated*.pth, params.json, consolidate_params.json and checklist.chk."""
  folder.mkdir(parents=True)
  for rank, shard in enumerate(shards):
    torch.save(shard, folder / ('consolidated.pth' if len(shards) == 1 else f'consolidated.{rank:02d}.pth'))
  model = {name: getattr(args, name) for name in ('dim', 'n_layers', 'n_heads', 'multiple_of', 'norm_eps', 'rope_theta', 'swin_norm')}
  model |= {'vocab_size': N_TOKENS, 'qk_normalization': True}
  for name in ('n_kv_heads', 'ffn_dim_multiplier'):
    if getattr(args, name) is not None:
      model[name] = getattr(args, name)
  # Two of the forms that the readers of the release accept: arguments under "model", or at the top beside foreign ones.
  params = model | {'seed': 7, 'max_seq_len': 4096} if args.fused else {'seed': 7, 'model': model}
  dtype = 'fp32' if args.dtype == 'float32' else 'bf16'
  consolidate: dict[str, Any] = {'model_parallel_size': args.model_parallel_size, 'dtype': dtype, 'on_gpu': True}
  consolidate |= {'src': args.name if args.fused else f'{args.name}_noimggen', 'tgt': args.name, 'tokenizer_path': None}
  for name, value in (('params.json', params), ('consolidate_params.json', consolidate)):
    (folder / name).write_text(json.dumps(value, indent=2) + '\n')
  write_checklist(folder)


def write_checklist(folder: pathlib.Path) -> None:
  """Lists the md5 of every file beside it (spec model.md 2.1)."""
  files = sorted(path for path in folder.iterdir() if path.name != 'checklist.chk')
  lines = [f'{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n' for path in files]
  (folder / 'checklist.chk').write_text(''.join(lines))
