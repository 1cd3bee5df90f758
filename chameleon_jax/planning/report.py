"""A plan as a table for people and as one JSON object for programs. Knows how it looks, not how it was found."""

import dataclasses
from typing import Any

from chameleon_jax.planning.compiler import Verdict
from chameleon_jax.planning.search import Candidate, Plan, Settings
from chameleon_jax.planning.topologies import GIB, Topology


@dataclasses.dataclass(frozen=True)
class Report:
  """Everything that is said.

  Attributes:
    title: model and task.
    topology: the machine.
    plan: what was found.
    limit: bytes of a chip to stay within.
    assumptions: what the seconds rest on, one line each.
    verdicts: of the compiler, for 'as given' and 'best', where it was asked.
  """

  title: str
  topology: Topology
  plan: Plan
  limit: float
  assumptions: tuple[str, ...]
  verdicts: dict[str, Verdict] = dataclasses.field(default_factory=dict)

  @property
  def fits(self) -> bool:
    """Whether anything fits; the compiler has the last word."""
    return self.plan.best is not None and all(verdict.fits for name, verdict in self.verdicts.items() if name == 'best')

  def lines(self) -> list[str]:
    """The text of the command."""
    shown = [(name, candidate) for name, candidate in self._candidates() if candidate is not None]
    lines = [self.title, str(self.topology) + f', planned to {self.limit / GIB:.2f} GiB', '']
    lines += _table([_HEAD, *(_row(name, candidate, self.verdicts.get(name)) for name, candidate in shown)])
    for name, candidate in shown:
      lines += ['', f'memory of {name!r}, GiB a device, at the worst moment ({candidate.memory.worst}):']
      parts = sorted(candidate.memory.parts.items(), key=lambda item: -item[1])
      lines += _table([[f'  {part}', f'{size / GIB:.2f}'] for part, size in parts if size >= 0.005 * GIB])
      lines.append('seconds of a step: ' + ', '.join(f'{part} {seconds:.3g}' for part, seconds in candidate.speed.parts.items() if seconds))
    if self.plan.reasons:
      lines += ['', 'why not:', *(f'  {reason}' for reason in self.plan.reasons)]
    if self.plan.changes:
      lines += ['', 'what to change:', *(f'  {change}' for change in self.plan.changes)]
    elif self.plan.best is not None:
      lines += ['', f'nothing to change: no other of {self.plan.n_tried} ways is faster by more than 2 %']
    lines += ['', 'assumed:', *(f'  {line}' for line in self.assumptions)]
    for name, verdict in self.verdicts.items():
      said = 'fits' if verdict.fits else f'does not fit: {verdict.message}'
      lines.append(f'TPU compiler, {name}: {said}, peak {verdict.peak / GIB:.2f} GiB ({verdict.seconds:.0f} s)')
    return lines

  def _candidates(self) -> list[tuple[str, Candidate | None]]:
    plan = self.plan
    same = plan.given is not None and plan.best is not None and plan.given.fits and plan.given.settings == plan.best.settings
    return [('as given', plan.given), ('best', None if same else plan.best), ('least memory', plan.least)]

  def to_dict(self) -> dict[str, Any]:
    """Plain values for JSON; bytes, seconds and shares unrounded."""
    plan = self.plan
    return {
      'title': self.title,
      'topology': {
        'name': self.topology.name,
        'chip': self.topology.chip.name,
        'n_chips': self.topology.n_chips,
        'memory': self.topology.memory,
      },
      'limit': self.limit,
      'fits': self.fits,
      'candidates': {
        name: None if candidate is None else _plain(candidate)
        for name, candidate in (('given', plan.given), ('best', plan.best), ('least', plan.least))
      },
      'reasons': list(plan.reasons),
      'changes': list(plan.changes),
      'n_tried': plan.n_tried,
      'assumptions': list(self.assumptions),
      'compiler': {name: dataclasses.asdict(verdict) for name, verdict in self.verdicts.items()},
    }


_HEAD = ['', 'mesh (data x fsdp x tensor)', 'settings', 'peak GiB', 'fits', 's/step', 'tokens/s', 'MFU', 'bound by']


def _row(name: str, candidate: Candidate, verdict: Verdict | None) -> list[str]:
  speed = candidate.speed
  peak = f'{candidate.memory.peak / GIB:.2f}' + ('' if verdict is None else f' (compiler {verdict.peak / GIB:.2f})')
  figures = [f'{speed.seconds:.3g}', f'{speed.tokens:,.0f}', f'{speed.mfu:.1%}', speed.bound]
  return [name, str(candidate.layout), words(candidate.settings), peak, 'yes' if candidate.fits else 'no', *figures]


def words(settings: Settings) -> str:
  """Settings beside the mesh, short: `remat full, rows in pieces, 16 loss chunks, accumulate 1`; empty for a sampler."""
  if 'model.remat' not in settings:
    return ''
  remat, chunks, n_micro = (settings[name] for name in ('model.remat', 'loss_chunks', 'optimizer.accumulate_steps'))
  pieces = ', rows in pieces' if settings['model.sequence_parallel'] else ''
  return f'remat {remat}{pieces}, {chunks} loss chunks, accumulate {n_micro}'


def _table(rows: list[list[str]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*rows)]
  return ['  '.join(f'{cell:<{width}}' for cell, width in zip(row, widths)).rstrip() for row in rows]


def _plain(candidate: Candidate) -> dict[str, Any]:
  return {
    'mesh': dataclasses.asdict(candidate.layout),
    'settings': candidate.settings,
    'fits': candidate.fits,
    'peak': candidate.memory.peak,
    'worst_moment': candidate.memory.worst,
    'moments': candidate.memory.moments,
    'seconds': candidate.speed.seconds,
    'tokens_per_second': candidate.speed.tokens,
    'mfu': candidate.speed.mfu,
    'bound': candidate.speed.bound,
    'seconds_of_parts': candidate.speed.parts,
  }
