"""Tiny checkpoints in Meta's form and Meta's computation on them, in numpy float64, one rank after another (spec model.md 1.3 to 1.7, 2).

Written from the specification alone: it shares no line with the package, which is why it keeps ranks apart to the end, turns channel pairs
(2i, 2i + 1) and knows nothing of merged tensors.
"""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import yaml

from chameleon_jax.interop.files.pth import open_pth
from chameleon_jax.interop.files.pth_writer import PthWriter
from chameleon_jax.interop.lazy import TensorSpec

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
F4 = np.dtype('f4')


@dataclasses.dataclass(frozen=True)
class Tiny:
  """Sizes of a tiny network; by Meta's formula the inner width is 96."""

  ranks: int = 1
  swin: bool = False
  heads: int = 8
  kv_heads: int = 4
  d_head: int = 4
  vocab: int = 64
  layers: int = 2
  ffn: int = 96
  theta: float = 10000.0
  eps: float = 1e-5

  @property
  def dim(self):
    return self.heads * self.d_head


def make_ranks(tiny, *, dtype=F4, seed=0, rope='tensor'):
  """Name -> array for each rank: random, q/k norms different on every rank, the others replicated."""
  rng = np.random.default_rng(seed)
  n, d, h, f = tiny.ranks, tiny.dim, tiny.d_head, tiny.ffn

  def draw(*shape, scale=1.0, shift=0.0):
    return (shift + scale * rng.normal(size=shape)).astype(dtype)

  per_rank = {
      'attention.wq.weight': (tiny.heads * h // n, d),
      'attention.wk.weight': (tiny.kv_heads * h // n, d),
      'attention.wv.weight': (tiny.kv_heads * h // n, d),
      'attention.wo.weight': (d, tiny.heads * h // n),
      'feed_forward.w1.weight': (f // n, d),
      'feed_forward.w3.weight': (f // n, d),
      'feed_forward.w2.weight': (d, f // n),
  }
  names = ['norm.weight', *(f'layers.{i}.{name}.weight' for i in range(tiny.layers) for name in ('attention_norm', 'ffn_norm'))]
  replicated = {name: draw(d, scale=0.3, shift=1.0) for name in names}
  ranks = []
  for _ in range(n):
    rank = {'tok_embeddings.weight': draw(tiny.vocab, d // n)}
    for i in range(tiny.layers):
      rank |= {f'layers.{i}.{name}': draw(*shape, scale=shape[1] ** -0.5) for name, shape in per_rank.items()}
      for norm in ('q_normalization', 'k_normalization'):
        rank[f'layers.{i}.attention.{norm}.weight'] = draw(h, scale=0.5, shift=1.0)
        rank[f'layers.{i}.attention.{norm}.bias'] = draw(h, scale=0.5)
      rank |= {name: array for name, array in replicated.items() if name.startswith(f'layers.{i}.')}
    rank |= {'norm.weight': replicated['norm.weight'], 'output.weight': draw(tiny.vocab // n, d, scale=d**-0.5)}
    if rope == 'tensor':
      rank['rope.freqs'] = np.arange(h // 2).astype('f4')
    elif rope == 'none':
      rank['rope.freqs'] = None
    ranks.append(rank)
  return ranks


def fuse(rank):
  """The same with attention.wqkv and feed_forward.w13 in the place of their first part."""
  fused = {}
  for name, array in rank.items():
    layer, _, part = name.partition('attention.' if 'attention.w' in name else 'feed_forward.')
    if part == 'wq.weight':
      fused[f'{layer}attention.wqkv.weight'] = np.concatenate([rank[f'{layer}attention.{p}.weight'] for p in ('wq', 'wk', 'wv')])
    elif part == 'w1.weight':
      fused[f'{layer}feed_forward.w13.weight'] = np.concatenate([rank[f'{layer}feed_forward.{p}.weight'] for p in ('w1', 'w3')])
    elif part not in ('wk.weight', 'wv.weight', 'w3.weight'):
      fused[name] = array
  return fused


def logits(ranks, tiny, tokens):
  """float64 [T, V] of one row of tokens."""
  ranks = [{name: np.asarray(array, np.float64) for name, array in rank.items() if array is not None} for rank in ranks]
  t, h = len(tokens), tiny.d_head
  angles = np.arange(t)[:, None] * tiny.theta ** (-2 * np.arange(h // 2) / h)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

  def rms(x, weight):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + tiny.eps) * weight

  def norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias

  def turn(x):  # [T, heads, h]
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)

  def attention(rank, layer, y):
    w = {name: rank[f'{layer}attention.{name}'] for name in ('wq.weight', 'wk.weight', 'wv.weight', 'wo.weight')}
    q, k, v = ((y @ w[f'w{p}.weight'].T).reshape(t, -1, h) for p in 'qkv')
    q = turn(norm(q, *(rank[f'{layer}attention.q_normalization.{p}'] for p in ('weight', 'bias'))))
    k = turn(norm(k, *(rank[f'{layer}attention.k_normalization.{p}'] for p in ('weight', 'bias'))))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum('tnh,snh->nts', q, k) / np.sqrt(h)
    scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum('nts,snh->tnh', weights, v).reshape(t, -1) @ w['wo.weight'].T

  def feed_forward(rank, layer, y):
    a, b = y @ rank[f'{layer}feed_forward.w1.weight'].T, y @ rank[f'{layer}feed_forward.w3.weight'].T
    return (a / (1 + np.exp(-a)) * b) @ rank[f'{layer}feed_forward.w2.weight'].T

  x = np.concatenate([rank['tok_embeddings.weight'][tokens] for rank in ranks], -1)
  for i in range(tiny.layers):
    layer = f'layers.{i}.'
    for branch, name in ((attention, 'attention_norm'), (feed_forward, 'ffn_norm')):
      weight = ranks[0][f'{layer}{name}.weight']
      y = x if tiny.swin else rms(x, weight)
      y = sum(branch(rank, layer, y) for rank in ranks)
      x = x + (rms(y, weight) if tiny.swin else y)
  x = rms(x, ranks[0]['norm.weight'])
  return np.concatenate([x @ rank['output.weight'].T for rank in ranks], -1)


# -------------------------------------------------------------------------------------------------- files


def spec_tree(node):
  """A tree in which arrays became what declares them."""
  if isinstance(node, np.ndarray):
    return TensorSpec(node.shape, node.dtype)
  if isinstance(node, dict):
    return {key: spec_tree(value) for key, value in node.items()}
  return type(node)(map(spec_tree, node)) if isinstance(node, (list, tuple)) else node


def arrays_of(node, name='', depth=0):
  """(name, array) of a tree, named as the reader does."""
  if isinstance(node, np.ndarray):
    yield name, node
  elif isinstance(node, (dict, list, tuple)):
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
      yield from arrays_of(value, f'{name}.{key}' if depth else str(key), depth + 1)


def save_pth(path, tree):
  """What torch.save would write."""
  with PthWriter(path, spec_tree(tree)) as writer:
    for name, array in arrays_of(tree):
      writer.write(name, array)


def load_pth(path):
  """The tree with arrays in it, and its tensors' names in order."""
  with open_pth(path, verify=True) as file:

    def whole(node):
      if isinstance(node, dict):
        return {key: whole(value) for key, value in node.items()}
      if isinstance(node, (list, tuple)):
        return type(node)(map(whole, node))
      return np.array(node.read()) if hasattr(node, 'read') else node

    return whole(file.tree), list(file.tensors())


def params_of(tiny):
  """params.json as the release is thought to have it."""
  model = {'dim': tiny.dim, 'n_layers': tiny.layers, 'n_heads': tiny.heads, 'n_kv_heads': tiny.kv_heads, 'vocab_size': tiny.vocab}
  model |= {'multiple_of': 16, 'norm_eps': tiny.eps, 'rope_theta': tiny.theta, 'qk_normalization': True, 'swin_norm': tiny.swin}
  return {'seed': 7, 'model': model}


def consolidate_of(tiny, dtype=F4):
  """consolidate_params.json likewise."""
  short = {'float32': 'fp32', 'float16': 'fp16', 'bfloat16': 'bf16'}[np.dtype(dtype).name]
  return {'model_parallel_size': tiny.ranks, 'dtype': short, 'on_gpu': True, 'src': 'a/b', 'tgt': 'c/d', 'tokenizer_path': None}


def save_model(folder, ranks, tiny, *, params=None, consolidate=None):
  """The shards and the argument files."""
  folder.mkdir(parents=True, exist_ok=True)
  for rank, tensors in enumerate(ranks):
    save_pth(folder / ('consolidated.pth' if len(ranks) == 1 else f'consolidated.{rank:02d}.pth'), tensors)
  (folder / 'params.json').write_text(json.dumps(params_of(tiny) if params is None else params))
  (folder / 'consolidate_params.json').write_text(json.dumps(consolidate or consolidate_of(tiny, ranks[0]['norm.weight'].dtype)))
  return folder


DDCONFIG = {'double_z': False, 'z_channels': 6, 'resolution': 8, 'in_channels': 3, 'out_ch': 3, 'ch': 32, 'ch_mult': [1, 2]}
DDCONFIG |= {'num_res_blocks': 1, 'attn_resolutions': [], 'dropout': 0.0}


def make_vqgan(*, decoder=True, seed=1):
  """The state dict of a tiny image tokenizer, in the order of spec model.md 4.3 and 4.4: 8 x 8 pixels, 16 of 32 codes."""
  rng = np.random.default_rng(seed)
  state = {}

  def add(name, *shape):
    state[name] = rng.normal(size=shape).astype('f4')

  def conv(name, into, out, kernel=3):
    add(f'{name}.weight', out, into, kernel, kernel)
    add(f'{name}.bias', out)

  def norm(name, channels):
    add(f'{name}.weight', channels)
    add(f'{name}.bias', channels)

  def block(name, into, out):
    norm(f'{name}.norm1', into)
    conv(f'{name}.conv1', into, out)
    norm(f'{name}.norm2', out)
    conv(f'{name}.conv2', out, out)
    if into != out:
      conv(f'{name}.nin_shortcut', into, out, 1)

  def middle(name):
    block(f'{name}.mid.block_1', 64, 64)
    norm(f'{name}.mid.attn_1.norm', 64)
    for part in ('q', 'k', 'v', 'proj_out'):
      conv(f'{name}.mid.attn_1.{part}', 64, 64, 1)
    block(f'{name}.mid.block_2', 64, 64)

  conv('encoder.conv_in', 3, 32)
  block('encoder.down.0.block.0', 32, 32)
  conv('encoder.down.0.downsample.conv', 32, 32)
  block('encoder.down.1.block.0', 32, 64)
  middle('encoder')
  norm('encoder.norm_out', 64)
  conv('encoder.conv_out', 64, 6)
  if decoder:
    conv('decoder.conv_in', 6, 64)
    middle('decoder')
    block('decoder.up.0.block.0', 64, 32)
    block('decoder.up.0.block.1', 32, 32)
    block('decoder.up.1.block.0', 64, 64)
    block('decoder.up.1.block.1', 64, 64)
    conv('decoder.up.1.upsample.conv', 64, 64)
    norm('decoder.norm_out', 32)
    conv('decoder.conv_out', 32, 3)
  add('quantize.embedding.weight', 32, 5)
  conv('quant_conv', 6, 5, 1)
  conv('post_quant_conv', 5, 6, 1)
  return state


def save_tokenizer(folder, tree, *, ddconfig=DDCONFIG, text=None):
  """vqgan.ckpt, vqgan.yaml (with a comment, so that rewriting it would show) and the text tokenizer."""
  folder.mkdir(parents=True, exist_ok=True)
  save_pth(folder / 'vqgan.ckpt', tree)
  params = {'embed_dim': 5, 'n_embed': 32, 'ddconfig': ddconfig, 'lossconfig': {'target': 'x.y'}, 'ckpt_path': 'p'}
  (folder / 'vqgan.yaml').write_text('# as released\n' + yaml.safe_dump({'model': {'target': 't', 'params': params}}))
  if text is not None:
    (folder / 'text_tokenizer.json').write_bytes(text)
  return folder


def same_tree(a, b):
  """Bitwise, with types, kinds of containers and the order of keys."""
  if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
    return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
  if type(a) is not type(b):
    return False
  if isinstance(a, dict):
    return list(a) == list(b) and all(same_tree(a[key], b[key]) for key in a)
  return len(a) == len(b) and all(map(same_tree, a, b)) if isinstance(a, (list, tuple)) else a == b


def same_folders(a, b, *, apart=('checklist.chk',)):
  """Asserts that two folders hold the same files: .pth and .ckpt by content, others byte by byte."""
  a, b = pathlib.Path(a), pathlib.Path(b)
  names = {path.name for path in a.iterdir()} - set(apart)
  assert names == {path.name for path in b.iterdir()} - set(apart)
  for name in sorted(names):
    if name.endswith(('.pth', '.ckpt')):
      assert same_tree(load_pth(a / name)[0], load_pth(b / name)[0]), name
    else:
      assert (a / name).read_bytes() == (b / name).read_bytes(), name
