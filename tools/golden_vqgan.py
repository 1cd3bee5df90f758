"""The image tokenizer for `make_golden.py`: random weights, encoder, quantizer and decoder in plain torch, and the path of a picture.

Written from the published facts alone (spec model.md 4, 7). Tensors are NCHW under the names of vqgan.ckpt.
Does not know: the package that these values test.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from golden_meta import GRID, draw
from PIL import Image
from torch.nn import functional

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class VQArgs:
  """Sizes, named as in vqgan.yaml."""

  ch: int = 32  # fewer channels do not split into the 32 groups of the norms
  ch_mult: tuple[int, ...] = (1, 2)
  num_res_blocks: int = 1
  resolution: int = 16
  z_channels: int = 16
  embed_dim: int = 8
  n_embed: int = 32


def shapes(args: VQArgs, *, decoder: bool) -> dict[str, tuple[int, ...]]:
  """Name -> shape of every tensor (spec model.md 4.3, 4.4 and 4.6)."""
  found: dict[str, tuple[int, ...]] = {}

  def conv(name: str, out: int, into: int, size: int = 3) -> None:
    found[f'{name}.weight'], found[f'{name}.bias'] = (out, into, size, size), (out,)

  def norm(name: str, width: int) -> None:
    found[f'{name}.weight'], found[f'{name}.bias'] = (width,), (width,)

  def block(name: str, into: int, out: int) -> None:
    norm(f'{name}.norm1', into)
    conv(f'{name}.conv1', out, into)
    norm(f'{name}.norm2', out)
    conv(f'{name}.conv2', out, out)
    if into != out:
      conv(f'{name}.nin_shortcut', out, into, 1)

  def middle(name: str, width: int) -> None:
    block(f'{name}.block_1', width, width)
    norm(f'{name}.attn_1.norm', width)
    for part in ('q', 'k', 'v', 'proj_out'):
      conv(f'{name}.attn_1.{part}', width, width, 1)
    block(f'{name}.block_2', width, width)

  widths = [args.ch * factor for factor in args.ch_mult]
  last = len(widths) - 1
  conv('encoder.conv_in', args.ch, 3)
  width = args.ch
  for level, out in enumerate(widths):
    for index in range(args.num_res_blocks):
      block(f'encoder.down.{level}.block.{index}', width, out)
      width = out
    if level < last:
      conv(f'encoder.down.{level}.downsample.conv', width, width)
  middle('encoder.mid', width)
  norm('encoder.norm_out', width)
  conv('encoder.conv_out', args.z_channels, width)
  if decoder:
    conv('decoder.conv_in', width, args.z_channels)
    middle('decoder.mid', width)
    for level in reversed(range(len(widths))):
      for index in range(args.num_res_blocks + 1):
        block(f'decoder.up.{level}.block.{index}', width, widths[level])
        width = widths[level]
      if level:
        conv(f'decoder.up.{level}.upsample.conv', width, width)
    norm('decoder.norm_out', width)
    conv('decoder.conv_out', 3, width)
  found['quantize.embedding.weight'] = (args.n_embed, args.embed_dim)
  conv('quant_conv', args.embed_dim, args.z_channels, 1)
  conv('post_quant_conv', args.z_channels, args.embed_dim, 1)
  return found


def draw_weights(layout: str, args: VQArgs, *, decoder: bool) -> Tensors:
  """Random float32 weights: kernels of three values, so that they pack small; vectors finer than bfloat16 can hold."""
  weights = {}
  for name, shape in shapes(args, decoder=decoder).items():
    if len(shape) == 4:
      step = 2.0 ** np.round(np.log2(np.sqrt(2 / np.prod(shape[1:]))))
      values = np.array([-1, 0, 0, 1]) * step
    elif name == 'quantize.embedding.weight':
      values = GRID * (0.1875 + 2.0**-13)
    elif name.endswith('.bias'):
      values = GRID * (2.0**-5 + 2.0**-15)
    else:
      values = 1 + GRID * (2.0**-3 + 2.0**-13)
    weights[name] = draw(f'{layout}/{name}', shape, values)
  return weights


def yaml_text(args: VQArgs) -> str:
  """vqgan.yaml (spec model.md 3.3, 4.1)."""
  levels = ''.join(f'      - {factor}\n' for factor in args.ch_mult)
  return f"""model:
  base_learning_rate: 4.5e-06
  params:
    embed_dim: {args.embed_dim}
    n_embed: {args.n_embed}
    ddconfig:
      double_z: false
      z_channels: {args.z_channels}
      resolution: {args.resolution}
      in_channels: 3
      out_ch: 3
      ch: {args.ch}
      ch_mult:
{levels}      num_res_blocks: {args.num_res_blocks}
      attn_resolutions: []
      dropout: 0.0
    lossconfig:
      target: not.used.Here
      params:
        disc_start: 100001
    ckpt_path: vqgan.ckpt
