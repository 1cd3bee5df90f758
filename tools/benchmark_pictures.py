"""The image tokenizer's cases of `benchmark.py`: a picture to codes against Hugging Face's encoder, codes to a picture against plain torch.

Gates: in float32 the codes are those of the peer; in bfloat16 at least 99 % of them are those of float32. Decoded pixels of float32 differ
by no more than 2e-3 of their range; those of bfloat16 by 1 % of it at most, root mean square. Random weights have codes that tie where
trained ones do not, see `with_codebook`.
"""

import dataclasses
import functools
import pathlib
import tempfile

import benchmark_peer
import benchmark_torch
import jax
import jax.numpy as jnp
import numpy as np
from benchmark_models import Subject, pictures, transformer_params, vqgan_params
from benchmark_protocol import Contestant, Race, Row, race
from benchmark_torch_plain import PictureDecoder
from benchmark_transformer import Bench

from chameleon_jax.array_types import Params
from chameleon_jax.config import VQGANConfig
from chameleon_jax.models.vqgan import model as vqgan

CODES = {'float32': 1.0, 'bfloat16': 0.99}  # least share of equal codes
PIXELS = 2e-3  # of the range of the pixels: largest difference in float32
ROUNDED = 1e-2  # the same, root mean square, in bfloat16
DTYPES = ('float32', 'bfloat16')


def with_codebook(config: VQGANConfig, params: Params, image: np.ndarray) -> Params:
  """The parameters with a codebook in which the latents of a picture have codes, as in a trained tokenizer.

  Those codes lie at 0.9 of the latents' spread from their latents, the others anywhere in the spread (1.4 of it away): near enough that
  rounding the latents by a tenth of the spread changes codes. In bfloat16 the released size is off by a fiftieth.
  """
  network = vqgan.VQGAN(config)
  latents = jax.jit(lambda params, pixels: network.apply({'params': params}, pixels, method='latents'))
  found = np.asarray(latents(params, vqgan.to_pixels(image))).reshape(-1, config.d_code)
  rng = np.random.default_rng(1)
  centre, spread = found.mean(0), found.std(0)
  book = centre + spread * rng.standard_normal((config.n_codes, config.d_code), np.float32)
  n = min(len(found), config.n_codes)
  book[:n] = found[:n] + 0.9 * spread * rng.standard_normal((n, config.d_code), np.float32)
  return {**params, 'quantize': {'embedding': book.astype(np.float32)}}


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
  """An image tokenizer with its weights, and one picture."""

  config: VQGANConfig
  params: Params
  image: np.ndarray

  @classmethod
  def random(cls, config: VQGANConfig) -> 'Pictures':
    """Of random weights."""
    image = pictures(config.resolution, 1)
    return cls(config, with_codebook(config, vqgan_params(config), image), image)

  def in_dtype(self, dtype: str) -> VQGANConfig:
    """The config that computes in `dtype`."""
    return dataclasses.replace(self.config, dtype=dtype)  # type: ignore[arg-type]

  @functools.cached_property
  def on_device(self) -> Params:
    """The parameters as jax arrays, so that no call moves them."""
    return jax.tree.map(jnp.asarray, self.params)

  def encode(self, dtype: str) -> np.ndarray:
    """Codes int32 [1, n], by the call that users have."""
    return vqgan.encode_pictures(self.in_dtype(dtype), self.on_device, self.image)

  def decode(self, dtype: str, codes: np.ndarray) -> np.ndarray:
    """Pixels float32 [1, H, W, 3], by the call that users have."""
    return vqgan.decode_pixels(self.in_dtype(dtype), self.on_device, codes)


def encoder_flops(config: VQGANConfig) -> float:
  """Products and sums of one picture's encoding, from the shapes (convolutions, the attention in the middle, distances to the codes)."""
  side, total, width = config.resolution // config.patch_size, 0.0, config.base_channels
  total += side**2 * 9 * 3 * config.patch_size**2 * width
  for level, multiplier in enumerate(config.channel_multipliers):
    out = multiplier * config.base_channels
    for _ in range(config.n_res_blocks):
      total += side**2 * (9 * width * out + 9 * out**2 + (width * out if width != out else 0))
      width = out
    if level < len(config.channel_multipliers) - 1:
      side //= 2
      total += side**2 * 9 * width**2
  total += _middle(side, width) + side**2 * (9 * width * config.z_channels + config.z_channels * config.d_code)
  return 2 * (total + side**2 * config.d_code * config.n_codes)


def decoder_flops(config: VQGANConfig) -> float:
  """The same for decoding; an upsampled picture is convolved at its full size."""
  widths = [m * config.base_channels for m in config.channel_multipliers]
  side, width = config.grid, widths[-1]
  total = side**2 * (config.d_code * config.z_channels + 9 * config.z_channels * width) + _middle(side, width)
  for level in reversed(range(len(widths))):
    for _ in range(config.n_res_blocks + 1):
      out = widths[level]
      total += side**2 * (9 * width * out + 9 * out**2 + (width * out if width != out else 0))
      width = out
    if level:
      side *= 2
      total += side**2 * 9 * width**2
  return 2 * (total + side**2 * 9 * width * 3 * config.patch_size**2)


def _middle(side: int, width: int) -> float:
  n = side**2
  return n * (4 * 9 * width**2 + 4 * width**2) + 2 * n**2 * width


