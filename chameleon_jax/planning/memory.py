"""How much memory: the exact bytes of `layout.py`, plus a stated model of what a step holds beside them at its worst moment.

What is saved between the forward and the backward pass is no model either: the layers' own backward pass is traced on
one device's share of a row and of the heads, and what it keeps is counted. That covers every rematerialisation policy, dropout,
norms and heads as the code has them. The rest is a model of the compiler.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import use_abstract_mesh

from chameleon_jax.array_types import Array, Params, PyTree
from chameleon_jax.config import TrainConfig, TransformerConfig
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.planning.layout import Layout, boxed_params, cache_bytes, decoding_bytes, itemsize, weight_bytes
from chameleon_jax.planning.speed import Requests, matmul_weights
from chameleon_jax.sampling.streams import FILL_ROWS
from chameleon_jax.training.state import unboxed

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
  return dataclasses.replace(model, scan_layers=True, **heads)


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


def kept(model: TransformerConfig, rows: int, length: int) -> Kept:
  """Traces the transformer of one device's share on one row and counts; all that is large grows with the rows."""
  return Kept(*(rows * size for size in dataclasses.astuple(_kept(model, length))))


@functools.lru_cache(maxsize=256)
def _kept(model: TransformerConfig, length: int) -> Kept:
  """Of one row; two layers are enough, since all are alike."""
  model = dataclasses.replace(model, n_layers=2)
  network = Transformer(model)
  ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = unboxed(boxed_params(dataclasses.replace(model, remat='none')))

  def backward(params: Params, tokens: Array, segment_ids: Array, positions: Array, key: Array) -> PyTree:
    def hidden(params: Params) -> Array:
      options = {'positions': positions, 'segment_ids': segment_ids, 'deterministic': False, 'rngs': {'dropout': key}}
      return network.apply({'params': params}, tokens, method='hidden', **options)[0]

    return jax.vjp(hidden, params)[1]  # what this function closes over is what was kept

  with use_abstract_mesh(Layout(1, 1, 1).mesh()):
    jaxpr = jax.make_jaxpr(backward)(params, ids, ids, ids, key).jaxpr
  given = set(jaxpr.invars)
  found = [leaf.aval for leaf in jaxpr.outvars if leaf not in given]
  stacked = [aval for aval in found if aval.shape[:1] == (2,)]
  layers, everything = (sum(aval.size * aval.dtype.itemsize for aval in avals) for avals in (stacked, found))
  narrow = sum(aval.size * min(aval.dtype.itemsize, itemsize(model.dtype)) for aval in stacked)
  return Kept(layers // 2, narrow // 2, everything - layers)


def train_memory(config: TrainConfig, layout: Layout) -> Memory:
  """One update on the fullest device.

  Always there: master weights, moments, the batch. Beside them, at the moments that can be the worst:

    loss        what was kept of all layers and of what has no layer; logits of one piece and their gradient; the output projection
                whole, once in the compute type and once as the float32 gradient before it is reduced
    layer       what was kept; gradients of all layers; one layer's recomputed activations: all that its own backward pass keeps
    reduction   what was kept; gradients of all layers; the matrix products of one layer, and its feed-forward's gradients in
                float32 before they are reduced over devices
    embedding   gradients of all layers; twice the whole table in float32: the scattered gradient and its sum over devices

  Until the layers are done, the compiler also keeps the compute-type copy of the layers' matrices that it makes before the loop
  over them, of the device's own share. With accumulation the gradients so far are there all the time, and those of one
  microbatch come on top.
  """
  model, n_micro = config.model, config.optimizer.accumulate_steps
  weights = weight_bytes(config, layout)
  length, rows = config.data.seq_len, config.data.batch_size // n_micro // layout.batch_shards
  always: Parts = {
      'parameters': weights.parameters,
      'optimizer': weights.optimizer,
      'batch': 5 * 4 * rows * n_micro * length,
  }
  if n_micro > 1:
    always['accumulated gradients'] = weights.gradients
  share = share_of_device(model, layout)
  saved = kept(share, rows, length)
  recomputed = kept(dataclasses.replace(share, remat='none'), rows, length).narrow
  products = kept(dataclasses.replace(share, remat='dots'), rows, length).layer
  sharded = layout.batch_shards > 1
  matrices, table = matmul_weights(model)
  copied = matrices // (layout.fsdp * layout.tensor) * itemsize(model.dtype) if model.dtype != model.param_dtype else 0
  forward: Parts = {'kept activations': saved.layer * model.n_layers, 'compute-type copy of weights': copied}
  logits = rows * (length // config.loss_chunks) * model.vocab_size // layout.tensor * 4
  head = table // layout.tensor
  feed_forward = 3 * model.d_model * share.d_ff
  moments: dict[str, Parts] = {
      'loss': {
          **always,
          **forward,
          'hidden states': saved.rest,
          'logits': 2 * logits,
          'output projection, whole': head * (itemsize(model.dtype) + 4) if sharded else 0,
      },
      'layer': {**always, **forward, 'gradients': weights.gradients, 'one layer, recomputed': recomputed},
      'reduction': {
          **always,
          **forward,
          'gradients': weights.gradients,
          'products of one layer': products,
          'feed-forward gradients, whole': 4 * feed_forward if sharded else 0,
      },
      'embedding': {**always, 'gradients': weights.gradients, 'embedding gradient, whole': 2 * 4 * table if sharded else 0},
  }
  return Memory(moments)


def sample_memory(model: TransformerConfig, requests: Requests, layout: Layout) -> Memory:
  """Filling prompts and decoding on the fullest device.

    fill     weights, the cache, the part of the cache that up to 16 streams fill apart from it, and of one layer the scores of
             a piece of 512 tokens against all slots, as float32 and in the compute type
    grow     weights, the cache, and the cache before it: streams of guided pictures came on top
    decode   weights, the cache, float32 logits of every stream four times over (raw, mixed, masked, sorted)
  """
  streams, slots = requests.streams(layout), requests.slots(model)
  cache = cache_bytes(model, layout, streams=streams, slots=slots)
  always: Parts = {'weights': decoding_bytes(model, layout), 'cache': cache}
  if layout.fsdp > 1:
    matrices, _ = matmul_weights(model)
    always['two gathered layers'] = 2 * matrices // model.n_layers // layout.tensor * itemsize(model.dtype)
  local = streams // layout.batch_shards
  filled = min(local, FILL_ROWS)
  piece = min(512, slots)
  scores = filled * model.n_heads // layout.tensor * piece * slots
  before = dataclasses.replace(requests, guided=False).streams(layout)
  logits = local * model.vocab_size * 4
  moments: dict[str, Parts] = {
      'fill': {**always, 'cache of the prompts': cache * filled // local, 'scores': scores * (2 * 4 + itemsize(model.dtype))},
      'grow': {**always, 'cache before': cache * before // streams if before != streams else 0},
      'decode': {**always, 'logits': 4 * logits},
  }
  return Memory(moments)
