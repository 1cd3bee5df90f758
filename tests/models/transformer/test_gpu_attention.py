"""Kernels of GPUs without one: Pallas interpreted against the plain form, and what is asked of CUDA and of cuDNN."""

import dataclasses
import functools
import json
import math
import re
import sys
import types
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from chameleon_jax import presets
from chameleon_jax.config import MeshConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer import attention, gpu_attention
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import AXES, make_mesh

INTERPRETED = functools.partial(gpu_attention.attend_pallas, interpret=True)


def draw(batch=2, length=200, heads=4, kv_heads=2, d_head=16, seed=0):
  rng = np.random.default_rng(seed)
  sizes = (heads, kv_heads, kv_heads, heads)
  return [jnp.asarray(1.5 * rng.standard_normal((batch, length, n, d_head)), jnp.float32) for n in sizes]


def packed_rows(batch: int, length: int) -> np.ndarray:
  """Documents of many lengths, one of them across blocks, one of a single token; padding behind, more than a block of it in the last."""
  rows = np.zeros((batch, length), np.int32)
  for row in range(batch):
    for index, (start, end) in enumerate([(0, 7), (7, 40), (40, 41), (41, length - 5 - row * 140 // max(1, batch - 1))]):
      rows[row, start : max(0, end)] = index + 1
  return rows


def gradients(attend, q, k, v, weights):
  """(context, dq, dk, dv), of the sum of the context times `weights`."""

  def loss(q, k, v):
    out = attend(q, k, v)
    return jnp.sum(out.astype(jnp.float32) * weights), out

  grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return out, *grads


def off(ours, theirs) -> float:
  """Largest difference over the largest value, of the worst array."""
  pairs = [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in zip(ours, theirs, strict=True)]
  assert all(np.isfinite(a).all() for a, _ in pairs)
  return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize(
    ('kv_heads', 'packed', 'dtype', 'tolerance'), [(2, True, 'float32', 1e-5), (4, False, 'float32', 1e-5), (2, True, 'bfloat16', 0.02)]
)
def test_pallas_and_its_gradients_equal_the_reference(kv_heads, packed, dtype, tolerance):
  """In float32 the algorithm; in bfloat16, which a GPU would run, its roundings."""
  q, k, v, weights = draw(kv_heads=kv_heads)
  segments = packed_rows(2, 200) if packed else None
  mask = attention.causal_mask(200) if segments is None else attention.segment_mask(segments)
  ours = gradients(lambda q, k, v: INTERPRETED(q, k, v, segment_ids=segments, dtype=dtype), q, k, v, weights)
  theirs = gradients(lambda q, k, v: attention.attend(q, k, v, mask, dtype='float32'), q, k, v, weights)
  assert ours[0].dtype == jnp.dtype(dtype) and off(ours, theirs) < tolerance


@pytest.mark.parametrize('sizes', [(1, 2, 2)])
def test_pallas_on_a_mesh_equals_the_reference(sizes):
  """Each device runs it on its rows and heads; no partitioner could split it."""
  q, k, v, weights = draw()
  segments, mesh = packed_rows(2, 200), make_mesh(MeshConfig(*sizes), devices=jax.devices()[:4])
  theirs = gradients(lambda q, k, v: attention.attend(q, k, v, attention.segment_mask(segments), dtype='float32'), q, k, v, weights)
  with jax.set_mesh(mesh):
    place = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, 'tensor'))
    given = [jax.device_put(x, place) for x in (q, k, v, weights)]
    ours = gradients(lambda q, k, v: INTERPRETED(q, k, v, segment_ids=segments, dtype='float32'), *given)
  assert off(ours, theirs) < 1e-5
  assert all(x.sharding.spec == place.spec for x in ours)


@pytest.mark.parametrize(('shape', 'what'), [({'batch': 3}, '3 rows do not split'), ({'kv_heads': 1}, '1 heads do not split over 2')])
def test_what_a_mesh_does_not_divide_is_refused(shape, what):
  q, k, v, _ = draw(**shape)
  with jax.set_mesh(make_mesh(MeshConfig(1, 2, 2), devices=jax.devices()[:4])), pytest.raises(ConfigError, match=what):
    jax.eval_shape(lambda q, k, v: gpu_attention.attend_pallas(q, k, v, segment_ids=None, dtype='bfloat16'), q, k, v)


def lowered_for_cuda(attend, *shapes) -> str:
  """Text of the program of forward and backward pass for CUDA, which needs no GPU to be written."""
  given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  loss = lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum()
  card = AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=None, platform='gpu')
  with use_abstract_mesh(AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=card)):
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*given).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize(('heads', 'kv_heads', 'd_head', 'length'), [(4, 4, 128, 4096), (8, 1, 128, 300), (2, 2, 24, 128)])
def test_pallas_is_accepted_for_cuda(heads, kv_heads, d_head, length):
  """Its blocks, head sizes and grouped heads pass the compiler's front end: three kernels, forward, row sums and backward."""
  shapes = (2, length, heads, d_head), *2 * ((2, length, kv_heads, d_head),)
  ids = packed_rows(2, length)
  asked = {'segment_ids': ids, 'dtype': 'bfloat16', 'implementation': 'pallas'}
  text = lowered_for_cuda(lambda q, k, v: attention.attend_rows(q, k, v, **asked), *shapes)
  assert text.count('custom_call @__gpu$xla.gpu.triton') == 3


