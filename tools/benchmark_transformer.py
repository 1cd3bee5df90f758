"""The transformer's cases of `benchmark.py`, ours against Hugging Face: a training step and prefill (`benchmark_decoding.py` decodes).

Every case compares what the two compute before it times them, in float32: logits, greedy tokens, losses and gradient norms. What a gate
has refused is in the table, and has no time.
"""

import dataclasses
import functools
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import benchmark_peer
import benchmark_torch
import jax
import numpy as np
from benchmark_machine import Ceilings
from benchmark_models import INT8_CACHE, WAYS, Subject, cache_dtype, training_flops
from benchmark_protocol import CompileClock, Contestant, Protocol, Race, Row, importable, race, spread

from chameleon_jax.config import CacheDtype, DataConfig, Dtype, MeshConfig, OptimizerConfig, SamplingOptions, TrainConfig, TransformerConfig
from chameleon_jax.models.transformer.cache import init_cache
from chameleon_jax.models.transformer.model import Transformer, stack_layers
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.planning.speed import attention_flops, matmul_weights
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.state import init_state
from chameleon_jax.training.step import make_train_step

LOGITS, RELATIVE = 2e-3, 1e-3  # of the gates: largest difference of logits; relative difference of loss and gradient norm
NARROW = 3e-2  # of bfloat16 and int8 against float32: logits, root mean square; loss and gradient norm
PEER = 'HF'


@dataclasses.dataclass(eq=False)
class Bench:
  """What the cases share.

  Attributes:
    subject: the transformer.
    protocol, clock, ceilings: of this run.
    folder: of the checkpoint that the peers read.
    peers: whether there are any.
  """

  subject: Subject
  protocol: Protocol
  clock: CompileClock
  ceilings: Ceilings
  folder: pathlib.Path
  peers: bool = dataclasses.field(default_factory=lambda: importable('torch', 'transformers'))

  @functools.cached_property
  def checkpoint(self) -> pathlib.Path:
    """The folder, written by the project's converter when it is first asked for."""
    sizes = self.subject.sizes
    benchmark_peer.write(self.folder, sizes.transformer, self.subject.params, sizes.vocabulary)
    return self.folder

  def row(self, case: str, what: str, aim: str, value: str, reached: bool | None = None, details: dict[str, Any] | None = None) -> Row:
    """A row of this model."""
    return Row(case, self.subject.sizes.name, what, aim, value, reached, details or {})

  def left_out(self, case: str) -> Row:
    """The row of a case whose peers are missing."""
    return self.row(case, 'against Hugging Face on torch', '-', 'left out: torch and transformers are not installed (extra `parity`)')

  def refused(self, case: str, gate: str) -> Row:
    """The row of a case that was not timed."""
    return self.row(case, 'gate', '-', f'not timed: {gate}', False)

  def ratio(
    self, case: str, what: str, seen: Race, ours: str, peer: str, *, aim: float | None = None, more: str = '', each: float = 1
  ) -> Row:
    """A row for two contestants.

    Args:
      case, what: cells.
      seen: the race.
      ours, peer: the two.
      aim: least median of the ratios, None where there is none.
      more: behind the ratio.
      each: tokens of a run; rates are given where it is not 1.
    """
    ratios = seen.ratios(ours, peer)
    rates = [each / seen.median(name) for name in (ours, peer)]
    value = f'{spread(ratios)}: {rates[0]:,.0f} against {rates[1]:,.0f} tokens/s' if each != 1 else spread(ratios)
    reached = None if aim is None else statistics.median(ratios) >= aim
    details = seen.record() | {'ours': ours, 'peer': peer, 'ratios': ratios, 'tokens': each}
    if seen.compiled_meanwhile:
      return self.row(case, what, '-', f'spoilt: {seen.compiled_meanwhile} programs were compiled under the clock', False, details)
    return self.row(case, what, '-' if aim is None else f'>= {aim}x', value + more, reached, details)


# ---------------------------------------------------------------------------------------------------------------------- training


