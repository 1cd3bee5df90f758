"""The parts of one transformer layer, and the layer (spec model.md 1.3).

Every parameter is a full-rank array born with logical axis names (`partitioning.RULES` maps them to the mesh).
Norms run in float32; projections in the compute type through `linear`.

Does not know: how layers are stacked, embeddings, or the loss.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from chameleon_jax.array_types import Activations, Array, Positions, SegmentIds
from chameleon_jax.config import TransformerConfig
from chameleon_jax.models.transformer import attention, cache, rope
from chameleon_jax.models.transformer.linear import linear
from chameleon_jax.models.transformer.quantization import QuantizedKernel
from chameleon_jax.partitioning import RULES, constrain

Initializer = Callable[..., Array]


def add_parameter(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], *, init: Initializer, dtype: str) -> Array:
  """Declares a parameter of `module` with one logical axis name per dimension and returns its plain value."""
  value = add_kernel(module, name, shape, axes, init=init, dtype=dtype)
  assert not isinstance(value, QuantizedKernel), f'{name} is never quantized'
  return value


def add_kernel(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], *, init: Initializer, dtype: str
) -> Array | QuantizedKernel:
  """The same for a parameter that may have been quantized since."""
  value = module.param(name, nn.with_logical_partitioning(init, axes, rules=RULES), shape, jnp.dtype(dtype))
  return value if isinstance(value, QuantizedKernel) else jnp.asarray(value)


def between_blocks(x: Activations, config: TransformerConfig) -> Activations:
  """Constrains the residual stream: with `sequence_parallel` each device of the tensor axis keeps its piece of every row."""
  return constrain(x, 'batch', 'residual_length' if config.sequence_parallel else 'length', 'act_embed')


def out_of_block(x: Activations, config: TransformerConfig) -> Activations:
  """The sum over heads or inner channels arrives in pieces of the rows: a reduce-scatter in place of an all-reduce."""
  return between_blocks(x, config) if config.sequence_parallel else x


def inside_block(x: Activations, config: TransformerConfig) -> Activations:
  """Whole rows again in front of the projections, gathered once for all of them; nothing where they never were in pieces."""
  return constrain(x, 'batch', 'length', 'act_embed') if config.sequence_parallel else x


def adapter_of(module: nn.Module, name: str) -> Mapping[str, Array] | None:
  """The adapter of a projection of `module`, where the collection 'lora' was given and has one (`linear` says what it does)."""
  return module.get_variable('lora', name)


def _initializers(config: TransformerConfig) -> tuple[Initializer, Initializer]:
  """For projections from and to the residual stream; the latter smaller, so that 2 L branches do not widen it (GPT-2's rule)."""
  return nn.initializers.normal(config.init_std), nn.initializers.normal(config.init_std * (2 * config.n_layers) ** -0.5)


class RMSNorm(nn.Module):
  """y / sqrt(mean(y^2) + eps) * weight, float32 inside, one rounding to the compute type at the end."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Activations) -> Activations:
    config = self.config
    weight = add_parameter(self, 'weight', (config.d_model,), ('norm',), init=nn.initializers.ones_init(), dtype=config.param_dtype)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.norm_eps)
    return (x * weight.astype(jnp.float32)).astype(config.dtype)


class HeadNorm(nn.Module):
  """LayerNorm over the channels of each head, with a weight and a bias per head (QK-norm); float32 out.

  Meta shares one pair among the heads of a model-parallel rank; one pair per head holds every source exactly
  (spec model.md 1.4).
  """

  config: TransformerConfig
  n_heads: int
  head_axis: str

  @nn.compact
  def __call__(self, x: Float[Array, 'B T N H']) -> Float[Array, 'B T N H']:
    config, shape, axes = self.config, (self.n_heads, self.config.d_head), (self.head_axis, 'd_head')
    weight = add_parameter(self, 'weight', shape, axes, init=nn.initializers.ones_init(), dtype=config.param_dtype)
    bias = add_parameter(self, 'bias', shape, axes, init=nn.initializers.zeros_init(), dtype=config.param_dtype)
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.qk_norm_eps)
    return x * weight.astype(jnp.float32) + bias.astype(jnp.float32)


class Attention(nn.Module):
  """Grouped-query self-attention with QK-norm, then rotation (spec model.md 1.3)."""

  config: TransformerConfig

  @nn.compact
  def __call__(
      self, x: Activations, layer_cache: cache.LayerCache | None, turn: rope.Rotation, positions: Positions, segment_ids: SegmentIds | None
  ) -> tuple[Activations, cache.LayerCache | None, Float[Array, '']]:
    """Returns (branch [B, T, D], updated cache, bound on the largest attention logit)."""
    config = self.config
    n_heads, n_kv_heads, d_head, d_model = config.n_heads, config.n_kv_heads, config.d_head, config.d_model
    init, init_out = _initializers(config)

    def project(name: str, heads: int, axis: str) -> Array:
      kernel = add_kernel(self, name, (d_model, heads, d_head), ('embed', axis, 'd_head'), init=init, dtype=config.param_dtype)
      y = linear(x, kernel, 1, config.dtype, adapter=adapter_of(self, name))
      return constrain(y, 'batch', 'length', f'act_{axis}', 'd_head')

    q, k, v = project('q_proj', n_heads, 'heads'), project('k_proj', n_kv_heads, 'kv_heads'), project('v_proj', n_kv_heads, 'kv_heads')
    if config.qk_norm:
      q = HeadNorm(config, n_heads, 'heads', name='q_norm')(q)
      k = HeadNorm(config, n_kv_heads, 'kv_heads', name='k_norm')(k)
    q = rope.rotate(q.astype(jnp.float32), turn)
    k = rope.rotate(k.astype(jnp.float32), turn)
    bound = jnp.sqrt(jnp.max(jnp.sum(jnp.square(q), axis=-1)) * jnp.max(jnp.sum(jnp.square(k), axis=-1)) / d_head)

    if layer_cache is None:
      asked = 'auto' if self.is_initializing() else config.attention_implementation  # shapes are asked for on any machine
      context = attention.attend_rows(q, k, v, segment_ids=segment_ids, dtype=config.dtype, implementation=asked)
    else:
      layer_cache = cache.write(layer_cache, k, v, positions)
      context = attention.attend_cache(q, *layer_cache, positions=positions, dtype=config.dtype)
    context = constrain(context, 'batch', 'length', 'act_heads', 'd_head')
    shape, axes = (n_heads, d_head, d_model), ('heads', 'd_head', 'embed')
    o_proj = add_kernel(self, 'o_proj', shape, axes, init=init_out, dtype=config.param_dtype)
    branch = linear(context, o_proj, 2, config.dtype, adapter=adapter_of(self, 'o_proj'))
    return branch, layer_cache, jax.lax.stop_gradient(bound)


class FeedForward(nn.Module):
  """SwiGLU: down(silu(gate y) * up y)."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Activations) -> Activations:
    config = self.config
    init, init_out = _initializers(config)
    wide, narrow = (config.d_model, config.d_ff), (config.d_ff, config.d_model)
    gate_proj = add_kernel(self, 'gate_proj', wide, ('embed', 'mlp'), init=init, dtype=config.param_dtype)
    up_proj = add_kernel(self, 'up_proj', wide, ('embed', 'mlp'), init=init, dtype=config.param_dtype)
    down_proj = add_kernel(self, 'down_proj', narrow, ('mlp', 'embed'), init=init_out, dtype=config.param_dtype)
    gate = linear(x, gate_proj, 1, config.dtype, adapter=adapter_of(self, 'gate_proj'))
    up = linear(x, up_proj, 1, config.dtype, adapter=adapter_of(self, 'up_proj'))
    inner = constrain(jax.nn.silu(gate) * up, 'batch', 'length', 'act_mlp')
    return linear(inner, down_proj, 1, config.dtype, adapter=adapter_of(self, 'down_proj'))


class Layer(nn.Module):
  """One block, in the order of the 7B ('pre') or of the 34B ('post'):

    pre    h = x + drop(attention(norm(x)));  out = h + drop(feed_forward(norm(h)))
    post   h = x + drop(norm(attention(x)));  out = h + drop(norm(feed_forward(h)))
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
      self,
      x: Activations,
      layer_cache: cache.LayerCache | None,
      turn: rope.Rotation,
      positions: Positions,
      segment_ids: SegmentIds | None,
      deterministic: bool,
  ) -> tuple[Activations, tuple[cache.LayerCache | None, dict[str, Array]]]:
    """Returns (x, (cache, diagnostics)): the carry and the per-layer output of a scan over layers."""
    pre = self.config.norm_position == 'pre'
    attention_norm, ffn_norm = RMSNorm(self.config, name='attention_norm'), RMSNorm(self.config, name='ffn_norm')
    drop = nn.Dropout(self.config.dropout, deterministic=deterministic)
    x = out_of_block(x, self.config)  # rematerialisation keeps this input; unless told so, gathered where norms come behind the blocks

    branch, layer_cache, bound = Attention(self.config, name='attention')(
        inside_block(attention_norm(x) if pre else x, self.config), layer_cache, turn, positions, segment_ids
    )
    branch = out_of_block(branch, self.config)
    x = between_blocks(x + drop(branch if pre else attention_norm(branch)), self.config)
    branch = FeedForward(self.config, name='feed_forward')(inside_block(ffn_norm(x) if pre else x, self.config))
    branch = out_of_block(branch, self.config)
    x = between_blocks(x + drop(branch if pre else ffn_norm(branch)), self.config)

    rms = jnp.sqrt(jnp.mean(jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32))))
    return x, (layer_cache, {'output_rms': rms, 'attention_logit_bound': bound})
