"""Attention inside rows by kernels of NVIDIA GPUs that others maintain: cuDNN for rows of one document, Pallas for packed ones.

  cudnn     `jax.nn.dot_product_attention(.., implementation='cudnn')`, a public interface of jax: causal, grouped heads as they
            are, no segments
  pallas    `mha` of `jax.experimental.pallas.ops.gpu.attention`, written for Triton: causal, closed in segments, visits all blocks of
            the triangle whatever the segments. It is in jax 0.10 to 0.12, deprecated there since 0.11

Both have backward passes of their own and compute in bfloat16: in float32 Triton would round the operands to ten bits, and cuDNN
has no such kernel. Neither was ever run on a GPU by this project; the tests run the Pallas kernels interpreted on a CPU, lower both for
CUDA, and compare what is asked of cuDNN.

Does not know: when to use which (`attention.choose`), projections, norms, rotations or caches.
"""

import functools
import importlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Float

from chameleon_jax.array_types import Array, SegmentIds
from chameleon_jax.config import Dtype
from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer.blockwise import CONTEXT
from chameleon_jax.partitioning import RULES

BLOCK = 128  # queries and keys of a block of the forward pass
BACKWARD_BLOCK = 64  # the same of the backward pass; half the shared memory

Generation = tuple[int, int]  # CUDA compute capability
_Settings = tuple[float, bool]  # factor of the scores, whether interpreted
_OLDEST: Generation = (8, 0)  # Ampere: bfloat16, and what both kernels are tested on by those who wrote them
_HOPPER: Generation = (9, 0)


def generation() -> Generation | None:
  """Compute capability of this process's first device; (0, 0) of a GPU that is not NVIDIA's, None where no GPU is here."""
  device = jax.local_devices()[0]
  if device.platform not in ('gpu', 'cuda', 'rocm'):
    return None
  found = re.fullmatch(r'(\d+)\.(\d+)', str(getattr(device, 'compute_capability', '')))
  return (int(found[1]), int(found[2])) if found else (0, 0)


def obstacle(kernel: str, *, platform: str, generation: Generation | None, dtype: Dtype, d_head: int, packed: bool) -> str | None:
  """Why 'cudnn' or 'pallas' cannot serve, in words that end a sentence; None where it can.

  Args:
    kernel: which of the two.
    platform: that the program is for.
    generation: of the GPU that is here; None, where none is, is taken to be recent enough, as programs for it can only be looked at.
    dtype: compute type.
    d_head: channels of a head.
    packed: whether rows hold several documents.
  """
  if platform != 'gpu':
    return f'which is a kernel for GPUs, and this program is for {platform}'
  if generation is not None and generation < _OLDEST:
    return f'which needs an NVIDIA GPU of compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer'
  if dtype != 'bfloat16':
    return f'which computes in bfloat16, and model.dtype is {dtype}'
  if kernel == 'pallas':
    return None if 16 <= d_head <= 128 else f'which takes heads of 16 to 128 channels, and model.d_head is {d_head}'
  widest = 256 if generation is not None and generation >= _HOPPER else 128
  if d_head % 8 or d_head > widest:
    return f'which takes heads of a multiple of 8 and at most {widest} channels, and model.d_head is {d_head}'
  return 'which takes rows of one document, and these come with segment_ids' if packed else None


def is_cudnn_forward(primitive: Any, *_: Any, **__: Any) -> bool:
  """Rematerialisation policy: keeps what cuDNN's forward kernel returns, the context and the log-sum of each query.

  Its backward pass needs both, and they are made inside jax's own function, where `checkpoint_name` does not reach: so they are
  told by the primitive. If a later jax renames that, the forward kernel runs twice and all results stay the same.
  """
  return primitive.name == 'dot_product_attention_fwd_wrapper'


def attend_cudnn(
    q: Float[Array, 'B T N H'], k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H'], *, dtype: Dtype
) -> Float[Array, 'B T N H']:
  """Causal attention of rows of one document. On a mesh jax's own rules split it over rows and heads."""
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  return jax.nn.dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, is_causal=True, implementation='cudnn')


