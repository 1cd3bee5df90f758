"""How much memory: the exact bytes of `weights.py` and `layout.py`, plus a stated model of what a step holds beside them at its worst
moment.

What is saved between the forward and the backward pass is no model either: the layers' own backward pass is traced on
one device's share of a row and of the heads, and what it keeps is counted. That covers every rematerialisation policy, dropout,
norms and heads as the code has them, and whatever a run freezes. The rest is a model of the compiler.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import use_abstract_mesh

from chameleon_jax.array_types import Array, Params, PyTree
from chameleon_jax.config import FineTuneConfig, TrainConfig, TransformerConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.planning.layout import Layout, boxed_params, cache_bytes, decoding_bytes, itemsize
from chameleon_jax.planning.speed import Requests, matmul_weights
from chameleon_jax.planning.weights import orthogonalised, trained_weights, weight_bytes, whole_gradients
from chameleon_jax.sampling.stream_pool import FILL_ROWS
from chameleon_jax.training.state import unboxed
from chameleon_jax.training.trainable import FULL, Tuning

Remat = Literal['none', 'dots', 'full']
Parts = dict[str, int]  # what is alive -> bytes of one device


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of the fullest device.

  Attributes:
    moments: moments of a step -> what is alive then.
  """

  moments: dict[str, Parts]

  @property
  def worst(self) -> str:
    """The moment with the most."""
    return max(self.moments, key=lambda name: sum(self.moments[name].values()))

  @property
  def peak(self) -> int:
    """Bytes at that moment."""
    return sum(self.moments[self.worst].values())

  @property
  def parts(self) -> Parts:
    """What is alive at that moment."""
    return self.moments[self.worst]


