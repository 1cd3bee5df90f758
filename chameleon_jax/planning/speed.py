"""How fast: a roofline of products, memory traffic and collectives, with every assumption a field that a flag can change.

Training. With F the products and sums of a step on one chip, recomputation included:

    compute      F / (peak * efficiency)
    gathers      all-gather of the weights, forward and backward, and the sum of their float32 gradients, for which the TPU compiler
                 takes an all-reduce (seen in its programs; a reduce-scatter would move half), over the bandwidth of the fsdp group
    exchange     all-reduce of the gradients over the data axis
    tensor       all-reduces of the residual stream inside the layers: their result is needed at once, so nothing hides them. With
                 `sequence_parallel` each is a reduce-scatter and an all-gather (arXiv 2205.05198, section 4.2). They could move as
                 much as the all-reduce, but the TPU compiler scatters float32 sums, where it all-reduces those of the compute type
                 (seen in its programs): half as much again in bfloat16. With remat `dots` inputs are gathered once more
    update       optimizer: reads and writes of the state / memory bandwidth

    step = accumulate * (max(compute, gathers + exchange) + tensor) + update

Sampling. One decode step of R streams: max(bytes of weights and cache slots / (bandwidth * hbm_efficiency), compute) + collectives.
All slots of the cache count, because attention reads them all and masks.

`efficiency` defaults: the share of the peak that products reach in whole training steps in public runs, recomputation counted. MaxText
on v5e and v5p 60 to 71 % without counting it (README at cc7478e), on v6e 45 %; levanter on v3 71 % with it; MaxText on H100 47 %,
llm-foundry 46 %. This project's own code has not been measured on these machines: take the seconds as an estimate to compare
meshes by. Collectives of bytes: an all-gather or reduce-scatter of x bytes over n chips moves x (n - 1) / n, an all-reduce twice that.

Frozen weights have a product less (no gradient of their own), and none but the first where nothing trains below them.

MFU is the model's causal count (6 per weight in products and token, attention at half the square; 4 or 2 for frozen weights), without
recomputation, over peak.
Does not know: memory limits (`memory.py`), or what a compiler makes of a program.
"""

import dataclasses

from chameleon_jax.config import CacheDtype, TrainConfig, TransformerConfig
from chameleon_jax.planning.layout import Layout, cache_bytes, itemsize
from chameleon_jax.planning.topologies import Topology
from chameleon_jax.planning.weights import trained_weights, weight_bytes
from chameleon_jax.sampling.stream_pool import MIN_SLOTS, power_of_two, size
from chameleon_jax.training.trainable import Tuning

_EFFICIENCY = {'v4': 0.6, 'v5e': 0.6, 'v5p': 0.65, 'v6e': 0.5, 'a100': 0.5, 'h100': 0.5, 'h200': 0.5, 'l4': 0.5}


@dataclasses.dataclass(frozen=True)
class Assumptions:
  """Shares of the makers' peaks. `efficiency` None takes the chip's own default."""

  efficiency: float | None = None  # products in training and in filling a prompt
  link_efficiency: float = 0.7  # collectives
  hbm_efficiency: float = 0.7  # decode: gpt-fast 68 %, vLLM 77 %, jax-llm-examples 85 % of their cards
  latency: float = 10e-6  # seconds of one small collective

  def lines(self, topology: Topology, memory_fraction: float) -> tuple[str, ...]:
    """What the figures rest on, with the flags that change it."""
    chip = topology.chip
    rates = f'{chip.flops / 1e12:.0f} TFLOP/s, memory {chip.hbm / 1e9:,.0f} GB/s, links {chip.link / 1e9:.0f} GB/s one way'
    shares = (
      f'products reach {self.efficiency_on(topology):.0%} of that (--efficiency), collectives {self.link_efficiency:.0%} '
      f'(--link_efficiency), decoding {self.hbm_efficiency:.0%} of the memory rate (--hbm_efficiency)'
    )
    memory = f'{memory_fraction:.0%} of the memory is used (--memory_fraction)'
    if chip.kind == 'gpu':
      memory += f'; start with XLA_PYTHON_CLIENT_MEM_FRACTION={memory_fraction:.2f}, else jax takes 75 %'
    return f'a chip: {rates}', shares, memory

  def efficiency_on(self, topology: Topology) -> float:
    """Of one machine."""
    return _EFFICIENCY[topology.chip.name] if self.efficiency is None else self.efficiency


