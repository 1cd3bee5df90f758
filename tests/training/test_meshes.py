"""The mesh decides where arrays lie and nothing else: twenty steps give the same losses on every mesh (float32)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from chameleon_jax import presets
from chameleon_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from chameleon_jax.data.packing import Limits, assemble
from chameleon_jax.data.pipeline import to_devices
from chameleon_jax.models.transformer.layers import between_blocks, inside_block, out_of_block
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import fetch, make_mesh, place
from chameleon_jax.tokens.render import Rendered
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.state import abstract_state
from chameleon_jax.training.step import make_train_step

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason='needs 8 devices')

N_STEPS = 20
CONFIG = TrainConfig(
    model=presets.tiny_transformer(n_layers=4, dropout=0.1, remat='full'),
    vocabulary=presets.tiny_vocabulary(),
    data=DataConfig(seq_len=32, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4),
    loss_chunks=2,
    n_steps=N_STEPS,
)
IN_PIECES = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, sequence_parallel=True))
QUICKLY = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}  # the sharding is the same, the code slower
LIMITS = Limits(seq_len=32, begin_image=37, end_image=36, pad=1)


def _document(rng, length):
  tokens = np.r_[0, rng.integers(4, 128, length - 1)].astype(np.int32)
  return Rendered(tokens, np.append(tokens[1:], np.int32(1)), np.r_[np.ones(length - 1), 0].astype(np.float32))


def _batch(step):
  rng = np.random.default_rng(step)
  rows = [assemble([_document(rng, n) for n in rng.integers(5, 16, 2)], LIMITS) for _ in range(8)]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _start(abstract):
  """A state at step 0 with random matrices from numpy: compiling a real start on every mesh would take a minute."""
  rng = np.random.default_rng(1)

  def value(path, leaf):
    names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    if names[0] != 'params' or names[-1] == 'bias':
      return place(np.zeros(leaf.shape), leaf.sharding, leaf.dtype)
    return place(np.ones(leaf.shape) if names[-1] == 'weight' else 0.05 * rng.normal(size=leaf.shape), leaf.sharding, leaf.dtype)

  return jax.tree_util.tree_map_with_path(value, abstract)


@functools.cache
def _run(config, sizes):
  """(losses [20], parameters, bytes of temporaries on a device)."""
  mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:8])
  model, optimizer = Transformer(config.model), make_optimizer(config.optimizer, config.n_steps)
  step = make_train_step(model, optimizer, config, mesh)
  abstract = abstract_state(model, optimizer, mesh)
  with jax.set_mesh(mesh):
    program = step.lower(abstract, to_devices(_batch(0), mesh), jax.random.key(7)).compile(compiler_options=QUICKLY)
    state, losses = _start(abstract), []
    for index in range(N_STEPS):
      state, metrics = program(state, to_devices(_batch(index % 4), mesh), jax.random.key(7))
      losses.append(float(metrics['loss']))
  return np.array(losses), jax.tree.map(fetch, state.params), program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ('config', 'sizes'),
    [
        (CONFIG, (2, 2, 2)),
        (IN_PIECES, (2, 2, 2)),
        pytest.param(CONFIG, (1, 8, 1), marks=pytest.mark.slow),
        pytest.param(CONFIG, (1, 4, 2), marks=pytest.mark.slow),
        pytest.param(IN_PIECES, (1, 4, 2), marks=pytest.mark.slow),
    ],
    ids=lambda value: 'x'.join(map(str, value)) if isinstance(value, tuple) else 'pieces' if value is IN_PIECES else 'whole',
)
def test_the_same_losses_on_every_mesh(config, sizes):
  losses, params, _ = _run(config, sizes)
  expected, expected_params, _ = _run(CONFIG, (8, 1, 1))
  assert expected[-1] < expected[0] - 0.1  # it learns
  difference = np.max(np.abs(losses - expected) / expected)
  print(f'\n{sizes}{" in pieces" if config is IN_PIECES else ""}: largest relative difference {difference:.1e}')
  assert difference <= 1e-5
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, expected_params)


def test_pieces_of_rows_take_less_memory():
  """What rematerialisation keeps of each layer, [8, 32, 32] floats, lies in two pieces on two devices."""
  assert _run(IN_PIECES, (2, 2, 2))[2] < _run(CONFIG, (2, 2, 2))[2]


def test_rows_are_split_between_the_blocks_only_where_asked_for():
  mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
  x = jnp.zeros((8, 32, 32))
  with jax.set_mesh(mesh):
    specs = [
        jax.jit(lambda x, f=f, config=config: f(x, config.model))(x).sharding.spec
        for config in (CONFIG, IN_PIECES)
        for f in (between_blocks, inside_block, out_of_block)
    ]
    assert inside_block(x, CONFIG.model) is out_of_block(x, CONFIG.model) is x  # nothing is added to the program
  pieces, whole = PartitionSpec(('data', 'fsdp'), 'tensor'), PartitionSpec(('data', 'fsdp'))
  assert specs[0] == whole and specs[3:] == [pieces, whole, pieces]