def attend_pallas(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    *,
    segment_ids: SegmentIds | None,
    dtype: Dtype,
    interpret: bool = False,
) -> Float[Array, 'B T N H']:
  """Causal attention of rows, closed in each segment where `segment_ids` are given; 0 is a segment like others.

  The kernel wants whole blocks, so rows are padded; what is added lies behind every token. On a mesh each device runs it on its own
  rows and heads. `interpret` runs it anywhere, slowly.

  Raises:
    ConfigError: this jax has no such kernel, or the mesh does not divide rows or heads.
  """
  _kernels()  # or tells that there are none
  missing, settings = -q.shape[1] % BLOCK, (q.shape[-1] ** -0.5, interpret)

  def attend_own(q: Array, k: Array, v: Array, *ids: Array) -> Array:
    run = lambda q, k, v: _attend_segments(settings, q, k, v, ids[0] if ids else None)
    if q.shape[2] == k.shape[2]:
      return run(q, k, v)
    groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])  # query heads of one key head, one after the other: keys lie once
    return jax.vmap(run, in_axes=(3, None, None), out_axes=3)(groups, k, v).reshape(q.shape)

  padded = [jnp.pad(x.astype(dtype), ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k, v)]
  names: list[tuple[str, ...]] = [('batch', 'length', f'act_{heads}', 'd_head') for heads in ('heads', 'kv_heads', 'kv_heads')]
  if segment_ids is not None:
    padded.append(jnp.pad(jnp.asarray(segment_ids), ((0, 0), (0, missing))))
    names.append(('batch', 'length'))
  return _on_each_device(attend_own, padded, names)[:, : q.shape[1]]


def _kernels() -> Any:
  """jax's module. Imported when it is asked for, since it announces that it will go."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', DeprecationWarning)
      return importlib.import_module('jax.experimental.pallas.ops.gpu.attention')
  except ImportError as error:
    advice = "set model.attention_implementation to 'auto', or install jax 0.10 to 0.12"
    raise ConfigError(f'jax {jax.__version__} has no Pallas attention for GPUs; {advice}') from error


def _block_sizes() -> Any:
  backward = {f'block_{name}': BACKWARD_BLOCK for name in ('q_dkv', 'kv_dkv', 'q_dq', 'kv_dq')}
  return _kernels().BlockSizes(block_q=BLOCK, block_k=BLOCK, **backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_segments(settings: _Settings, q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
  """jax's kernels with names on what the backward pass is given, so that rematerialisation can keep it; as many key as query heads."""
  return _attend_fwd(settings, q, k, v, segment_ids)[0]


def _attend_fwd(settings: _Settings, q: Array, k: Array, v: Array, segment_ids: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
  scale, interpret = settings
  options = {'sm_scale': scale, 'causal': True, 'block_sizes': _block_sizes(), 'interpret': interpret, 'return_residuals': True}
  context, log_sums = (checkpoint_name(x, CONTEXT) for x in _kernels().mha(q, k, v, segment_ids, **options))
  return context, (q, k, v, segment_ids, context, log_sums)


def _attend_bwd(settings: _Settings, saved: tuple[Array | None, ...], d_context: Array) -> tuple[Array, Array, Array, None]:
  """By the backward rule of `mha`, whose first arguments are the settings of `mha` in their order."""
  scale, interpret = settings
  causal, implementation, n_warps, n_stages, grid, debug, with_log_sums = True, 'triton', None, 2, None, False, False
  options = (scale, causal, _block_sizes(), implementation, n_warps, n_stages, grid, interpret, debug, with_log_sums)
  return _kernels().mha.bwd(*options, saved, d_context)


_attend_segments.defvjp(_attend_fwd, _attend_bwd)


def _on_each_device(run: Callable[..., Array], operands: list[Array], names: list[tuple[str, ...]]) -> Array:
  """Runs a kernel that no partitioner can split, on the pieces of its operands that each device of the ambient mesh has.

  Args:
    run: the kernel; its result is laid out as its first operand.
    operands: arrays.
    names: logical axes of each.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run(*operands)
  specs = tuple(PartitionSpec(*nn.logical_to_mesh_axes(axes, RULES)) for axes in names)
  for operand, axes, spec in zip(operands, names, specs):
    for size, name, over in zip(operand.shape, axes, spec):
      pieces = 1
      for axis in (over,) if isinstance(over, str) else over or ():
        pieces *= mesh.shape[axis]
      if size % pieces:
        what = 'rows' if name == 'batch' else 'heads'
        raise ConfigError(
            f"model.attention_implementation='pallas' needs {what} that the mesh divides, and {size} {what} do not split over {pieces} "
            f"devices; change config.mesh, or set it to 'auto'"
        )
  # Kernels do not say over which axes their results vary, which the check would ask for.
  return jax.shard_map(run, in_specs=specs, out_specs=specs[0], check_vma=False)(*operands)
