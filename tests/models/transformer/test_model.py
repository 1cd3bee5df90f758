"""The transformer against an independent float64 implementation written from spec model.md 1.3, and its invariants."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from chameleon_jax import partitioning, presets
from chameleon_jax.config import MeshConfig, TransformerConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer.cache import init_cache
from chameleon_jax.models.transformer.model import Transformer, stack_layers, unstack_layers

TINY = TransformerConfig(
    vocab_size=48, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_head=8, d_ff=40, max_seq_len=160, init_std=0.2, rope_theta=100.0
)


@functools.cache
def initialise(config: TransformerConfig):
  """Parameters with norm weights and biases moved off their start, so that a forgotten one shows."""
  init = jax.jit(lambda key: nn.meta.unbox(Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))['params']))
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda leaf: leaf + 0.15 * rng.standard_normal(leaf.shape).astype(np.float32), init(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, **inputs):
  return Transformer(config).apply({'params': params}, tokens, **inputs)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(config, params, tokens):
  def loss(params):
    logits, _ = Transformer(config).apply({'params': params}, tokens)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0])

  return jax.value_and_grad(loss)(params)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, TINY.vocab_size, shape).astype(np.int32)


def relative_error(ours, theirs) -> float:
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def as_stored_in_int8(x):
  """Keys or values [H] as they come back from a cache in int8."""
  step = np.abs(x).max() / 127
  return np.rint(x / step) * step


def reference_logits(config: TransformerConfig, params, tokens, positions, *, stored=lambda x: x) -> np.ndarray:
  """One row [T], one document, in float64, head by head and query by query; `stored` is what attention sees of a key or value [H]."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  half = config.d_head // 2

  def rms(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weight

  def head_norm(x, norm, head):
    if norm is None:
      return x
    return (x - x.mean()) / np.sqrt(x.var() + config.qk_norm_eps) * norm['weight'][head] + norm['bias'][head]

  def turn(x, position):
    y = np.zeros_like(x)
    for i in range(half):
      angle = position * config.rope_theta ** (-2 * i / config.d_head)
      y[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
      y[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return y

  def attention(y, layer):
    out = np.zeros_like(y)
    for head in range(config.n_heads):
      kv = head // (config.n_heads // config.n_kv_heads)
      q = [turn(head_norm(row @ layer['q_proj'][:, head], layer.get('q_norm'), head), at) for row, at in zip(y, positions)]
      k = [stored(turn(head_norm(row @ layer['k_proj'][:, kv], layer.get('k_norm'), kv), at)) for row, at in zip(y, positions)]
      v = [stored(row @ layer['v_proj'][:, kv]) for row in y]
      for t in range(len(y)):
        score = np.array([q[t] @ k[s] / np.sqrt(config.d_head) for s in range(t + 1)])
        weight = np.exp(score - score.max())
        out[t] += sum(w * x for w, x in zip(weight / weight.sum(), v)) @ layer['o_proj'][head]
    return out

  def feed_forward(y, layer):
    gate = y @ layer['gate_proj']
    return (gate / (1 + np.exp(-gate)) * (y @ layer['up_proj'])) @ layer['down_proj']

  x = p['embedding'][tokens]
  for index in range(config.n_layers):
    layer = jax.tree.map(lambda leaf, index=index: leaf[index], p['layers'])
    norm_a, norm_f = layer['attention_norm']['weight'], layer['ffn_norm']['weight']
    if config.norm_position == 'pre':
      x = x + attention(rms(x, norm_a), layer['attention'])
      x = x + feed_forward(rms(x, norm_f), layer['feed_forward'])
    else:
      x = x + rms(attention(x, layer['attention']), norm_a)
      x = x + rms(feed_forward(x, layer['feed_forward']), norm_f)
  return rms(x, p['final_norm']['weight']) @ p['lm_head']


@pytest.mark.parametrize(
    'changes',
    [{}, {'norm_position': 'post'}, {'n_kv_heads': 4}, {'n_kv_heads': 1, 'qk_norm': False, 'norm_position': 'post'}],
    ids=['pre', 'post', 'one_head_per_group', 'no_qk_norm'],
)
def test_logits_equal_the_float64_reference(changes):
  config = dataclasses.replace(TINY, **changes)
  params, tokens = initialise(config), random_tokens(2, 9)
  positions = np.stack([np.arange(9), np.arange(9) + 5]).astype(np.int32)
  logits, cache = forward(config, params, tokens, positions=positions)
  assert cache is None and logits.dtype == jnp.float32 and logits.shape == (2, 9, config.vocab_size)
  for row in range(2):
    expected = reference_logits(config, params, tokens[row], positions[row])
    assert np.abs(expected).max() > 1
    assert relative_error(logits[row], expected) < 2e-5


def test_bfloat16_is_near_the_float64_reference():
  params, tokens = initialise(TINY), random_tokens(1, 9)
  logits, _ = forward(dataclasses.replace(TINY, dtype='bfloat16'), params, tokens)
  expected = reference_logits(TINY, params, tokens[0], np.arange(9))
  assert logits.dtype == jnp.float32
  assert np.sqrt(np.mean((np.asarray(logits[0]) - expected) ** 2) / np.mean(expected**2)) < 0.03


def test_packed_documents_do_not_see_each_other():
  """Row `a a a b b b b c . .` gives the logits that a, b and c give on their own."""
  params = initialise(TINY)
  documents = [random_tokens(n, seed=n) for n in (3, 4, 1)]
  padding = np.zeros(2, np.int32)
  row = np.concatenate([*documents, padding])[None]
  segments = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0]], np.int32)
  positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 0, 1]], np.int32)
  packed, _ = forward(TINY, params, row, segment_ids=segments, positions=positions)
  assert np.isfinite(packed).all()
  start = 0
  for document in documents:
    alone, _ = forward(TINY, params, document[None])
    assert relative_error(packed[0, start : start + len(document)], alone[0]) < 1e-5
    start += len(document)


