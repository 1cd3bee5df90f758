"""Plain fast torch written for the benchmark: a decode loop for the transformer, and the decoder of the image tokenizer.

The decode loop is what one would write by hand with torch: fused matrices for q, k, v and for gate and up, a static cache, sdpa over the
slots in use, nothing between two tokens but the network. It takes our parameters as they are (numpy or jax arrays, on the host or the
device), so it has the same weights without a file. On a GPU a step is one CUDA graph. Pre-norm models only.
Torch is imported inside the functions.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from chameleon_jax.array_types import Params
from chameleon_jax.config import TransformerConfig, VQGANConfig
from chameleon_jax.interop.trees import flat


def _tensor(leaf: Any) -> Any:
  """The array as a torch tensor where it lies, not copied."""
  import torch

  return torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else torch.from_dlpack(leaf)


class PlainDecoder:
  """Greedy text for rows of one length, with the interface of `benchmark_torch.Decoder`; `forward` for anything else."""

  def __init__(self, params: Params, config: TransformerConfig, allowed: np.ndarray, *, dtype: str, slots: int, device: str = 'cpu'):
    """Args:
      params: of the transformer, one tree a layer.
      config: its sizes.
      allowed: bool [V], what may be written.
      dtype: of the weights, the cache and the products.
      slots: of the cache.
      device: 'cpu' or 'cuda'.

    Raises:
      ValueError: a model of another kind.
    """
    import torch

    if config.norm_position != 'pre' or not config.qk_norm:
      raise ValueError('the plain loop knows pre-norm models with q/k norms only')
    self._config, self._slots, self._device = config, slots, device
    self._dtype = getattr(torch, dtype)

    def vector(leaf: Any) -> Any:
      return _tensor(leaf).to(device, self._dtype)

    def matrix(leaf: Any, width: int) -> Any:
      """[.., out] with `width` inputs in front -> [out, in], as torch stores its linear layers."""
      return vector(leaf).reshape(width, -1).T

    def layer(tree: Params) -> dict[str, Any]:
      attention, forward = tree['attention'], tree['feed_forward']
      width = config.d_model
      return {
        'qkv': torch.cat([matrix(attention[f'{part}_proj'], width) for part in 'qkv']).contiguous(),
        'out': matrix(attention['o_proj'], config.n_heads * config.d_head).contiguous(),
        'wide': torch.cat([matrix(forward[f'{part}_proj'], width) for part in ('gate', 'up')]).contiguous(),
        'down': matrix(forward['down_proj'], config.d_ff).contiguous(),
        'norms': (vector(tree['attention_norm']['weight']), vector(tree['ffn_norm']['weight'])),
        'heads': [vector(attention[f'{part}_norm'][kind]) for part in 'qk' for kind in ('weight', 'bias')],
      }

    self._layers = [layer(params[f'layers_{index}']) for index in range(config.n_layers)]
    self._embedding, self._norm = vector(params['embedding']), vector(params['final_norm']['weight'])
    self._head = matrix(params['lm_head'], config.d_model).contiguous()
    self._mask = torch.where(torch.tensor(allowed), 0.0, -torch.inf).to(device, self._dtype)
    angles = torch.arange(slots)[:, None] * config.rope_theta ** (-torch.arange(0, config.d_head, 2) / config.d_head)
    self._turn = (angles.cos().to(device), angles.sin().to(device))

  def empty_cache(self, rows: int) -> list[tuple[Any, Any]]:
    """Keys and values [B, K, S, H] of every layer."""
    import torch

    shape = (rows, self._config.n_kv_heads, self._slots, self._config.d_head)
    return [tuple(torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in 'kv') for _ in self._layers]  # type: ignore[misc]

  def forward(self, tokens: Any, positions: Any, cache: list[tuple[Any, Any]]) -> Any:
    """Logits [B, V] of the last token of each row.

    Args:
      tokens: int64 [B, T].
      positions: the place of the first token, the same for all rows; or int64 [B, T], where any row may stand anywhere.
      cache: of `empty_cache`; written.
    """
    import torch
    from torch.nn import functional

    config = self._config
    rows, length = tokens.shape
    same = isinstance(positions, int)
    places = slice(positions, positions + length) if same else positions
    cos, sin = (table[places][..., None, :] for table in self._turn)
    seen = self._slots if not same else positions + length
    mask = None if same else (torch.arange(self._slots, device=self._device) <= positions[..., None])[:, None]
    causal = same and length > 1
    if causal and positions:
      raise ValueError('several tokens are filled in at the beginning only')
    sizes = [config.n_heads, config.n_kv_heads, config.n_kv_heads]

    def turned(x: Any, weight: Any, bias: Any) -> Any:
      x = functional.layer_norm(x, (config.d_head,), eps=config.qk_norm_eps) * weight + bias
      low, high = x.chunk(2, -1)
      return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(self._dtype).transpose(1, 2)

    x = self._embedding[tokens]
    for layer, (keys, values) in zip(self._layers, cache):
      qkv = functional.linear(functional.rms_norm(x, (config.d_model,), layer['norms'][0], config.norm_eps), layer['qkv'])
      q, k, v = qkv.view(rows, length, -1, config.d_head).split(sizes, 2)
      q, k, v = turned(q, *layer['heads'][:2]), turned(k, *layer['heads'][2:]), v.transpose(1, 2)
      if same:
        keys[:, :, places], values[:, :, places] = k, v
      else:
        row = torch.arange(rows, device=self._device)[:, None]
        keys[row, :, places], values[row, :, places] = k.transpose(1, 2), v.transpose(1, 2)
      context = functional.scaled_dot_product_attention(
        q, keys[:, :, :seen], values[:, :, :seen], mask, is_causal=causal, enable_gqa=config.n_heads != config.n_kv_heads
      )
      x = x + functional.linear(context.transpose(1, 2).reshape(rows, length, -1), layer['out'])
      gate, up = functional.linear(functional.rms_norm(x, (config.d_model,), layer['norms'][1], config.norm_eps), layer['wide']).chunk(
        2, -1
      )
      x = x + functional.linear(functional.silu(gate) * up, layer['down'])
    return functional.linear(functional.rms_norm(x[:, -1], (config.d_model,), self._norm, config.norm_eps), self._head)

  def prepare(self, prompts: np.ndarray, n_new: int) -> tuple[Any, Callable[[Any], Any], int]:
    """(first token [B, 1], a function from each token to the next, tokens still to draw)."""
    import torch

    with torch.inference_mode():
      cache, length = self.empty_cache(len(prompts)), prompts.shape[1]
      scores = self.forward(torch.from_numpy(prompts.astype(np.int64)).to(self._device), 0, cache) + self._mask
      token = scores.argmax(-1, keepdim=True)
      if self._device == 'cuda':
        return token, self._graph(token, cache, length), n_new - 1
    places = itertools.count(length)
    return token, lambda token: (self.forward(token, next(places), cache) + self._mask).argmax(-1, keepdim=True), n_new - 1

  def run(self, prepared: tuple[Any, Callable[[Any], Any], int]) -> np.ndarray:
    """int32 [B, n_new]."""
    import torch

    token, step, left = prepared
    written = [token]
    with torch.inference_mode():
      for _ in range(left):
        written.append(step(written[-1]))
      return torch.cat(written, 1).cpu().numpy().astype(np.int32)

  def guided(self, prompts: tuple[np.ndarray, np.ndarray], n_new: int, scale: float) -> np.ndarray:
    """Greedy codes of a guided picture, `b + scale (a - b)` of the logits behind two prompts a and b: int32 [n_new]."""
    import torch

    with torch.inference_mode():
      cache = self.empty_cache(2)
      for row, prompt in enumerate(prompts):
        before = torch.from_numpy(prompt[None, :-1].astype(np.int64)).to(self._device)
        self.forward(before, 0, [(keys[row : row + 1], values[row : row + 1]) for keys, values in cache])
      token = torch.tensor([[int(prompt[-1])] for prompt in prompts], device=self._device)
      positions = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=self._device)
      written = []
      for _ in range(n_new):
        first, second = self.forward(token, positions, cache)
        drawn = (second + scale * (first - second) + self._mask).argmax()
        written.append(drawn)
        token, positions = drawn.expand(2, 1), positions + 1
      return torch.stack(written).cpu().numpy().astype(np.int32)

  def _graph(self, token: Any, cache: Any, length: int) -> Callable[[Any], Any]:
    """The step as one CUDA graph, which keeps its token and place itself."""
    import torch

    positions = torch.full((len(token), 1), length, device=self._device)
    held = token.clone()

    def step() -> None:
      held.copy_((self.forward(held, positions, cache) + self._mask).argmax(-1, keepdim=True))
      positions.add_(1)

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):  # once without a graph: the libraries make their own room
      step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      step()
    held.copy_(token)
    positions.fill_(length)

    def replay(_: Any) -> Any:
      graph.replay()
      return held.clone()

    return replay


class PictureDecoder:
  """The decoder of the image tokenizer (spec model.md 4.4), channels last: `decode(codes int [B, n]) -> pixels [B, H, W, 3]`."""

  def __init__(self, params: Params, config: VQGANConfig, *, dtype: str, device: str = 'cpu'):
    import torch

    self._config, self._dtype, self._device = config, getattr(torch, dtype), device
    self._weights: dict[str, Any] = {}
    for name, leaf in flat(params).items():
      if name.split('/')[0] in ('decoder', 'post_quant_conv', 'quantize'):
        tensor = _tensor(leaf).to(device, self._dtype)
        kernel = name.endswith('/kernel')
        self._weights[name] = tensor.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last) if kernel else tensor

  def _conv(self, name: str, x: Any) -> Any:
    from torch.nn import functional

    kernel = self._weights[f'{name}/kernel']
    return functional.conv2d(x, kernel, self._weights[f'{name}/bias'], padding=kernel.shape[-1] // 2)

  def _norm(self, name: str, x: Any) -> Any:
    from torch.nn import functional

    return functional.group_norm(x, self._config.norm_groups, self._weights[f'{name}/scale'], self._weights[f'{name}/bias'], 1e-6)

  def _block(self, name: str, x: Any) -> Any:
    from torch.nn import functional

    y = self._conv(f'{name}/conv1', functional.silu(self._norm(f'{name}/norm1', x)))
    y = self._conv(f'{name}/conv2', functional.silu(self._norm(f'{name}/norm2', y)))
    return y + (self._conv(f'{name}/nin_shortcut', x) if f'{name}/nin_shortcut/kernel' in self._weights else x)

  def _attention(self, name: str, x: Any) -> Any:
    from torch.nn import functional

    y = self._norm(f'{name}/norm', x)
    q, k, v = (self._conv(f'{name}/{part}', y).flatten(2).transpose(1, 2) for part in 'qkv')
    mixed = functional.scaled_dot_product_attention(q, k, v)
    return x + self._conv(f'{name}/proj_out', mixed.transpose(1, 2).unflatten(2, x.shape[2:]))

  def decode(self, codes: np.ndarray) -> np.ndarray:
    """float32 [B, H, W, 3], not clamped."""
    import torch
    from torch.nn import functional

    grid = self._config.grid
    with torch.inference_mode():
      x = self._weights['quantize/embedding'][torch.from_numpy(codes.astype(np.int64)).to(self._device)]
      x = self._conv('decoder/conv_in', self._conv('post_quant_conv', x.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)))
      x = self._block('decoder/mid/block_1', x)
      x = self._block('decoder/mid/block_2', self._attention('decoder/mid/attn_1', x))
      for level in reversed(range(len(self._config.channel_multipliers))):
        for index in range(self._config.n_res_blocks + 1):
          x = self._block(f'decoder/up_{level}/block_{index}', x)
        if level:
          x = self._conv(f'decoder/up_{level}/upsample/conv', functional.interpolate(x, scale_factor=2.0, mode='nearest'))
      x = self._conv('decoder/conv_out', functional.silu(self._norm('decoder/norm_out', x)))
      return x.permute(0, 2, 3, 1).float().cpu().numpy()
