"""Scaling curves for `benchmark.py`: tokens (or pixels) per second against size, context, batch and picture, beside the cost model.

The cost model is the project's own roofline (`planning/speed.py`) over the ceilings of this machine, measured in the same run. Its two
parameters, the share of the product rate and of the memory rate that programs reach, are fitted here (the median over the points that each
of them rules) and drawn with the points; dashed is the limit, both shares 1. Needs matplotlib (extra `dev`).
"""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmark_decoding import rest
from benchmark_machine import Ceilings
from benchmark_models import Sizes, Subject, pictures, vqgan_params
from benchmark_pictures import encoder_flops
from benchmark_protocol import CompileClock, Contestant, Protocol, race, write_aside
from benchmark_transformer import OurTrainer, first_token, last_logits, prefill_flops, submitted, train_config

from chameleon_jax.models.vqgan.model import encode_pictures
from chameleon_jax.planning.layout import Layout
from chameleon_jax.planning.speed import Assumptions, Requests, decode_speed, matmul_weights, train_speed
from chameleon_jax.planning.topologies import Chip, Topology

ALONE = Layout(1, 1, 1)
DTYPE = 'bfloat16'


@dataclasses.dataclass(frozen=True)
class Point:
  """One measurement.

  Attributes:
    curve: title of its panel and name of its line.
    x: size, context, batch or side.
    amount: tokens or pixels of a run.
    seconds: of a run, the median.
    model: (share of products, share of memory) -> seconds by the cost model.
    ruled_by: the parameter that it is taken to be ruled by.
  """

  curve: tuple[str, str]
  x: float
  amount: float
  seconds: float
  model: Callable[[float, float], float]
  ruled_by: str


def topology(ceilings: Ceilings) -> Topology:
  """This machine as the planner sees one: a chip without links."""
  chip = Chip('here', 'cpu', 2**40, ceilings.flops[DTYPE], ceilings.read, 1.0, 1.0, dims=1, per_domain=1)
  return Topology('here', chip, 1)


def _assumed(products: float, memory: float) -> Assumptions:
  return Assumptions(efficiency=products, hbm_efficiency=memory)


@dataclasses.dataclass(frozen=True)
class Scales:
  """What the curves run over. Widths have a layer for every 64 channels and heads of 64 (of 8 for the tiny size)."""

  widths: tuple[int, ...] = (128, 256, 512)
  contexts: tuple[int, ...] = (128, 256, 512, 1024, 2048)
  batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
  sides: tuple[int, ...] = (64, 128, 256, 512)
  new: int = 32


TINY = Scales((16, 32), (16, 32), (1, 2), (16, 32), 4)


