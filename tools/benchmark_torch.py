"""The torch peers of `benchmark.py`: Hugging Face's Chameleon for training, prefill and decoding, given every help that keeps its results.

Its own forward writes the smallest number over all 8,192 image columns at every call, by a Python list; that is left out here (the network
and its head are called one after the other), so the peer is faster than what a user gets from `model(...)` or `generate`.
Needs the `parity` extra; torch is imported inside the functions.
"""

import functools
import inspect
import pathlib
import warnings
from typing import Any

import numpy as np

DTYPES = ('float32', 'bfloat16')
CACHES = ('dynamic', 'static')


@functools.lru_cache(maxsize=4)
def load(folder: pathlib.Path, dtype: str) -> Any:
  """Hugging Face's model of a folder in `dtype`, with sdpa attention, for inference."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation='sdpa')
  return model.eval()


@functools.cache
def _cache_argument(kind: Any) -> str:
  """What this release of transformers calls the argument."""
  return 'cache' if 'cache' in inspect.signature(kind.forward).parameters else 'past_key_values'


def _hidden(model: Any, tokens: Any, cache: Any = None) -> Any:
  """Last hidden states [B, T, D]."""
  more = {'use_cache': False} if cache is None else {'use_cache': True, _cache_argument(type(model.model)): cache}  # type: ignore[arg-type]
  return model.model(input_ids=tokens, **more).last_hidden_state


def logits(model: Any, tokens: np.ndarray, *, last: bool = False) -> np.ndarray:
  """float32 [B, T, V] of tokens [B, T], or of the last position alone [B, 1, V]; image columns as the network gives them."""
  import torch

  with torch.inference_mode():
    hidden = _hidden(model, torch.from_numpy(tokens.astype(np.int64)))
    return model.lm_head(hidden[:, -1:] if last else hidden).float().numpy()


class Decoder:
  """Greedy text for rows of one length: `prepare` fills the cache and draws the first token, `run` draws the rest one by one."""

  def __init__(self, model: Any, allowed: np.ndarray, *, cache: str):
    """allowed: bool [V], what may be written; cache: 'dynamic' or 'static'."""
    import torch

    self._model = model
    self._mask = torch.where(torch.tensor(allowed), 0.0, -torch.inf).to(model.dtype)
    self._cache = cache

  def _draw(self, tokens: Any, cache: Any) -> Any:
    return (self._model.lm_head(_hidden(self._model, tokens, cache)[:, -1]) + self._mask).argmax(-1, keepdim=True)

  def prepare(self, prompts: np.ndarray, n_new: int) -> tuple[Any, Any, int]:
    """(first token [B, 1], the filled cache, tokens still to draw)."""
    import torch
    import transformers

    config = self._model.config
    slots = prompts.shape[1] + n_new
    static = self._cache == 'static'
    cache = transformers.StaticCache(config=config, max_cache_len=slots) if static else transformers.DynamicCache(config=config)
    with torch.inference_mode():
      return self._draw(torch.from_numpy(prompts.astype(np.int64)), cache), cache, n_new - 1

  def run(self, prepared: tuple[Any, Any, int]) -> np.ndarray:
    """int32 [B, n_new]."""
    import torch

    token, cache, left = prepared
    written = [token]
    with torch.inference_mode():
      for _ in range(left):
        written.append(self._draw(written[-1], cache))
      return torch.cat(written, 1).numpy().astype(np.int32)


class Trainer:
  """One training step after the other: cross entropy in float32, clipping, fused AdamW that decays matrices alone."""

  def __init__(
    self, folder: pathlib.Path, dtype: str, *, learning_rate: float, betas: tuple[float, float], eps: float, decay: float, clip: float
  ):
    import torch

    self._model = load.__wrapped__(folder, dtype).train()  # not the shared one: its weights change
    named = [(name, p) for name, p in self._model.named_parameters() if '.vqmodel.' not in name]
    matrices = [p for name, p in named if p.ndim > 1 and 'norm' not in name]
    others = [p for name, p in named if not (p.ndim > 1 and 'norm' not in name)]
    self._parameters, self._clip = [p for _, p in named], clip
    groups = [{'params': matrices, 'weight_decay': decay}, {'params': others, 'weight_decay': 0.0}]
    self._optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)

  def step(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """(loss, norm of the gradient before clipping) of one step on int [B, T]."""
    import torch

    hidden = _hidden(self._model, torch.from_numpy(tokens.astype(np.int64)))
    scores = self._model.lm_head(hidden).float().flatten(0, 1)  # as transformers' own loss does
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(targets.astype(np.int64)).flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


def encoder(folder: pathlib.Path, dtype: str) -> Any:
  """`encode(pixels [B, H, W, 3]) -> codes int32 [B, n]` by Hugging Face's image tokenizer, channels last."""
  import torch

  network = load(folder, dtype).model.vqmodel.to(memory_format=torch.channels_last)

  def encode(pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
      x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(network.dtype)  # the host's layout is channels last already
      return network.encode(x).image_tokens.view(len(pixels), -1).numpy().astype(np.int32)

  return encode
