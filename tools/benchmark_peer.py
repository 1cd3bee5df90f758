"""The peer of the sampler's benchmark: Hugging Face's Chameleon on torch, greedy text for one row, with the same weights.

Given every help that keeps its results: the faster of float32 and bfloat16 and of its two caches, sdpa attention, no gradients, and the
tokens that may not be written taken out by one precomputed addition (its own `suppress_tokens` searches the list at every step).
Needs the `parity` extra.
"""

import functools
import importlib.util
import pathlib
import time
import warnings
from typing import Any

import numpy as np

from chameleon_jax.array_types import Params
from chameleon_jax.config import TransformerConfig, VocabularyConfig, VQGANConfig
from chameleon_jax.interop.huggingface.writer import write_huggingface
from chameleon_jax.interop.lazy import LazyModel, TensorSource, TensorSpec
from chameleon_jax.interop.trees import flat
from chameleon_jax.models.transformer.model import unstack_layers


def missing() -> str | None:
  """The library that is not installed, if any."""
  return next((name for name in ('torch', 'transformers') if importlib.util.find_spec(name) is None), None)


def _source(params: Params) -> TensorSource:
  arrays = flat(params)
  specs = {name: TensorSpec(tuple(array.shape), np.dtype(array.dtype)) for name, array in arrays.items()}
  return TensorSource(specs, lambda name: np.asarray(arrays[name]))


def write(
  folder: pathlib.Path,
  config: TransformerConfig,
  params: Params,
  vocabulary: VocabularyConfig,
  *,
  vqgan: tuple[VQGANConfig, Params] | None = None,
) -> None:
  """Writes a float32 checkpoint for transformers, which without `vqgan` fills in a picture encoder nobody calls."""
  source = _source(unstack_layers(params) if config.scan_layers else params)
  parts: dict[str, Any] = {} if vqgan is None else {'vqgan_config': vqgan[0], 'vqgan': _source(vqgan[1])}
  model = LazyModel('the benchmark model', 'orbax', transformer_config=config, transformer=source, vocabulary=vocabulary, **parts)
  write_huggingface(folder, model, dtype='float32')


class Peer:
  """`peer(prompt, n_new)` gives the new tokens of one row; float32 and the growing cache until `choose` has found better."""

  def __init__(self, folder: pathlib.Path, allowed: np.ndarray):
    """Opens a folder that `write` made; `allowed`: bool [V], what may be written."""
    import torch

    self._folder = folder
    self._mask = torch.where(torch.tensor(allowed), 0.0, -torch.inf)
    self.dtype, self.cache = 'float32', 'dynamic'

  @functools.cache  # noqa: B019 (a peer lives as long as the run)
  def _model(self, dtype: str) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    load = transformers.ChameleonForConditionalGeneration.from_pretrained
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      return load(self._folder, dtype=getattr(torch, dtype), attn_implementation='sdpa').eval()

  def __call__(self, prompt: np.ndarray, n_new: int) -> np.ndarray:
    """Greedy tokens int32 [n_new]."""
    import torch

    mask = self._mask
    tokens = torch.tensor(prompt[None].astype(np.int64))
    with torch.inference_mode():
      made = self._model(self.dtype).generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        num_beams=1,
        max_new_tokens=n_new,
        min_new_tokens=None,
        eos_token_id=None,
        pad_token_id=1,
        cache_implementation=self.cache,
        logits_processor=[lambda _, scores: scores + mask],
      )
    return made[0, len(prompt) :].numpy().astype(np.int32)

  def choose(self, prompt: np.ndarray, n_new: int, *, turns: int = 3) -> dict[str, float]:
    """Keeps the fastest setting; returns the least seconds of each."""
    seconds: dict[str, float] = {}
    for dtype in ('float32', 'bfloat16'):
      for cache in ('dynamic', 'static'):
        self.dtype, self.cache = dtype, cache
        times = []
        for _ in range(1 + turns):
          start = time.perf_counter()
          self(prompt, n_new)
          times.append(time.perf_counter() - start)
        seconds[f'{dtype}, {cache} cache'] = min(times[1:])
    best = min(seconds, key=lambda name: seconds[name])
    self.dtype, self.cache = best.removesuffix(' cache').split(', ')
    return seconds
