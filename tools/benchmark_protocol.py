"""How the benchmarks measure and report: two things (or more) in turn, medians of pairwise ratios, one table.

    A B A B A B ..      ratio i = seconds of B i / seconds of A i;  reported: median (least .. most)
    A B C A B C ..      the same for every pair of a round

A machine's speed drifts, and a ratio of neighbours does not see it. Nothing that compiled counts: warm-up goes on until a run
compiles nothing, and compilation is reported by itself. Knows no model.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags


def markers(section: str) -> tuple[str, str]:
  """The two lines of a page between which a tool writes."""
  return f'<!-- {section}: begin (written by the tool, not by hand) -->', f'<!-- {section}: end -->'


BEGIN, END = markers('results')
MAX_LOAD = 0.7  # above it the clock measures the neighbours
_COMPILED = '/jax/core/compile/backend_compile_duration'
_FLAGS = ('amx_bf16', 'amx_int8', 'avx512_bf16', 'avx512_fp16', 'avx512f', 'avx2')


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Runs before the clock (at least), pairs under it, runs before the clock at most."""

  warm_ups: int = 2
  repetitions: int = 7
  most_warm_ups: int = 8


def define_flags(figures: Iterable[int]) -> None:
  """Flags that every benchmark has."""
  flags.DEFINE_list('only', [str(figure) for figure in figures], 'Figures to measure.')
  flags.DEFINE_integer('repetitions', 7, 'Pairs under the clock.', lower_bound=1)
  flags.DEFINE_float('max_load', MAX_LOAD, 'Load average above which nothing is timed.')
  flags.DEFINE_bool('quick', False, 'Small sizes and two repetitions.')
  flags.DEFINE_string('output', None, 'JSON file for every reading.')


def asked(argv: Sequence[str], aims: Mapping[int, str]) -> tuple[list[int], Protocol]:
  """The figures to measure, and how often.

  Raises:
    UsageError: there is no such figure, or the machine is busy.
  """
  values = flags.FLAGS
  only = sorted({int(figure) for figure in values.only})
  if len(argv) > 1 or not set(only) <= set(aims):
    raise app.UsageError(f'--only takes figures out of {", ".join(map(str, aims))}; there are no further arguments')
  if not values.quick:
    refuse_if_busy(values.max_load)
  return only, Protocol(repetitions=2 if values.quick else values.repetitions)


def refuse_if_busy(max_load: float) -> None:
  """Raises UsageError on a machine whose load average is above `max_load`."""
  load = os.getloadavg()[0]
  if load > max_load:
    raise app.UsageError(f'the load average is {load:.2f}; wait until it is below {max_load}, or raise --max_load')


def importable(*names: str) -> bool:
  """Whether all these libraries are installed; nothing is imported."""
  return all(importlib.util.find_spec(name) is not None for name in names)


class CompileClock:
  """Seconds that XLA has compiled since this was made, programs found in the persistent cache included."""

  def __init__(self) -> None:
    self.seconds = 0.0
    self.programs = 0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
      self.seconds += duration_secs
      self.programs += 1


@dataclasses.dataclass(frozen=True)
class Pairs:
  """What `alternate` saw.

  Attributes:
    first, second: seconds of each timed run, in pairs.
    compile_s: seconds of compilation during warm-up.
    compiled_meanwhile: programs compiled during timed runs; anything but 0 spoils them.
  """

  first: tuple[float, ...]
  second: tuple[float, ...]
  compile_s: float
  compiled_meanwhile: int

  @property
  def ratios(self) -> list[float]:
    """Seconds of the second over seconds of the first, pair by pair."""
    return [second / first for first, second in zip(self.first, self.second)]

  def record(self) -> dict[str, Any]:
    """For JSON: every reading."""
    medians = {'first_median_s': statistics.median(self.first), 'second_median_s': statistics.median(self.second)}
    return dataclasses.asdict(self) | medians | {'ratios': self.ratios}


def spread(values: Sequence[float], digits: int = 2) -> str:
  """`median (least to most)`."""
  return f'{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})'


def alternate(first: Callable[[], object], second: Callable[[], object], protocol: Protocol, clock: CompileClock) -> Pairs:
  """Runs both in turn. Both must return only when their results are on the host."""
  before = clock.seconds
  for run in (first, second):
    for turn in range(protocol.most_warm_ups):
      programs = clock.programs
      run()
      if turn + 1 >= protocol.warm_ups and clock.programs == programs:
        break
  compile_s, programs = clock.seconds - before, clock.programs
  times: tuple[list[float], list[float]] = ([], [])
  for _ in range(protocol.repetitions):
    for run, kept in zip((first, second), times):
      start = time.perf_counter()
      run()
      kept.append(time.perf_counter() - start)
  return Pairs(tuple(times[0]), tuple(times[1]), compile_s, clock.programs - programs)


@dataclasses.dataclass(frozen=True)
class Contestant:
  """One of several that do the same work.

  Attributes:
    name: of its times.
    run: what is timed; takes what `prepare` gave and returns when its results are on the host.
    prepare: runs before each `run`, beside the clock.
  """

  name: str
  run: Callable[[Any], object]
  prepare: Callable[[], Any] = lambda: None


