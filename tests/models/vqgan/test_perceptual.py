"""Perceptual distances against numpy; LPIPS with made-up weights (the real ones are not shipped)."""

import numpy as np
import pytest

from chameleon_jax.config import VQLossConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.models.vqgan import perceptual


def pair(side: int = 16) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  a = rng.uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
  return a, np.clip(a + rng.normal(0, 0.3, a.shape), -1, 1).astype(np.float32)


def made_up_weights(path) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  weights = {}
  for name, shape in perceptual.lpips_names():
    scale = np.sqrt(2 / np.prod(shape[:-1])) if len(shape) == 4 else 1.0
    weights[name] = np.abs(rng.normal(0, 1, shape)) if name.startswith('head') else rng.normal(0, scale, shape) * (len(shape) == 4)
    weights[name] = weights[name].astype(np.float32)
  np.savez(path, **weights)
  return weights


def test_ssim_against_numpy_windows():
  a, b = pair(9)
  values = []
  for i in range(3):
    for j in range(3):
      for n in range(2):
        for c in range(3):
          x, y = (t[n, i : i + 7, j : j + 7, c].astype(np.float64) for t in (a, b))
          covariance = ((x - x.mean()) * (y - y.mean())).mean()
          c1, c2 = 0.02**2, 0.06**2
          top = (2 * x.mean() * y.mean() + c1) * (2 * covariance + c2)
          values.append(top / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var() + y.var() + c2)))
  assert float(perceptual.mean_ssim(a, b)) == pytest.approx(np.mean(values), abs=1e-4)
  assert float(perceptual.mean_ssim(a, a)) == pytest.approx(1, abs=1e-5)


def test_multiscale_closed_form():
  """A constant offset of 0.1: L1 is 0.1 at each scale, differences vanish, SSIM of constants has a closed form."""
  a = np.full((1, 16, 16, 3), 0.2, np.float32)
  b = a + 0.1
  ssim = (2 * 0.2 * 0.3 + 0.02**2) / (0.2**2 + 0.3**2 + 0.02**2)
  assert float(perceptual.multiscale_distance(a, b)) == pytest.approx(0.1 + 1 - ssim, abs=1e-4)
  assert float(perceptual.multiscale_distance(a, a)) == pytest.approx(0, abs=1e-5)


def test_random_features():
  distance = perceptual.make_perceptual(VQLossConfig(perceptual='random_features'))
  a, b = pair()
  assert float(distance(a, a)) == 0
  assert float(distance(a, b)) > 0
  assert float(distance(a, b)) == float(perceptual.make_random_features()(a, b))


def test_none_and_weight_zero_switch_it_off():
  assert perceptual.make_perceptual(VQLossConfig(perceptual='none')) is None
  assert perceptual.make_perceptual(VQLossConfig(perceptual_weight=0.0)) is None


def test_lpips_from_a_file(tmp_path):
  """First stage against numpy; the whole is 0 for equal pictures and grows with the difference."""
  weights = made_up_weights(tmp_path / 'lpips.npz')
  distance = perceptual.make_perceptual(VQLossConfig(perceptual='lpips', lpips_path=str(tmp_path / 'lpips.npz')))
  a, b = pair()
  assert float(distance(a, a)) == 0
  near = a + 0.1 * (b - a)
  assert 0 < float(distance(a, near)) < float(distance(a, b))
  only_first = dict(weights) | {f'head{stage}': np.zeros_like(weights[f'head{stage}']) for stage in range(2, 6)}
  np.savez(tmp_path / 'first.npz', **only_first)

  def stage_1(x):
    x = (x - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
    for i in (1, 2):
      padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
      windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))  # [B, H, W, C, 3, 3]
      x = np.maximum(np.einsum('bhwcij,ijcd->bhwd', windows, weights[f'conv1_{i}/kernel']), 0)
    return x / np.sqrt((x**2).sum(-1, keepdims=True))

  expected = (np.square(stage_1(a) - stage_1(b)) * weights['head1']).sum(-1).mean()
  assert float(perceptual.make_lpips(tmp_path / 'first.npz')(a, b)) == pytest.approx(expected, rel=1e-4)


def test_bad_lpips_files(tmp_path):
  with pytest.raises(CheckpointError, match='cannot be read'):
    perceptual.load_lpips(tmp_path / 'absent.npz')
  (tmp_path / 'broken.npz').write_bytes(b'no zip')
  with pytest.raises(CheckpointError, match='cannot be read'):
    perceptual.load_lpips(tmp_path / 'broken.npz')
  np.savez(tmp_path / 'empty.npz', other=np.zeros(3))
  with pytest.raises(CheckpointError, match="lack 'conv1_1/kernel'"):
    perceptual.load_lpips(tmp_path / 'empty.npz')
  weights = {name: np.zeros(shape, np.float32) for name, shape in perceptual.lpips_names()} | {'head2': np.zeros(3, np.float32)}
  np.savez(tmp_path / 'shape.npz', **weights)
  with pytest.raises(CheckpointError, match=r"'head2' has shape \[3\], \[128\] is needed"):
    perceptual.load_lpips(tmp_path / 'shape.npz')