def share_of_device(model: TransformerConfig, layout: Layout) -> TransformerConfig:
  """The transformer as one device of the tensor axis computes it: its heads and its part of the inner width."""
  heads = {name: getattr(model, name) // layout.tensor for name in ('n_heads', 'n_kv_heads', 'd_ff')}
  return dataclasses.replace(model, scan_layers=True, sequence_parallel=False, **heads)


@dataclasses.dataclass(frozen=True)
class Kept:
  """What the backward pass keeps of a forward pass over whole rows, bytes.

  Attributes:
    layer: of one layer.
    narrow: of one layer, with float32 values counted in the compute type.
    rest: of what has no layer: embedding, angles, last norm.
  """

  layer: int
  narrow: int
  rest: int


@functools.lru_cache(maxsize=4096)
def kept(model: TransformerConfig, rows: int, length: int, *, fine_tune: FineTuneConfig = FineTuneConfig(), pieces: int = 1) -> Kept:
  """Traces the transformer of one device's share and counts what the gradient of the trained parameters needs.

  Args:
    model: of the device, see `share_of_device`.
    rows, length: of a microbatch on the device.
    fine_tune: what trains.
    pieces: devices that the residual stream between the blocks is split over (`sequence_parallel`). What is [rows, length, d_model]
      is then a piece, but for the two inputs of a layer's projections, which are gathered: kept whole where nothing is recomputed.
  """
  each, once, split = map(dataclasses.astuple, _kept(model, length, fine_tune))
  if pieces > 1 and model.d_ff == model.d_model:  # the stream is told by its shape, so nothing else may have it
    split = dataclasses.astuple(_kept(dataclasses.replace(model, d_ff=2 * model.d_ff), length, fine_tune)[2])
  return Kept(*(fixed + rows * (row - part + part // pieces) for row, fixed, part in zip(each, once, split)))


_ROWS, _LAYERS = 10_007, 3  # of a trace: what grows with the rows has this prime in its size; all layers are alike


@functools.lru_cache(maxsize=256)
def _kept(model: TransformerConfig, length: int, fine_tune: FineTuneConfig) -> tuple[Kept, Kept, Kept]:
  """(what each row leaves, what is there once, what of a row is on the stream between the blocks)."""
  model = dataclasses.replace(model, n_layers=_LAYERS)
  network, tuning, compute = Transformer(model), _tuning(model, fine_tune), jnp.dtype(model.dtype)
  ids = jax.ShapeDtypeStruct((_ROWS, length), jnp.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = unboxed(boxed_params(dataclasses.replace(model, remat='none')))

  def backward(params: Params, tokens: Array, segment_ids: Array, positions: Array, key: Array) -> PyTree:
    trained, frozen = params

    def hidden(trained: Params) -> Array:
      options = {'positions': positions, 'segment_ids': segment_ids, 'deterministic': False, 'rngs': {'dropout': key}}
      return network.apply(tuning.variables(trained, frozen), tokens, method='hidden', **options)[0]

    return jax.vjp(hidden, trained)[1]  # what this function closes over is what was kept

  platform = 'tpu' if model.attention_implementation in ('auto', 'plain', 'blockwise') else 'gpu'  # where its kernel can run at all
  with use_abstract_mesh(Layout(1, 1, 1).mesh(platform)):
    jaxpr = jax.make_jaxpr(backward)(jax.eval_shape(tuning.split, params, key), ids, ids, ids, key).jaxpr
  given = set(jaxpr.invars)
  found = [leaf.aval for leaf in jaxpr.outvars if not isinstance(leaf, core.Literal) and leaf not in given]
  whole = 2 if model.remat == 'none' else 0  # inputs of projections that are kept as they are read

  sizes = np.zeros((3, 3), np.int64)  # the three results; their three fields, the layers' of all layers
  for aval in found:
    stacked = aval.shape[:1] == (_LAYERS,)
    grows = aval.size % _ROWS == 0
    count = np.array([1, 0, 0]) if stacked else np.array([0, 0, 1])
    count = count * aval.size * aval.dtype.itemsize // (_ROWS if grows else 1)
    if stacked:
      count[1] = count[0] * min(aval.dtype.itemsize, compute.itemsize) // aval.dtype.itemsize
    sizes[0 if grows else 1] += count
    if aval.shape[-3:] != (_ROWS, length, model.d_model):
      continue
    if stacked and aval.dtype == compute and whole:
      whole -= 1
    else:
      sizes[2] += count
  each, once, split = (Kept(int(layers) // _LAYERS, int(narrow) // _LAYERS, int(rest)) for layers, narrow, rest in sizes)
  return each, once, split


def _tuning(model: TransformerConfig, fine_tune: FineTuneConfig) -> Tuning:
  """The split of a run, on scanned layers; one whose patterns name single layers counts as training everything."""
  tuning = Tuning(fine_tune)
  try:
    jax.eval_shape(tuning.split, boxed_params(dataclasses.replace(model, remat='none')), jax.eval_shape(lambda: jax.random.key(0)))
  except ConfigError:
    return FULL
  return tuning


def train_memory(config: TrainConfig, layout: Layout) -> Memory:
  """One update on the fullest device.

  Always there: master weights, what the optimizer keeps, frozen weights, the batch. Beside them, at the moments that can be the worst:

    loss        what was kept of all layers and of what has no layer; logits of one piece and their gradient; the output projection
                whole, once in the compute type and, where it trains, once as the float32 gradient before it is reduced or cut to the
                rows that train; one after the other where nothing below it trains
    layer       what was kept; gradients of all layers; one layer's recomputed activations: all that its own backward pass keeps, or
                would keep where nothing below the head trains and layers run forward only
    reduction   what was kept; gradients of all layers; the matrix products of one layer, and its feed-forward's gradients in
                float32 before they are reduced over devices
    embedding   gradients of all layers; twice the whole table in float32: the scattered gradient and its sum over devices
    update      of Muon alone, others work in place: gradients; the table's whole; of the largest stack of hidden matrices two
                copies in float32 beside its gradient, with its layers spread over the fsdp axis

  Until the layers are done, the compiler also keeps the compute-type copy of the layers' matrices that it makes before the loop
  over them, of the device's own share. With accumulation the gradients so far are there all the time, and those of one
  microbatch come on top.
  """
  model, n_micro = config.model, config.optimizer.accumulate_steps
  weights, whole = weight_bytes(config, layout), whole_gradients(config, layout)
  length, rows = config.data.seq_len, config.data.batch_size // n_micro // layout.batch_shards
  always: Parts = {
      'parameters': weights.parameters,
      'optimizer': weights.optimizer,
      'frozen parameters': weights.frozen,
      'batch': 5 * 4 * rows * n_micro * length,
  }
  if n_micro > 1:
    always['accumulated gradients'] = weights.gradients
  share = share_of_device(model, layout)
  pieces = layout.tensor if model.sequence_parallel else 1
  below = trained_weights(config).below

  def of(remat: Remat, fine_tune: FineTuneConfig = config.fine_tune) -> Kept:
    return kept(dataclasses.replace(share, remat=remat), rows, length, fine_tune=fine_tune, pieces=pieces)

  saved, products = of(model.remat), of('dots').layer
  at_work = (of('none') if below else of('none', FineTuneConfig())).narrow
  sharded = layout.batch_shards > 1
  head = matmul_weights(model)[1] // layout.tensor * itemsize(model.dtype)
  projection = head + whole.head if below else max(head, whole.head)
  if not sharded:  # else it is a parameter, and its gradient among the gradients
    projection = whole.head if config.fine_tune.head_rows is not None else 0
  forward: Parts = {'kept activations': saved.layer * model.n_layers, 'compute-type copy of weights': weights.copies}
  logits = rows * (length // config.loss_chunks) * model.vocab_size // layout.tensor * 4
  moments: dict[str, Parts] = {
      'loss': {
          **always,
          **forward,
          'hidden states': saved.rest,
          'logits': 2 * logits,
          'output projection, whole': projection,
      },
      'layer': {**always, **forward, 'gradients': weights.gradients, 'one layer, recomputed': at_work},
      'reduction': {
          **always,
          **forward,
          'gradients': weights.gradients,
          'products of one layer': products,
          'feed-forward gradients, whole': whole.feed_forward if sharded else 0,
      },
      'embedding': {**always, 'gradients': weights.gradients, 'embedding gradient, whole': 2 * whole.embedding if sharded else 0},
  }
  stack = orthogonalised(config, layout)
  if stack:
    moments['update'] = {
        **always,
        'gradients': weights.gradients,
        'embedding gradient, whole': whole.embedding if sharded else 0,
        'hidden matrices of one stack': 2 * 4 * stack,
    }
  return Memory(moments)


def sample_memory(model: TransformerConfig, requests: Requests, layout: Layout) -> Memory:
  """Filling prompts and decoding on the fullest device.

    fill     weights, the cache, the part of the cache that up to 16 streams fill apart from it, and of one layer the scores of
             a piece of 512 tokens against a block of slots or of one of 128 against all, as float32 and in the compute type
    grow     weights, the cache, and the cache before it: streams of guided pictures came on top
    decode   weights, the cache, float32 logits of every stream four times over (raw, mixed, masked, sorted)

  Of an int8 cache, room for the keys of one layer in the compute type, where a compiler converts them ahead of the product.
  """
  streams, slots = requests.streams(layout), requests.slots(model)
  cache = cache_bytes(model, layout, streams=streams, slots=slots, dtype=requests.cache_dtype)
  always: Parts = {'weights': decoding_bytes(model, layout), 'cache': cache}
  if layout.fsdp > 1:
    matrices, _ = matmul_weights(model)
    always['two gathered layers'] = 2 * matrices // model.n_layers // layout.tensor * itemsize(model.dtype)
  local = streams // layout.batch_shards
  filled = min(local, FILL_ROWS)
  piece = min(512, slots)
  pairs = max(piece * piece, min(128, slots) * slots)  # blocks of slots are as large as the piece (`attention.attend_cache`)
  scores = filled * model.n_heads // layout.tensor * pairs
  before = dataclasses.replace(requests, guided=False).streams(layout)
  logits = local * model.vocab_size * 4

  def converted(rows: int) -> int:
    keys = rows * slots * model.n_kv_heads // layout.tensor * model.d_head
    return keys * itemsize(model.dtype) if requests.cache_dtype == 'int8' else 0

  moments: dict[str, Parts] = {
      'fill': {
          **always,
          'cache of the prompts': cache * filled // local,
          'scores': scores * (2 * 4 + itemsize(model.dtype)),
          'converted keys': converted(filled),
      },
      'grow': {**always, 'cache before': cache * before // streams if before != streams else 0},
      'decode': {**always, 'logits': 4 * logits, 'converted keys': converted(local)},
  }
  return Memory(moments)