def test_a_token_does_not_see_what_follows():
  params, tokens = initialise(TINY), random_tokens(1, 8)
  changed = tokens.copy()
  changed[0, 5] = (changed[0, 5] + 1) % TINY.vocab_size
  before, after = forward(TINY, params, tokens)[0], forward(TINY, params, changed)[0]
  np.testing.assert_array_equal(before[0, :5], after[0, :5])
  assert np.abs(np.asarray(before - after))[0, 5:].max(axis=-1).min() > 1e-3


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('norm_position', ['pre', 'post'])
def test_cached_decoding_equals_the_full_forward_for_ragged_rows(scan_layers, norm_position):
  """Prompts of 5 and 2 tokens, prefilled in rows of 5, then four steps at positions of their own."""
  config = dataclasses.replace(TINY, norm_position=norm_position)
  params, tokens = initialise(config), random_tokens(2, 9)
  full, _ = forward(config, params, tokens)
  lengths = np.array([5, 2])
  if not scan_layers:
    config, params = dataclasses.replace(config, scan_layers=False), unstack_layers(params)
  cache = init_cache(config, 2, 12)
  assert (cache.n_slots, cache.batch_size) == (12, 2)
  logits, cache = forward(config, params, np.where(np.arange(5) < lengths[:, None], tokens[:, :5], 7), cache=cache)
  for row, length in enumerate(lengths):
    assert relative_error(logits[row, :length], full[row, :length]) < 1e-5
  for step in range(4):
    at = lengths + step
    logits, cache = forward(config, params, tokens[[0, 1], at][:, None], positions=at[:, None].astype(np.int32), cache=cache)
    for row in range(2):
      assert relative_error(logits[row, 0], full[row, at[row]]) < 1e-5


@pytest.mark.parametrize('scan_layers', [True, False])
def test_decoding_with_an_int8_cache_equals_the_reference_with_rounded_keys_and_values(scan_layers):
  """Prompts of 5 and 2 tokens, prefilled in rows of 5, then four steps; the reference sees whole rows, without a cache."""
  params, tokens, lengths = initialise(TINY), random_tokens(2, 9), np.array([5, 2])
  expected, unrounded = (
    [reference_logits(TINY, params, row, np.arange(9), stored=stored) for row in tokens] for stored in (as_stored_in_int8, lambda x: x)
  )
  config = dataclasses.replace(TINY, scan_layers=scan_layers)
  params = params if scan_layers else unstack_layers(params)
  cache = init_cache(config, 2, 12, 'int8')
  logits, cache = forward(config, params, np.where(np.arange(5) < lengths[:, None], tokens[:, :5], 7), cache=cache)
  seen = [list(logits[row, :length]) for row, length in enumerate(lengths)]
  for step in range(4):
    at = lengths + step
    logits, cache = forward(config, params, tokens[[0, 1], at][:, None], positions=at[:, None].astype(np.int32), cache=cache)
    for row in range(2):
      seen[row].append(logits[row, 0])
  assert {leaf.dtype.name for leaf in jax.tree.leaves(cache)} == {'int8', 'float32'}
  for row in range(2):
    n = lengths[row] + 4
    assert relative_error(seen[row], expected[row][:n]) < 1e-3  # room for a value of the 864 that float32 rounds to the step beside
    assert 5e-3 < relative_error(seen[row], unrounded[row][:n]) < 0.05


