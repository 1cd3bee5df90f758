"""planning/topologies.py: names read as their makers mean them; wrong ones answered with the nearest."""

import math

import pytest

from chameleon_jax.errors import ConfigError
from chameleon_jax.planning.topologies import GIB, known_names, parse_topology


@pytest.mark.parametrize(
  ('name', 'n_chips', 'shape', 'chip'),
  [
    ('v5e-64', 64, (8, 8), 'v5e'),
    ('v5litepod-16', 16, (4, 4), 'v5e'),
    ('V6E-256', 256, (16, 16), 'v6e'),
    ('v5p-16', 8, (2, 2, 2), 'v5p'),  # 16 TensorCores
    ('v5p-128', 64, (4, 4, 4), 'v5p'),
    ('v5p:2x2x4', 16, (2, 2, 4), 'v5p'),
    ('v4-32', 16, (2, 2, 4), 'v4'),
    ('8xh100', 8, (), 'h100'),
    ('1xh200', 1, (), 'h200'),
    ('h200', 1, (), 'h200'),
    ('64xh100', 64, (), 'h100'),
  ],
)
def test_names(name, n_chips, shape, chip):
  topology = parse_topology(name)
  assert (topology.n_chips, topology.shape, topology.chip.name) == (n_chips, shape, chip)
  assert math.prod(topology.shape) in (1, topology.n_chips)


def test_every_known_name_is_read():
  assert all(parse_topology(name).n_chips >= 1 for name in known_names())


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('8xh10', "nearest known one is '8xh100'"),
    ('v5e-65', 'the nearest is v5e-64'),
    ('v5p-15', 'the nearest is v5p-16'),
    ('v7x-64', "unknown topology 'v7x-64'"),
    ('12xh100', 'nodes of 8'),
    ('0xh100', 'nodes of 8'),
    ('v5p:2x2', 'has 3 sides'),
    ('h100-8', 'unknown topology'),
    ('', 'unknown topology'),
  ],
)
def test_a_wrong_name_is_one_line(name, message):
  with pytest.raises(ConfigError, match='topology') as error:
    parse_topology(name)
  assert message in str(error.value) and '\n' not in str(error.value)


def test_bandwidth_of_a_group():
  """v5e: 200 GB/s over two dimensions. H100: 450 GB/s inside a node of eight, 50 GB/s a port outside."""
  slice_, nodes = parse_topology('v5e-64'), parse_topology('64xh100')
  assert slice_.group_bandwidth(64, 1) == 200e9
  assert slice_.group_bandwidth(16, 4) == 100e9
  assert nodes.group_bandwidth(8, 1) == 450e9
  assert nodes.group_bandwidth(64, 1) == 400e9  # eight ports a node serve the one gather of all
  assert nodes.group_bandwidth(16, 4) == 100e9  # two chips of the group in a node
  assert nodes.group_bandwidth(8, 8) == 50e9
  assert nodes.group_bandwidth(1, 1) == math.inf


def test_memory_is_what_the_compiler_allows():
  assert parse_topology('v5e-4').memory == 15.75 * GIB
