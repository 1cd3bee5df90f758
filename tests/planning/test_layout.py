"""planning/layout.py: bytes against closed forms, and the words for a mesh that does not divide."""

import dataclasses

import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import MeshConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.planning.layout import Layout, cache_bytes, decoding_bytes, misfit

# 7B: layers of 4 D^2 + 3 D F, two norms of D, and q/k norms of 2 * 2 * D values; two tables of V D; a last norm of D.
D, F, V, L = 4096, 11_008, 65_536, 32
MATRICES = L * (4 * D * D + 3 * D * F) + 2 * V * D
VECTORS = L * (2 * D + 4 * D) + D


def test_the_weights_of_a_sampler_are_two_bytes_a_matrix_entry():
  assert decoding_bytes(presets.chameleon_7b(), Layout(1, 1, 4)) == 2 * MATRICES // 4 + 4 * (L * (2 * D + 4 * D // 4) + D)


def test_cache_of_grouped_heads():
  """2 * L * streams * heads * slots * channels * 2 bytes: 34B has 8 key/value heads of 128 channels in 48 layers."""
  assert cache_bytes(presets.chameleon_34b(), Layout(1, 1, 8), streams=12, slots=4096) == 2 * 48 * 12 * 4096 * 128 * 2
  assert cache_bytes(presets.chameleon_34b(), Layout(2, 2, 2), streams=12, slots=4096) == 2 * 48 * 3 * 4 * 4096 * 128 * 2


def test_an_int8_cache_is_a_byte_a_value_and_four_a_head():
  """7B, one token: 2 * L * K * (H + 4) bytes in place of 2 * L * K * H * 2."""
  one = Layout(1, 1, 1)
  int8, bfloat16 = (cache_bytes(presets.chameleon_7b(), one, streams=1, slots=32, dtype=dtype) / 32 for dtype in ('int8', None))
  assert (int8, bfloat16) == (2 * 32 * 32 * (128 + 4), 2 * 32 * 32 * 128 * 2) == (270_336, 524_288)
  spread = cache_bytes(presets.chameleon_34b(), Layout(2, 2, 2), streams=12, slots=4096, dtype='int8')
  assert spread == 2 * 48 * 3 * 4 * 4096 * (128 + 4)


@pytest.mark.parametrize(
  ('layout', 'words'),
  [
    (Layout(1, 64, 1), None),
    (Layout(1, 8, 8), None),
    (Layout(1, 4, 16), 'kv_heads 8'),
    (Layout(1, 3, 1), 'does not divide over 3 devices'),
  ],
)
def test_misfit(layout, words):
  found = misfit(presets.chameleon_34b(), layout)
  assert (found is None) if words is None else (words in found)


def test_a_mesh_takes_what_is_left():
  assert Layout.of(MeshConfig(data=2, fsdp=-1, tensor=4), 64) == Layout(2, 8, 4)
  with pytest.raises(ConfigError, match='needs 16 devices, the topology has 64'):
    Layout.of(MeshConfig(data=1, fsdp=16, tensor=1), 64)


def test_unscanned_layers_weigh_the_same():
  scanned = dataclasses.replace(presets.tiny_transformer(), n_layers=3)
  unrolled = dataclasses.replace(scanned, scan_layers=False)
  assert decoding_bytes(scanned, Layout(1, 2, 2)) == decoding_bytes(unrolled, Layout(1, 2, 2))
  assert np.dtype('float32').itemsize * 32 * 128 // 4 < decoding_bytes(scanned, Layout(1, 2, 2))
