"""Names and layouts of the released checkpoints against ours: one rule per tensor (spec model.md 1.4, 1.5, 2.3, 2.4, 3.2, 4.6).

Three things differ beside the names. Matrices are [out, in] there and [in, out] here, with heads an axis of their own. Meta turns the
channel pairs (2i, 2i + 1) in its rotary embedding, we turn (i, i + H/2) as Hugging Face does; so the channels of q, k and their norms
move inside each head, v and o stay. Meta keeps one q/k norm per model-parallel rank, the port one per head, as we do.

    channel of a head, H = 6    Meta   0 1 2 3 4 5     pairs (0 1) (2 3) (4 5)
                                ours   0 2 4 1 3 5     pairs (0 . . 1) ...: place j holds Meta's 2j, place j + 3 its 2j + 1

Knows no files: how tensors are split over ranks or shards is the business of the readers, `Rule.axis` tells them along which axis.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.array_types import PyTree
from chameleon_jax.config import TransformerConfig, VQGANConfig
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.models.vqgan.model import VQGAN

Change = Callable[[np.ndarray, TransformerConfig], np.ndarray]
_LAYER = '{layer}'
_BLOCK = 1 << 10  # rows and columns copied together in a transposition


@dataclass(frozen=True)
class Rule:
  """One tensor, here and there.

  Attributes:
    ours: path in the parameter tree; '{layer}' stands for the number of a layer.
    theirs: name in the checkpoint, with the same '{layer}'.
    axis: along which Meta splits the full tensor over its ranks; None: every rank has the same; 'rank': each its own, never merged.
    to_ours: full tensor of theirs -> ours. 'rank': the ranks' tensors stacked [R, H] -> [heads, H].
    to_theirs: ours -> full tensor of theirs. 'rank': [heads, H] -> [heads, H] in their order of channels; one head stands for its rank.
    shape: shape of the full tensor of theirs; 'rank': of one rank.
  """

  ours: str
  theirs: str
  axis: int | None | Literal['rank']
  to_ours: Change
  to_theirs: Change
  shape: Callable[[TransformerConfig], tuple[int, ...]]


# ---------------------------------------------------------------------------------------------- our names


@functools.lru_cache(maxsize=16)
def _transformer_shapes(config: TransformerConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
  one = replace(config, n_layers=1, scan_layers=False, remat='none')
  found = _shapes(jax.eval_shape(Transformer(one).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))['params'])
  layer = {name.removeprefix('layers_0/'): shape for name, shape in found.items() if name.startswith('layers_0/')}
  rest = {name: shape for name, shape in found.items() if not name.startswith('layers_0/')}
  first, last = ('embedding',), ('final_norm/weight', 'lm_head')
  if set(rest) != {*first, *last}:
    raise AssertionError(f'the transformer has parameters {sorted(rest)} outside its layers, which have no rule here')
  names = [(name, rest[name]) for name in first]
  names += [(f'layers_{index}/{name}', shape) for index in range(config.n_layers) for name, shape in layer.items()]
  return (*names, *((name, rest[name]) for name in last))


def transformer_specs(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
  """Name -> shape of every parameter with unrolled layers, in reading order: embedding, layers_0 .., final_norm, lm_head."""
  return dict(_transformer_shapes(config))


@functools.lru_cache(maxsize=16)
def _vqgan_shapes(config: VQGANConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
  config = replace(config, resolution=config.downsampling)  # no parameter depends on it
  pixels = jax.ShapeDtypeStruct((1, config.resolution, config.resolution, 3), jnp.float32)
  return tuple(_shapes(jax.eval_shape(VQGAN(config).init, jax.random.key(0), pixels)['params']).items())


def vqgan_specs(config: VQGANConfig, *, decoder: bool = True) -> dict[str, tuple[int, ...]]:
  """Name -> shape of every parameter of the image tokenizer; `decoder` False leaves out what lies under `decoder/`."""
  return {name: shape for name, shape in _vqgan_shapes(config) if decoder or not name.startswith('decoder/')}


def _shapes(boxed: PyTree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed))
  return {'/'.join(part.key for part in path): tuple(leaf.shape) for path, leaf in leaves}


# ------------------------------------------------------------------------------------------------ layouts


def transposed(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
  """`array.transpose(axes)` as a new contiguous array.

  Types numpy does not know by itself, such as bfloat16, are moved as integers of their size, and large arrays in blocks of
  rows: both are many times faster on the matrices of a large model.
  """
  view = array.view(f'u{array.itemsize}').transpose(axes)
  out = np.empty(view.shape, view.dtype)
  if view.ndim < 2:
    np.copyto(out, view)
    return out.view(array.dtype)
  for row in range(0, view.shape[0], _BLOCK):
    for column in range(0, view.shape[-1], _BLOCK):
      block = (slice(row, row + _BLOCK), ..., slice(column, column + _BLOCK))
      out[block] = view[block]
  return out.view(array.dtype)


def _as_is(array: np.ndarray, _: TransformerConfig) -> np.ndarray:
  return array


def _matrix(array: np.ndarray, _: TransformerConfig) -> np.ndarray:
  """[out, in] <-> [in, out]."""
  return transposed(array, (1, 0))


def _heads_in(array: np.ndarray, config: TransformerConfig) -> np.ndarray:
  """[N H, D] -> [D, N, H]."""
  return transposed(array, (1, 0)).reshape(array.shape[1], -1, config.d_head)


def _heads_out(array: np.ndarray, _: TransformerConfig) -> np.ndarray:
  """[D, N, H] -> [N H, D]."""
  return transposed(array.reshape(array.shape[0], -1), (1, 0))


def _pairs_in(array: np.ndarray, config: TransformerConfig) -> np.ndarray:
  """[N H, D] with interleaved pairs -> [D, N, H] with split halves."""
  pairs = array.reshape(-1, config.d_head // 2, 2, array.shape[1])
  return transposed(pairs, (3, 0, 2, 1)).reshape(array.shape[1], -1, config.d_head)


def _pairs_out(array: np.ndarray, config: TransformerConfig) -> np.ndarray:
  """[D, N, H] with split halves -> [N H, D] with interleaved pairs."""
  halves = array.reshape(array.shape[0], -1, 2, config.d_head // 2)
  return transposed(halves, (1, 3, 2, 0)).reshape(-1, array.shape[0])


def _output_in(array: np.ndarray, config: TransformerConfig) -> np.ndarray:
  """[D, N H] -> [N, H, D]."""
  return transposed(array, (1, 0)).reshape(-1, config.d_head, array.shape[0])


def _output_out(array: np.ndarray, _: TransformerConfig) -> np.ndarray:
  """[N, H, D] -> [D, N H]."""
  return transposed(array.reshape(-1, array.shape[2]), (1, 0))


def _norm_in(heads: Callable[[TransformerConfig], int], *, interleaved: bool) -> Change:
  """[R, H] -> [heads, H]: group r serves `heads / R` neighbouring heads; R = heads leaves them as they are."""

  def change(array: np.ndarray, config: TransformerConfig) -> np.ndarray:
    if interleaved:
      array = transposed(array.reshape(len(array), -1, 2), (0, 2, 1)).reshape(array.shape)
    return array if len(array) == heads(config) else np.repeat(array, heads(config) // len(array), axis=0)

  return change


def _norm_out(array: np.ndarray, _: TransformerConfig) -> np.ndarray:
  """[heads, H] with split halves -> the same with interleaved pairs."""
  return transposed(array.reshape(len(array), 2, -1), (0, 2, 1)).reshape(array.shape)


# -------------------------------------------------------------------------------------------------- rules


def _q_heads(config: TransformerConfig) -> int:
  return config.n_heads


def _kv_heads(config: TransformerConfig) -> int:
  return config.n_kv_heads


def _rules(
    names: dict[str, tuple[str, int | None | Literal['rank']]], *, pairs: tuple[Change, Change], interleaved: bool
) -> tuple[Rule, ...]:
  """Rules from our name -> (their name, axis); `pairs` is the layout of q_proj and k_proj."""
  matrix = (_matrix, _matrix)
  layouts: dict[str, tuple[Change, Change, Callable[[TransformerConfig], tuple[int, ...]]]] = {
      'embedding': (_as_is, _as_is, lambda c: (c.vocab_size, c.d_model)),
      'q_proj': (*pairs, lambda c: (c.n_heads * c.d_head, c.d_model)),
      'k_proj': (*pairs, lambda c: (c.n_kv_heads * c.d_head, c.d_model)),
      'v_proj': (_heads_in, _heads_out, lambda c: (c.n_kv_heads * c.d_head, c.d_model)),
      'o_proj': (_output_in, _output_out, lambda c: (c.d_model, c.n_heads * c.d_head)),
      'gate_proj': (*matrix, lambda c: (c.d_ff, c.d_model)),
      'up_proj': (*matrix, lambda c: (c.d_ff, c.d_model)),
      'down_proj': (*matrix, lambda c: (c.d_model, c.d_ff)),
      'lm_head': (*matrix, lambda c: (c.vocab_size, c.d_model)),
  }
  rules = []
  for ours, (theirs, axis) in names.items():
    parent, _, leaf = ours.rpartition('/')
    if parent.endswith(('q_norm', 'k_norm')):
      heads = _q_heads if parent.endswith('q_norm') else _kv_heads
      norm_shape = (lambda c: (c.d_head,)) if interleaved else (lambda c, heads=heads: (heads(c), c.d_head))
      rules.append(Rule(ours, theirs, axis, _norm_in(heads, interleaved=interleaved), _norm_out if interleaved else _as_is, norm_shape))
    elif leaf == 'weight':
      rules.append(Rule(ours, theirs, axis, _as_is, _as_is, lambda c: (c.d_model,)))
    else:
      rules.append(Rule(ours, theirs, axis, *layouts[leaf]))
  return tuple(rules)


META_RULES: tuple[Rule, ...] = _rules(
    {
        'embedding': ('tok_embeddings.weight', 1),
        'layers_{layer}/attention_norm/weight': ('layers.{layer}.attention_norm.weight', None),
        'layers_{layer}/attention/q_proj': ('layers.{layer}.attention.wq.weight', 0),
        'layers_{layer}/attention/k_proj': ('layers.{layer}.attention.wk.weight', 0),
        'layers_{layer}/attention/v_proj': ('layers.{layer}.attention.wv.weight', 0),
        'layers_{layer}/attention/o_proj': ('layers.{layer}.attention.wo.weight', 1),
        'layers_{layer}/attention/q_norm/weight': ('layers.{layer}.attention.q_normalization.weight', 'rank'),
        'layers_{layer}/attention/q_norm/bias': ('layers.{layer}.attention.q_normalization.bias', 'rank'),
        'layers_{layer}/attention/k_norm/weight': ('layers.{layer}.attention.k_normalization.weight', 'rank'),
        'layers_{layer}/attention/k_norm/bias': ('layers.{layer}.attention.k_normalization.bias', 'rank'),
        'layers_{layer}/ffn_norm/weight': ('layers.{layer}.ffn_norm.weight', None),
        'layers_{layer}/feed_forward/gate_proj': ('layers.{layer}.feed_forward.w1.weight', 0),
        'layers_{layer}/feed_forward/up_proj': ('layers.{layer}.feed_forward.w3.weight', 0),
        'layers_{layer}/feed_forward/down_proj': ('layers.{layer}.feed_forward.w2.weight', 1),
        'final_norm/weight': ('norm.weight', None),
        'lm_head': ('output.weight', 0),
    },
    pairs=(_pairs_in, _pairs_out),
    interleaved=True,
)

HUGGINGFACE_RULES: tuple[Rule, ...] = _rules(
    {
        'embedding': ('model.embed_tokens.weight', None),
        'layers_{layer}/attention_norm/weight': ('model.layers.{layer}.input_layernorm.weight', None),
        'layers_{layer}/attention/q_proj': ('model.layers.{layer}.self_attn.q_proj.weight', None),
        'layers_{layer}/attention/k_proj': ('model.layers.{layer}.self_attn.k_proj.weight', None),
        'layers_{layer}/attention/v_proj': ('model.layers.{layer}.self_attn.v_proj.weight', None),
        'layers_{layer}/attention/o_proj': ('model.layers.{layer}.self_attn.o_proj.weight', None),
        'layers_{layer}/attention/q_norm/weight': ('model.layers.{layer}.self_attn.q_norm.weight', None),
        'layers_{layer}/attention/q_norm/bias': ('model.layers.{layer}.self_attn.q_norm.bias', None),
        'layers_{layer}/attention/k_norm/weight': ('model.layers.{layer}.self_attn.k_norm.weight', None),
        'layers_{layer}/attention/k_norm/bias': ('model.layers.{layer}.self_attn.k_norm.bias', None),
        'layers_{layer}/ffn_norm/weight': ('model.layers.{layer}.post_attention_layernorm.weight', None),
        'layers_{layer}/feed_forward/gate_proj': ('model.layers.{layer}.mlp.gate_proj.weight', None),
        'layers_{layer}/feed_forward/up_proj': ('model.layers.{layer}.mlp.up_proj.weight', None),
        'layers_{layer}/feed_forward/down_proj': ('model.layers.{layer}.mlp.down_proj.weight', None),
        'final_norm/weight': ('model.norm.weight', None),
        'lm_head': ('lm_head.weight', None),
    },
    pairs=(_heads_in, _heads_out),
    interleaved=False,
)


def rules_for(rules: Sequence[Rule], config: TransformerConfig) -> list[Rule]:
  """One rule per tensor of the network `config`, '{layer}' filled in, in reading order; without the norms if it has none.

  Every name of `transformer_specs` comes exactly once.
  """
  by_name = {rule.ours: rule for rule in expand(rules, config.n_layers)}
  return [by_name[name] for name in transformer_specs(config)]


def expand(rules: Sequence[Rule], n_layers: int) -> list[Rule]:
  """One rule per tensor of a network with q/k norms; asks nothing of the network, so sizes can be checked before it is built."""
  found = []
  for rule in rules:
    for layer in range(n_layers) if _LAYER in rule.ours else (0,):
      found.append(replace(rule, ours=rule.ours.replace(_LAYER, str(layer)), theirs=rule.theirs.replace(_LAYER, str(layer))))
  return found


# ------------------------------------------------------------------------------------------------- VQ-GAN


def vqgan_name(ours: str) -> str:
  """Their name of a parameter of the image tokenizer, which both families share; Hugging Face puts `model.vqmodel.` before it.

  'encoder/down_0/block_0/conv1/kernel' -> 'encoder.down.0.block.0.conv1.weight'; 'encoder/mid/block_1/norm1/scale' ->
  'encoder.mid.block_1.norm1.weight'; 'quantize/embedding' -> 'quantize.embedding.weight'.
  """
  name = re.sub(r'/(down|up)_(\d+)/', r'/\1.\2/', ours)
  name = re.sub(r'(\d)/block_(\d+)/', r'\1/block.\2/', name)
  name = re.sub(r'/(kernel|scale)$', '/weight', name).replace('/', '.')
  return f'{name}.weight' if name == 'quantize.embedding' else name


def vqgan_to_ours(ours: str, theirs: np.ndarray) -> np.ndarray:
  """Kernels [out, in, kh, kw] -> [kh, kw, in, out], all else as it is; `ours` is our name."""
  return transposed(theirs, (2, 3, 1, 0)) if ours.endswith('/kernel') else theirs


def vqgan_to_theirs(ours: str, ours_value: np.ndarray) -> np.ndarray:
  """Inverse of `vqgan_to_ours`."""
  return transposed(ours_value, (3, 2, 0, 1)) if ours.endswith('/kernel') else ours_value


def vqgan_their_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape on their side of a parameter that has `shape` here."""
  return (shape[3], shape[2], shape[0], shape[1]) if ours.endswith('/kernel') else shape
