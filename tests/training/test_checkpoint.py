"""Checkpoints: what is saved comes back, and nothing that is damaged, foreign or cut off passes for one."""

import contextlib
import dataclasses
import json
import resource
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import CheckpointConfig, MeshConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.training import agreement
from chameleon_jax.training.checkpoint import Checkpoints, resolved
from chameleon_jax.training.tree_files import load_tree, save_tree

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


def test_last_steps_and_every_so_many_are_kept(tmp_path):
  with Checkpoints(tmp_path, CheckpointConfig(every_steps=1, keep_last=2, keep_every=3)) as checkpoints:
    for step in range(1, 9):
      checkpoints.save(step, {'x': jnp.zeros(2)}, config={})
    checkpoints.wait()
    assert checkpoints.all_steps() == [3, 6, 7, 8]


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  """Checkpoints 1 and 2 of one array, 1 and 2 everywhere."""
  folder = tmp_path_factory.mktemp('two') / 'c'
  with Checkpoints(folder, CheckpointConfig()) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {'x': jnp.full(3000, float(step))}, iterator=_counting_iterator(), config={'step': step})
  return folder


def _largest(folder):
  return max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def _flip_a_bit(step):
  path = next(path for path in sorted((step / 'state').rglob('d/*')) if path.stat().st_size > 20)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(bytes(data))


DAMAGES = {
    'flipped bit': (_flip_a_bit, 'checksum'),
    'cut off': (lambda step: _largest(step / 'state').write_bytes(b'half'), 'has 4 bytes'),
    'array gone': (lambda step: _largest(step / 'state').unlink(), 'missing'),
    'config unreadable': (lambda step: (step / 'config' / 'metadata').write_text('{"format": "cham'), 'config/metadata has 16 bytes'),
    'no commit marker': (lambda step: (step / 'commit_success.txt').unlink(), 'commit_success.txt is missing'),
    'table unreadable': (lambda step: (step / 'checksums-0-of-1.json').write_text('{'), 'checksums-0-of-1.json cannot be read'),
    'state gone': (lambda step: shutil.rmtree(step / 'state'), 'missing'),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_a_damaged_newest_step_is_passed_over(two_steps, tmp_path, name):
  folder, said = tmp_path / 'c', []
  shutil.copytree(two_steps, folder)
  damage, message = DAMAGES[name]
  damage(folder / '2')
  state = {'x': jnp.full(3000, 3.0)}
  with Checkpoints(folder, CheckpointConfig()) as checkpoints:
    assert checkpoints.intact_step(said.append) == 1
    assert len(said) == 1 and message in said[0] and said[0].endswith('it is now damaged-2, going back to step 1')
    assert checkpoints.all_steps() == [1]
    np.testing.assert_array_equal(checkpoints.restore(_abstract(state))['x'], np.ones(3000))
    checkpoints.save(2, state, config={})  # the run comes to that step again
    checkpoints.wait()
    assert checkpoints.intact_step(said.append) == 2
  assert len(said) == 1 and (folder / 'damaged-2').is_dir()


def test_a_run_whose_steps_are_all_damaged_does_not_start_anew(two_steps, tmp_path):
  folder, said = tmp_path / 'c', []
  shutil.copytree(two_steps, folder)
  for step in '12':
    _flip_a_bit(folder / step)
  with Checkpoints(folder, CheckpointConfig()) as checkpoints, pytest.raises(CheckpointError, match='is intact; bring one back'):
    checkpoints.intact_step(said.append)
  assert 'there is none before it' in said[1]


def test_steps_without_checksums_count_as_unchecked(tmp_path):
  with Checkpoints(tmp_path, CheckpointConfig(checksums=False)) as checkpoints:
    assert checkpoints.intact_step(print) is None
    checkpoints.save(1, STATE, config={})
    checkpoints.wait()
    assert not list((tmp_path / '1').glob('checksums*'))
    assert checkpoints.intact_step(print) == 1


def test_the_positions_of_all_hosts_are_saved_as_one(tmp_path, monkeypatch):
  class Position:
    def __init__(self, state):
      self.state = state

    def get_state(self):
      return self.state

    def set_state(self, state):
      self.state = state

  hosts = [{'n': 2, 'shards': {'0': {'at': 5}}}, {'n': 2, 'shards': {'1': {'at': 7}}}]
  monkeypatch.setattr(agreement, 'gather', lambda text: [json.dumps(host) for host in hosts])
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    checkpoints.save(1, STATE, iterator=Position(hosts[0]), config={})
    checkpoints.wait()
    restored = Position({})
    checkpoints.restore(_abstract(STATE), iterator=restored)
    assert restored.state == {'n': 2, 'shards': {'0': {'at': 5}, '1': {'at': 7}}}
    hosts[1]['shards'] = {'0': {'at': 6}}  # both run shard 0, and differ
    with pytest.raises(CheckpointError, match=r'hosts disagree about the position in the data \(5 and 6\)'):
      checkpoints.save(2, STATE, iterator=Position(hosts[0]), config={})


def test_a_position_of_the_format_before_is_read(tmp_path):
  iterator = _counting_iterator()
  next(iterator)
  with Checkpoints(tmp_path, CheckpointConfig(checksums=False)) as checkpoints:
    checkpoints.save(1, STATE, iterator=iterator, config={})
  shutil.rmtree(tmp_path / '1' / 'position')
  (tmp_path / '1' / 'iterator').mkdir()
  (tmp_path / '1' / 'iterator' / 'process_0-of-1.json').write_text(json.dumps(iterator.get_state(), indent=4))
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    other = _counting_iterator()
    checkpoints.restore(_abstract(STATE), iterator=other)
    assert next(other) == 1


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
