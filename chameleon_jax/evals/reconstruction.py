"""How well the image tokenizer gives pictures back: PSNR, SSIM, codebook use and perplexity (spec evaluation.md 6.7).

Works on uint8 pictures and codes; PSNR and SSIM are plain numpy. PSNR is the mean of the pictures' own PSNRs, not the PSNR
of the mean error. Codebook use = share of codes hit at least once over the whole set.
"""

import numpy as np
from jaxtyping import Float, UInt8

from chameleon_jax.array_types import Codes, Params, Pictures
from chameleon_jax.config import VQGANConfig
from chameleon_jax.models.vqgan.model import decode_codes, encode_pictures

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
MAX_PSNR = 100.0  # of equal pictures, so that a mean stays finite


def psnr(a: UInt8[np.ndarray, 'B H W 3'], b: UInt8[np.ndarray, 'B H W 3']) -> Float[np.ndarray, 'B']:
  """10 log10(255^2 / MSE) of each pair of pictures in dB; 100 where they are equal."""
  error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)), axis=(1, 2, 3))
  with np.errstate(divide='ignore'):
    return np.minimum(10 * np.log10(255.0**2 / error), MAX_PSNR)


def _blur(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
  """Separable filter over axes 1 and 2, windows that lie inside only."""
  n = len(kernel)
  rows = sum(kernel[i] * x[:, i : x.shape[1] - n + 1 + i] for i in range(n))
  return sum(kernel[i] * rows[:, :, i : x.shape[2] - n + 1 + i] for i in range(n))


def ssim(a: UInt8[np.ndarray, 'B H W 3'], b: UInt8[np.ndarray, 'B H W 3']) -> Float[np.ndarray, 'B']:
  """SSIM of each pair: 11-wide Gaussian (sigma 1.5), K1 0.01, K2 0.03, range 255, mean over channels and inner windows.

  Population covariances, as in the original paper. Sides must be at least 11 pixels.
  """
  offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
  kernel = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
  kernel /= kernel.sum()
  c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
  x, y = a.astype(np.float64), b.astype(np.float64)
  mx, my = _blur(x, kernel), _blur(y, kernel)
  vx, vy = _blur(x * x, kernel) - mx * mx, _blur(y * y, kernel) - my * my
  vxy = _blur(x * y, kernel) - mx * my
  values = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
  return values.mean(axis=(1, 2, 3))


def codebook_use(codes: Codes, n_codes: int) -> dict[str, float]:
  """{'use': share of codes that occur, 'perplexity': exp(-sum p ln p), between 1 and n_codes}."""
  counts = np.bincount(codes.reshape(-1), minlength=n_codes)
  p = counts[counts > 0] / max(int(counts.sum()), 1)
  return {'use': float(np.mean(counts > 0)), 'perplexity': float(np.exp(-np.sum(p * np.log(p))))}


def evaluate_reconstruction(config: VQGANConfig, params: Params, pictures: Pictures, *, batch_size: int = 32) -> dict[str, float]:
  """Encodes and decodes uint8 pictures; returns psnr (dB), ssim, use and perplexity of the set."""
  codes = encode_pictures(config, params, pictures, batch_size=batch_size)
  decoded = decode_codes(config, params, codes, batch_size=batch_size)
  metrics = {'psnr': float(psnr(pictures, decoded).mean())}
  if min(pictures.shape[1:3]) >= SSIM_WINDOW:
    metrics['ssim'] = float(ssim(pictures, decoded).mean())
  return metrics | codebook_use(codes, config.n_codes)
