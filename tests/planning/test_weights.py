"""planning/weights.py: bytes against closed forms, and against real states on eight devices."""

import dataclasses

import jax
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import DataConfig, FineTuneConfig, MeshConfig, OptimizerConfig, TrainConfig
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.planning.layout import Layout, boxed_params
from chameleon_jax.planning.weights import (
  Trained,
  WeightBytes,
  WholeGradients,
  orthogonalised,
  trained_weights,
  weight_bytes,
  whole_gradients,
)
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.state import init_frozen, init_state, unboxed
from chameleon_jax.training.trainable import Tuning


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
  copies = 2 * L * (4 * D * D + 3 * D * F) // 16  # of the layers' matrices, in bfloat16
  assert weight_bytes(seven_b(), Layout(1, 16, 1)) == WeightBytes(parameters, 2 * parameters + 8, parameters, copies=copies)


def test_tensor_cuts_head_norms_too():
  parameters = 4 * (MATRICES // 16 + L * (2 * D + 4 * D // 4) + D)
  assert weight_bytes(seven_b(), Layout(1, 4, 4)).parameters == parameters


def test_data_axis_cuts_nothing():
  assert weight_bytes(seven_b(), Layout(4, 4, 1)) == weight_bytes(seven_b(), Layout(1, 4, 1))


def test_muon_has_one_moment_for_hidden_matrices():
  adam, muon = (weight_bytes(seven_b(name=name), Layout(1, 16, 1)).optimizer for name in ('adamw', 'muon'))
  assert adam - muon == pytest.approx(4 * L * (4 * D * D + 3 * D * F) // 16, abs=64)


def test_adapters_and_frozen_weights_of_seven_b():
  """Rank 16: a pair of (D + out) x 16 for q, k, v, o (D wide) and (D + F) x 16 thrice; the rest lies in two bytes, attention's twice."""
  config = dataclasses.replace(seven_b(), fine_tune=FineTuneConfig(method='lora'))
  adapters = 4 * L * 16 * (4 * 2 * D + 3 * (D + F))
  found = weight_bytes(config, Layout(1, 1, 1))
  copies = adapters // 2 + 2 * L * 4 * D * D
  assert found == WeightBytes(adapters, 2 * adapters + 8, adapters, frozen=2 * (MATRICES + VECTORS), copies=copies)
  assert found.state == 3 * adapters + 8 and found.resident == found.state + found.frozen
  assert trained_weights(config) == Trained(layers=0, head=0, thin=adapters // 4, below=True)


ANOLE = FineTuneConfig(method='selected', trainable=('lm_head',), head_rows=(4, 4 + 8192), restart_std=0.02)


def test_what_muon_orthogonalises_at_once():
  """The widest of the scanned stacks, its layers over fsdp, rounded up; unrolled layers go one by one."""
  muon = seven_b(name='muon')
  unrolled = dataclasses.replace(muon, model=dataclasses.replace(muon.model, n_layers=1, scan_layers=False))
  assert orthogonalised(muon, Layout(2, 8, 4)) == L // 8 * D * F // 4
  assert orthogonalised(muon, Layout(1, 64, 1)) == orthogonalised(unrolled, Layout(2, 8, 1)) == D * F
  assert orthogonalised(seven_b(), Layout(1, 8, 1)) == 0


def test_whole_gradients():
  full, rows = seven_b(), dataclasses.replace(seven_b(), fine_tune=ANOLE)
  assert whole_gradients(full, Layout(2, 4, 8)) == WholeGradients(4 * 3 * D * F // 8, 4 * D * V // 8, 4 * D * V)
  assert whole_gradients(rows, Layout(2, 4, 8)) == WholeGradients(0, 4 * D * V // 8, 0)
  assert trained_weights(rows) == Trained(layers=0, head=D * V, thin=0, below=False)
  assert trained_weights(full) == Trained(layers=MATRICES - 2 * D * V, head=D * V, thin=0, below=True)


def _wide_enough(**changes):
  """Matrices with two axes of 128, which Adafactor factors; float32 masters over bfloat16 products, frozen weights in bfloat16."""
  return TrainConfig(
    model=presets.tiny_transformer(d_model=128, d_head=32, d_ff=256, n_kv_heads=4, dtype='bfloat16'),
    vocabulary=presets.tiny_vocabulary(),
    data=DataConfig(seq_len=16, batch_size=8),
    **changes,
  )


RUNS = {
  'adamw': _wide_enough(),
  'adafactor': _wide_enough(optimizer=OptimizerConfig(name='adafactor')),
  'adafactor with momentum': _wide_enough(optimizer=OptimizerConfig(name='adafactor', momentum_dtype='float32')),
  'muon': _wide_enough(optimizer=OptimizerConfig(name='muon')),
  'lora': _wide_enough(fine_tune=FineTuneConfig(method='lora', lora_rank=4)),
  'image rows': _wide_enough(fine_tune=FineTuneConfig(method='selected', trainable=('lm_head',), head_rows=(4, 20), restart_std=0.1)),
  'norms': _wide_enough(
    fine_tune=FineTuneConfig(method='selected', trainable=('*norm*',), frozen_dtype='float32'), optimizer=OptimizerConfig(name='muon')
  ),
}


@pytest.mark.parametrize(
  ('name', 'sizes'),
  [
    *((name, (2, 2, 2)) for name in RUNS),
    *((name, (1, 8, 1)) for name in ('adafactor', 'muon', 'image rows')),
    *(('adafactor', sizes) for sizes in ((8, 1, 1), (2, 1, 4))),
  ],
)
def test_bytes_are_those_of_real_arrays(name, sizes):
  """A real start of a run on eight devices against what lies on the first of them."""
  config, mesh = RUNS[name], make_mesh(MeshConfig(*sizes))
  network, tuning, key = Transformer(config.model), Tuning(config.fine_tune), jax.random.key(0)
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), unboxed(boxed_params(config.model)))
  frozen = None
  if tuning.freezes:
    params, frozen = init_frozen(network, mesh, params, tuning, key=key)
  optimizer = make_optimizer(config.optimizer, 10)
  state = init_state(network, optimizer, mesh, key=key, params=params, tuning=tuning)
  first = mesh.devices.flat[0]

  def held(tree):
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == first)

  found = weight_bytes(config, Layout(*sizes))
  expected = WeightBytes(held(state.params), held(state.opt_state), held(state.params), held(frozen), copies=found.copies)
  assert found == expected and found.parameters > 0
  assert (found.frozen > 0) == tuning.freezes