@functools.lru_cache(maxsize=1)
def _written(folder: pathlib.Path, subject: Subject, given: Pictures) -> pathlib.Path:
  """A checkpoint with the image tokenizer, and one small layer of a transformer that nobody calls."""
  path = pathlib.Path(tempfile.mkdtemp(dir=folder))
  sizes = subject.sizes
  least = dataclasses.replace(sizes.transformer, d_model=16, n_layers=1, n_heads=1, n_kv_heads=1, d_head=16, d_ff=16)
  benchmark_peer.write(path, least, transformer_params(least), sizes.vocabulary, vqgan=(given.config, given.params))
  return path


def equal_share(a: np.ndarray, b: np.ndarray) -> float:
  """Of equal entries."""
  return float(np.mean(a == b))


def _rows(bench: Bench, case: str, seen: Race, peer_names: dict[str, str], aim: float, flops: float) -> list[Row]:
  """Ours in both types against the peer in both."""
  found = []
  for mine in DTYPES:
    if f'ours {mine}' not in seen.seconds:
      continue
    for theirs, name in peer_names.items():
      seconds = seen.median(f'ours {mine}')
      share = flops / seconds / bench.ceilings.flops[mine]
      more = f': {1e3 * seconds:,.0f} against {1e3 * seen.median(name):,.0f} ms; {share:.0%} of the {mine} product'
      found.append(
        bench.ratio(case, f'ours {mine} against {name}', seen, f'ours {mine}', name, aim=aim if theirs == 'float32' else None, more=more)
      )
  return found


def _alone(bench: Bench, case: str, mine: list[Contestant], refused: list[Row]) -> list[Row]:
  """Ours without a peer."""
  seen = race(mine, bench.protocol, bench.clock)
  times = ', '.join(f'{name} {1e3 * seen.median(name):,.0f} ms' for name in seen.seconds)
  return [bench.left_out(case), *refused, bench.row(case, 'ours', '-', times)]


def encode(bench: Bench, given: Pictures) -> list[Row]:
  """A picture to its codes."""
  side, case = given.config.resolution, f'image encode {given.config.resolution}'
  mine = [Contestant(f'ours {dtype}', lambda _, dtype=dtype: given.encode(dtype)) for dtype in DTYPES]
  codes = {dtype: given.encode(dtype) for dtype in DTYPES}
  rows = []
  rounded = equal_share(codes['float32'], codes['bfloat16'])
  if rounded < CODES['bfloat16']:
    rows.append(bench.refused(case, f'{rounded:.1%} of the bfloat16 codes are those of float32 (limit {CODES["bfloat16"]:.0%})'))
    mine = mine[:1]
  if not bench.peers:
    return _alone(bench, case, mine, rows)
  pixels = np.array(vqgan.to_pixels(given.image))
  folder = _written(bench.folder, bench.subject, given)
  peers = {dtype: benchmark_torch.encoder(folder, dtype) for dtype in DTYPES}
  theirs = {dtype: peer(pixels) for dtype, peer in peers.items()}
  share = equal_share(codes['float32'], theirs['float32'])
  if share < CODES['float32']:
    return [bench.refused(case, f'{share:.1%} of the float32 codes are those of the peer, at {side} x {side}')]
  names = {dtype: f'HF {dtype}, channels last' for dtype in DTYPES}
  contestants = mine + [Contestant(names[dtype], lambda _, peer=peer: peer(pixels)) for dtype, peer in peers.items()]
  rows += _rows(bench, case, race(contestants, bench.protocol, bench.clock), names, 1.0, encoder_flops(given.config))
  for row in rows:
    row.details['equal codes'] = {'ours bfloat16': rounded, 'peer bfloat16': equal_share(theirs['float32'], theirs['bfloat16'])}
  return rows


def decode(bench: Bench, given: Pictures) -> list[Row]:
  """Codes to a picture."""
  case = f'image decode {given.config.resolution}'
  codes = np.random.default_rng(2).integers(0, given.config.n_codes, (1, given.config.n_image_tokens)).astype(np.int32)
  mine = [Contestant(f'ours {dtype}', lambda _, dtype=dtype: given.decode(dtype, codes)) for dtype in DTYPES]
  pixels = {dtype: given.decode(dtype, codes) for dtype in DTYPES}
  extent = float(np.ptp(pixels['float32']))
  rows = []
  off = float(np.sqrt(np.mean(np.square(pixels['bfloat16'] - pixels['float32'])))) / extent
  if not off <= ROUNDED:
    rows.append(bench.refused(case, f'bfloat16 pixels differ from those of float32 by {off:.1e} of their range (limit {ROUNDED})'))
    mine = mine[:1]
  if not bench.peers:
    return _alone(bench, case, mine, rows)
  peers = {dtype: PictureDecoder(given.params, given.config, dtype=dtype) for dtype in DTYPES}
  worst = float(np.abs(pixels['float32'] - peers['float32'].decode(codes)).max()) / extent
  if not worst <= PIXELS:
    return [bench.refused(case, f'float32 pixels differ from those of the peer by {worst:.1e} of their range (limit {PIXELS})')]
  names = {dtype: f'plain torch {dtype}, channels last' for dtype in DTYPES}
  contestants = mine + [Contestant(names[dtype], lambda _, peer=peer: peer.decode(codes)) for dtype, peer in peers.items()]
  return rows + _rows(bench, case, race(contestants, bench.protocol, bench.clock), names, 1.0, decoder_flops(given.config))
