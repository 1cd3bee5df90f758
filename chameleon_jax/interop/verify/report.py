"""The parity certificate itself: rows of checks, what the failures look like, as a table and as JSON.

Knows nothing of checkpoints: `verify` fills it in.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Status = Literal['pass', 'fail', 'info']
MISSING = 'missing'


@dataclasses.dataclass(frozen=True)
class Row:
  """One check.

  Attributes:
    name: what was compared.
    value: the measured figure, or words where the check is no number.
    limit: the largest `value` that passes; None where nothing is judged.
    status: 'info' rows are reported and never fail.
    where: the first place that differs, or why nothing was compared.
    details: more figures, for the JSON alone.
    skipped: what the verdict names as not compared; empty where all was, or where nothing was there to compare.
  """

  name: str
  value: float | str
  limit: float | str | None
  status: Status
  where: str = ''
  details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  skipped: str = ''


def judged(
    name: str, value: float | str, limit: float | str, where: str = '', *, good: bool, details: Mapping[str, Any] | None = None
) -> Row:
  """A row that passes where `good`."""
  return Row(name, value, limit, 'pass' if good else 'fail', where, details or {})


def not_compared(name: str, why: str, *, skipped: str = '') -> Row:
  """A row that says why there is no figure; `skipped` as in `Row`."""
  return Row(name, 'not compared', None, 'info', why, skipped=skipped)


def lone(name: str, part: str, where: str, *, partial: bool) -> Row:
  """The row of a part that only one side has: it fails, or with `partial` goes into the verdict as not compared."""
  if partial:
    return not_compared(name, where, skipped=part)
  return Row(name, MISSING, 'on both sides', 'fail', f'{where} (--partial compares the rest)', skipped=part)


@dataclasses.dataclass(frozen=True)
class Finding:
  """A fault that explains a failure: its short name (`qk_not_permuted`, `code_offset`, ...) and one plain sentence."""

  fault: str
  sentence: str


@dataclasses.dataclass(frozen=True)
class Report:
  """The outcome of `verify`. `tensors` holds, by part and name, the sha256 of both sides ('a', 'b')."""

  a: str
  b: str | None
  golden: str | None
  dtype: str
  rows: Sequence[Row]
  findings: Sequence[Finding]
  notes: Sequence[str] = ()
  tensors: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

  @property
  def passed(self) -> bool:
    """Whether no check failed."""
    return all(row.status != 'fail' for row in self.rows)

  @property
  def not_compared(self) -> tuple[str, ...]:
    """The parts that were there and not compared, each once: with them a pass is one of the rest alone."""
    return tuple(dict.fromkeys(row.skipped for row in self.rows if row.skipped))

  @property
  def compared(self) -> tuple[str, ...]:
    """Names of the checks that were made."""
    return tuple(row.name for row in self.rows if row.status != 'info' and row.value != MISSING)

  @property
  def verdict(self) -> str:
    """One line."""
    left_out = f'; not compared: {", ".join(self.not_compared)}' if self.not_compared else ''
    return f'verified: {"PASS" if self.passed else "FAIL"}{left_out}'

  def to_dict(self) -> dict[str, Any]:
    """What goes into the JSON file; figures that are no finite number become words ('inf', 'nan')."""
    outcome = {'passed': self.passed, 'verdict': self.verdict, 'compared': self.compared, 'not_compared': self.not_compared}
    return _plain(dataclasses.asdict(self) | outcome)

  def format(self) -> str:
    """The table, then one sentence for each fault that the failures look like, then the verdict."""
    lines = [f'A = {self.a}'] + ([f'B = {self.b}'] if self.b else []) + ([f'golden values = {self.golden}'] if self.golden else [])
    lines += [f'note: {note}' for note in self.notes]
    head = ('check', 'value', 'limit', 'result', 'where it first differs')
    cells = [head, *((row.name, _figure(row.value), _figure(row.limit), row.status, row.where) for row in self.rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head) - 1)]
    table = ['| ' + ' | '.join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[-1]]) + ' |' for line in cells]
    table.insert(1, '|' + '|'.join('-' * (width + 2) for width in [*widths, len(head[-1])]) + '|')
    lines += ['', *table, '']
    lines += [f'looks like: {finding.sentence}' for finding in self.findings]
    if not self.findings and any(row.status == 'fail' and row.value != MISSING for row in self.rows):
      lines.append('no fault that is known here explains the failure')
    return '\n'.join([*lines, self.verdict])


def _figure(value: float | str | None) -> str:
  if value is None:
    return '-'
  return value if isinstance(value, str) else f'{value:.3g}'


def _plain(value: Any) -> Any:
  """The same in the types of JSON."""
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else str(value)
  return value
