"""The engine on meshes of eight devices gives the tokens of one device."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import MeshConfig, SamplingOptions
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import make_mesh, shardings_of
from chameleon_jax.presets import tiny_transformer, tiny_vocabulary
from chameleon_jax.sampling.engine import Engine
from chameleon_jax.tokens.vocabulary import Vocabulary

CONFIG = tiny_transformer(max_seq_len=48, init_std=0.3, scan_layers=False)
V = Vocabulary(tiny_vocabulary())
N = 4
OPTIONS = [
  SamplingOptions(max_new_tokens=24, greedy=True, image_greedy=True, min_images=2),
  SamplingOptions(max_new_tokens=9, modalities='text', temperature=1.0, seed=5),
  SamplingOptions(modalities='image', image_temperature=1.0, seed=2),
]


@functools.cache
def boxed():
  return Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']


def prompts():
  t = V.text_start
  return [np.array(row, np.int32) for row in ([0, t, t + 5], [0, V.begin_image, 4, 9, 30, 7, V.end_image, t + 2], [0, *range(t, t + 17)])]


def written(params):
  engine = Engine(CONFIG, params, V, n_image_tokens=N)
  return [row.tolist() for row in engine.generate_tokens(prompts(), OPTIONS)], engine


@functools.cache
def on_one_device():
  return written(nn.meta.unbox(boxed()))[0]


@pytest.mark.parametrize('shape', [{'data': 2, 'tensor': 2, 'fsdp': 2}, {'tensor': 2, 'data': 4}, {'fsdp': 8}], ids=str)
def test_a_mesh_gives_the_tokens_of_one_device(shape):
  mesh = make_mesh(MeshConfig(**{'data': 1, 'fsdp': 1, 'tensor': 1} | shape))
  params = jax.device_put(nn.meta.unbox(boxed()), shardings_of(boxed(), mesh))
  lines, engine = written(params)
  assert lines == on_one_device()
  assert sum(line.count(V.begin_image) for line in lines) >= 2
  assert engine._shards == shape.get('data', 1) * shape.get('fsdp', 1)


def test_an_int8_cache_lies_on_the_mesh_and_gives_the_tokens_of_one_device():
  mesh = make_mesh(MeshConfig(data=2, tensor=2, fsdp=2))
  params = jax.device_put(nn.meta.unbox(boxed()), shardings_of(boxed(), mesh))
  spread, one = (Engine(CONFIG, given, V, n_image_tokens=N, cache_dtype='int8') for given in (params, nn.meta.unbox(boxed())))
  options = SamplingOptions(max_new_tokens=9, modalities='text', temperature=1.0, seed=5)
  spread.submit(prompts()[0], options)
  tokens = [progress.tokens for progress in spread.advance(2)]
  leaves = jax.tree.leaves(spread._pool.cache)
  assert {leaf.dtype.name for leaf in leaves} == {'int8', 'float32'}
  for leaf in leaves:
    assert leaf.addressable_shards[0].data.shape == (leaf.shape[0] // 4, leaf.shape[1] // 2, *leaf.shape[2:])
  while spread.pending:
    tokens += [progress.tokens for progress in spread.advance()]
  np.testing.assert_array_equal(np.concatenate(tokens), one.generate_tokens(prompts()[:1], options)[0])
  assert len(np.concatenate(tokens)) > 4


def test_the_cache_lies_on_the_mesh():
  mesh = make_mesh(MeshConfig(data=4, tensor=2, fsdp=1))
  params = jax.device_put(nn.meta.unbox(boxed()), shardings_of(boxed(), mesh))
  engine = Engine(CONFIG, params, V, n_image_tokens=N)
  for row, prompt in enumerate(prompts()):
    engine.submit(prompt, SamplingOptions(max_new_tokens=24, modalities='text'), row=row)
  engine.advance(2)
  leaf = jax.tree.leaves(engine._pool.cache)[0]
  assert len(leaf.sharding.device_set) == 8
  assert leaf.addressable_shards[0].data.shape == (leaf.shape[0] // 4, leaf.shape[1] // 2, *leaf.shape[2:])
