"""The models that `benchmark.py` measures: sizes, random weights of either network, and the project's own ways to run them.

Weights are float32 masters, drawn on the host; every contestant gets these. `WAYS` are what ours computes in or keeps its weights in; each
takes part in every case of the sampler.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from chameleon_jax import presets
from chameleon_jax.array_types import Params
from chameleon_jax.config import CacheDtype, Dtype, TransformerConfig, VocabularyConfig, VQGANConfig
from chameleon_jax.interop.native import abstract_transformer, abstract_vqgan
from chameleon_jax.models.transformer.model import decoding_params, dequantize_params, quantize_params
from chameleon_jax.planning.speed import attention_flops, matmul_weights
from chameleon_jax.sampling.engine import Engine
from chameleon_jax.tokens.vocabulary import Vocabulary
from chameleon_jax.training.state import unboxed

INT8_CACHE = 'int8 weights and cache'
WAYS: tuple[str, ...] = ('float32', 'bfloat16', 'int8', INT8_CACHE)  # int8: weights alone, the rest bfloat16


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is measured.

  Attributes:
    name: cell of the table.
    transformer, vocabulary, vqgan: the networks.
    train: rows and their tokens of a training step.
    loss_chunks: pieces of a row in the loss.
    scan_training: whether the layers of a training step are scanned, as the presets have it.
    prefill: tokens of the prompt that is filled in.
    prompt, new: tokens before and of the decoding that is timed.
    batches: rows of it.
    gate: greedy tokens that must be equal.
  """

  name: str
  transformer: TransformerConfig
  vocabulary: VocabularyConfig
  vqgan: VQGANConfig
  train: tuple[int, int] = (2, 512)
  loss_chunks: int = 2
  scan_training: bool = True
  prefill: int = 1024
  prompt: int = 64
  new: int = 64
  batches: tuple[int, ...] = (1, 8, 32)
  gate: int = 32

  def transformer_in(self, dtype: Dtype, *, scan_layers: bool = False) -> TransformerConfig:
    """The transformer that computes in `dtype`."""
    return dataclasses.replace(self.transformer, dtype=dtype, scan_layers=scan_layers)


def small() -> Sizes:
  """92.4 million parameters with the released vocabulary, and the released image tokenizer at 256 x 256 pixels (performance.md 3)."""
  vocabulary = presets.released_vocabulary()
  sizes: dict[str, Any] = {'d_model': 512, 'n_layers': 8, 'n_heads': 8, 'n_kv_heads': 8, 'd_head': 64, 'd_ff': 1376}
  transformer = TransformerConfig(vocab_size=vocabulary.size, max_seq_len=2048, scan_layers=False, **sizes)
  return Sizes('92M', transformer, vocabulary, dataclasses.replace(presets.vqgan_512(), resolution=256))


def tiny() -> Sizes:
  """For tests: says that the tool works, nothing else."""
  transformer = presets.tiny_transformer(init_std=0.3, scan_layers=False, n_kv_heads=4)
  vqgan = presets.tiny_vqgan(base_channels=32, channel_multipliers=(1, 1, 2), norm_groups=32)
  fields: dict[str, Any] = {'train': (2, 16), 'loss_chunks': 2, 'prefill': 32, 'prompt': 8, 'new': 8, 'batches': (1, 2), 'gate': 8}
  return Sizes('tiny', transformer, presets.tiny_vocabulary(), vqgan, **fields)


SIZES: dict[str, Callable[[], Sizes]] = {'small': small, 'tiny': tiny}


def training_flops(config: TransformerConfig, length: int) -> float:
  """FLOPs of one token of a row of `length` in training, forward and backward, all weights trained, attention causal."""
  return 6 * sum(matmul_weights(config)) + 3 * attention_flops(config, length)


def transformer_params(config: TransformerConfig, *, seed: int = 0) -> Params:
  """Normal weights of `init_std`, norms near one and biases near nought, one tree a layer; float32."""
  rng = np.random.default_rng(seed)

  def draw(path: Any, leaf: Any) -> np.ndarray:
    values = config.init_std * rng.standard_normal(leaf.shape, np.float32)
    return values + np.float32(1) if path[-1].key == 'weight' else values

  return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(abstract_transformer(dataclasses.replace(config, scan_layers=False))))


def vqgan_params(config: VQGANConfig, *, seed: int = 0) -> Params:
  """Kernels that keep the size of what they take, norms near one; the codebook is standard normal."""
  rng = np.random.default_rng(seed)

  def draw(path: Any, leaf: Any) -> np.ndarray:
    values = rng.standard_normal(leaf.shape, np.float32)
    if path[-1].key == 'kernel':
      return values * np.float32(np.prod(leaf.shape[:-1]) ** -0.5)
    if path[-1].key == 'embedding':
      return values
    return values * np.float32(0.02) + np.float32(path[-1].key == 'scale')

  return jax.tree_util.tree_map_with_path(draw, unboxed(abstract_vqgan(config)))


def pictures(resolution: int, n: int, *, seed: int = 0) -> np.ndarray:
  """Uint8 [n, H, W, 3]: coarse patches with noise."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(16, 240, (n, resolution // 8, resolution // 8, 3))
  noise = rng.integers(-15, 16, (n, resolution, resolution, 3))
  return (coarse.repeat(8, 1).repeat(8, 2) + noise).astype(np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """The transformer of one size with its weights."""

  sizes: Sizes
  params: Params

  @classmethod
  def random(cls, sizes: Sizes) -> 'Subject':
    """Of random weights."""
    return cls(sizes, transformer_params(sizes.transformer))

  @functools.cached_property
  def vocabulary(self) -> Vocabulary:
    """What each id means."""
    return Vocabulary(self.sizes.vocabulary)

  @functools.cached_property
  def allowed(self) -> np.ndarray:
    """Bool [V]: ids of text that do not end a row, which every contestant may write."""
    allowed = self.vocabulary.is_text & ~self.vocabulary.is_barred
    allowed[[self.vocabulary.end_sequence, self.vocabulary.end_turn]] = False
    return allowed

  def text(self, rows: int, length: int, *, seed: int = 1) -> np.ndarray:
    """int32 [rows, length] of text ids that follow begin_sequence."""
    v = self.vocabulary
    tokens = np.random.default_rng(seed).integers(v.text_start, v.size, (rows, length)).astype(np.int32)
    tokens[:, 0] = v.begin_sequence
    return tokens

  @functools.cache  # noqa: B019 (a subject lives as long as the run)
  def way(self, name: str) -> tuple[TransformerConfig, Params]:
    """Config and parameters of one of `WAYS`, one array a layer on the device, as the sampler takes them."""
    if name == INT8_CACHE:
      return self.way('int8')
    dtype: Dtype = 'float32' if name == 'float32' else 'bfloat16'
    config = self.sizes.transformer_in(dtype)
    return config, decoding_params(quantize_params(self.params, config) if name == 'int8' else self.params, config)

  def meant_by(self, name: str) -> 'Subject':
    """The subject of the weights that one of `WAYS` stands for: rounded to int8 and back, or as they are."""
    return Subject(self.sizes, dequantize_params(self.way(name)[1])) if name in ('int8', INT8_CACHE) else self

  def engine(self, name: str) -> Engine:
    """A new engine over shared parameters."""
    config, params = self.way(name)
    return Engine(config, params, self.vocabulary, n_image_tokens=self.sizes.vqgan.n_image_tokens, cache_dtype=cache_dtype(name))


def cache_dtype(way: str) -> CacheDtype | None:
  """Of keys and values in one of `WAYS`; None for the default of the platform."""
  return 'int8' if way == INT8_CACHE else None
