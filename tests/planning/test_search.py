"""planning/search.py: the choice on small truth tables, and the words where nothing fits."""

import dataclasses

import pytest

from chameleon_jax import presets
from chameleon_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.planning import search
from chameleon_jax.planning.layout import Layout
from chameleon_jax.planning.memory import Memory, train_memory
from chameleon_jax.planning.report import words
from chameleon_jax.planning.speed import Requests, Speed
from chameleon_jax.planning.topologies import parse_topology


def tiny(rows=8, accumulate=1, chunks=1, mesh=MeshConfig(), **model):
  return TrainConfig(
    model=presets.tiny_transformer(**model),
    vocabulary=presets.tiny_vocabulary(),
    data=DataConfig(seq_len=16, batch_size=rows),
    optimizer=OptimizerConfig(accumulate_steps=accumulate),
    loss_chunks=chunks,
    mesh=mesh,
  )


@pytest.fixture
def table(monkeypatch):
  """Replaces both models by a table: (remat, fsdp, tensor) -> (GiB, seconds); everything else is far too large."""

  def set_table(rows):
    def memory(config, layout):
      gib, _ = rows.get((config.model.remat, layout.fsdp, layout.tensor), (1000, 1))
      return Memory({'layer': {'all': gib * 2**30}})

    def speed(config, topology, layout, assumptions):
      _, seconds = rows.get((config.model.remat, layout.fsdp, layout.tensor), (1000, 1))
      return Speed(seconds, 1 / seconds, 0.5, {'compute': seconds}, 'compute')

    monkeypatch.setattr(search, 'train_memory', memory)
    monkeypatch.setattr(search, 'train_speed', speed)

  return set_table


@pytest.mark.parametrize(
  ('kernel', 'machine', 'says'),
  [('pallas', 'v5e-4', 'this program is for tpu'), ('pallas', '8xh100', 'model.d_head is 8'), ('cudnn', '8xh100', 'model.d_head is 12')],
)
def test_attention_that_the_machine_cannot_run_is_told(kernel, machine, says):
  config = tiny(attention_implementation=kernel, dtype='bfloat16', d_head=12 if kernel == 'cudnn' else 8)
  with pytest.raises(ConfigError, match=says):
    search.plan_train(config, parse_topology(machine))


def test_layouts_of_four():
  found = [(layout.data, layout.fsdp, layout.tensor) for layout in search.layouts(4)]
  assert found == [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]


def test_the_fastest_that_fits(table):
  """v5e: 15.75 GiB. `none` is fastest and too large, `full` fits and is slowest."""
  table({('none', 4, 1): (20, 1.0), ('dots', 4, 1): (12, 1.1), ('full', 4, 1): (5, 1.4)})
  plan = search.plan_train(tiny(remat='full'), parse_topology('v5e-4'))
  assert plan.given is not None and plan.given.fits and plan.best is not None
  assert plan.best.settings['model.remat'] == 'dots'
  assert plan.changes == ('--config.model.remat=dots (now full)',)
  assert plan.reasons == () and plan.least is None


def test_within_two_per_cent_the_fewest_changes_win(table):
  table({('dots', 2, 2): (5, 1.0), ('full', 4, 1): (5, 1.019)})
  plan = search.plan_train(tiny(remat='full', n_kv_heads=4), parse_topology('v5e-4'))
  assert plan.best is not None and plan.best.layout == Layout(1, 4, 1) and plan.changes == ()


def test_a_choice_leaves_room(table):
  """15 GiB fit 15.75 as they are; the search leaves 5 % and takes the slower one."""
  table({('none', 4, 1): (15, 1.0), ('full', 4, 1): (14, 1.3)})
  plan = search.plan_train(tiny(remat='none'), parse_topology('v5e-4'))
  assert plan.given is not None and plan.given.fits
  assert plan.best is not None and plan.best.settings['model.remat'] == 'full'


def test_nothing_fits(table):
  table({('full', 4, 1): (40, 1.4), ('none', 4, 1): (90, 1.0)})
  plan = search.plan_train(tiny(remat='none'), parse_topology('v5e-4'))
  assert plan.best is None and plan.least is not None and plan.least.settings['model.remat'] == 'full'
  assert plan.reasons[0].startswith('as given: 90.00 GiB a device of 15.75 at the worst moment (layer)')
  assert plan.reasons[1].startswith('the least of all: 40.00 GiB')
  assert plan.changes == ('no number of these chips that is on offer fits: shorten data.seq_len, or take a chip with more memory',)


