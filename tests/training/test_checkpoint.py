"""Checkpoints: what is saved comes back, and nothing that is damaged, foreign or cut off passes for one."""

import contextlib
import dataclasses
import json
import resource

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import CheckpointConfig, MeshConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.training.checkpoint import Checkpoints, load_tree, resolved, save_tree

STATE = {'params': {'kernel': jnp.arange(6.0).reshape(2, 3), 'half': jnp.ones(4, jnp.bfloat16)}, 'step': jnp.int32(3)}


def _abstract(state):
  return jax.eval_shape(lambda: state)


def _counting_iterator():
  return iter(grain.MapDataset.range(100).to_iter_dataset())


@contextlib.contextmanager
def _files_no_larger_than(n_bytes):
  """Writing beyond fails as it does on a full disk (EFBIG in place of ENOSPC)."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_state_iterator_and_config_come_back_together(tmp_path):
  iterator = _counting_iterator()
  with Checkpoints(tmp_path / 'c', CheckpointConfig(keep_last=2)) as checkpoints:
    assert checkpoints.latest_step() is None
    for step in (1, 2, 3):
      next(iterator)
      state = jax.tree.map(lambda x, step=step: x + step, STATE)
      checkpoints.save(step, state, iterator=iterator, config={'rate': 0.1, 'list': [1, None], 'step': step})
    checkpoints.wait()
    assert checkpoints.all_steps() == [2, 3]

  with Checkpoints(tmp_path / 'c', CheckpointConfig()) as checkpoints:
    iterator = _counting_iterator()
    restored = checkpoints.restore(_abstract(STATE), iterator=iterator)
    assert next(iterator) == 3
    np.testing.assert_array_equal(restored['params']['kernel'], np.arange(6.0).reshape(2, 3) + 3)
    assert restored['params']['half'].dtype == jnp.bfloat16
    assert int(restored['step']) == 6
    assert checkpoints.config() == {'rate': 0.1, 'list': [1, None], 'step': 3}
    assert checkpoints.config(2)['step'] == 2
    assert next(iterator) == 4
    checkpoints.restore(_abstract(STATE), iterator=iterator, step=2)
    assert next(iterator) == 2


def test_errors_name_the_step_or_the_array(tmp_path):
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    with pytest.raises(CheckpointError, match='no checkpoint in'):
      checkpoints.restore(_abstract(STATE))
    checkpoints.save(5, STATE, config={})
    checkpoints.wait()
    with pytest.raises(CheckpointError, match='step 5 .* exists'):
      checkpoints.save(5, STATE, config={})
    with pytest.raises(CheckpointError, match=r'no checkpoint of step 4 .*\[5\]'):
      checkpoints.restore(_abstract(STATE), step=4)
    with pytest.raises(CheckpointError, match="'params/kernel' has shape"):
      checkpoints.restore(_abstract({**STATE, 'params': {**STATE['params'], 'kernel': jnp.zeros((2, 4))}}))
    with pytest.raises(CheckpointError, match="no 'params/bias'"):
      checkpoints.restore(_abstract({**STATE, 'params': {**STATE['params'], 'bias': jnp.zeros(4)}}))
    with pytest.raises(CheckpointError, match='no position of the input data'):
      checkpoints.restore(_abstract(STATE), iterator=_counting_iterator())


@pytest.mark.parametrize('content', ['nothing', 'another_format', 'file_in_the_way'])
def test_foreign_checkpoint(tmp_path, content):
  if content == 'file_in_the_way':
    (tmp_path / 'c').write_text('hello')
    with pytest.raises(CheckpointError, match='cannot use'):
      Checkpoints(tmp_path / 'c', CheckpointConfig())
    return
  if content == 'nothing':
    (tmp_path / '7' / 'default').mkdir(parents=True)
  else:
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
      checkpoints.save(7, STATE, config={})
    meta = tmp_path / '7' / 'config' / 'metadata'
    meta.write_text(json.dumps({**json.loads(meta.read_text()), 'format': 'something else'}))
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    assert checkpoints.latest_step() == 7
    with pytest.raises(CheckpointError, match='name another directory'):
      checkpoints.restore(_abstract(STATE))


@pytest.mark.parametrize('asynchronous', [False, True])
def test_full_disk_keeps_the_last_checkpoint(tmp_path, asynchronous):
  state = {'big': jax.random.normal(jax.random.key(0), (300_000,))}
  config = CheckpointConfig(asynchronous=asynchronous)
  with pytest.raises(CheckpointError) as raised, Checkpoints(tmp_path, config) as checkpoints:
    checkpoints.save(1, state, config={})
    checkpoints.wait()
    with _files_no_larger_than(100_000):
      checkpoints.save(2, jax.tree.map(lambda x: 2 * x, state), config={})
      checkpoints.wait()
  assert '\n' not in str(raised.value)
  with Checkpoints(tmp_path, config) as checkpoints:
    assert checkpoints.latest_step() == 1
    restored = checkpoints.restore(_abstract(state))
  np.testing.assert_array_equal(restored['big'], state['big'])


def test_a_half_written_step_is_no_checkpoint(tmp_path):
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    checkpoints.save(1, STATE, config={})
  (tmp_path / '2.orbax-checkpoint-tmp').mkdir()
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    assert checkpoints.latest_step() == 1


def test_tree_round_trip_and_replacement(tmp_path):
  save_tree(tmp_path / 'tree', {'old': jnp.zeros(2)})
  save_tree(tmp_path / 'tree', STATE)
  loaded = load_tree(tmp_path / 'tree')
  jax.tree.map(np.testing.assert_array_equal, loaded, STATE)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))
  assert loaded['params']['half'].dtype == jnp.bfloat16
  assert sorted(path.name for path in tmp_path.iterdir()) == ['tree']
  converted = load_tree(tmp_path / 'tree', jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), STATE))
  assert {leaf.dtype for leaf in jax.tree.leaves(converted)} == {np.dtype(np.float32)}


def test_tree_lands_on_its_shardings(tmp_path):
  from jax.sharding import NamedSharding, PartitionSpec

  from chameleon_jax.partitioning import make_mesh

  save_tree(tmp_path / 'tree', {'x': jnp.arange(16.0)})
  sharding = NamedSharding(make_mesh(MeshConfig()), PartitionSpec('fsdp'))
  loaded = load_tree(tmp_path / 'tree', {'x': jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)})
  assert loaded['x'].sharding == sharding
  np.testing.assert_array_equal(loaded['x'], np.arange(16.0))


def test_tree_errors(tmp_path):
  with pytest.raises(CheckpointError, match='no saved parameters'):
    load_tree(tmp_path / 'none')
  with pytest.raises(CheckpointError, match='no saved arrays'):
    load_tree(tmp_path)
  save_tree(tmp_path / 'tree', {'a': jnp.zeros((2, 3))})
  with pytest.raises(CheckpointError, match=r"'a' has shape \(2, 3\)"):
    load_tree(tmp_path / 'tree', {'a': jax.ShapeDtypeStruct((3, 3), jnp.float32)})
  with pytest.raises(CheckpointError), _files_no_larger_than(50_000):
    save_tree(tmp_path / 'tree', {'big': jax.random.normal(jax.random.key(0), (300_000,))})
  assert load_tree(tmp_path / 'tree')['a'].shape == (2, 3)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['tree']


def test_resolved_config_is_plain_json():
  @dataclasses.dataclass(frozen=True)
  class Config:
    sizes: tuple[int, ...] = (1, 2)
    inner: MeshConfig = MeshConfig()

  assert resolved(Config()) == {'sizes': [1, 2], 'inner': {'data': 1, 'fsdp': -1, 'tensor': 1}}


def test_a_saved_tree_does_not_name_the_folder_it_was_written_in(tmp_path):
  save_tree(tmp_path / 'tree', STATE)
  files = [path for path in (tmp_path / 'tree').rglob('*') if path.is_file()]
  assert files
  assert [path.name for path in files if str(tmp_path).encode() in path.read_bytes()] == []