def test_hidden_and_unembed_make_the_logits_and_report_each_layer():
  params, tokens = initialise(TINY), random_tokens(2, 7)
  model = Transformer(TINY)
  hidden, cache, diagnostics = jax.jit(lambda p: model.apply({'params': p}, tokens, method='hidden'))(params)
  assert cache is None and hidden.shape == (2, 7, 32)
  piece = model.apply({'params': params}, hidden[:, 2:4], method='unembed')
  np.testing.assert_allclose(piece, forward(TINY, params, tokens)[0][:, 2:4], rtol=1e-5, atol=1e-4)
  assert set(diagnostics) == {'output_rms', 'attention_logit_bound'}
  assert all(value.shape == (3,) and value.dtype == jnp.float32 and (np.asarray(value) > 0).all() for value in diagnostics.values())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_scanned_and_unrolled_layers_are_the_same_network(dtype):
  scanned = dataclasses.replace(TINY, dtype=dtype)
  unrolled = dataclasses.replace(scanned, scan_layers=False)
  params, tokens = initialise(TINY), random_tokens(2, 8)
  loss, gradients = loss_and_gradients(scanned, params, tokens)
  loss_unrolled, gradients_unrolled = loss_and_gradients(unrolled, unstack_layers(params), tokens)
  tolerance = 1e-5 if dtype == 'float32' else 0.03
  assert abs(loss - loss_unrolled) < tolerance
  together = jax.tree.map(lambda a, b: relative_error(a, b), stack_layers(gradients_unrolled), gradients)
  assert max(jax.tree.leaves(together)) < 3 * tolerance


def test_unstack_and_stack_are_inverse_and_match_the_unrolled_tree():
  params = initialise(TINY)
  unrolled = unstack_layers(params)
  expected = jax.eval_shape(Transformer(dataclasses.replace(TINY, scan_layers=False)).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  shapes = jax.tree.map(jnp.shape, nn.meta.unbox(expected['params']))
  assert jax.tree.map(jnp.shape, unrolled) == shapes
  assert set(unrolled) == {'embedding', 'final_norm', 'lm_head', 'layers_0', 'layers_1', 'layers_2'}
  jax.tree.map(np.testing.assert_array_equal, stack_layers(unrolled), params)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rematerialisation_changes_no_gradient(dtype):
  base = dataclasses.replace(TINY, dtype=dtype)
  params, tokens = initialise(TINY), random_tokens(2, 8)
  loss, gradients = loss_and_gradients(base, params, tokens)
  for remat in ('dots', 'full'):
    other_loss, other = loss_and_gradients(dataclasses.replace(base, remat=remat), params, tokens)
    tolerance = 1e-5 if dtype == 'float32' else 0.02  # roundings to bfloat16 may fall elsewhere
    assert abs(loss - other_loss) < tolerance
    assert max(jax.tree.leaves(jax.tree.map(relative_error, other, gradients))) < tolerance


def test_rematerialisation_keeps_what_it_says():
  """Numbers that the forward pass leaves for the backward pass: everything > projections and attention > the layer's input."""
  params, tokens = initialise(TINY), random_tokens(1, 96)

  def kept(remat: str) -> int:
    config = dataclasses.replace(TINY, remat=remat)
    pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: Transformer(config).apply({'params': p}, tokens)[0], p)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(pullback))

  none, dots, full = (kept(remat) for remat in ('none', 'dots', 'full'))
  assert none > 1.3 * dots and dots > 1.3 * full


def test_bfloat16_gradients_are_near_float32_gradients():
  params, tokens = initialise(TINY), random_tokens(4, 16)
  _, exact = loss_and_gradients(TINY, params, tokens)
  _, mixed = loss_and_gradients(dataclasses.replace(TINY, dtype='bfloat16'), params, tokens)

  def distance(a, b):
    assert a.dtype == jnp.float32
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

  assert max(jax.tree.leaves(jax.tree.map(distance, mixed, exact))) < 0.1