class Curves:
  """Measures the points."""

  def __init__(self, subject: Subject, ceilings: Ceilings, protocol: Protocol, clock: CompileClock, scales: Scales):
    self.subject, self.ceilings, self.scales = subject, ceilings, scales
    self._protocol = dataclasses.replace(protocol, repetitions=min(3, protocol.repetitions))
    self._clock, self._here = clock, topology(ceilings)

  def _seconds(self, run: Callable[[Any], object], prepare: Callable[[], Any] = lambda: None) -> float:
    return race([Contestant('', run, prepare)], self._protocol, self._clock).median('')

  def of_width(self, width: int) -> Sizes:
    """The benchmark's transformer at another width, in proportion."""
    base = self.subject.sizes.transformer
    heads = width // base.d_head
    changes: dict[str, Any] = {'d_model': width, 'n_heads': heads, 'n_kv_heads': heads, 'd_ff': width * base.d_ff // base.d_model // 8 * 8}
    layers = max(1, base.n_layers * width // base.d_model)
    return dataclasses.replace(self.subject.sizes, transformer=dataclasses.replace(base, n_layers=layers, **changes))

  def training(self, width: int) -> Point:
    """A training step of one width."""
    subject = Subject.random(self.of_width(width))
    rows, length = subject.sizes.train
    text = subject.text(rows, length + 1)
    trainer = OurTrainer(subject, DTYPE)  # type: ignore[arg-type]
    seconds = self._seconds(lambda _: trainer.step(text[:, :-1], text[:, 1:]))
    config = train_config(subject, DTYPE)  # type: ignore[arg-type]
    size = sum(matmul_weights(config.model)) + config.model.vocab_size * width

    def model(products: float, memory: float) -> float:
      return train_speed(config, self._here, ALONE, _assumed(products, memory)).seconds

    return Point(('training, 2 rows', 'step'), size, rows * length, seconds, model, 'products')

  def prefill(self, context: int) -> Point:
    """A prompt filled in at once, without a cache."""
    config, params = self.subject.way(DTYPE)
    logits, tokens = last_logits(config, params), self.subject.text(1, context)
    seconds = self._seconds(lambda _: logits(tokens))
    flops = prefill_flops(config, context)
    nbytes = 2 * matmul_weights(config)[0]

    def model(products: float, memory: float) -> float:
      return max(flops / (self._here.chip.flops * products), nbytes / (self._here.chip.hbm * memory))

    return Point(('one row', 'prefill'), context, context, seconds, model, 'products')

  def decoding(self, rows: int, context: int, title: str) -> Point:
    """Tokens one after the other behind a prompt of `context` tokens."""
    scales = self.scales
    prompts = self.subject.text(rows, context - scales.new)
    prepare = functools.partial(self._begun, prompts)
    seconds = self._seconds(rest, prepare)
    config, _ = self.subject.way(DTYPE)
    requests = Requests(n=rows, context=context, guided=False)

    def model(products: float, memory: float) -> float:
      return scales.new * decode_speed(config, requests, self._here, ALONE, _assumed(products, memory)).seconds

    return Point((title, 'decode'), rows if title == 'decoding' else context, rows * scales.new, seconds, model, 'memory')

  def _begun(self, prompts: Any) -> Any:
    return first_token(submitted(self.subject, DTYPE, prompts, self.scales.new + 1))

  def encoding(self, side: int) -> Point:
    """One picture to its codes, float32."""
    config = dataclasses.replace(self.subject.sizes.vqgan, resolution=side)
    params, image = vqgan_params(config), pictures(side, 1)
    seconds = self._seconds(lambda _: encode_pictures(config, params, image))
    flops = encoder_flops(config)
    rate = self.ceilings.flops['float32']
    return Point(
      ('one picture, float32', 'encode'), side, side**2, seconds, lambda products, memory: flops / (rate * products), 'convolutions'
    )

  def measure(self) -> list[Point]:
    """Every point; each is told on stderr."""
    scales, limit = self.scales, self.subject.sizes.transformer.max_seq_len
    runs = [functools.partial(self.training, width) for width in scales.widths]
    runs += [functools.partial(self.prefill, context) for context in scales.contexts]
    runs += [functools.partial(self.decoding, 1, min(context, limit - 1), 'one row') for context in scales.contexts]
    runs += [functools.partial(self.decoding, rows, min(128, limit // 2), 'decoding') for rows in scales.batches]
    runs += [functools.partial(self.encoding, side) for side in scales.sides]
    points = []
    for run in runs:
      point = run()
      points.append(point)
      print(f'{": ".join(point.curve)} at {point.x:,.0f}: {point.amount / point.seconds:,.0f}/s', file=sys.stderr, flush=True)
    return points


def fit(points: Sequence[Point]) -> dict[str, float]:
  """Shares of the ceilings: for each parameter the median over its points of (seconds at the limit) / (seconds measured)."""
  found: dict[str, float] = {}
  for name in ('products', 'memory', 'convolutions'):
    shares = [point.model(1.0, 1.0) / point.seconds for point in points if point.ruled_by == name]
    if shares:
      found[name] = statistics.median(shares)
  return found


def predicted(point: Point, shares: dict[str, float]) -> float:
  """Seconds of a point by the fitted model."""
  products = shares.get('convolutions' if point.ruled_by == 'convolutions' else 'products', 1.0)
  return point.model(products, shares.get('memory', 1.0))


def record(points: Sequence[Point], shares: dict[str, float]) -> dict[str, Any]:
  """For JSON: every point, the parameters, and how far off the model is (median of the larger of both ratios, less one)."""
  rows: list[dict[str, Any]] = [
    {
      'panel': point.curve[0],
      'line': point.curve[1],
      'x': point.x,
      'per_second': point.amount / point.seconds,
      'model_per_second': point.amount / predicted(point, shares),
      'limit_per_second': point.amount / point.model(1.0, 1.0),
    }
    for point in points
  ]
  off = [abs(math.log(row['per_second'] / row['model_per_second'])) for row in rows]
  return {'points': rows, 'shares': shares, 'median_error': math.exp(statistics.median(off)) - 1}


_AXES = {
  'training, 2 rows': ('parameters', 'tokens/s'),
  'one row': ('context (tokens)', 'tokens/s'),
  'decoding': ('rows', 'tokens/s'),
  'one picture, float32': ('side (pixels)', 'pixels/s'),
}


def draw(found: dict[str, Any], output: pathlib.Path) -> None:
  """Measured points, the fitted model (line) and its limit (dashed), a panel for each kind of size."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  panels = list(dict.fromkeys(row['panel'] for row in found['points']))
  figure, axes = plt.subplots(1, len(panels), figsize=(4.0 * len(panels), 3.4), squeeze=False, layout='constrained')
  for axis, panel in zip(axes[0], panels):
    rows = [row for row in found['points'] if row['panel'] == panel]
    for place, line in enumerate(dict.fromkeys(row['line'] for row in rows)):
      x, measured, model, limit = zip(
        *((row['x'], row['per_second'], row['model_per_second'], row['limit_per_second']) for row in rows if row['line'] == line)
      )
      axis.plot(x, measured, 'o', color=f'C{place}', label=f'{line}, measured')
      axis.plot(x, model, '-', color=f'C{place}', linewidth=1.2, label=f'{line}, cost model')
      axis.plot(x, limit, '--', color=f'C{place}', linewidth=0.8, label=f'{line}, limit')
    label, unit = _AXES[panel]
    axis.set(title=panel, xlabel=label, ylabel=unit, xscale='log', yscale='log')
    sides = sorted({row['x'] for row in rows})
    axis.set_xticks(sides, [f'{side / 1e6:.0f}M' if side >= 1e6 else f'{side:,.0f}' for side in sides], fontsize=7)
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3, which='both')
    axis.legend(fontsize=7)
  figure.savefig(output, dpi=110)
  plt.close(figure)


def write(
  subject: Subject, ceilings: Ceilings, protocol: Protocol, clock: CompileClock, *, output: pathlib.Path, where: dict[str, Any]
) -> str:
  """Measures, draws into `output` and its numbers into the .json beside it; returns a line for the terminal."""
  scales = TINY if subject.sizes.name == 'tiny' else Scales()
  points = Curves(subject, ceilings, protocol, clock, scales).measure()
  found = record(points, fit(points))
  draw(found, output)
  write_aside(output.with_suffix('.json'), json.dumps({'machine': where, **found}, indent=2) + '\n')
  shares = ', '.join(f'{name} {share:.0%}' for name, share in found['shares'].items())
  return f'{output}: {len(points)} points; the model reaches {shares} of the ceilings and is off by {found["median_error"]:.0%} (median)'
