"""Adapters: added in or beside, the same network; their gradient, shapes and shardings; what a target must be."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import FineTuneConfig, MeshConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import make_mesh, shardings_of
from chameleon_jax.training import lora

CONFIG = FineTuneConfig(method='lora', lora_rank=3, lora_alpha=6.0, lora_targets=lora.TARGETS)
TOKENS = np.random.default_rng(0).integers(0, 128, (2, 8)).astype(np.int32)


def _random(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), tree)


def _network(**changes):
  """(model, parameters, adapters with a B that is not 0)."""
  model = Transformer(presets.tiny_transformer(n_layers=2, **changes))
  boxed = jax.eval_shape(model.init, jax.random.key(0), TOKENS)['params']
  adapters = jax.eval_shape(lambda: lora.init_adapters(nn.meta.unbox(boxed), CONFIG, jax.random.key(0)))
  return model, _random(nn.meta.unbox(boxed), 1), _random(adapters, 2)


def _logits(model, params, adapters=None):
  extra = {} if adapters is None else {'lora': lora.scaled(adapters, CONFIG)}
  return jax.jit(lambda variables: model.apply(variables, TOKENS)[0])({'params': params, **extra})


@pytest.mark.parametrize(('scan_layers', 'remat'), [(True, 'dots'), (False, 'none')])
def test_added_in_or_beside_is_the_same_network(scan_layers, remat):
  model, params, adapters = _network(scan_layers=scan_layers, remat=remat)
  beside, added_in = _logits(model, params, adapters), _logits(model, lora.merged(params, adapters, CONFIG))
  np.testing.assert_allclose(beside, added_in, rtol=1e-5, atol=1e-5 * float(np.abs(added_in).max()))
  assert np.abs(beside - _logits(model, params)).max() > 0.1


def test_merged_is_the_definition():
  _, params, adapters = _network()
  whole = lora.merged(params, adapters, CONFIG)
  pair = adapters['layers']['attention']['o_proj']
  delta = np.einsum('lnhr,lrd->lnhd', pair['a'].astype(np.float64), pair['b'])  # layers, heads, channels of a head, rank, width
  expected = params['layers']['attention']['o_proj'] + 6.0 / 3 * delta
  np.testing.assert_allclose(whole['layers']['attention']['o_proj'], expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(whole['embedding'], params['embedding'])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_gradient_is_that_of_the_sum_by_the_chain_rule(dtype):
  """d/dA = s G B^T and d/dB = s A^T G with G the gradient of the whole matrix; every pair has one, in both types."""
  model, params, adapters = _network(dtype=dtype)

  def loss(params, adapters):
    extra = {} if adapters is None else {'lora': lora.scaled(adapters, CONFIG)}
    hidden = model.apply({'params': params, **extra}, TOKENS, method='hidden')[0]
    return jnp.sum(jnp.sin(3 * model.apply({'params': params, **extra}, hidden, method='unembed')))

  pairs = jax.jit(jax.grad(loss, argnums=1))(params, adapters)
  whole = jax.jit(lambda params: jax.grad(loss)(params, None))(lora.merged(params, adapters, CONFIG))
  rtol = 2e-3 if dtype == 'float32' else 0.15
  for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj', 'lm_head'):
    places = [('layers', 'attention'), ('layers', 'feed_forward'), ()]
    path = next(place for place in places if name in _at(params, place))
    gradient, a, b = _at(whole, path)[name], *(_at(adapters, path)[name][side] for side in 'ab')
    lead = a.shape[:1] if path else ()
    left, right = a.reshape(*lead, -1, 3), b.reshape(*lead, 3, -1)
    gradient = np.asarray(gradient, np.float32).reshape(*left.shape[:-1], right.shape[-1])
    expected = 2 * gradient @ np.swapaxes(right, -1, -2), 2 * np.swapaxes(left, -1, -2) @ gradient
    for side, wanted in zip('ab', expected):
      found = np.asarray(_at(pairs, path)[name][side]).reshape(wanted.shape)
      assert np.linalg.norm(found - wanted) <= rtol * np.linalg.norm(wanted), (name, side)
      assert np.linalg.norm(wanted) > 0


def _at(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def test_it_starts_as_the_base_and_is_sharded_by_the_rules():
  model, params, _ = _network()
  start = lora.init_adapters(params, CONFIG, jax.random.key(3))
  np.testing.assert_array_equal(_logits(model, params, start), _logits(model, params))
  a = np.asarray(start['layers']['feed_forward']['down_proj']['a'])  # [L, F, r]
  assert np.abs(a).max() <= a.shape[1] ** -0.5
  assert np.std(a) == pytest.approx(a.shape[1] ** -0.5 / 3**0.5, rel=0.1)  # uniform
  abstract = jax.eval_shape(lambda key: lora.init_adapters(model.init(key, TOKENS)['params'], CONFIG, key), jax.random.key(0))
  shardings = shardings_of(abstract, make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
  spec = lambda path, name, side: _at(shardings, path)[name][side].spec
  assert spec(('layers', 'attention'), 'q_proj', 'a') == jax.P(None, 'fsdp', None)
  assert spec(('layers', 'attention'), 'q_proj', 'b') == jax.P(None, None, 'tensor', None)
  assert spec(('layers', 'attention'), 'o_proj', 'a') == jax.P(None, 'tensor', None, None)
  assert spec((), 'lm_head', 'b') == jax.P(None, 'tensor')


def test_a_target_must_be_a_projection():
  _, params, _ = _network()
  with pytest.raises(ConfigError, match="'embedding' is no projection; choose from q_proj"):
    lora.init_adapters(params, dataclasses.replace(CONFIG, lora_targets=('embedding',)), jax.random.key(0))
