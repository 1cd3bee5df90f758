"""Perceptual distances between pictures (spec training.md 2.6).

`multiscale` and `random_features` need no stored weights; only `lpips` may be reported under that name. Pictures are
float [B, H, W, 3] in [-1, 1].
"""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from chameleon_jax.array_types import AnyArray, Array, Pixels
from chameleon_jax.config import VQLossConfig
from chameleon_jax.errors import CheckpointError

Distance = Callable[[AnyArray, AnyArray], Array]

N_SCALES = 3
SSIM_WINDOW = 7
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)
VGG_STAGES = (2, 2, 3, 3, 3)  # convolutions of each stage of VGG16; the last activation of each is compared
RANDOM_WIDTHS = (32, 64, 128)


def make_perceptual(config: VQLossConfig) -> Distance | None:
  """Returns distance(x, y) -> scalar mean over the batch, or None for 'none'.

  Raises:
    CheckpointError: the LPIPS weight file is missing or does not fit.
  """
  if config.perceptual == 'none' or config.perceptual_weight == 0:
    return None
  if config.perceptual == 'multiscale':
    return multiscale_distance
  if config.perceptual == 'random_features':
    return make_random_features()
  assert config.lpips_path is not None  # VQLossConfig checks this
  return make_lpips(config.lpips_path)


# ------------------------------------------------------------------------------------------ without weights


def _halve(x: Pixels) -> Float[AnyArray, 'B h w 3']:
  """2x2 means; an odd last row or column is dropped."""
  h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
  return (x[:, 0:h:2, 0:w:2] + x[:, 1:h:2, 0:w:2] + x[:, 0:h:2, 1:w:2] + x[:, 1:h:2, 1:w:2]) / 4


def _window_mean(x: Pixels, window: int) -> Float[Array, 'B h w 3']:
  """Means over all window x window patches that lie inside."""
  sums = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, window, window, 1), (1, 1, 1, 1), 'VALID')
  return sums / window**2


def mean_ssim(x: Pixels, y: Pixels, *, window: int = SSIM_WINDOW) -> Float[Array, '']:
  """Mean SSIM over windows, channels and pictures, uniform window, data range 2; differentiable."""
  c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
  mx, my = _window_mean(x, window), _window_mean(y, window)
  vx = _window_mean(x * x, window) - mx * mx
  vy = _window_mean(y * y, window) - my * my
  vxy = _window_mean(x * y, window) - mx * my
  return jnp.mean((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2)))


def multiscale_distance(x: Pixels, y: Pixels) -> Float[Array, '']:
  """Mean over scales 1, 1/2, 1/4 of L1 + L1 of the differences between neighbours, plus (1 - SSIM) at full size."""
  total = jnp.zeros(())
  a, b = x, y
  n = 0
  while n < N_SCALES and min(a.shape[1:3]) >= 4:
    d = a - b
    total += jnp.mean(jnp.abs(d)) + jnp.mean(jnp.abs(jnp.diff(d, axis=1))) + jnp.mean(jnp.abs(jnp.diff(d, axis=2)))
    a, b = _halve(a), _halve(b)
    n += 1
  return total / max(n, 1) + 1 - mean_ssim(x, y, window=min(SSIM_WINDOW, *x.shape[1:3]))


def _unit(x: Array) -> Array:
  """Unit length along channels."""
  return x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)) + 1e-10)


def _conv(x: AnyArray, kernel: Array, bias: Array | None = None, stride: int = 1) -> Array:
  y = jax.lax.conv_general_dilated(jnp.asarray(x), kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  return y if bias is None else y + bias


def make_random_features(seed: int = 0) -> Distance:
  """LPIPS form on a frozen random network: three 3x3 layers of stride 2, ReLU, unit head weights.

  Weak, but it keeps edge statistics.
  """
  rng = np.random.default_rng(seed)
  kernels, width = [], 3
  for out in RANDOM_WIDTHS:
    kernels.append(rng.normal(0, np.sqrt(2 / (9 * width)), (3, 3, width, out)).astype(np.float32))
    width = out

  def distance(x: Pixels, y: Pixels) -> Float[Array, '']:
    total = jnp.zeros(())
    for kernel in kernels:
      x, y = (jax.nn.relu(_conv(t, jnp.asarray(kernel), stride=2)) for t in (x, y))
      total += jnp.mean(jnp.sum(jnp.square(_unit(x) - _unit(y)), axis=-1))
    return total

  return distance


# ---------------------------------------------------------------------------------------------------- LPIPS


def lpips_names() -> list[tuple[str, tuple[int | None, ...]]]:
  """Arrays an LPIPS weight file (.npz) must hold, with their shapes.

  conv{stage}_{i}/kernel [3, 3, in, out] and /bias [out] of VGG16, stage 1 to 5; head{stage} [channels], not negative.
  """
  widths = (64, 128, 256, 512, 512)
  names: list[tuple[str, tuple[int | None, ...]]] = []
  width = 3
  for stage, n in enumerate(VGG_STAGES, start=1):
    for i in range(1, n + 1):
      names += [(f'conv{stage}_{i}/kernel', (3, 3, width, widths[stage - 1])), (f'conv{stage}_{i}/bias', (widths[stage - 1],))]
      width = widths[stage - 1]
    names.append((f'head{stage}', (width,)))
  return names


def load_lpips(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads an LPIPS weight file (see `lpips_names`).

  Raises:
    CheckpointError: missing, unreadable, or an array is absent or of the wrong shape.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      weights = {name: np.asarray(file[name], np.float32) for name in file.files}
  except (OSError, ValueError) as error:
    raise CheckpointError(f'LPIPS weights {path} cannot be read ({error}); give an .npz file as loss.lpips_path') from error
  for name, shape in lpips_names():
    if name not in weights:
      raise CheckpointError(f'LPIPS weights {path} lack {name!r}; see models/vqgan/perceptual.py for the names')
    if weights[name].shape != shape:
      raise CheckpointError(f'LPIPS weights {path}: {name!r} has shape {list(weights[name].shape)}, {list(shape)} is needed')
  return weights


def make_lpips(path: str | pathlib.Path) -> Distance:
  """LPIPS with a VGG16 backbone and linear heads from a file (arXiv 1801.03924)."""
  weights = load_lpips(path)

  def stages(pixels: Pixels) -> list[Array]:
    x: Array = (jnp.asarray(pixels) - jnp.asarray(LPIPS_SHIFT)) / jnp.asarray(LPIPS_SCALE)
    out: list[Array] = []
    for stage, n in enumerate(VGG_STAGES, start=1):
      if stage > 1:
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID')
      for i in range(1, n + 1):
        x = jax.nn.relu(_conv(x, jnp.asarray(weights[f'conv{stage}_{i}/kernel']), jnp.asarray(weights[f'conv{stage}_{i}/bias'])))
      out.append(x)
    return out

  def distance(x: Pixels, y: Pixels) -> Float[Array, '']:
    total = jnp.zeros(())
    for stage, (a, b) in enumerate(zip(stages(x), stages(y), strict=True), start=1):
      total += jnp.mean(jnp.sum(jnp.square(_unit(a) - _unit(b)) * weights[f'head{stage}'], axis=-1))
    return total

  return distance