@pytest.mark.parametrize(
  ('config', 'words'),
  [
    (tiny(rows=6, mesh=MeshConfig(1, 4, 1)), 'data.batch_size 6 does not divide over 4 devices (data x fsdp)'),
    (tiny(rows=8, accumulate=4), '4 devices (data x fsdp) times optimizer.accumulate_steps 4'),
    (tiny(chunks=3), 'loss_chunks 3 does not divide data.seq_len 16'),
    (tiny(mesh=MeshConfig(1, 1, 4)), 'kv_heads 2'),
  ],
)
def test_settings_that_cannot_run_say_why_and_what_would(config, words):
  plan = search.plan_train(config, parse_topology('v5e-4'))
  assert plan.given is None and words in plan.reasons[0]
  assert plan.best is not None and plan.changes


def test_every_way_is_a_setting_the_trainer_takes():
  """Same batch, rows and model; microbatches and meshes that divide."""
  config = tiny(rows=8, chunks=2)
  ways = list(search._train_ways(config, 4))
  assert len(ways) == len({repr(way) for way in ways}) > 30
  for way, layout in ways:
    assert way.data == config.data and dataclasses.replace(way.model, remat='none', sequence_parallel=False) == config.model
    assert not way.model.sequence_parallel or layout.tensor == 2
    assert 8 % (layout.batch_shards * way.optimizer.accumulate_steps) == 0 and 16 % way.loss_chunks == 0
    assert layout.tensor in (1, 2)  # two key/value heads
    assert Layout.of(way.mesh, 4) == layout


def test_rows_in_pieces_where_they_alone_fit(table, monkeypatch):
  """The table knows no sequence_parallel, so memory is halved where it is on."""
  table({('full', 2, 2): (24, 1.0)})
  whole = search.train_memory

  def memory(config, layout):
    return Memory({'layer': {'all': whole(config, layout).peak // (2 if config.model.sequence_parallel else 1)}})

  monkeypatch.setattr(search, 'train_memory', memory)
  plan = search.plan_train(tiny(remat='full', mesh=MeshConfig(1, 2, 2)), parse_topology('v5e-4'))
  assert plan.given is not None and not plan.given.fits and plan.best is not None
  assert plan.changes == ('--config.model.sequence_parallel=True (now False)',)
  assert words(plan.best.settings) == 'remat full, rows in pieces, 1 loss chunks, accumulate 1'


def test_rows_that_do_not_divide_are_not_cut():
  config = dataclasses.replace(tiny(), data=DataConfig(seq_len=15, batch_size=8))
  assert not any(way.model.sequence_parallel for way, _ in search._train_ways(config, 4))
  cut = dataclasses.replace(config, model=dataclasses.replace(config.model, sequence_parallel=True), mesh=MeshConfig(1, 2, 2))
  plan = search.plan_train(cut, parse_topology('v5e-4'))
  assert plan.given is None and 'data.seq_len 15 does not divide over mesh.tensor 2' in plan.reasons[0]


def test_a_real_table_34b_on_v5e():
  """64 chips hold it with full rematerialisation only; 16 do not, and 64 is named."""
  config = TrainConfig(
    model=presets.chameleon_34b(), vocabulary=presets.released_vocabulary(), data=DataConfig(batch_size=64), loss_chunks=16
  )
  plan = search.plan_train(config, parse_topology('v5e-64'))
  assert plan.given is not None and plan.given.fits and plan.given.layout == Layout(1, 64, 1)
  assert plan.best is not None and plan.best.settings['model.remat'] == 'full'
  few = search.plan_train(dataclasses.replace(config, data=DataConfig(batch_size=16)), parse_topology('v5e-16'))
  assert few.best is None and few.changes == ('more chips: v5e-64 fits, with data.batch_size 64',)
  assert train_memory(few.least.config, few.least.layout).peak == few.least.memory.peak > 2 * 15.75 * 2**30


def test_sampling_prefers_the_tensor_axis():
  config = TrainConfig(model=presets.chameleon_34b(), vocabulary=presets.released_vocabulary(), data=DataConfig())
  plan = search.plan_sample(config, parse_topology('8xh100'), Requests(4))
  assert plan.best is not None and plan.best.layout == Layout(1, 1, 8)
  assert plan.changes == ('--config.mesh.fsdp=1 (now 8)', '--config.mesh.tensor=8 (now 1)')


def test_sampling_too_much_says_what_is_less():
  config = TrainConfig(model=presets.chameleon_34b(), vocabulary=presets.released_vocabulary(), data=DataConfig())
  plan = search.plan_sample(config, parse_topology('1xl4'), Requests(64))
  assert plan.best is None and plan.given is not None and not plan.given.fits
  assert plan.changes == (
    *('more chips: 16xl4 fits', 'fewer at once: --requests', 'shorter ones: --context', 'without guidance: --noguided'),
    'keys and values in int8: --cache_dtype=int8',
  )


def test_a_mesh_of_another_size_is_refused():
  with pytest.raises(ConfigError, match='needs 8 devices, the topology has 4'):
    search.plan_train(tiny(mesh=MeshConfig(2, 2, 2)), parse_topology('v5e-4'))
