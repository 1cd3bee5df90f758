"""Token lists in, new tokens out: checks prompts, forms batches of bounded shapes, runs the loop, cuts the result.

It knows tokens, not text or pixels: `chameleon_jax.chameleon` turns documents into prompts and results into documents.
Source: architecture.md 4 and spec model.md 8; the released code allows mixed output for one row only, this one
for any number, because modality is state per row.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from chameleon_jax.array_types import Params, PyTree
from chameleon_jax.config import SamplingOptions, TransformerConfig
from chameleon_jax.errors import CheckpointError, PromptError
from chameleon_jax.models.transformer.cache import init_cache
from chameleon_jax.models.transformer.model import Transformer, unstack_layers
from chameleon_jax.sampling import logits as drawing
from chameleon_jax.sampling import loop, modality
from chameleon_jax.tokens.vocabulary import Vocabulary

_MIN_BUCKET = 32


def bucket(n: int, *, smallest: int = 1) -> int:
  """The least power of two that is at least `n` and `smallest` (itself a power of two)."""
  return max(smallest, 1 << max(n - 1, 0).bit_length())


def open_codes(prompt: Int[np.ndarray, ' T'], vocabulary: Vocabulary) -> int | None:
  """Number of codes in the picture that a prompt leaves open, None where it leaves none open.

  ... begin_image c c c   -> 3          ... begin_image   -> 0          ... c c end_image   -> None
  """
  is_code = vocabulary.is_image[prompt]
  run = len(prompt) if is_code.all() else int(np.argmin(is_code[::-1]))
  return run if run < len(prompt) and prompt[len(prompt) - run - 1] == vocabulary.begin_image else None


@functools.lru_cache(maxsize=8)
def _forward(config: TransformerConfig) -> loop.Forward:
  """The transformer as the loop wants it. Cached, so that samplers of one config share compiled programs."""
  model = Transformer(config)

  def forward(params: Params, tokens: Any, positions: Any, last: Any, cache: PyTree) -> tuple[Any, PyTree]:
    outputs: Any = model.apply({'params': params}, tokens, positions=positions, cache=cache, method='hidden')
    hidden, cache, _ = outputs
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)  # the vocabulary projection sees one column
    logits: Any = model.apply({'params': params}, hidden, method='unembed')
    return logits[:, 0], cache

  return forward


@functools.lru_cache(maxsize=8)
def _make_cache(config: TransformerConfig) -> loop.MakeCache:
  return functools.partial(init_cache, config)


def _for_decoding(params: Params, config: TransformerConfig) -> Params:
  """Parameters on the device, one array per layer; what `linear` would cast at every token is cast once."""

  def cast(path: Any, leaf: Any) -> Any:
    name = path[-1].key
    is_matrix = name.endswith('_proj') or name in ('embedding', 'lm_head')
    return jnp.asarray(leaf, config.dtype if is_matrix else None)

  return jax.tree_util.tree_map_with_path(cast, unstack_layers(params) if config.scan_layers else params)


@dataclasses.dataclass(frozen=True)
class _Row:
  """One checked prompt. `index` is its place in the request, `n_new` what it may draw, `open_codes` -1 outside pictures."""

  index: int
  prompt: np.ndarray
  open_codes: int
  n_new: int


class Sampler:
  """A transformer ready to write.

  Compiled programs. Shapes come in powers of two: rows (up to `max_batch_size`), prompt tokens and new tokens
  (each from 32 to `max_seq_len`; the cache holds their sum, `max_seq_len` at most). One prefill program per (rows, prompt, new)
  and one decode program per (rows, cache, new) that occurs, for each set of sampling steps that exists
  (`logits.DrawSteps`); temperatures, scales, seeds, limits and modalities are data and compile nothing. Larger
  requests run in several batches, rows of like length together.
  """

  def __init__(
    self,
    config: TransformerConfig,
    params: Params,
    vocabulary: Vocabulary,
    *,
    n_image_tokens: int,
    max_batch_size: int = 64,
  ):
    """Takes the transformer apart into one array per layer.

    Args:
      config: of the transformer; its `scan_layers` says how `params` are stacked.
      params: plain arrays.
      vocabulary: meaning of the ids.
      n_image_tokens: codes of one picture.
      max_batch_size: rows run together at most, rounded up to a power of two.

    Raises:
      CheckpointError: vocabulary and transformer do not match.
    """
    if config.vocab_size != vocabulary.size:
      raise CheckpointError(f'the vocabulary has {vocabulary.size} ids and the transformer {config.vocab_size}: they are not of one model')
    self.config = dataclasses.replace(config, scan_layers=False, remat='none', dropout=0.0)
    self.params = _for_decoding(params, config)
    self.vocabulary = vocabulary
    self.n_image_tokens = n_image_tokens
    self.max_batch_size = bucket(max_batch_size)
    self._table = modality.token_table(vocabulary, n_image_tokens=n_image_tokens, max_seq_len=config.max_seq_len)
    self._forward = _forward(self.config)
    self._make_cache = _make_cache(self.config)

  def generate_tokens(self, prompts: Sequence[np.ndarray], options: SamplingOptions) -> list[np.ndarray]:
    """Continues every prompt; rows do not influence one another.

    With modalities 'image' begin_image is appended to a prompt that does not end inside a picture, and the result is
    the codes missing from that picture, nothing else. With 'mixed' a prompt that ends inside a picture has it finished
    first. Otherwise a row ends with end_sequence, with end_turn where `options.stop_at_end_turn`, after `options.max_new_tokens`,
    or where the context is full, whichever is first; a prompt that fills the context yields nothing.

    Args:
      prompts: int arrays [T], lengths may differ.
      options: the same for all rows. `seed` and the row's place in `prompts` determine what a row draws.

    Returns:
      int32 arrays of the new tokens, the stop token included.

    Raises:
      PromptError: a prompt is empty, longer than the context, holds ids outside the vocabulary, or the picture it asks for
        fits neither the context nor `options.max_new_tokens`.
    """
    rows = [self._check(index, np.asarray(prompt), options) for index, prompt in enumerate(prompts)]
    rows.sort(key=lambda row: (len(row.prompt), row.index))
    results: dict[int, np.ndarray] = {}
    for start in range(0, len(rows), self.max_batch_size):
      results.update(self._run(rows[start : start + self.max_batch_size], options))
    return [results[index] for index in range(len(rows))]

  def _check(self, index: int, prompt: np.ndarray, options: SamplingOptions) -> _Row:
    """Checks one prompt and finds what it may draw."""
    context, vocabulary = self.config.max_seq_len, self.vocabulary
    if prompt.ndim != 1 or prompt.size == 0 or not np.issubdtype(prompt.dtype, np.integer):
      raise PromptError(f'prompt {index} is empty or no list of token ids; give at least begin_sequence ({vocabulary.begin_sequence})')
    outside = prompt[(prompt < 0) | (prompt >= vocabulary.size)]
    if outside.size:
      raise PromptError(f'prompt {index} holds token id {outside[0]}, outside the vocabulary of {vocabulary.size}')
    prompt = prompt.astype(np.int32)
    codes = open_codes(prompt, vocabulary)
    if codes is None and options.modalities == 'image':
      prompt, codes = np.append(prompt, np.int32(vocabulary.begin_image)), 0
    if len(prompt) > context:
      raise PromptError(f'prompt {index} has {len(prompt)} tokens, the context of this model {context}; shorten it')
    if codes is None:
      return _Row(index, prompt, -1, min(options.max_new_tokens, context - len(prompt)))
    if options.modalities == 'text':
      raise PromptError(f"prompt {index} ends inside a picture, which modalities='text' cannot finish; add end_image or ask for 'mixed'")
    if codes > self.n_image_tokens or (codes == self.n_image_tokens and options.modalities == 'image'):
      raise PromptError(f'prompt {index} ends in a picture of {codes} codes without end_image; a picture has {self.n_image_tokens}')
    needed = self.n_image_tokens - codes + (options.modalities == 'mixed')
    if len(prompt) + needed > context:
      raise PromptError(f'prompt {index} has {len(prompt)} tokens, its picture needs {needed} more, the context is {context}; shorten it')
    if needed > options.max_new_tokens:
      raise PromptError(f'the picture of prompt {index} needs {needed} tokens; raise max_new_tokens, now {options.max_new_tokens}')
    room = needed if options.modalities == 'image' else min(options.max_new_tokens, context - len(prompt))
    return _Row(index, prompt, codes, room)

  def _streams(self, row: _Row, *, guided: bool) -> list[np.ndarray]:
    """The prompts of the row's streams: [f], or [f, i, u] (see `loop`)."""
    if not guided:
      return [row.prompt]
    v = self.vocabulary
    kept = v.is_image[row.prompt] | np.isin(row.prompt, (v.begin_sequence, v.begin_image, v.end_image))
    alone = [v.begin_sequence] if row.open_codes < 0 else [v.begin_sequence, *row.prompt[len(row.prompt) - row.open_codes - 1 :]]
    return [row.prompt, row.prompt[kept], np.array(alone, np.int32)]

  def _run(self, rows: list[_Row], options: SamplingOptions) -> dict[int, np.ndarray]:
    """Runs one batch; returns the new tokens by the rows' places in the request."""
    if max(row.n_new for row in rows) == 0:
      return {row.index: np.zeros(0, np.int32) for row in rows}
    steps = drawing.make_steps(options)
    batch = bucket(len(rows))
    # Rows that fill up the batch are done from the start.
    filled = rows + [dataclasses.replace(rows[0], n_new=0)] * (batch - len(rows))
    streams = [stream for group in zip(*(self._streams(row, guided=steps.guided) for row in filled)) for stream in group]
    lengths = np.array([len(stream) for stream in streams], np.int32)
    context, longest = self.config.max_seq_len, max(len(stream) for stream in streams)
    width = min(bucket(longest, smallest=_MIN_BUCKET), context)
    max_new = min(bucket(max(row.n_new for row in rows), smallest=_MIN_BUCKET), context)
    slots = min(width + max_new, context)
    if steps.guided:  # a prompt without begin_sequence leaves stream u one token longer than the row
      width, slots = max(width, longest), max(slots, self.n_image_tokens + 2)
    tokens = np.full((len(streams), width), self.vocabulary.pad, np.int32)
    for stream, prompt in enumerate(streams):
      tokens[stream, : len(prompt)] = prompt
    state = modality.init_state(
      lengths[:batch],
      open_codes=np.array([row.open_codes for row in filled]),
      remaining=np.array([row.n_new for row in filled]),
    )
    request = loop.Request(
      rules=modality.make_rules(options, batch),
      settings=drawing.make_settings(options, batch),
      keys=drawing.row_keys(options.seed, np.array([row.index for row in filled])),
      table=self._table,
    )
    carry = loop.prefill(
      self.params,
      tokens,
      lengths,
      state,
      request,
      forward=self._forward,
      make_cache=self._make_cache,
      steps=steps,
      slots=slots,
      max_new=max_new,
    )
    carry = loop.decode(self.params, carry, request, forward=self._forward, steps=steps)
    out, drawn = jax.device_get((carry.out, carry.state.drawn))
    return {row.index: out[i, : drawn[i]] for i, row in enumerate(rows)}