def test_dropout_is_off_by_default_and_random_per_key_and_layer():
  config = dataclasses.replace(TINY, dropout=0.5)
  params, tokens = initialise(TINY), random_tokens(2, 8)
  plain, _ = forward(config, params, tokens)
  np.testing.assert_array_equal(plain, forward(TINY, params, tokens)[0])

  @jax.jit
  def dropped(key):
    return Transformer(config).apply({'params': params}, tokens, deterministic=False, rngs={'dropout': key})[0]

  first = dropped(jax.random.key(0))
  np.testing.assert_array_equal(first, dropped(jax.random.key(0)))
  assert relative_error(first, plain) > 0.05 and relative_error(dropped(jax.random.key(1)), first) > 0.05


@pytest.mark.parametrize('scan_layers', [True, False])
def test_every_parameter_carries_axis_names_of_the_rules(scan_layers):
  config = dataclasses.replace(TINY, scan_layers=scan_layers)
  boxed = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  known = {name for name, _ in partitioning.RULES}
  leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert len(leaves) == (16 if scan_layers else 3 + 3 * 13)
  for path, leaf in leaves:
    assert isinstance(leaf, nn.LogicallyPartitioned), jax.tree_util.keystr(path)
    assert len(leaf.names) == leaf.value.ndim and set(leaf.names) <= known, (jax.tree_util.keystr(path), leaf.names)


@pytest.mark.parametrize(
    'config, count', [(presets.chameleon_7b(), 7_013_666_816), (presets.chameleon_34b(), 34_294_308_864)], ids=['7b', '34b']
)
def test_preset_has_exactly_the_published_parameters(config, count):
  """Spec model.md 1.1, column "norms expanded per head"."""
  tree = jax.eval_shape(Transformer(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count


def test_start_loss_is_the_logarithm_of_the_vocabulary():
  config = dataclasses.replace(TINY, init_std=0.02)
  init = jax.jit(lambda key: nn.meta.unbox(Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))['params']))
  params = init(jax.random.key(0))
  loss, _ = loss_and_gradients(config, params, random_tokens(4, 16))
  assert abs(loss - np.log(config.vocab_size)) < 0.1


@pytest.mark.parametrize('sizes', [(1, 8, 1), (2, 2, 2)], ids=str)
def test_sharded_training_has_the_same_loss_and_gradients(sizes):
  """Rows of 80 tokens: more than one block of attention, and not a whole number of them."""
  config = dataclasses.replace(TINY, d_ff=64)
  params, tokens = initialise(config), random_tokens(8, 80)
  loss, gradients = loss_and_gradients(config, params, tokens)
  mesh = partitioning.make_mesh(MeshConfig(*sizes), jax.devices()[:8])
  boxed = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  shardings = partitioning.shardings_of(boxed, mesh)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, shardings)
    rows = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))
    sharded_loss, sharded = loss_and_gradients(config, placed, rows)
    sharded_loss = float(sharded_loss)
  assert abs(sharded_loss - loss) < 1e-5
  assert max(jax.tree.leaves(jax.tree.map(relative_error, sharded, gradients))) < 1e-4


def test_bfloat16_trains_sharded():
  config = dataclasses.replace(TINY, d_ff=64, dtype='bfloat16')
  params, tokens = initialise(config), random_tokens(8, 16)
  loss, _ = loss_and_gradients(config, params, tokens)
  mesh = partitioning.make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
  boxed = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  with jax.set_mesh(mesh):
    sharded_loss, _ = loss_and_gradients(config, jax.device_put(params, partitioning.shardings_of(boxed, mesh)), tokens)
    assert abs(float(sharded_loss) - loss) < 0.02


def test_row_longer_than_the_context_is_refused():
  with pytest.raises(ConfigError, match='a row of 161 tokens does not fit max_seq_len 160'):
    Transformer(TINY).apply({'params': initialise(TINY)}, random_tokens(1, 161))


def test_cache_and_segments_together_are_refused():
  with pytest.raises(ConfigError, match='not both'):
    Transformer(TINY).apply(
        {'params': initialise(TINY)}, random_tokens(1, 4), segment_ids=np.ones((1, 4), np.int32), cache=init_cache(TINY, 1, 8)
    )
