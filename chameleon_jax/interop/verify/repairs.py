"""Explains wrong logits where no second checkpoint shows which tensor is at fault: known faults are undone, one at a time, until
the logits are right.

Not found this way: norms averaged or one rank's kept (what was lost cannot be brought back), shards in another order, and two
faults at once, except the rotary permutation of projections and norms together.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from chameleon_jax.array_types import Tokens
from chameleon_jax.config import Dtype, TransformerConfig
from chameleon_jax.interop.lazy import LazyModel, TensorSource, TensorSpec
from chameleon_jax.interop.verify.faults import deinterleave
from chameleon_jax.interop.verify.forward import logits_of
from chameleon_jax.interop.verify.outputs import LOGITS_LIMIT, logits_rows
from chameleon_jax.interop.verify.report import Finding

Read = Callable[[str], np.ndarray]
Change = Callable[[Read, str], np.ndarray]  # the tensor of a name, given the reader of the faulty checkpoint
MAX_BYTES = 4 << 30  # of the transformer in float32: each trial is a forward pass
_OFFSET = 4  # tokens before the first code in the release


def explain_logits(
    model: LazyModel, label: str, tokens: Tokens, dtype: Dtype, *, target: np.ndarray, image_tokens: tuple[int, int] | None
) -> list[Finding]:
  """The fault whose repair gives the logits `target` [B, T, V] within the limit; empty where none does, or the model is too large."""
  config, source = model.transformer_config, model.transformer
  if config is None or source is None or sum(4 * np.prod(spec.shape, dtype=np.int64) for spec in source.specs.values()) > MAX_BYTES:
    return []
  for fault, sentence, repaired_config, change in _repairs(config, image_tokens):
    repaired = dataclasses.replace(model, transformer_config=repaired_config, transformer=_changed(source, change))
    rows = logits_rows(target, logits_of(repaired, tokens, dtype), image_columns=None, masked=True)
    figure = next(row.value for row in rows if row.name.startswith('logits'))
    if isinstance(figure, float) and figure <= LOGITS_LIMIT:
      return [Finding(fault, f'{label}: {sentence}; with that undone the logits agree')]
  return []


def _changed(source: TensorSource, change: Change) -> TensorSource:
  specs = {name: TensorSpec(spec.shape, spec.dtype) for name, spec in source.specs.items()}
  return TensorSource(specs, lambda name: change(source.read, name))


def _plain(read: Read, name: str) -> np.ndarray:
  return read(name)


def _repairs(config: TransformerConfig, image_tokens: tuple[int, int] | None) -> Iterator[tuple[str, str, TransformerConfig, Change]]:
  """(fault, sentence, config, change) of each fault, the more likely ones first."""
  projections, norms = ('q_proj', 'k_proj'), ('q_norm/weight', 'q_norm/bias', 'k_norm/weight', 'k_norm/bias')
  other: Literal['pre', 'post'] = 'post' if config.norm_position == 'pre' else 'pre'
  sentence = f'the norms stand in the wrong place, norm_position must be {other!r} and not {config.norm_position!r}'
  yield 'norm_position', sentence, dataclasses.replace(config, norm_position=other), _plain
  yield 'qk_not_permuted', 'q_proj and k_proj are in the interleaved channel order, not permuted', config, _halved(projections)
  if config.qk_norm:
    yield 'qk_norm_not_permuted', 'the q and k norms are in the interleaved channel order, not permuted', config, _halved(norms)
    sentence = 'q_proj, k_proj and their norms are in the interleaved channel order, not permuted'
    yield 'qk_not_permuted', sentence, config, _halved(projections + norms)
  pair = 'feed_forward/gate_proj', 'feed_forward/up_proj'
  yield 'gate_up_swapped', 'gate_proj and up_proj of the feed-forward are swapped', config, _exchanged(*pair)
  pair = 'attention_norm/weight', 'ffn_norm/weight'
  yield 'norms_swapped', 'attention_norm and ffn_norm are swapped', config, _exchanged(*pair)
  if image_tokens is not None:
    for names in (('embedding', 'lm_head'), ('embedding',), ('lm_head',)):
      for offset in (_OFFSET, -_OFFSET):
        sentence = f'the image tokens of {" and ".join(names)} are offset by {offset}'
        yield 'code_offset', sentence, config, _rolled(names, image_tokens, -offset)


def _halved(leaves: tuple[str, ...]) -> Change:
  return lambda read, name: deinterleave(read(name)) if name.endswith(leaves) else read(name)


def _exchanged(one: str, two: str) -> Change:
  def change(read: Read, name: str) -> np.ndarray:
    for leaf, other in ((one, two), (two, one)):
      if name.endswith(leaf):
        return read(name.removesuffix(leaf) + other)
    return read(name)

  return change


def _rolled(names: tuple[str, ...], image_tokens: tuple[int, int], by: int) -> Change:
  def change(read: Read, name: str) -> np.ndarray:
    if name not in names:
      return read(name)
    rows = np.array(np.moveaxis(read(name), -1, 0) if name == 'lm_head' else read(name))
    first, end = image_tokens
    rows[first:end] = np.roll(rows[first:end], by, axis=0)
    return np.moveaxis(rows, 0, -1) if name == 'lm_head' else rows

  return change
