"""PSNR, SSIM and codebook use against closed forms and a direct numpy SSIM."""

import numpy as np
import pytest

from chameleon_jax.evals import reconstruction


def test_psnr_closed_form():
  a = np.zeros((3, 4, 4, 3), np.uint8)
  b = np.stack([a[0], a[0] + 1, a[0] + 255])
  np.testing.assert_allclose(reconstruction.psnr(a, b), [100, 20 * np.log10(255), 0], atol=1e-9)


def test_ssim_against_direct_windows():
  rng = np.random.default_rng(0)
  a = rng.integers(0, 256, (1, 12, 12, 3), dtype=np.uint8)
  b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
  grid = np.arange(11) - 5
  weight = np.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / (2 * 1.5**2))
  weight /= weight.sum()
  values = []
  for i in range(2):
    for j in range(2):
      for c in range(3):
        x, y = (t[0, i : i + 11, j : j + 11, c].astype(np.float64) for t in (a, b))
        mx, my = (weight * x).sum(), (weight * y).sum()
        vx, vy, vxy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum(), (weight * (x - mx) * (y - my)).sum()
        c1, c2 = 2.55**2, 7.65**2
        values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
  assert reconstruction.ssim(a, b)[0] == pytest.approx(np.mean(values), abs=1e-6)
  assert reconstruction.ssim(a, a)[0] == pytest.approx(1)


def test_codebook_use():
  assert reconstruction.codebook_use(np.array([[0, 1], [1, 0]]), 4) == {'use': 0.5, 'perplexity': pytest.approx(2)}
  uneven = reconstruction.codebook_use(np.array([[0, 0, 0, 3]]), 4)
  assert uneven['perplexity'] == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
