"""planning/layout.py: bytes against closed forms, and the words for a mesh that does not divide."""

import dataclasses

import jax
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.planning.layout import Layout, WeightBytes, cache_bytes, decoding_bytes, misfit, weight_bytes
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.state import init_state


def seven_b(**optimizer):
  return TrainConfig(
    model=presets.chameleon_7b(),
    vocabulary=presets.released_vocabulary(),
    data=DataConfig(batch_size=64),
    optimizer=OptimizerConfig(**optimizer),
  )


# 7B: layers of 4 D^2 + 3 D F, two norms of D, and q/k norms of 2 * 2 * D values; two tables of V D; a last norm of D.
D, F, V, L = 4096, 11_008, 65_536, 32
MATRICES = L * (4 * D * D + 3 * D * F) + 2 * V * D
VECTORS = L * (2 * D + 4 * D) + D


def test_seven_b_with_adam_on_sixteen_devices():
  """Matrices are cut in sixteen, vectors lie everywhere; Adam has two moments and two int32 counters (its own and the schedule's)."""
  parameters = 4 * (MATRICES // 16 + VECTORS)
  assert weight_bytes(seven_b(), Layout(1, 16, 1)) == WeightBytes(parameters, 2 * parameters + 8, parameters)


def test_tensor_cuts_head_norms_too():
  parameters = 4 * (MATRICES // 16 + L * (2 * D + 4 * D // 4) + D)
  assert weight_bytes(seven_b(), Layout(1, 4, 4)).parameters == parameters


def test_data_axis_cuts_nothing():
  assert weight_bytes(seven_b(), Layout(4, 4, 1)) == weight_bytes(seven_b(), Layout(1, 4, 1))


def test_muon_has_one_moment_for_hidden_matrices():
  adam, muon = (weight_bytes(seven_b(name=name), Layout(1, 16, 1)).optimizer for name in ('adamw', 'muon'))
  assert adam - muon == pytest.approx(4 * L * (4 * D * D + 3 * D * F) // 16, abs=64)


def test_the_weights_of_a_sampler_are_two_bytes_a_matrix_entry():
  assert decoding_bytes(presets.chameleon_7b(), Layout(1, 1, 4)) == 2 * MATRICES // 4 + 4 * (L * (2 * D + 4 * D // 4) + D)


def test_cache_of_grouped_heads():
  """2 * L * streams * heads * slots * channels * 2 bytes: 34B has 8 key/value heads of 128 channels in 48 layers."""
  assert cache_bytes(presets.chameleon_34b(), Layout(1, 1, 8), streams=12, slots=4096) == 2 * 48 * 12 * 4096 * 128 * 2
  assert cache_bytes(presets.chameleon_34b(), Layout(2, 2, 2), streams=12, slots=4096) == 2 * 48 * 3 * 4 * 4096 * 128 * 2


def test_bytes_are_those_of_real_arrays():
  """A tiny state on eight devices against what lies on the first of them."""
  model = presets.tiny_transformer()
  config = TrainConfig(model=model, vocabulary=presets.tiny_vocabulary(), data=DataConfig(seq_len=16, batch_size=8))
  mesh = make_mesh(MeshConfig(2, 2, 2))
  state = init_state(Transformer(model), make_optimizer(config.optimizer, 10), mesh, key=jax.random.key(0))
  first = mesh.devices.flat[0]

  def held(tree):
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == first)

  assert weight_bytes(config, Layout(2, 2, 2)) == WeightBytes(held(state.params), held(state.opt_state), held(state.params))


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