def test_cudnn_is_asked_for_causal_attention_of_grouped_heads():
  from jax._src.cudnn import fused_attention_stablehlo

  with mock.patch.object(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91_000):
    attend = lambda q, k, v: attention.attend_rows(q, k, v, segment_ids=None, dtype='bfloat16', implementation='cudnn')
    text = lowered_for_cuda(attend, (3, 200, 4, 64), (3, 200, 2, 64), (3, 200, 2, 64))
  assert re.findall(r'custom_call @(__cudnn\S*?)\(', text) == ['__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward']
  for config in re.findall(r'backend_config = "(\{.*?\})"', text):
    asked = json.loads(config.replace('\\22', '"'))['cudnn_fmha_backend_config']
    assert asked['mask_type'] == 'CAUSAL' and asked['fmha_scale'] == 1 / 8
    assert asked['intermediate_tensor_shape']['dimensions'] == ['3', '4', '200', '200']  # whole heads, whole rows


def test_what_is_asked_of_cudnn_is_the_reference(monkeypatch):
  """The same call, computed by jax's other implementation."""
  honest, asked = jax.nn.dot_product_attention, []

  def stand_in(*arrays, implementation, **keywords):
    asked.append(implementation)
    return honest(*arrays, implementation='xla', **keywords)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)
  q, k, v, weights = draw()
  theirs = gradients(lambda q, k, v: attention.attend(q, k, v, attention.causal_mask(200), dtype='float32'), q, k, v, weights)
  for dtype, tolerance in (('float32', 1e-5), ('bfloat16', 0.03)):
    ours = gradients(functools.partial(gpu_attention.attend_cudnn, dtype=dtype), q, k, v, weights)
    assert ours[0].dtype == jnp.dtype(dtype) and off(ours, theirs) < tolerance
  assert asked == ['cudnn', 'cudnn']


@pytest.mark.parametrize(
    ('device', 'expected'),
    [
        ({'platform': 'cpu'}, None),
        ({'platform': 'gpu', 'compute_capability': '9.0'}, (9, 0)),
        ({'platform': 'gpu', 'compute_capability': '12.1'}, (12, 1)),
        ({'platform': 'gpu', 'compute_capability': 'gfx942'}, (0, 0)),
        ({'platform': 'gpu'}, (0, 0)),
    ],
)
def test_generation(monkeypatch, device, expected):
  monkeypatch.setattr(jax, 'local_devices', lambda: [types.SimpleNamespace(**device)])
  assert gpu_attention.generation() == expected


def test_a_jax_without_the_kernel_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, 'jax.experimental.pallas.ops.gpu.attention', None)
  with pytest.raises(ConfigError, match='has no Pallas attention for GPUs'):
    gpu_attention.attend_pallas(*draw()[:3], segment_ids=None, dtype='bfloat16')


MODEL = presets.tiny_transformer(d_head=16, dtype='bfloat16', attention_implementation='pallas')


def on_a_gpu(monkeypatch):
  """Traces as one would on a GPU; the Pallas kernel itself is for the CPU."""
  monkeypatch.setattr(attention, 'target_platform', lambda: 'gpu')
  monkeypatch.setattr(gpu_attention, 'generation', lambda: (9, 0))
  monkeypatch.setattr(gpu_attention, 'attend_pallas', INTERPRETED)


def model_loss(config, segments):
  """A function of parameters that reads every logit, and their shapes."""
  params = nn.meta.unbox(jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))['params']
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 24)).astype(np.int32)

  weights = np.random.default_rng(1).standard_normal((4, 24, config.vocab_size)).astype(np.float32)

  def loss(params):
    return jnp.sum(weights * Transformer(config).apply({'params': params}, tokens, segment_ids=segments)[0])

  return loss, params


def forward_kernels(jaxpr) -> int:
  """How often a program runs the forward kernel; the body of a scan counts once."""
  found = 0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name in ('pallas_call', 'dot_product_attention_fwd_wrapper'):
      found += name != 'pallas_call' or 'mha_forward' in str({key: equation.params.get(key) for key in ('name', 'name_and_src_info')})
      continue
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)
      found += forward_kernels(inner) if hasattr(inner, 'eqns') else 0
  return found


@pytest.mark.parametrize(('remat', 'runs'), [('none', 1), ('dots', 1), ('full', 2)])
@pytest.mark.parametrize(('kernel', 'sizes'), [('pallas', (1, 1, 1)), ('pallas', (2, 2, 2)), ('cudnn', (1, 1, 1))])
def test_rematerialisation_keeps_what_the_kernels_return(monkeypatch, kernel, sizes, remat, runs):
  from jax._src.cudnn import fused_attention_stablehlo

  on_a_gpu(monkeypatch)
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91_000)
  config = dataclasses.replace(MODEL, remat=remat, attention_implementation=kernel)
  loss, params = model_loss(config, np.ones((4, 24), np.int32) if kernel == 'pallas' else None)
  with jax.set_mesh(make_mesh(MeshConfig(*sizes), devices=jax.devices()[: math.prod(sizes)])):
    assert forward_kernels(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) == runs


def test_a_step_through_the_network_is_that_of_the_plain_form(monkeypatch):
  """Layers scanned and rematerialised, on a mesh, packed: loss and gradients, in float32, which is let through for once."""
  on_a_gpu(monkeypatch)
  monkeypatch.setattr(gpu_attention, 'obstacle', lambda *_, **__: None)
  config, segments = dataclasses.replace(MODEL, remat='dots', dtype='float32'), packed_rows(4, 24)
  (pallas, shapes), (plain, _) = (
      model_loss(dataclasses.replace(config, attention_implementation=name), segments) for name in ('pallas', 'plain')
  )
  rng = np.random.default_rng(3)
  params = jax.tree.map(lambda leaf: (0.5 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
  with jax.set_mesh(make_mesh(MeshConfig(1, 2, 2), devices=jax.devices()[:4])):
    found, expected = (jax.jit(jax.value_and_grad(loss))(params) for loss in (pallas, plain))
  assert off(jax.tree.leaves(found), jax.tree.leaves(expected)) < 1e-4