@dataclasses.dataclass(frozen=True)
class Speed:
  """Of a training step or a decode step.

  Attributes:
    seconds: of a step.
    tokens: trained, or drawn, a second by the whole machine.
    mfu: model FLOPs over peak.
    parts: what the seconds are made of; some overlap.
    bound: the part that limits.
  """

  seconds: float
  tokens: float
  mfu: float
  parts: dict[str, float]
  bound: str


def matmul_weights(config: TransformerConfig) -> tuple[int, int]:
  """Weights that take part in products: (all layers, output projection)."""
  attention = config.d_model * config.d_head * (2 * config.n_heads + 2 * config.n_kv_heads)
  return config.n_layers * (attention + 3 * config.d_model * config.d_ff), config.d_model * config.vocab_size


def attention_flops(config: TransformerConfig, seq_len: int) -> float:
  """Of one token, forward: two products over half the row on average."""
  return config.n_layers * 2 * 2 * config.n_heads * config.d_head * seq_len / 2


def model_flops(config: TrainConfig) -> float:
  """FLOPs of one token, forward and backward, attention causal; what is frozen has no gradient of its own."""
  (layers, head), trains = matmul_weights(config.model), trained_weights(config)
  weights = layers + head + trains.thin
  gradients = trains.layers + trains.head + trains.thin
  through = (weights if trains.below else 0) + gradients
  attention = attention_flops(config.model, config.data.seq_len)
  return 2 * weights + 2 * through + (3 if trains.below else 1) * attention


def executed_flops(config: TrainConfig) -> float:
  """FLOPs of one token as the program runs them: recomputed layers and attention weights counted. Logits are made once."""
  layers, again = matmul_weights(config.model)[0], 0.0
  score = attention_flops(config.model, config.data.seq_len) / 2  # one product
  if trained_weights(config).below:
    again += 2 * layers + 2 * score if config.model.remat == 'full' else 0.0
    again += score  # the scores, in the backward pass
  return model_flops(config) + again


def train_speed(config: TrainConfig, topology: Topology, layout: Layout, assumptions: Assumptions) -> Speed:
  """The roofline of one update."""
  chip, efficiency = topology.chip, assumptions.efficiency_on(topology)
  batch, length, n_micro = config.data.batch_size, config.data.seq_len, config.optimizer.accumulate_steps
  tokens = batch * length
  compute = executed_flops(config) * tokens / n_micro / topology.n_chips / (chip.flops * efficiency)

  def bandwidth(members: int, stride: int) -> float:
    return topology.group_bandwidth(members, stride) * assumptions.link_efficiency

  compute_itemsize = itemsize(config.model.dtype)
  master_itemsize = 4 if Tuning(config.fine_tune).freezes else itemsize(config.model.param_dtype)
  trains = trained_weights(config)
  weights = sum(matmul_weights(config.model)) / layout.tensor
  gradients = (trains.layers + trains.head + trains.thin) / layout.tensor * master_itemsize
  shared = (layout.fsdp - 1) / layout.fsdp
  gathered = weights * compute_itemsize * (2 if trains.below else 1) + 2 * gradients
  gathers = gathered * shared / bandwidth(layout.fsdp, layout.tensor)
  reduced = 2 * (layout.data - 1) / layout.data * gradients / layout.fsdp
  exchange = reduced / bandwidth(layout.data, layout.tensor * layout.fsdp)
  rows = batch / n_micro / layout.batch_shards
  stream = rows * length * config.model.d_model * compute_itemsize
  once = (layout.tensor - 1) / layout.tensor * stream / bandwidth(layout.tensor, 1)
  tensor = config.model.n_layers * _tensor_seconds(config.model, trains.below, once, assumptions.latency * (layout.tensor > 1))
  update = 2 * weight_bytes(config, layout).state / chip.hbm
  seconds = n_micro * (max(compute, gathers + exchange) + tensor) + update
  parts = {
    'compute': n_micro * compute, 'weight gathers': n_micro * gathers, 'gradient exchange': n_micro * exchange,
    'tensor collectives': n_micro * tensor, 'update': update,
  }
  mfu = model_flops(config) * tokens / seconds / (topology.n_chips * chip.flops)
  return Speed(seconds, tokens / seconds, mfu, parts, max(parts, key=lambda name: parts[name]))


