"""The Chameleon transformer: tokens in, logits out, whatever the tokens mean (arXiv 2405.09818, section 2.3).

Parameter tree (L leading when `scan_layers`, else `layers_0` .. in place of `layers`):

  embedding [V, D]
  layers    attention     q_proj [D, N, H]  k_proj, v_proj [D, K, H]  o_proj [N, H, D]
                          q_norm {weight, bias} [N, H]   k_norm {weight, bias} [K, H]
            feed_forward  gate_proj, up_proj [D, F]  down_proj [F, D]
            attention_norm, ffn_norm {weight} [D]
  final_norm {weight} [D]
  lm_head   [D, V]

A second collection, 'lora', may hold adapters of any of the projections and of lm_head, under the same paths (`linear.linear`).

Does not know: the vocabulary, pictures, sampling or the loss.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from chameleon_jax.array_types import Activations, Array, Logits, Params, Positions, PyTree, SegmentIds, Tokens
from chameleon_jax.config import TransformerConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer import rope
from chameleon_jax.models.transformer.blockwise import CONTEXT
from chameleon_jax.models.transformer.cache import KVCache
from chameleon_jax.models.transformer.gpu_attention import is_cudnn_forward
from chameleon_jax.models.transformer.layers import Layer, RMSNorm, adapter_of, add_kernel, between_blocks, inside_block
from chameleon_jax.models.transformer.linear import PROJECTION, linear
from chameleon_jax.models.transformer.quantization import QuantizedKernel, contracted_axes, dequantize, is_quantized, look_up, quantize
from chameleon_jax.partitioning import constrain


class Transformer(nn.Module):
  """Decoder with rotary positions, QK-norm and pre- or post-norm blocks.

  `init` with any [1, 1] tokens gives the boxed parameters; `nn.meta.unbox` strips the boxes.
  """

  config: TransformerConfig

  def setup(self):
    config = self.config
    init = nn.initializers.normal(config.init_std)
    width, size = config.d_model, config.vocab_size
    self.embedding = add_kernel(self, 'embedding', (size, width), ('vocab_in', 'embed_in'), init=init, dtype=config.param_dtype)
    if config.scan_layers:
      self.layers = nn.scan(
          _rematerialised(config),
          variable_axes={'params': 0, 'lora': 0},
          split_rngs={'params': True, 'dropout': True},
          in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
          out_axes=0,
          length=config.n_layers,
          metadata_params={nn.PARTITION_NAME: 'layers'},
      )(config)
    else:
      self.layers = [_rematerialised(config)(config) for _ in range(config.n_layers)]
    self.final_norm = RMSNorm(config)
    self.lm_head = add_kernel(self, 'lm_head', (width, size), ('embed', 'vocab_out'), init=init, dtype=config.param_dtype)

  def __call__(
      self,
      tokens: Tokens,
      *,
      positions: Positions | None = None,
      segment_ids: SegmentIds | None = None,
      cache: KVCache | None = None,
      deterministic: bool = True,
  ) -> tuple[Logits, KVCache | None]:
    """Returns (float32 logits [B, T, V], updated cache); the arguments are those of `hidden`."""
    hidden, cache, _ = self.hidden(tokens, positions=positions, segment_ids=segment_ids, cache=cache, deterministic=deterministic)
    return self.unembed(hidden), cache

  def hidden(
      self,
      tokens: Tokens,
      *,
      positions: Positions | None = None,
      segment_ids: SegmentIds | None = None,
      cache: KVCache | None = None,
      deterministic: bool = True,
  ) -> tuple[Activations, KVCache | None, dict[str, Array]]:
    """Runs everything but the vocabulary projection.

    Args:
      tokens: [B, T] ids below `vocab_size`; an id outside gives NaN.
      positions: [B, T] place of each token in its document; 0 .. T-1 unless given.
      segment_ids: [B, T] documents of a packed row, 0 = padding; one document a row unless given. Attention is
        causal in the order of the row, inside a segment.
      cache: keys and values of earlier tokens; the new ones are written at `positions`, and each query sees the
        slots up to its own position. Not together with `segment_ids`.
      deterministic: False switches dropout on (rng 'dropout').

    Returns:
      Normed hidden states [B, T, D] in `config.dtype`, the updated cache (None without one), and float32
      diagnostics per layer [L]: `output_rms` of the residual stream behind it, and `attention_logit_bound`,
      max|q| max|k| / sqrt(H), which no attention logit exceeds.

    Raises:
      ConfigError: the row is longer than `max_seq_len`, or both a cache and segments are given.
    """
    config = self.config
    batch, length = tokens.shape
    if length > config.max_seq_len:
      raise ConfigError(f'a row of {length} tokens does not fit max_seq_len {config.max_seq_len}; shorten it or raise model.max_seq_len')
    if cache is not None and segment_ids is not None:
      raise ConfigError('a cache holds one document a row; call the transformer with cache or with segment_ids, not both')
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    turn = rope.rotation(positions, config.d_head, config.rope_theta)

    table = self.embedding
    rows = look_up(table, tokens) if isinstance(table, QuantizedKernel) else jnp.take(table, tokens, axis=0)
    x = rows.astype(config.dtype)
    x = between_blocks(x, config)
    if config.scan_layers:
      stacked = None if cache is None else (cache.k, cache.v)
      x, (stacked, diagnostics) = self.layers(x, stacked, turn, positions, segment_ids, deterministic)
      cache = None if stacked is None else KVCache(*stacked)
    else:
      outputs = []
      for index, layer in enumerate(self.layers):
        layer_cache = None if cache is None else cache.layer(index)
        x, output = layer(x, layer_cache, turn, positions, segment_ids, deterministic)
        outputs.append(output)
      caches, per_layer = zip(*outputs)
      cache = None if cache is None else KVCache(*zip(*caches))
      diagnostics = jax.tree.map(lambda *values: jnp.stack(values), *per_layer)
    return inside_block(self.final_norm(x), config), cache, diagnostics

  def unembed(self, hidden: Activations) -> Logits:
    """Projects hidden states [B, T, D] (or any piece of the rows) to float32 logits [B, T, V]."""
    logits = linear(hidden, self.lm_head, 1, self.config.dtype, out_dtype='float32', adapter=adapter_of(self, 'lm_head'))
    return constrain(logits, 'batch', 'length', 'act_vocab')


def _rematerialised(config: TransformerConfig) -> type[nn.Module]:
  """Layer class whose backward pass recomputes all ('full'), all but projections and attention ('dots'), or nothing ('none')."""
  policies = jax.checkpoint_policies
  if config.remat == 'none':
    return Layer
  kept = policies.save_from_both_policies(policies.save_only_these_names(PROJECTION, CONTEXT), is_cudnn_forward)
  policy = kept if config.remat == 'dots' else policies.nothing_saveable
  return nn.remat(Layer, policy=policy, prevent_cse=not config.scan_layers, static_argnums=(6,))


def unstack_layers(params: Params) -> Params:
  """Tree of scanned layers -> tree of `layers_0` .. `layers_{L-1}`, the form of `scan_layers=False`."""
  stacked = params['layers']
  n_layers = jax.tree.leaves(stacked)[0].shape[0]
  rest = {name: value for name, value in params.items() if name != 'layers'}
  return rest | {f'layers_{index}': jax.tree.map(lambda leaf, index=index: leaf[index], stacked) for index in range(n_layers)}


def decoding_params(params: Params, config: TransformerConfig) -> Params:
  """Parameters on the device, one array per layer; what `linear` would cast at every token is cast once.

  `config.scan_layers` says how `params` are stacked. Arrays that are already so are shared, not copied; quantized ones stay so.
  """

  def cast(path: Any, leaf: Any) -> Any:
    if is_quantized(leaf):
      return jax.tree.map(jnp.asarray, leaf)
    return jnp.asarray(leaf, None if contracted_axes(path[-1].key) is None else config.dtype)

  return jax.tree_util.tree_map_with_path(cast, unstack_layers(params) if config.scan_layers else params, is_leaf=is_quantized)


def quantize_params(params: Params, config: TransformerConfig) -> Params:
  """Parameters for sampling with the projections, lm_head and embedding in int8 (`quantization`), one array per layer, where they lie.

  `config.scan_layers` says how `params` are stacked. For weights that lie on a mesh load them with `quantization='int8'` instead.
  """

  def quantized(path: Any, leaf: Any) -> Any:
    axes = contracted_axes(path[-1].key)
    return leaf if axes is None or is_quantized(leaf) else quantize(leaf, axes)

  return jax.tree_util.tree_map_with_path(quantized, unstack_layers(params) if config.scan_layers else params, is_leaf=is_quantized)


def dequantize_params(params: Params) -> Params:
  """The float32 weights that quantized ones stand for, on the host."""

  def weights(path: Any, leaf: Any) -> Any:
    axes = contracted_axes(path[-1].key)
    return dequantize(leaf, axes) if is_quantized(leaf) and axes is not None else leaf

  return jax.tree_util.tree_map_with_path(weights, params, is_leaf=is_quantized)


def stack_layers(params: Params) -> Params:
  """Inverse of `unstack_layers`."""
  names = [name for name in params if name.startswith('layers_')]
  layers: list[PyTree] = [params[f'layers_{index}'] for index in range(len(names))]
  rest = {name: value for name, value in params.items() if name not in names}
  return rest | {'layers': jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
