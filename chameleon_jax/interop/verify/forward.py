"""An open checkpoint run stage by stage, float32: only the tensors of the stage under way are in memory.

So activations and logits of two models can be compared side by side, on a host that holds neither of them. Does not know
what is compared with what, nor any limit.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.array_types import Codes, Params, Pictures, Tokens
from chameleon_jax.config import Dtype, TransformerConfig, VQGANConfig
from chameleon_jax.interop.lazy import LazyModel, TensorSource
from chameleon_jax.interop.trees import nested
from chameleon_jax.interop.verify.tensors import normalised
from chameleon_jax.models.transformer import rope
from chameleon_jax.models.transformer.layers import Layer, RMSNorm
from chameleon_jax.models.transformer.linear import linear
from chameleon_jax.models.vqgan.model import VQGAN
from chameleon_jax.tokens import images

# Sub-modules of a layer -> what is at fault when their output is the first that differs, in the order of
# computation of the 'pre' block.
_PARTS = {
    'attention_norm': 'attention_norm',
    'q_norm': 'queries (q_proj or q_norm)',
    'k_norm': 'keys (k_proj or k_norm)',
    'attention': 'attention (v_proj, o_proj or the rotary positions)',
    'ffn_norm': 'ffn_norm',
    'feed_forward': 'feed_forward (gate_proj, up_proj or down_proj)',
}
_POST_ORDER = ('q_norm', 'k_norm', 'attention', 'attention_norm', 'feed_forward', 'ffn_norm')


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of a forward pass.

  Attributes:
    name: 'embedding', 'layers_0' .., 'final_norm', 'lm_head'.
    output: float32 [B, T, D], the residual stream behind it; of 'lm_head' the logits [B, T, V].
    parts: outputs inside a layer, in the order of computation, by what is at fault when one differs.
  """

  name: str
  output: np.ndarray
  parts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def plain_config(config: TransformerConfig) -> TransformerConfig:
  """The same network in float32, unrolled, without dropout."""
  config = dataclasses.replace(config, attention_implementation='auto')
  return dataclasses.replace(config, dtype='float32', param_dtype='float32', scan_layers=False, remat='none', dropout=0.0)


def run_stages(model: LazyModel, tokens: Tokens, dtype: Dtype) -> Iterator[Stage]:
  """Runs the transformer on tokens [B, T]; weights are rounded to `dtype`, everything is computed in float32."""
  assert model.transformer_config is not None and model.transformer is not None
  config, source = plain_config(model.transformer_config), model.transformer
  layer, head = _compiled_layer(config), _compiled_head(config)
  order = tuple(_PARTS) if config.norm_position == 'pre' else _POST_ORDER
  with jax.default_matmul_precision('highest'):
    x = jnp.asarray(normalised(source.read('embedding')[np.asarray(tokens)], dtype))
    yield Stage('embedding', np.asarray(x))
    for index in range(config.n_layers):
      x, parts = layer(read_tree(source, dtype, f'layers_{index}/'), x)
      yield Stage(f'layers_{index}', np.asarray(x), {_PARTS[name]: np.asarray(parts[name]) for name in order if name in parts})
    x = RMSNorm(config).apply({'params': read_tree(source, dtype, 'final_norm/')}, x)
    yield Stage('final_norm', np.asarray(x))
    yield Stage('lm_head', np.asarray(head(jnp.asarray(normalised(source.read('lm_head'), dtype)), x)))


def logits_of(model: LazyModel, tokens: Tokens, dtype: Dtype) -> np.ndarray:
  """float32 [B, T, V], raw, image columns included."""
  *_, last = run_stages(model, tokens, dtype)
  return last.output


def read_tree(source: TensorSource, dtype: Dtype, prefix: str = '') -> Params:
  """The tensors whose names start with `prefix`, as a nested dict without it."""
  names = (name for name in source.specs if name.startswith(prefix))
  return nested({name.removeprefix(prefix): jnp.asarray(normalised(source.read(name), dtype)) for name in names})