@dataclasses.dataclass(frozen=True)
class Race:
  """What `race` saw.

  Attributes:
    seconds: contestant -> seconds of each of its timed runs, in rounds.
    compile_s: seconds of compilation during warm-up.
    compiled_meanwhile: programs compiled during timed runs; anything but 0 spoils them.
    load: load average at the start and at the end.
  """

  seconds: dict[str, tuple[float, ...]]
  compile_s: float
  compiled_meanwhile: int
  load: tuple[float, float]

  def ratios(self, ours: str, peer: str) -> list[float]:
    """Seconds of the peer over ours, round by round."""
    return [theirs / mine for mine, theirs in zip(self.seconds[ours], self.seconds[peer])]

  def median(self, name: str) -> float:
    """Seconds of a contestant."""
    return statistics.median(self.seconds[name])

  def fastest(self, names: Iterable[str]) -> str:
    """Of some of the contestants."""
    return min(names, key=self.median)

  def record(self) -> dict[str, Any]:
    """For JSON: every reading."""
    return dataclasses.asdict(self) | {'median_s': {name: self.median(name) for name in self.seconds}}


def race(contestants: Sequence[Contestant], protocol: Protocol, clock: CompileClock) -> Race:
  """Runs all in turn, round after round; each warms up until it compiles nothing."""
  load, before = os.getloadavg()[0], clock.seconds
  for contestant in contestants:
    for turn in range(protocol.most_warm_ups):
      programs = clock.programs
      contestant.run(contestant.prepare())
      if turn + 1 >= protocol.warm_ups and clock.programs == programs:
        break
  compile_s, programs = clock.seconds - before, clock.programs
  seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
  for _ in range(protocol.repetitions):
    for contestant in contestants:
      prepared = contestant.prepare()
      start = time.perf_counter()
      contestant.run(prepared)
      seconds[contestant.name].append(time.perf_counter() - start)
  times = {name: tuple(readings) for name, readings in seconds.items()}
  return Race(times, compile_s, clock.programs - programs, (load, os.getloadavg()[0]))


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table.

  Attributes:
    figure: its number in the table of aims, or the name of its case.
    model: what was measured.
    what, aim, value: cells.
    reached: None where it was not measured, or has no aim.
    details: everything behind the cell, for JSON.
  """

  figure: int | str
  model: str
  what: str
  aim: str
  value: str
  reached: bool | None
  details: dict[str, Any] = dataclasses.field(default_factory=dict)


def machine() -> dict[str, Any]:
  """What the figures depend on; nothing that names the machine."""
  info = pathlib.Path('/proc/cpuinfo')
  words = set(info.read_text().split()) if info.exists() else set()
  versions: dict[str, str | None] = {}
  for package in ('jax', 'jaxlib', 'flax', 'numpy', 'torch', 'transformers'):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return {
    'device': f'{jax.default_backend()} ({jax.devices()[0].device_kind})',
    'cores': cores,
    'instructions': [flag for flag in _FLAGS if flag in words],
    'load_at_start': round(os.getloadavg()[0], 2),
    'python': platform.python_version(),
    'versions': versions,
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
  }


def markdown(rows: Sequence[Row], where: dict[str, Any], command: str) -> str:
  """The table, and under it what it was measured on."""
  words = {True: 'yes', False: 'no', None: '-'}
  lines = ['| figure | model | what | aim | measured | reached |', '|---|---|---|---|---|---|']
  lines += [f'| {row.figure} | {row.model} | {row.what} | {row.aim} | {row.value} | {words[row.reached]} |' for row in rows]
  versions = ', '.join(f'{name} {version or "not installed"}' for name, version in where['versions'].items())
  instructions = ', '.join(where['instructions']) or 'none of ' + ', '.join(_FLAGS)
  lines += [
    '',
    f'Measured with `{command}` on {where["device"]}, {where["cores"]} cores ({instructions}), load average {where["load_at_start"]} '
    f'at the start, Python {where["python"]}, {versions}' + (f', XLA_FLAGS `{where["xla_flags"]}`' if where['xla_flags'] else '') + '.',
    'Ratios are medians of pairs (least to most).',
  ]
  return '\n'.join(lines) + '\n'


def write_aside(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  aside = path.with_name(path.name + '.part')
  aside.write_text(text, encoding='utf-8')
  aside.replace(path)


def write_json(path: pathlib.Path, rows: Sequence[Row], where: dict[str, Any]) -> None:
  """Every reading behind the table."""
  write_aside(path, json.dumps({'machine': where, 'rows': [dataclasses.asdict(row) for row in rows]}, indent=2) + '\n')


def write_page(path: pathlib.Path, table: str, section: str = 'results') -> None:
  """Puts the table between the two marker lines of a section of a page.

  Raises:
    ValueError: the page lacks a marker line, or has it twice.
  """
  begin, end = markers(section)
  text = path.read_text(encoding='utf-8')
  if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
    raise ValueError(f'{path} must hold the lines {begin!r} and {end!r} once, in this order')
  head, rest = text.split(begin)
  write_aside(path, f'{head}{begin}\n\n{table}\n{end}{rest.split(end)[1]}')
