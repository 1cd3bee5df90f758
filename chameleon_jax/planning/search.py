"""Tries the settings that the trainer really has, and picks the fastest that fits, or says why none does.

Training: the three mesh axes, `model.remat`, `model.sequence_parallel`, `loss_chunks` and `optimizer.accumulate_steps`; batch, rows,
model and optimizer stay as they are, so every candidate computes the same update. Sampling: the mesh.

Does not know: how memory and seconds are counted (`memory.py`, `speed.py`).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from chameleon_jax.config import MeshConfig, TrainConfig, TransformerConfig
from chameleon_jax.models.transformer.attention import choose
from chameleon_jax.planning.layout import Layout, misfit
from chameleon_jax.planning.memory import Memory, Remat, sample_memory, train_memory
from chameleon_jax.planning.speed import Assumptions, Requests, Speed, decode_speed, train_speed
from chameleon_jax.planning.topologies import GIB, Topology, larger_topologies
from chameleon_jax.planning.weights import weight_bytes

Settings = dict[str, str | int]  # what the search turns, by the names of the flags

HEADROOM = 0.05  # share of the limit that a choice leaves free: the model of memory is right to a few per cent
_CHUNKS = (1, 2, 4, 8, 16, 32, 64)
_REMAT: tuple[Remat, ...] = ('none', 'dots', 'full')


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to run.

  Attributes:
    config: the whole config; of a sampler only model and mesh count.
    layout: its mesh, every size known.
    settings: what the search turned.
    memory, speed: what it takes.
    fits: whether `memory` stays within the limit.
  """

  config: TrainConfig
  layout: Layout
  settings: Settings
  memory: Memory
  speed: Speed
  fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
  """What was found.

  Attributes:
    given: the settings as they came, None where they cannot run at all.
    best: the fastest that fits with `HEADROOM` to spare, None where none does.
    least: where none fits, the one with the smallest peak.
    reasons: why the given settings do not run or fit, or why none does; one line each.
    changes: what to change, one line each.
    n_tried: candidates there were.
  """

  given: Candidate | None
  best: Candidate | None
  least: Candidate | None
  reasons: tuple[str, ...]
  changes: tuple[str, ...]
  n_tried: int


Way = tuple[TrainConfig, Layout]