@functools.lru_cache(maxsize=8)
def _compiled_layer(config: TransformerConfig) -> Callable[..., Any]:
  layer = Layer(config)

  def apply(params, x):
    batch, length, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    turn = rope.rotation(positions, config.d_head, config.rope_theta)
    captured = {'capture_intermediates': True, 'mutable': ['intermediates']}
    (x, _), state = layer.apply({'params': params}, x, None, turn, positions, None, True, **captured)
    seen = state['intermediates']
    seen = seen | {name: seen['attention'][name] for name in ('q_norm', 'k_norm') if name in seen['attention']}
    parts = {name: seen[name]['__call__'][0] for name in _PARTS if name in seen}
    return x, parts | {'attention': parts['attention'][0]}

  return jax.jit(apply)


@functools.lru_cache(maxsize=8)
def _compiled_head(config: TransformerConfig) -> Callable[..., Any]:
  return jax.jit(lambda kernel, x: linear(x, kernel, 1, config.dtype, out_dtype='float32'))


# -------------------------------------------------------------------------------------------- pictures


def has_decoder(model: LazyModel) -> bool:
  """Whether the checkpoint can turn codes into pictures."""
  return model.vqgan is not None and any(name.startswith('decoder/') for name in model.vqgan.specs)


def load_vqgan(model: LazyModel, dtype: Dtype) -> Params:
  """All parameters of the image tokenizer that the checkpoint holds, float32."""
  assert model.vqgan is not None
  return read_tree(model.vqgan, dtype)


def latents(config: VQGANConfig, params: Params, pixels: np.ndarray) -> np.ndarray:
  """Pixels float32 [P, H, W, 3] -> latents before quantization, float32 [P, n, Z], a picture at a time."""
  encode, _ = _compiled_vqgan(dataclasses.replace(config, dtype='float32', dropout=0.0))
  with jax.default_matmul_precision('highest'):
    rows = [np.asarray(encode(params, picture[None])) for picture in pixels]
  return np.concatenate(rows).reshape(len(pixels), -1, config.d_code)


def decoded_pictures(config: VQGANConfig, params: Params, codes: Codes) -> Pictures:
  """Codes [P, n] -> uint8 [P, H, W, 3], cut off to whole levels as in the release (spec model.md 7.3)."""
  _, decode = _compiled_vqgan(dataclasses.replace(config, dtype='float32', dropout=0.0))
  with jax.default_matmul_precision('highest'):
    rows = [np.asarray(decode(params, row.reshape(1, config.grid, config.grid))) for row in np.asarray(codes, np.int32)]
  return images.to_uint8(np.concatenate(rows))


@functools.lru_cache(maxsize=8)
def _compiled_vqgan(config: VQGANConfig) -> tuple[Callable[..., Any], Callable[..., Any]]:
  network = VQGAN(config)
  encode = jax.jit(lambda params, pixels: network.apply({'params': params}, pixels, method='latents'))
  return encode, jax.jit(lambda params, codes: network.apply({'params': params}, codes, method='decode'))


# ---------------------------------------------------------------------------------------------- memory


def bytes_needed(model: LazyModel, n_tokens: int) -> int:
  """A rough upper estimate of the memory that running the model takes: its largest stage and the whole image tokenizer.

  Each tensor counts as float32 four times (the file's copy, the cast one, the device's, the other checkpoint's).
  """
  stages: dict[str, int] = {}
  for name, spec in ({} if model.transformer is None else model.transformer.specs).items():
    stages[name.split('/')[0]] = stages.get(name.split('/')[0], 0) + 4 * int(np.prod(spec.shape, dtype=np.int64))
  needed = 4 * max(stages.values(), default=0)
  if model.transformer_config is not None:
    needed += 4 * n_tokens * (16 * model.transformer_config.d_ff + 8 * model.transformer_config.vocab_size)
  if model.vqgan_config is not None and model.vqgan is not None:
    needed += 16 * sum(int(np.prod(spec.shape, dtype=np.int64)) for spec in model.vqgan.specs.values())
    needed += 64 * model.vqgan_config.resolution**2 * model.vqgan_config.base_channels
  return needed


def memory_available() -> int | None:
  """Bytes that this process may still take; None where the system does not tell."""
  try:
    lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable:'))
  except (OSError, StopIteration, ValueError, IndexError):
    pass
  try:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES')
  except (ValueError, OSError, AttributeError):
    return None