class OurTrainer:
  """The project's own step, with its state."""

  def __init__(self, subject: Subject, dtype: Dtype):
    rows, length = subject.sizes.train
    self.config = train_config(subject, dtype)
    self._mesh, model, optimizer, self._step = _program(self.config)
    params = stack_layers(subject.params) if self.config.model.scan_layers else subject.params
    self._state = init_state(model, optimizer, self._mesh, key=jax.random.key(0), params=params)
    self._rest = {'loss_weights': np.ones((rows, length), np.float32), 'segment_ids': np.ones((rows, length), np.int32)}
    self._rest['positions'] = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))

  def step(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """(loss, gradient norm) of one step."""
    with jax.set_mesh(self._mesh):
      self._state, metrics = self._step(self._state, {'tokens': tokens, 'targets': targets, **self._rest}, jax.random.key(0))
    jax.block_until_ready(self._state)
    return float(metrics['loss']), float(metrics['gradient_norm'])


@functools.lru_cache(maxsize=4)
def _program(config: TrainConfig) -> tuple[Any, Transformer, Any, Callable[..., Any]]:
  """Mesh of one device, model, optimizer and step of a config: what is compiled for one trainer serves the next."""
  mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
  model, optimizer = Transformer(config.model), make_optimizer(config.optimizer, config.n_steps)
  return mesh, model, optimizer, make_train_step(model, optimizer, config, mesh)


def train_config(subject: Subject, dtype: Dtype) -> TrainConfig:
  """float32 masters and moments, computing in `dtype`; no z-loss, which the peer has not."""
  sizes = subject.sizes
  return TrainConfig(
    model=sizes.transformer_in(dtype, scan_layers=sizes.scan_training),
    vocabulary=sizes.vocabulary,
    data=DataConfig(seq_len=sizes.train[1], batch_size=sizes.train[0]),
    optimizer=OptimizerConfig(schedule='constant', warmup_steps=0, eps=1e-8),
    loss_chunks=sizes.loss_chunks,
    z_loss=0.0,
  )


def train(bench: Bench) -> list[Row]:
  """A training step: mixed precision against the peer's float32 and its pure bfloat16."""
  subject, case = bench.subject, 'train'
  rows, length = subject.sizes.train
  text = subject.text(rows, length + 1)
  tokens, targets = text[:, :-1], text[:, 1:]
  ours = {way: OurTrainer(subject, way) for way in ('float32', 'bfloat16')}  # type: ignore[arg-type]
  flops = training_flops(subject.sizes.transformer, length) * rows * length

  def share(seen: Race) -> str:
    return f'; {flops / seen.median("ours bfloat16") / bench.ceilings.flops["bfloat16"]:.0%} of the bfloat16 product'

  contestants = [Contestant(f'ours {way}', lambda _, step=trainer.step: step(tokens, targets)) for way, trainer in ours.items()]
  if not bench.peers:
    seen = race(contestants, bench.protocol, bench.clock)
    return [
      bench.left_out(case),
      bench.row(case, 'ours bfloat16', '-', f'{rows * length / seen.median("ours bfloat16"):,.0f} tokens/s' + share(seen)),
    ]
  o = train_config(subject, 'float32').optimizer
  given: dict[str, Any] = {
    'learning_rate': o.learning_rate,
    'betas': (o.beta1, o.beta2),
    'eps': o.eps,
    'decay': o.weight_decay,
    'clip': o.clip_norm,
  }
  theirs = {dtype: benchmark_torch.Trainer(bench.checkpoint, dtype, **given) for dtype in benchmark_torch.DTYPES}
  for turn in range(2):  # the second step sees the first update; bfloat16 takes part in the first
    mine, peer = ours['float32'].step(tokens, targets), theirs['float32'].step(tokens, targets)
    off = max(abs(a / b - 1) for a, b in zip(mine, peer))
    if not off <= RELATIVE:
      return [bench.refused(case, f'step {turn + 1}: loss and gradient norm {mine} against {peer}, off by {off:.1e} (limit {RELATIVE})')]
    off = 0.0 if turn else max(abs(a / b - 1) for a, b in zip(ours['bfloat16'].step(tokens, targets), mine))
    if not off <= NARROW:
      return [bench.refused(case, f'loss and gradient norm in bfloat16 are {off:.1e} off those in float32 (limit {NARROW})')]
  contestants += [Contestant(f'{PEER} {dtype}', lambda _, step=trainer.step: step(tokens, targets)) for dtype, trainer in theirs.items()]
  seen = race(contestants, bench.protocol, bench.clock)
  make = functools.partial(bench.ratio, case, seen=seen, each=rows * length)
  return [
    make(
      what=f'step of {rows} x {length}, mixed precision against HF float32',
      ours='ours bfloat16',
      peer=f'{PEER} float32',
      aim=1.3,
      more=share(seen),
    ),
    make(what='the same against HF bfloat16 (pure)', ours='ours bfloat16', peer=f'{PEER} bfloat16', aim=0.9),
    make(what='ours float32 against HF float32', ours='ours float32', peer=f'{PEER} float32'),
  ]


# ----------------------------------------------------------------------------------------------------------------------- prefill


def options(subject: Subject, n_new: int) -> SamplingOptions:
  """Greedy text that ends after `n_new` tokens."""
  v = subject.vocabulary
  return SamplingOptions(
    'text', max_new_tokens=n_new, greedy=True, repetition_penalty=1.0, stop_at_end_turn=False, banned_tokens=(v.end_sequence, v.end_turn)
  )


def submitted(subject: Subject, way: str, prompts: np.ndarray, n_new: int) -> Any:
  """A new engine with these requests queued."""
  engine = subject.engine(way)
  for row, prompt in enumerate(prompts):
    engine.submit(prompt, options(subject, n_new), row=row)
  return engine


def first_token(engine: Any) -> Any:
  """Fills in all prompts and draws one token a row; returns the engine."""
  while not engine.steps:
    engine.advance(1)
  return engine


def logits_program(config: TransformerConfig, *, all_positions: bool, cache: CacheDtype | None = None) -> Callable[[Any, Any], Any]:
  """A compiled function from parameters and tokens to logits, of all positions or of the last; through a new cache of a type, or none."""
  model = Transformer(config)

  def logits(params: Any, tokens: Any) -> Any:
    empty = None if cache is None else init_cache(config, tokens.shape[0], tokens.shape[1], cache)
    hidden: Any = model.apply({'params': params}, tokens, cache=empty, method='hidden')[0]
    return model.apply({'params': params}, hidden if all_positions else hidden[:, -1:], method='unembed')

  return jax.jit(logits)


_shared_program = functools.lru_cache(maxsize=8)(logits_program)


def last_logits(
  config: TransformerConfig, params: Any, *, all_positions: bool = False, cache: CacheDtype | None = None
) -> Callable[[np.ndarray], np.ndarray]:
  """The same as a function of tokens alone, on the host; one program serves all calls."""
  program = _shared_program(config, all_positions=all_positions, cache=cache)
  return lambda tokens: np.asarray(program(params, tokens))


def prefill_flops(config: TransformerConfig, length: int) -> float:
  """Of a prompt whose last position alone is projected, attention causal."""
  layers, head = matmul_weights(config)
  return length * (2 * layers + attention_flops(config, length)) + 2 * head


def rounded_off(subject: Subject, way: str, tokens: np.ndarray) -> str | None:
  """How far the logits of a narrower way are from those of float32 with the weights it stands for, where that is too far."""
  if way == 'float32':
    return None
  exact = last_logits(*subject.meant_by(way).way('float32'), all_positions=True)(tokens)
  off = relative(last_logits(*subject.way(way), all_positions=True, cache=cache_dtype(way))(tokens), exact)
  return None if off <= NARROW else f'{way} logits are {off:.1e} of their size off (root mean square, limit {NARROW})'


def relative(found: np.ndarray, exact: np.ndarray) -> float:
  """Root mean square of the difference, as a share of that of `exact`."""
  return float(np.sqrt(np.mean(np.square(found - exact)) / np.mean(np.square(exact))))


def difference(bench: Bench, tokens: np.ndarray) -> str | None:
  """What the float32 logits of all positions differ by, where it is too much."""
  ours = last_logits(*bench.subject.way('float32'), all_positions=True)(tokens)
  off = float(np.abs(ours - benchmark_torch.logits(benchmark_torch.load(bench.checkpoint, 'float32'), tokens)).max())
  return None if off <= LOGITS else f'float32 logits differ by {off:.1e} (limit {LOGITS})'


def prefill(bench: Bench) -> list[Row]:
  """One long prompt: the logits behind it; and through the sampler, the first token."""
  case, sizes = 'prefill', bench.subject.sizes
  tokens = bench.subject.text(1, sizes.prefill)
  ours = {way: last_logits(*bench.subject.way(way)) for way in WAYS if way != INT8_CACHE}  # which keeps none here
  flops = prefill_flops(sizes.transformer, sizes.prefill)
  contestants = [Contestant(f'ours {way}', lambda _, f=f: f(tokens)) for way, f in ours.items()]
  if not bench.peers:
    seen = race(contestants, bench.protocol, bench.clock)
    rate = sizes.prefill / seen.median('ours bfloat16')
    return [bench.left_out(case), bench.row(case, 'ours bfloat16', '-', f'{rate:,.0f} tokens/s')]
  problem = difference(bench, tokens) or next(filter(None, (rounded_off(bench.subject, way, tokens[:, :128]) for way in WAYS)), None)
  if problem:
    return [bench.refused(case, problem)]
  models = {dtype: benchmark_torch.load(bench.checkpoint, dtype) for dtype in benchmark_torch.DTYPES}
  contestants += [
    Contestant(f'{PEER} {dtype}', lambda _, m=model: benchmark_torch.logits(m, tokens, last=True)) for dtype, model in models.items()
  ]
  peers = {dtype: benchmark_torch.Decoder(model, bench.subject.allowed, cache='dynamic') for dtype, model in models.items()}
  contestants += [
    Contestant(f'ours {way}, sampler', lambda e: first_token(e), functools.partial(submitted, bench.subject, way, tokens, 1))
    for way in WAYS
  ]
  contestants += [Contestant(f'{PEER} {dtype}, cache', lambda _, p=peer: p.run(p.prepare(tokens, 1))) for dtype, peer in peers.items()]
  seen = race(contestants, bench.protocol, bench.clock)
  make = functools.partial(bench.ratio, case, seen=seen, each=sizes.prefill)
  found = []
  for through, mine, peer in (('last logits', '', ''), ('first token, filling a cache', ', sampler', ', cache')):
    best = seen.fastest(f'ours {way}{mine}' for way in WAYS if way in benchmark_torch.DTYPES)  # the same numbers on both sides
    narrower = [f'ours {way}{mine}' for way in (WAYS if mine else ours) if way not in benchmark_torch.DTYPES]
    for chosen, aims in ((best, (2.0, 0.8)), *((name, (None, None)) for name in narrower)):
      share = f'; {flops / seen.median(chosen) / bench.ceilings.flops["bfloat16"]:.0%} of the bfloat16 product'
      what = f'1 x {sizes.prefill}, {through}, {chosen.split(",")[0]}'
      found.append(make(what=f'{what} against HF float32', ours=chosen, peer=f'{PEER} float32{peer}', aim=aims[0], more=share))
      found.append(make(what=f'{what} against HF bfloat16', ours=chosen, peer=f'{PEER} bfloat16{peer}', aim=aims[1]))
  return found


def bench_in(subject: Subject, protocol: Protocol, ceilings: Ceilings, clock: CompileClock) -> tuple[Bench, tempfile.TemporaryDirectory]:
  """A bench with a folder of its own, which its second part removes."""
  folder = tempfile.TemporaryDirectory()
  return Bench(subject, protocol, clock, ceilings, pathlib.Path(folder.name)), folder