def _tensor_seconds(model: TransformerConfig, below: bool, once: float, latency: float) -> float:
  """Of one layer's collectives over the tensor axis.

  Two sums of the stream forward, two backward, two once more where all is recomputed.

  Args:
    model: the transformer.
    below: whether a backward pass runs through the layers.
    once: seconds in which each device gets the pieces of all others, in the compute type.
    latency: of one collective.
  """
  sums = (4 if below else 2) + (2 if below and model.remat == 'full' else 0)
  if not model.sequence_parallel:
    return sums * (2 * once + latency)
  gathers = sums + (2 if below and model.remat == 'dots' else 0)
  return gathers * (once + latency) + sums * (once * 4 / itemsize(model.dtype) + latency)


@dataclasses.dataclass(frozen=True)
class Requests:
  """What a sampler is asked for at once.

  Attributes:
    n: requests under way together.
    context: tokens of each, prompt and answer; the cache has the power of two above it.
    guided: pictures are guided: a request inside one has three streams (`sampling/guidance.py`).
    cache_dtype: of keys and values, by default that of the computation.
  """

  n: int = 1
  context: int = 4096
  guided: bool = True
  cache_dtype: CacheDtype | None = None

  def streams(self, layout: Layout) -> int:
    """Rows of the cache, as `sampling/stream_pool.py` sizes it."""
    return size(self.n * (3 if self.guided else 1), multiple=layout.batch_shards)

  def slots(self, config: TransformerConfig) -> int:
    """Slots of each."""
    return min(power_of_two(self.context, smallest=MIN_SLOTS), config.max_seq_len)


def decode_speed(config: TransformerConfig, requests: Requests, topology: Topology, layout: Layout, assumptions: Assumptions) -> Speed:
  """The roofline of one decode step with all streams in use."""
  chip = topology.chip
  streams, slots = requests.streams(layout), requests.slots(config)
  local = streams // layout.batch_shards
  weights = sum(matmul_weights(config)) / layout.tensor * itemsize(config.dtype)
  cache = cache_bytes(config, layout, streams=streams, slots=slots, dtype=requests.cache_dtype)
  memory = (weights + cache) / (chip.hbm * assumptions.hbm_efficiency)
  attention = config.n_layers * 4 * config.n_heads * config.d_head * slots
  compute = local * (2 * sum(matmul_weights(config)) + attention) / layout.tensor / (chip.flops * assumptions.efficiency_on(topology))

  def bandwidth(members: int, stride: int) -> float:
    return topology.group_bandwidth(members, stride) * assumptions.link_efficiency

  shared = (layout.fsdp - 1) / layout.fsdp
  gathers = weights * shared / bandwidth(layout.fsdp, layout.tensor) + config.n_layers * assumptions.latency * (layout.fsdp > 1)
  reduced = 2 * (layout.tensor - 1) / layout.tensor * local * config.d_model * itemsize(config.dtype)
  tensor = 2 * config.n_layers * (reduced / bandwidth(layout.tensor, 1) + assumptions.latency * (layout.tensor > 1))
  seconds = max(memory, compute) + gathers + tensor
  parts = {'memory': memory, 'compute': compute, 'weight gathers': gathers, 'tensor collectives': tensor}
  flops = 2 * sum(matmul_weights(config)) + attention / 2
  mfu = flops * streams / seconds / (topology.n_chips * chip.flops)
  return Speed(seconds, requests.n / seconds, mfu, parts, max(parts, key=lambda name: parts[name]))