"""


class Network:
  """Encoder and decoder over a dict of weights, computed in `dtype`."""

  def __init__(self, args: VQArgs, weights: Mapping[str, torch.Tensor], dtype: torch.dtype):
    self.args = args
    self.weights = {name: value.to(dtype) for name, value in weights.items()}
    self.dtype = dtype

  def latents(self, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, H, W] -> latents [B, h, w, embed_dim] before the quantizer."""
    x = self._conv('encoder.conv_in', pixels.to(self.dtype))
    last = len(self.args.ch_mult) - 1
    for level in range(last + 1):
      for index in range(self.args.num_res_blocks):
        x = self._block(f'encoder.down.{level}.block.{index}', x)
      if level < last:
        x = self._conv(f'encoder.down.{level}.downsample.conv', functional.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    x = self._middle('encoder.mid', x)
    x = self._conv('encoder.conv_out', functional.silu(self._norm('encoder.norm_out', x)))
    return self._conv('quant_conv', x, padding=0).permute(0, 2, 3, 1)

  def encode(self, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes int32 [B, h * w], row-major, and how much farther (squared) the second nearest entry is, float32 [B, h * w]."""
    z = self.latents(pixels)
    distance = (z[..., None, :] - self.weights['quantize.embedding.weight']).pow(2).sum(-1).flatten(1, 2)
    nearest = distance.sort(-1).values
    return distance.argmin(-1).numpy().astype(np.int32), (nearest[..., 1] - nearest[..., 0]).numpy().astype(np.float32)

  def decode(self, codes: np.ndarray) -> torch.Tensor:
    """Codes [B, n] -> pixels [B, 3, H, W], not clamped."""
    side = round(codes.shape[1] ** 0.5)
    x = self.weights['quantize.embedding.weight'][torch.tensor(codes).long()].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    x = self._middle('decoder.mid', self._conv('decoder.conv_in', self._conv('post_quant_conv', x, padding=0)))
    for level in reversed(range(len(self.args.ch_mult))):
      for index in range(self.args.num_res_blocks + 1):
        x = self._block(f'decoder.up.{level}.block.{index}', x)
      if level:
        x = self._conv(f'decoder.up.{level}.upsample.conv', x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return self._conv('decoder.conv_out', functional.silu(self._norm('decoder.norm_out', x)))

  def _conv(self, name: str, x: torch.Tensor, *, stride: int = 1, padding: int | None = None) -> torch.Tensor:
    kernel = self.weights[f'{name}.weight']
    return functional.conv2d(x, kernel, self.weights[f'{name}.bias'], stride, kernel.shape[-1] // 2 if padding is None else padding)

  def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.group_norm(x, 32, self.weights[f'{name}.weight'], self.weights[f'{name}.bias'], 1e-6)

  def _block(self, name: str, x: torch.Tensor) -> torch.Tensor:
    y = self._conv(f'{name}.conv1', functional.silu(self._norm(f'{name}.norm1', x)))
    y = self._conv(f'{name}.conv2', functional.silu(self._norm(f'{name}.norm2', y)))
    return y + (self._conv(f'{name}.nin_shortcut', x) if f'{name}.nin_shortcut.weight' in self.weights else x)

  def _middle(self, name: str, x: torch.Tensor) -> torch.Tensor:
    x = self._block(f'{name}.block_1', x)
    y = self._norm(f'{name}.attn_1.norm', x)
    q, k, v = (self._conv(f'{name}.attn_1.{part}', y).flatten(2) for part in 'qkv')  # [B, C, n]
    weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)  # [B, query, key]
    x = x + self._conv(f'{name}.attn_1.proj_out', (v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))
    return self._block(f'{name}.block_2', x)


# ------------------------------------------------------------------------------------------------------------------ pictures


def draw_picture(name: str, height: int, width: int) -> np.ndarray:
  """Uint8 [height, width, 3]: coarse patches and a little noise."""
  coarse = draw(f'{name}/coarse', (-(-height // 4), -(-width // 4), 3), np.arange(16, 240)).numpy()
  noise = draw(f'{name}/noise', (height, width, 3), np.arange(-15, 16)).numpy()
  return (coarse.repeat(4, 0).repeat(4, 1)[:height, :width] + noise).astype(np.uint8)


def crop_meta(picture: np.ndarray, side: int) -> np.ndarray:
  """RGB picture of any size -> uint8 [side, side, 3] as the release does (spec model.md 7.1, steps 2 and 3)."""
  image = Image.fromarray(picture)
  factor = side / min(image.size)
  image = image.resize((round(factor * image.width), round(factor * image.height)), Image.Resampling.LANCZOS)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  return np.asarray(image.crop((left, top, left + side, top + side)))


def scale_meta(pictures: np.ndarray) -> torch.Tensor:
  """Uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
  return torch.tensor((pictures / 255 * 2 - 1).astype(np.float32)).permute(0, 3, 1, 2)


def scale_huggingface(pictures: np.ndarray) -> torch.Tensor:
  """The same with the port's factor, 0.0078 in place of 1 / 127.5."""
  return torch.tensor(pictures.astype(np.float32) * np.float32(0.0078) - np.float32(1)).permute(0, 3, 1, 2)


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
  """Pixels [B, 3, H, W] -> uint8 [B, H, W, 3], cut off as in the release (spec model.md 7.3)."""
  return ((pixels.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