def layouts(n_devices: int) -> Iterator[Layout]:
  """Every way to write `n_devices` as data * fsdp * tensor.

  4 -> 1 1 4, 1 2 2, 1 4 1, 2 1 2, 2 2 1, 4 1 1
  """
  for data in divisors(n_devices):
    for fsdp in divisors(n_devices // data):
      yield Layout(data, fsdp, n_devices // data // fsdp)


def divisors(n: int) -> list[int]:
  """All of them, ascending."""
  return [divisor for divisor in range(1, n + 1) if n % divisor == 0]


def plan_train(config: TrainConfig, topology: Topology, *, assumptions: Assumptions = Assumptions(), limit: float | None = None) -> Plan:
  """Looks at `config` as it is, then for the fastest way to compute the same updates on the same machine.

  Args:
    config: a training run.
    topology: the machine.
    assumptions: of speed.
    limit: bytes of a chip to stay within; all its memory by default.

  Raises:
    ConfigError: `config.mesh` does not give the machine's number of devices, or its chips cannot run the attention that is asked for.
  """
  limit = topology.memory if limit is None else limit
  layout = Layout.of(config.mesh, topology.n_chips)
  _check_attention(config.model, topology)

  def timed(way: Way) -> tuple[Way, Speed]:
    return way, train_speed(way[0], topology, way[1], assumptions)

  def looked_at(timed_way: tuple[Way, Speed]) -> Candidate:
    way, speed = timed_way
    memory = train_memory(*way)
    return Candidate(*way, _train_settings(*way), memory, speed, memory.peak <= limit)

  before, room = _train_settings(config, layout), limit * (1 - HEADROOM)
  # Where weights and moments alone are too much, only the smallest of the policies is worth a look, for the record.
  worth = (way for way in _train_ways(config, topology.n_chips) if way[0].model.remat == 'full' or weight_bytes(*way).resident < room)
  ways = sorted(map(timed, worth), key=lambda timed_way: timed_way[1].seconds)
  refused = _refused(config, layout)
  given = None if refused else looked_at(timed((config, layout)))
  best, least = _choose(map(looked_at, ways), before, room)
  changes = _flags(before, best) if best is not None else _larger_for_training(config, topology, limit)
  return Plan(given, best, least, _reasons(refused, given, best, least, limit), tuple(changes), len(ways))


def _check_attention(model: TransformerConfig, topology: Topology) -> None:
  """Raises what the training step would raise on that machine, whose rows are packed."""
  facts: dict[str, Any] = {'length': model.max_seq_len, 'dtype': model.dtype, 'd_head': model.d_head, 'packed': True}
  choose(model.attention_implementation, platform=topology.chip.kind, generation=None, **facts)


def plan_sample(
    config: TrainConfig, topology: Topology, requests: Requests, *, assumptions: Assumptions = Assumptions(), limit: float | None = None
) -> Plan:
  """The same for a sampler that serves `requests` with the transformer of `config`; only meshes are tried.

  Raises:
    ConfigError: `config.mesh` does not give the machine's number of devices.
  """
  limit = topology.memory if limit is None else limit
  layout = Layout.of(config.mesh, topology.n_chips)

  def looked_at(layout: Layout, topology: Topology = topology) -> Candidate:
    memory = sample_memory(config.model, requests, layout)
    speed = decode_speed(config.model, requests, topology, layout, assumptions)
    meshed = dataclasses.replace(config, mesh=MeshConfig(layout.data, layout.fsdp, layout.tensor))
    return Candidate(meshed, layout, _mesh_settings(layout), memory, speed, memory.peak <= limit)

  def ways(topology: Topology) -> list[Layout]:
    found = [layout for layout in layouts(topology.n_chips) if misfit(config.model, layout) is None]
    return sorted(found, key=lambda way: decode_speed(config.model, requests, topology, way, assumptions).seconds)

  refused = misfit(config.model, layout)
  given = None if refused else looked_at(layout)
  found = ways(topology)
  best, least = _choose(map(looked_at, found), _mesh_settings(layout), limit * (1 - HEADROOM))
  changes = _flags(_mesh_settings(layout), best) if best is not None else []
  if best is None:
    fitting = (
        larger
        for larger in larger_topologies(topology)
        if any(looked_at(way, larger).memory.peak <= limit * (1 - HEADROOM) for way in ways(larger))
    )
    changes = [*(f'more chips: {larger.name} fits' for larger in _first(fitting)), *_less(requests)]
  return Plan(given, best, least, _reasons(refused, given, best, least, limit), tuple(changes), len(found))


def _refused(config: TrainConfig, layout: Layout) -> str | None:
  """Why the trainer would not start, one line."""
  shards, n_micro = layout.batch_shards, config.optimizer.accumulate_steps
  if config.data.batch_size % (shards * n_micro):
    parts = f'{shards} devices (data x fsdp)' + (f' times optimizer.accumulate_steps {n_micro}' if n_micro > 1 else '')
    return f'data.batch_size {config.data.batch_size} does not divide over {parts}'
  if config.data.seq_len % config.loss_chunks:
    return f'loss_chunks {config.loss_chunks} does not divide data.seq_len {config.data.seq_len}'
  if config.model.sequence_parallel and config.data.seq_len % layout.tensor:
    return f'data.seq_len {config.data.seq_len} does not divide over mesh.tensor {layout.tensor}, which model.sequence_parallel asks for'
  return misfit(config.model, layout)


def _train_ways(config: TrainConfig, n_devices: int) -> Iterator[Way]:
  rows, length = config.data.batch_size, config.data.seq_len
  chunks = sorted({n for n in (*_CHUNKS, config.loss_chunks) if length % n == 0})
  for layout in layouts(n_devices):
    if rows % layout.batch_shards or misfit(config.model, layout):
      continue
    micro = [n for n in divisors(rows // layout.batch_shards) if n == config.optimizer.accumulate_steps or n & (n - 1) == 0]
    for remat, in_pieces, n_chunks, n_micro in itertools.product(_REMAT, _in_pieces(config, layout), chunks, micro):
      changed = dataclasses.replace(
          config,
          model=dataclasses.replace(config.model, remat=remat, sequence_parallel=in_pieces),
          optimizer=dataclasses.replace(config.optimizer, accumulate_steps=n_micro),
          loss_chunks=n_chunks,
          mesh=MeshConfig(layout.data, layout.fsdp, layout.tensor),
      )
      yield changed, layout


def _in_pieces(config: TrainConfig, layout: Layout) -> tuple[bool, ...]:
  """Values of `model.sequence_parallel` to try: as it is where it changes nothing."""
  if layout.tensor == 1:
    return (config.model.sequence_parallel,)
  return (False,) if config.data.seq_len % layout.tensor else (False, True)


def _choose(candidates: Iterable[Candidate], before: Settings, room: float) -> tuple[Candidate | None, Candidate | None]:
  """(the choice, None), or (None, the one with the smallest peak) where none fits.

  Candidates come fastest first. Seconds within 2 % of each other are alike, since a roofline tells no finer: of those that are
  like the fastest that fits, the one with the fewest changes is chosen.

  Args:
    candidates: each is made as it is looked at, and no more than needed.
    before: settings that changes are counted from.
    room: bytes that a choice may take.
  """
  found: list[Candidate] = []
  least: Candidate | None = None
  for candidate in candidates:
    if found and candidate.speed.seconds > 1.02 * found[0].speed.seconds:
      break
    if candidate.memory.peak <= room:
      found.append(candidate)
    least = candidate if least is None or candidate.memory.peak < least.memory.peak else least
  if not found:
    return None, least
  return min(found, key=lambda candidate: sum(before[name] != value for name, value in candidate.settings.items())), None


def _first(items: Iterable[Topology]) -> list[Topology]:
  return [item for item, _ in zip(items, range(1))]


def _mesh_settings(layout: Layout) -> Settings:
  return {f'mesh.{axis}': getattr(layout, axis) for axis in ('data', 'fsdp', 'tensor')}


def _train_settings(config: TrainConfig, layout: Layout) -> Settings:
  return {
      **_mesh_settings(layout),
      'model.remat': config.model.remat,
      'model.sequence_parallel': config.model.sequence_parallel,
      'loss_chunks': config.loss_chunks,
      'optimizer.accumulate_steps': config.optimizer.accumulate_steps,
  }


def _flags(before: Settings, best: Candidate) -> list[str]:
  return [f'--config.{name}={value} (now {before[name]})' for name, value in best.settings.items() if before[name] != value]


def _reasons(
    refused: str | None, given: Candidate | None, best: Candidate | None, least: Candidate | None, limit: float
) -> tuple[str, ...]:
  found = [f'as given: {refused}'] if refused else []
  if given is not None and not given.fits:
    found.append(_too_much('as given', given, limit))
  if best is None and least is None:
    found.append('no mesh of this machine divides the model and the batch')
  elif least is not None:
    found.append(_too_much('the least of all', least, limit))
  return tuple(found)


def _too_much(name: str, candidate: Candidate, limit: float) -> str:
  largest = sorted(candidate.memory.parts.items(), key=lambda item: -item[1])[:3]
  parts = ', '.join(f'{part} {size / GIB:.2f}' for part, size in largest)
  peak, worst = candidate.memory.peak / GIB, candidate.memory.worst
  return f'{name}: {peak:.2f} GiB a device of {limit / GIB:.2f} at the worst moment ({worst}); the most of it: {parts}'


def _larger_for_training(config: TrainConfig, topology: Topology, limit: float) -> list[str]:
  """The next larger machine of the same chip that some setting fits, with at least a row a device."""
  room = limit * (1 - HEADROOM)
  for larger in larger_topologies(topology):
    rows = math.lcm(config.data.batch_size, larger.n_chips)
    grown = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))
    ways = (way for way in _train_ways(grown, larger.n_chips) if way[0].model.remat == 'full')
    if any(weight_bytes(*way).resident < room and train_memory(*way).peak <= room for way in ways):
      return [f'more chips: {larger.name} fits, with data.batch_size {rows}']
  return ['no number of these chips that is on offer fits: shorten data.seq_len, or take a chip with more memory']


def _less(requests: Requests) -> list[str]:
  found = ['fewer at once: --requests'] if requests.n > 1 else []
  found += ['shorter ones: --context'] if requests.context > 512 else []
  found += ['without guidance: --noguided'] if requests.guided else []
  return found + (['keys and values in int8: --cache_dtype=int8'] if requests.cache_dtype != 'int8' else [])
