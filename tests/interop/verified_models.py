"""Tiny checkpoints in memory for the tests of `verify`, and the faults that are put into them.

The reference has two layers, grouped heads, and norms of four model-parallel ranks that differ.
"""

import ml_dtypes
import numpy as np

from chameleon_jax import presets
from chameleon_jax.interop import mapping
from chameleon_jax.interop.lazy import LazyModel, TensorSource, TensorSpec
from chameleon_jax.interop.verify import faults as verify_faults

N_RANKS = 4
VOCABULARY = presets.tiny_vocabulary()
CONFIG = presets.tiny_transformer(vocab_size=VOCABULARY.size, n_heads=8, n_kv_heads=4)
VQGAN = presets.tiny_vqgan()
IMAGES = slice(4, 4 + VOCABULARY.n_codes)
QK = ('q_proj', 'k_proj')
NORMS = ('q_norm/weight', 'q_norm/bias', 'k_norm/weight', 'k_norm/bias')
SHARD_AXES = {  # of our layout, from spec model.md 2.3
    **dict.fromkeys(('embedding', 'lm_head', 'q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj'), 1),
    **dict.fromkeys(('o_proj', 'down_proj', *NORMS), 0),
}


def draw_transformer(config):
  """Name -> values; norms are equal on a rank, and no two ranks are alike."""
  rng = np.random.default_rng(0)
  values = {}
  for name, shape in mapping.transformer_specs(config).items():
    if name.endswith(NORMS):
      ranks = rng.normal(size=(N_RANKS, shape[1])) * 0.3 + name.endswith('weight')
      drawn = np.repeat(ranks, shape[0] // N_RANKS, axis=0)
    elif name.endswith('norm/weight'):
      drawn = 1 + 0.2 * rng.normal(size=shape)
    else:
      fan_in = int(np.prod(shape[:-1])) if name.endswith('o_proj') else 1 if name == 'embedding' else shape[0]
      drawn = rng.normal(size=shape) * fan_in**-0.5
    values[name] = drawn.astype(np.float32)
  return values


def draw_vqgan(config):
  """Random networks, and a codebook about as wide as the latents, so that many codes are in use."""
  rng = np.random.default_rng(1)
  values = {}
  for name, shape in mapping.vqgan_specs(config).items():
    fan_in = int(np.prod(shape[:-1])) if len(shape) == 4 else 4
    values[name] = ((name.endswith('scale')) + rng.normal(size=shape) * (0.1 if len(shape) == 1 else fan_in**-0.5)).astype(np.float32)
  return values | {'quantize/embedding': rng.normal(size=(config.n_codes, config.d_code)).astype(np.float32)}


def source_of(values):
  return TensorSource({name: TensorSpec(value.shape, value.dtype) for name, value in values.items()}, lambda name: values[name])


TRANSFORMER, IMAGE_TOKENIZER = draw_transformer(CONFIG), draw_vqgan(VQGAN)


def model(transformer=TRANSFORMER, vqgan=IMAGE_TOKENIZER, *, config=CONFIG, name='there', **fields):
  """A checkpoint in memory; None leaves a part out."""
  parts = {'vocabulary': VOCABULARY} | fields
  if transformer is not None:
    parts |= {'transformer_config': config, 'transformer': source_of(transformer)}
  if vqgan is not None:
    parts |= {'vqgan_config': VQGAN, 'vqgan': source_of(vqgan)}
  return LazyModel(path=name, format='orbax', **parts)


def changed(leaves, change, *, part=None):
  """The reference with `change` applied to every tensor whose name ends with one of the leaves."""
  values = TRANSFORMER if part is None else part
  found = {name: np.ascontiguousarray(change(value)) if name.endswith(leaves) else value for name, value in values.items()}
  assert any(found[name] is not values[name] for name in values)
  return found


def exchanged(one, two):
  """The reference with the tensors of two names swapped; '{layer}' stands for both layers."""
  found = dict(TRANSFORMER)
  for layer in ('layers_0', 'layers_1'):
    left, right = one.format(layer=layer), two.format(layer=layer)
    found[left], found[right] = TRANSFORMER[right], TRANSFORMER[left]
  return found


def row(report, name):
  found = [row for row in report.rows if row.name == name]
  assert len(found) == 1, [row.name for row in report.rows]
  return found[0]


def failing(report):
  return [row.name for row in report.rows if row.status == 'fail']


def faults(report):
  return [finding.fault for finding in report.findings]


def noise(x):
  return x + np.random.default_rng(3).normal(size=x.shape).astype(np.float32)


def in_order(*order):
  """Change that joins the ranks' shards in another order, by leaf."""

  def change(name, value):
    axis = next(axis for leaf, axis in SHARD_AXES.items() if name.endswith(leaf))
    shards = np.split(value, len(order), axis=axis)
    return np.ascontiguousarray(np.concatenate([shards[i] for i in order], axis=axis))

  return {name: change(name, value) if name.endswith(tuple(SHARD_AXES)) else value for name, value in TRANSFORMER.items()}


def one_rank(x):
  return np.repeat(x[:1], len(x), axis=0)


def average(x):
  return np.repeat(x.mean(axis=0, keepdims=True), len(x), axis=0)


def bf16(x):
  return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def rolled(x, by=4, axis=0):
  x = np.moveaxis(x.copy(), axis, 0)
  x[IMAGES] = np.roll(x[IMAGES], by, axis=0)
  return np.moveaxis(x, 0, axis)


def codes_for_tokens(x):
  """Rows of the image tokens looked up by code, not by token."""
  x = x.copy()
  x[IMAGES] = x[: VOCABULARY.n_codes].copy()
  return x


INJECTED = {
    'projections': (changed(QK, verify_faults.interleave), {'qk_not_permuted'}, ['attention/k_proj, attention/q_proj', 'is missing']),
    'projections permuted twice': (changed(QK, verify_faults.deinterleave), {'qk_not_permuted'}, ['twice']),
    'values permuted': (changed('v_proj', verify_faults.interleave), {'qk_not_permuted'}, ['v_proj', 'queries and keys alone']),
    'outputs permuted': (changed('o_proj', lambda x: verify_faults.interleave(x, 1)), {'qk_not_permuted'}, ['queries and keys alone']),
    'norms': (changed(NORMS, verify_faults.interleave), {'qk_norm_not_permuted'}, ['q_norm/weight', 'k_norm/bias', 'is missing']),
    'norms permuted twice': (changed(NORMS, verify_faults.deinterleave), {'qk_norm_not_permuted'}, ['twice']),
    'all of q and k': (
        changed(NORMS + QK, verify_faults.interleave),
        {'qk_not_permuted', 'qk_norm_not_permuted'},
        ['attention/q_proj', 'attention/q_norm/bias'],
    ),
    'averaged': (changed(NORMS, average), {'norms_averaged'}, ['ranks were averaged']),
    'averaged in bfloat16': (changed(NORMS, lambda x: bf16(average(bf16(x)))), {'norms_averaged'}, ['ranks were averaged']),
    'averaged, not permuted': (changed(NORMS, lambda x: average(verify_faults.interleave(x))), {'norms_averaged'}, ['interleaved order']),
    'one rank': (changed(NORMS, one_rank), {'norms_one_rank'}, ['head 0', 'one rank']),
    'one rank, not permuted': (changed(NORMS, lambda x: one_rank(verify_faults.interleave(x))), {'norms_one_rank'}, ['interleaved order']),
    'last rank': (changed(NORMS, lambda x: one_rank(x[::-1])), {'norms_one_rank'}, ['one rank']),
    'two of four ranks': (
        changed('q_norm/weight', lambda x: np.repeat(x[[0, 4]], 4, axis=0)),
        {'norms_one_rank'},
        ['one head in 4'],
    ),
    'two shards': (in_order(1, 0), {'shard_order'}, ['order 1, 0 along axis']),
    'four shards': (in_order(0, 2, 1, 3), {'shard_order'}, ['order 0, 2, 1, 3 along axis']),
    'four shards, last two': (in_order(0, 1, 3, 2), {'shard_order'}, ['order 0, 1, 3, 2 along axis']),
    'embedding rolled': (changed('embedding', rolled), {'code_offset'}, ['embedding', 'rows 4 to 35', 'offset by 4']),
    'head rolled': (changed('lm_head', lambda x: rolled(x, -1, axis=1)), {'code_offset'}, ['lm_head', 'offset by -1']),
    'tokens taken for codes': (changed('embedding', codes_for_tokens), {'code_offset'}, ['row i holds row i-4', 'offset by 4']),
    'gate and up': (
        exchanged('{layer}/feed_forward/gate_proj', '{layer}/feed_forward/up_proj'),
        {'gate_up_swapped'},
        ['gate_proj and up_proj of the feed-forward are swapped', '2 layers'],
    ),
    'the two norms': (
        exchanged('{layer}/attention_norm/weight', '{layer}/ffn_norm/weight'),
        {'norms_swapped'},
        ['attention_norm and ffn_norm'],
    ),
    'layers': (
        {
            name: TRANSFORMER[name.replace('layers_0', 'layers_x').replace('layers_1', 'layers_0').replace('layers_x', 'layers_1')]
            for name in TRANSFORMER
        },
        {'layer_order'},
        ['the values of layers_1', 'the values of layers_0'],
    ),
    'transposed': (changed('o_proj', lambda x: x.swapaxes(0, 1)), {'transposed'}, ['axes in the order 1, 0, 2']),
    'sorted': (changed('up_proj', lambda x: np.sort(x, axis=0)), {'other_order'}, ['same values in another order']),
}
