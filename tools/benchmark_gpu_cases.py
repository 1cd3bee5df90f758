"""Training and the image tokenizer for `benchmark_gpu.py`: what one accelerator does with the released sizes, absolute, random weights.

Each case runs in a process of its own with a deadline and yields a row as soon as it has one; a part for which no time is left says so.
Gates compare with plain forms first: a training step with whole attention and whole logits, each attention in bfloat16, bfloat16 codes and
pixels with float32. Weights are made on the device. Rates are shares of the products and copies of the same process.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from benchmark_machine import Ceilings
from benchmark_models import pictures, tiny, training_flops, transformer_params
from benchmark_pictures import ROUNDED, Pictures
from benchmark_protocol import CompileClock, Contestant, Protocol, Row, race

from chameleon_jax import presets
from chameleon_jax.config import (
  AttentionImplementation,
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
  TransformerConfig,
  VQGANConfig,
)
from chameleon_jax.errors import ConfigError
from chameleon_jax.interop.native import abstract_transformer
from chameleon_jax.models.transformer import attention
from chameleon_jax.models.transformer.model import Transformer, stack_layers
from chameleon_jax.models.vqgan import model as vqgan
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.state import init_state
from chameleon_jax.training.step import make_train_step

PEAK = 989e12  # bfloat16 of an H100 or H200, the maker's
GATE_LENGTH = 1024  # tokens of the rows that the gate of training compares; blocks of the attention are 512 on a GPU
GRADIENT = 1e-3  # relative difference of loss and gradient norm from the plain form


@dataclasses.dataclass(frozen=True)
class GpuSizes:
  """What is measured; `name` 'tiny' for tests.

  Attributes:
    transformer, vqgan: the networks.
    train: rows and tokens of a training step.
    short, long, many: tokens of a short prompt and of a long one, rows of a batch at the long one.
    new: tokens drawn.
    n_pictures: of a batch of the image tokenizer.
  """

  name: str
  transformer: TransformerConfig
  vqgan: VQGANConfig
  train: tuple[int, int] = (2, 4096)
  short: int = 64
  long: int = 2048
  many: int = 32
  new: int = 256
  n_pictures: int = 16


def sizes_7b() -> GpuSizes:
  """The released sizes."""
  config = dataclasses.replace(presets.chameleon_7b(), dropout=0.0, scan_layers=False, param_dtype='bfloat16', remat='none')
  return GpuSizes('7B', config, dataclasses.replace(presets.vqgan_512(), dtype='bfloat16'))


def sizes_tiny() -> GpuSizes:
  """For tests on the CPU."""
  small = tiny()
  config = dataclasses.replace(small.transformer, dtype='bfloat16', param_dtype='bfloat16')
  return GpuSizes('tiny', config, dataclasses.replace(small.vqgan, dtype='bfloat16'), (2, 32), 8, 32, 2, 8, 2)


def vocabulary_of(sizes: GpuSizes) -> Any:
  """Its layout."""
  return presets.tiny_vocabulary() if sizes.name == 'tiny' else presets.released_vocabulary()


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: Any, shape: tuple[int, ...], std: float, mean: float) -> Any:
  return (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(jnp.bfloat16)


def device_params(config: TransformerConfig) -> Any:
  """bfloat16 weights, one tree a layer, made where they lie."""
  keys = iter(jax.random.split(jax.random.key(0), 16 * config.n_layers + 16))

  def draw(path: Any, leaf: Any) -> Any:
    return _normal(next(keys), leaf.shape, config.init_std, float(path[-1].key == 'weight'))

  return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(abstract_transformer(config)))


@dataclasses.dataclass(eq=False)
class Work:
  """A case under way.

  Attributes:
    sizes, ceilings: of this process.
    deadline: when it must have ended, of `time.monotonic`.
  """

  sizes: GpuSizes
  ceilings: Ceilings
  deadline: float
  protocol: Protocol = Protocol(warm_ups=1, repetitions=3, most_warm_ups=4)

  def __post_init__(self) -> None:
    self.clock = CompileClock()

  @property
  def left(self) -> float:
    """Seconds."""
    return self.deadline - time.monotonic()

  def row(self, case: str, what: str, aim: str, value: str, reached: bool | None, details: dict[str, Any] | None = None) -> Row:
    """Of this size."""
    return Row(case, self.sizes.name, what, aim, value, reached, details or {})

  def seconds(self, run: Callable[[Any], object], prepare: Callable[[], Any] = lambda: None) -> tuple[float, dict[str, Any]]:
    """Median seconds of a run, and every reading."""
    seen = race([Contestant('ours', run, prepare)], self.protocol, self.clock)
    return seen.median('ours'), seen.record()

  @contextlib.contextmanager
  def plain(self) -> Iterator[None]:
    """Traced under it, rows attend by the plain form, all scores at once; products in full precision."""

    def whole(q: Any, k: Any, v: Any, *, segment_ids: Any, dtype: Any, implementation: Any) -> Any:
      del segment_ids, implementation  # one document a row
      return attention.attend(q, k, v, attention.causal_mask(q.shape[1]), dtype=dtype)

    with mock.patch.object(attention, 'attend_rows', whole), jax.default_matmul_precision('highest'):
      yield


def parts(work: Work, each: dict[str, tuple[float, Callable[[], Iterator[Row]]]]) -> Iterator[Row]:
  """Runs parts of a case one after the other, (seconds it needs, rows); what no time is left for is told."""
  for name, (needed, run) in each.items():
    if work.left < needed:
      yield work.row(name, 'skipped', '-', f'not measured: {work.left:.0f} s left of the budget, it needs {needed:.0f}', None)
      continue
    try:
      yield from run()
    except RuntimeError as error:
      if not too_large(error):
        raise
      yield work.row(name, 'skipped', '-', 'does not fit the memory', None)


def too_large(error: RuntimeError) -> bool:
  """Whether jax or torch ran out of memory."""
  return 'RESOURCE_EXHAUSTED' in str(error) or 'out of memory' in str(error)


# ---------------------------------------------------------------------------------------------------------------------- training


def _train_config(model: TransformerConfig, vocabulary: Any, shape: tuple[int, int], chunks: int, **optimizer: Any) -> TrainConfig:
  return TrainConfig(
    model=model,
    vocabulary=vocabulary,
    data=DataConfig(seq_len=shape[1], batch_size=shape[0]),
    optimizer=OptimizerConfig(schedule='constant', warmup_steps=0, **optimizer),
    loss_chunks=chunks,
    n_steps=100,
  )


class Trainer:
  """A state made on the device, from `params` (stacked as the config has its layers) or anew, and its step on random tokens.

  A row is one document; it comes with segment ids, as packed rows do, but for cuDNN, which knows none.
  """

  def __init__(self, config: TrainConfig, params: Any = None):
    self._mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    model, optimizer = Transformer(config.model), make_optimizer(config.optimizer, config.n_steps)
    self._state = init_state(model, optimizer, self._mesh, key=jax.random.key(0), params=params)
    self._step = make_train_step(model, optimizer, config, self._mesh)
    rows, length = config.data.batch_size, config.data.seq_len
    text = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, length + 1)).astype(np.int32)
    self._batch = {'tokens': text[:, :-1], 'targets': text[:, 1:], 'loss_weights': np.ones((rows, length), np.float32)}
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    self._batch['positions'] = places
    if config.model.attention_implementation != 'cudnn':
      self._batch['segment_ids'] = np.ones((rows, length), np.int32)

  def __call__(self, _: Any = None) -> tuple[float, float]:
    """(loss, gradient norm)."""
    with jax.set_mesh(self._mesh):
      self._state, metrics = self._step(self._state, self._batch, jax.random.key(0))
    jax.block_until_ready(self._state)
    return float(metrics['loss']), float(metrics['gradient_norm'])


def _training_differs(work: Work) -> str | None:
  """How far two float32 steps of a small model are from the plain form, where that is too far."""
  base, length = work.sizes.transformer, 96 if work.sizes.name == 'tiny' else GATE_LENGTH
  if work.sizes.name != 'tiny':
    base = dataclasses.replace(base, n_layers=2, d_model=512, n_heads=4, n_kv_heads=4, d_ff=1376)
  large: dict[str, Any] = {} if work.sizes.name == 'tiny' else {'scan_layers': True, 'remat': 'full'}  # as what is timed
  model = dataclasses.replace(base, dtype='float32', param_dtype='float32', **large)
  params = transformer_params(model)
  given = stack_layers(params) if model.scan_layers else params

  def steps(chunks: int) -> list[tuple[float, float]]:
    trainer = Trainer(_train_config(model, vocabulary_of(work.sizes), (2, length), chunks), given)
    return [trainer() for _ in range(2)]

  with jax.default_matmul_precision('highest'):
    found = steps(4)
  with work.plain():
    expected = steps(1)
  off = max(abs(a / b - 1) for mine, plain in zip(found, expected) for a, b in zip(mine, plain))
  return None if off <= GRADIENT else f'loss and gradient norm of two float32 steps {found} against {expected} in the plain form'


def attention_problem(work: Work, kernel: AttentionImplementation) -> str | None:
  """Why a way to compute attention is not timed: it cannot serve or run here, or lies too far from the plain form in float32.

  Compared are the context and its gradients by queries, keys and values, packed rows with padding but for cuDNN.
  """
  model, length = work.sizes.transformer, 96 if work.sizes.name == 'tiny' else GATE_LENGTH
  rng = np.random.default_rng(1)
  keys = min(model.n_kv_heads, 2)
  heads = (model.n_heads // model.n_kv_heads * keys, keys, keys, model.n_heads // model.n_kv_heads * keys)
  q, k, v, weights = (rng.standard_normal((2, length, n, model.d_head)).astype(np.float32) for n in heads)
  ends = [length // 7, length // 2, length - length // 5]
  documents = np.array([[0, *ends], [0, ends[0] + 1, ends[1] - 1, length]])
  ids = np.stack([np.searchsorted(row[1:], np.arange(length), side='right') + 1 for row in documents])
  segments = None if kernel == 'cudnn' else np.where(ids > 3, 0, ids).astype(np.int32)

  def results(implementation: AttentionImplementation, dtype: Any) -> list[Any]:
    def loss(*operands: Any) -> Any:
      context = attention.attend_rows(*operands, segment_ids=segments, dtype=dtype, implementation=implementation)
      return jnp.sum(context * weights), context

    gradients, context = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (context, *gradients)]

  try:
    found = results(kernel, 'bfloat16')
  except ConfigError as error:
    return str(error)
  except (RuntimeError, ValueError, NotImplementedError) as error:  # a kernel that nobody has run here must not end the case
    return f'it does not run: {" ".join(str(error).split())[:200]}'
  with jax.default_matmul_precision('highest'):
    expected = results('plain', 'float32')
  off = [float(np.sqrt(np.mean(np.square(a - b)) / np.mean(np.square(b)))) for a, b in zip(found, expected)]
  if max(off) <= ROUNDED:
    return None
  return f'context and gradients are {", ".join(f"{x:.1e}" for x in off)} off the plain form, root mean square (limit {ROUNDED})'


def train(work: Work) -> Iterator[Row]:
  """Steps at the width of the 7B: float32 masters, bfloat16 products and first moments."""
  sizes, case = work.sizes, 'train'
  problem = _training_differs(work)
  if problem:
    yield work.row(case, 'gate', '-', f'not timed: {problem}', False)
    return
  rows, length = sizes.train
  whole, half = sizes.transformer.n_layers, max(1, sizes.transformer.n_layers // 2)
  variants: list[tuple[int, Any, bool, AttentionImplementation]] = [  # first the attentions side by side
    (half, 'dots', True, 'pallas'),
    (half, 'dots', True, 'cudnn'),
    (half, 'dots', True, 'blockwise'),
    (whole, 'full', True, 'pallas'),
    (whole, 'full', True, 'blockwise'),
    (half, 'dots', False, 'pallas'),
    (whole, 'dots', True, 'pallas'),
  ]
  timed = False
  refused: dict[AttentionImplementation, str | None] = {}
  for n_layers, remat, scanned, kernel in variants:
    what = f'{n_layers} layers, {rows} x {length}, remat {remat}, layers {"scanned" if scanned else "unrolled"}, attention {kernel}'
    if kernel not in refused:
      refused[kernel] = attention_problem(work, kernel)
    if refused[kernel]:
      yield work.row(case, what, '-', f'not timed: {refused[kernel]}', None)
      continue
    needed = 45 if scanned else 90  # mostly compilation; an estimate, no GPU was at hand
    if timed and work.left < needed:
      yield work.row(case, what, '-', f'not measured: {work.left:.0f} s left of the budget, it needs {needed}', None)
      continue
    timed = True
    changes: dict[str, Any] = {'n_layers': n_layers, 'remat': remat, 'scan_layers': scanned, 'attention_implementation': kernel}
    model = dataclasses.replace(sizes.transformer, param_dtype='float32', **changes)
    config = _train_config(model, vocabulary_of(sizes), sizes.train, 8, momentum_dtype='bfloat16')
    try:
      trainer = Trainer(config)
      seconds, details = work.seconds(trainer)
    except RuntimeError as error:
      if not too_large(error):
        raise
      yield work.row(case, what, '-', 'does not fit the memory', None)
      continue
    finally:
      trainer = None  # type: ignore[assignment]  # its memory
    rate = rows * length / seconds
    flops = training_flops(model, length) * rate
    share = flops / work.ceilings.flops['bfloat16']
    value = f'{flops / PEAK:.1%} MFU (causal count, of 989 TFLOP/s), {share:.1%} of the measured product: {rate:,.0f} tokens/s'
    yield work.row(
      case, what, '>= 48 % MFU, aim 55 %', value, flops / PEAK >= 0.48, details | {'mfu': flops / PEAK, 'tokens_per_second': rate}
    )


# ---------------------------------------------------------------------------------------------------------------------- pictures


def image_tokenizer(work: Work) -> Iterator[Row]:
  """Encoding and decoding of a batch, on the device; and by the calls that users have, transfers included."""
  sizes, case = work.sizes, 'image tokenizer'
  config = sizes.vqgan
  given = Pictures.random(dataclasses.replace(config, dtype='float32'))
  with jax.default_matmul_precision('highest'):
    codes = given.encode('float32')
    pixels = given.decode('float32', codes)
  share = float(np.mean(given.encode('bfloat16') == codes))
  off = float(np.sqrt(np.mean(np.square(given.decode('bfloat16', codes) - pixels))) / np.ptp(pixels))
  if share < 0.99 or not off <= ROUNDED:
    yield work.row(
      case,
      'gate',
      '-',
      f'not timed: {share:.1%} of the bfloat16 codes are those of float32, pixels are {off:.1e} of their range off',
      False,
    )
    return
  network, n, side = vqgan.VQGAN(config), sizes.n_pictures, config.resolution
  batch = pictures(side, n, seed=5)
  grids = np.broadcast_to(codes, (n, codes.shape[1]))
  encode = jax.jit(lambda params, images: network.apply({'params': params}, vqgan.to_pixels(images), method='encode')[0])
  decode = jax.jit(lambda params, codes: network.apply({'params': params}, codes.reshape(-1, config.grid, config.grid), method='decode'))
  on_device = jnp.asarray(batch), jnp.asarray(grids)
  runs: dict[str, tuple[int, Callable[[Any], object]]] = {
    'encode, on the device': (350, lambda _: encode(given.on_device, on_device[0]).block_until_ready()),
    'decode, on the device': (180, lambda _: decode(given.on_device, on_device[1]).block_until_ready()),
    'encode_pictures, from and to the host': (0, lambda _: vqgan.encode_pictures(config, given.on_device, batch, batch_size=n)),
    'decode_codes, from and to the host': (0, lambda _: vqgan.decode_codes(config, given.on_device, np.array(grids), batch_size=n)),
  }
  for what, (aim, run) in runs.items():
    if work.left < 25:
      yield work.row(case, what, '-', f'not measured: {work.left:.0f} s left of the budget, it needs 25', None)
      continue
    seconds, details = work.seconds(run)
    rate = n / seconds
    aims = (f'>= {aim} pictures/s', rate >= aim) if aim else ('-', None)
    yield work.row(case, f'{side} x {side}, batch {n}, bfloat16, {what}', aims[0], f'{rate:,.0f} pictures/s', aims[1], details)
