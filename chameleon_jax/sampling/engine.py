"""Requests in, new tokens out: a queue, rows that share compiled decode steps, and reports of what each has gained.

    engine = Engine(config, params, vocabulary, n_image_tokens=1024)
    ticket = engine.submit(prompt, options)
    while engine.pending:
      for progress in engine.advance():
        ...                                       # progress.ticket, .tokens, .finished

Requests enter free rows while others are under way, and every row has its own state, limits, settings, guidance, seed and
stop tokens: what a row draws does not depend on which rows share its batch. One `advance` admits, fills in a piece of
the prompts that wait, runs up to `max_steps` steps on the device, and speaks with the device once.

Compiled programs. One `fill` per (prompts filled together, width, slots) and one `decode` per (rows, streams, slots, steps of the
draw that exist) that occurs. Sizes come from the short series of `stream_pool.py`; temperatures, scales, seeds, limits,
constraints and modalities are data and compile nothing; a program that exists is preferred to one that would fit a little
better. With s = log2(max_seq_len / 16) sizes of slots that is at most 9 s fills, and, since streams are 1 to 4 times the rows,
at most 3 (log2(max_rows) + 1) s decodes for each of the 12 sets of steps. In practice a handful.

It knows tokens, not text or pixels: `chameleon_jax.chameleon` turns documents into prompts and results into documents.
Source: architecture.md 4 and spec model.md 8; the released code allows mixed output for one row only, this one for
any number, because modality is state per row.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from chameleon_jax.array_types import Params, PyTree
from chameleon_jax.config import CacheDtype, SamplingOptions, TransformerConfig
from chameleon_jax.errors import CheckpointError, PromptError, SamplingError
from chameleon_jax.models.transformer.cache import check_cache_dtype, init_cache
from chameleon_jax.models.transformer.model import Transformer, decoding_params
from chameleon_jax.sampling import guidance, loop, modality
from chameleon_jax.sampling import logits as drawing
from chameleon_jax.sampling.requests import Limits, Progress, Row
from chameleon_jax.sampling.stream_pool import LIGHT_BYTES, MakeCache, StreamPool, batch_shards, power_of_two, size
from chameleon_jax.tokens.vocabulary import Vocabulary

MAX_STEPS = 256
_STEPS_WHILE_FILLING = 32


@dataclasses.dataclass(frozen=True)
class ModelFunctions:
  """A model as the sampler sees it: three pure functions, described in `loop` and `stream_pool`; and what has been compiled for it.

  Attributes:
    forward, unembed, make_cache: the functions.
    compiled: (rows, streams, slots, codes of a picture, steps of the draw) of every run so far.
    cache_sizes: (streams, slots) of every cache so far.
  """

  forward: loop.Forward
  unembed: loop.Unembed
  make_cache: MakeCache
  compiled: set[tuple[Any, ...]] = dataclasses.field(default_factory=set, compare=False)
  cache_sizes: set[tuple[int, int]] = dataclasses.field(default_factory=set, compare=False)


@functools.lru_cache(maxsize=8)
def model_functions(config: TransformerConfig, cache_dtype: CacheDtype | None) -> ModelFunctions:
  """The transformer as the sampler wants it. Cached, so that engines of one config and type of cache share compiled programs."""
  model = Transformer(config)

  def forward(params: Params, tokens: Any, positions: Any, cache: PyTree) -> tuple[Any, PyTree]:
    outputs: Any = model.apply({'params': params}, tokens, positions=positions, cache=cache, method='hidden')
    return outputs[0], outputs[1]

  def unembed(params: Params, hidden: Any) -> Any:
    return model.apply({'params': params}, hidden, method='unembed')

  return ModelFunctions(forward, unembed, jax.jit(functools.partial(init_cache, config, dtype=cache_dtype), static_argnums=(0, 1)))


def _on_host(tree: PyTree) -> PyTree:
  """Numpy arrays; on several hosts, which then run the same requests in step, all of them get the whole."""

  def fetched(leaf: Any) -> Any:
    here = leaf.is_fully_addressable or leaf.is_fully_replicated
    return leaf if here else multihost_utils.process_allgather(leaf, tiled=True)

  return jax.device_get(jax.tree.map(fetched, tree))


class Engine:
  """A transformer that writes for many requests at once.

  Attributes:
    syncs: how often the host has waited for the device: once in each `advance` that ran steps.
    steps: decode steps run on the device.
    decoded: tokens drawn, over all rows.
  """

  def __init__(
    self,
    config: TransformerConfig,
    params: Params,
    vocabulary: Vocabulary,
    *,
    n_image_tokens: int,
    max_rows: int = 64,
    max_prompt_piece: int = 512,
    mesh: Mesh | None = None,
    cache_dtype: CacheDtype | None = None,
    functions: ModelFunctions | None = None,
  ):
    """Takes the transformer apart into one array per layer.

    Args:
      config: of the transformer; its `scan_layers` says how `params` are stacked.
      params: plain arrays; on a mesh, if they lie on one.
      vocabulary: meaning of the ids.
      n_image_tokens: codes of one picture.
      max_rows: requests under way together at most.
      max_prompt_piece: tokens of a prompt that are filled in between two runs of steps, rounded up to a power of two.
      mesh: the mesh of `params`; by default found from them.
      cache_dtype: of keys and values, see `cache.init_cache`; 'int8' has a scale for each token and head.
      functions: the model, by default the transformer of `config`; `params` then go to it as they are, and it makes the cache.

    Raises:
      CheckpointError: vocabulary and transformer do not match.
      ConfigError: there is no such type of cache.
    """
    if config.vocab_size != vocabulary.size:
      raise CheckpointError(f'the vocabulary has {vocabulary.size} ids and the transformer {config.vocab_size}: they are not of one model')
    check_cache_dtype(cache_dtype)
    self.config = dataclasses.replace(config, scan_layers=False, remat='none', dropout=0.0)
    self.params = decoding_params(params, config) if functions is None else params
    self.vocabulary = vocabulary
    self.max_rows = max_rows
    found, self._shards = batch_shards(self.params)
    self._mesh = mesh or found
    self._limits = Limits(vocabulary, n_image_tokens, config.max_seq_len)
    self._table = modality.token_table(vocabulary, n_image_tokens=n_image_tokens, max_seq_len=config.max_seq_len)
    self._functions = functions or model_functions(self.config, cache_dtype)
    self._pool = StreamPool(
      self._functions.make_cache,
      forward=self._functions.forward,
      max_slots=max(config.max_seq_len, n_image_tokens + 2),
      known=self._functions.cache_sizes,
      multiple=self._shards,
      piece=min(power_of_two(max_prompt_piece), config.max_seq_len),
      light_bytes=max(sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)) // 8, LIGHT_BYTES),
    )
    self._queue: collections.deque[Row] = collections.deque()
    self._rows: list[Row] = []
    self._held: list[Progress] = []
    self._n_submitted = 0
    self.syncs = self.steps = self.decoded = 0

  def submit(
    self, prompt: np.ndarray, options: SamplingOptions = SamplingOptions(), *, row: int = 0, name: str = 'the prompt'
  ) -> int:
    """Queues a request; nothing runs before `advance`.

    With modalities 'image' begin_image is appended to a prompt that does not end inside a picture, and the result is
    the codes missing from that picture, nothing else. With 'mixed' a prompt that ends inside a picture has it finished
    first. Otherwise a row ends with end_sequence, with end_turn where `options.stop_at_end_turn`, with one of
    `options.stop_tokens`, after `options.max_new_tokens`, or where the context is full, whichever is first; a prompt that
    fills the context yields nothing.

    Args:
      prompt: int [T].
      options: of this request.
      row: folded into the seed: requests of one seed differ by it.
      name: what messages call the prompt.

    Returns:
      The ticket that `Progress` and `cancel` know the request by.

    Raises:
      PromptError: this request cannot be done; the others are not touched.
    """
    ticket = self._n_submitted
    self._queue.append(Row(ticket, prompt, options, row=row, limits=self._limits, name=name))
    self._n_submitted += 1
    return ticket

  def cancel(self, ticket: int) -> None:
    """Ends a request; its last report says 'cancelled'. Nothing happens to one that is not under way."""
    for row in (*self._queue, *self._rows):
      if row.ticket == ticket:
        row.cancelled = True

  @property
  def pending(self) -> bool:
    """Whether requests are queued or under way."""
    return bool(self._queue or self._rows or self._held)

  def advance(self, max_steps: int = MAX_STEPS) -> list[Progress]:
    """Admits requests, runs up to `max_steps` steps, reports every request that gained tokens or finished."""
    with jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext():
      reports = self._held + self._retire({})
      self._held = []
      while self._queue and len(self._rows) < self.max_rows:
        self._rows.append(self._queue.popleft())
      reports += self._retire({})  # what came in finished or cancelled
      if not self._rows:
        return reports
      guidance.provide_streams(self._rows, self._pool, self.vocabulary)
      still_filling = self._pool.fill(self.params)
      ready = [row for row in self._rows if not guidance.waits(row)]
      failed = self._run(ready, min(max_steps, MAX_STEPS, _STEPS_WHILE_FILLING if still_filling else MAX_STEPS)) if ready else {}
      return reports + self._retire(failed)

  def _run(self, rows: list[Row], max_steps: int) -> dict[int, int]:
    """Runs steps for the given rows; returns the tickets of those that failed, with the reason."""
    found = [guidance.places(row) for row in rows]
    needed = drawing.make_steps([row.options for row in rows], guided=any(i is not None for _, i, _, _ in found))
    batch, steps = self._program(len(rows), needed)
    found += found[:1] * (batch - len(rows))
    done = dataclasses.replace(rows[0].state, mode=np.array([modality.DONE], np.int32))
    padded = rows + [rows[0]] * (batch - len(rows))  # rows that fill up the batch are done from the start
    states = [row.state for row in rows] + [done] * (batch - len(rows))
    options = [row.options for row in padded]
    max_steps = min(max_steps, self._pool.steps_within([(row.room(0), row.room()) for row in rows]))
    carry = loop.decode(
      self.params,
      self._pool.cache,
      jax.tree.map(lambda *leaves: np.concatenate(leaves), *states),
      {
        'token': np.array([row.tokens[-1] for row in padded], np.int32),
        'image_length': np.array([row.image_length for row in padded], np.int32),
        'marks': np.stack([row.marks for row in padded]),
      },
      loop.Request(
        rules=modality.make_rules(options),
        settings=drawing.make_settings(options),
        key_data=np.stack([row.key_data for row in padded]),
        fixed=np.stack([row.fixed for row in padded]),
        places=self._pool.places(found, [row.ticket for row in rows]),
        table=self._table,
      ),
      np.array([max_steps, self._enough_ended(len(rows))], np.int32),
      forward=self._functions.forward,
      unembed=self._functions.unembed,
      steps=steps,
      max_steps=MAX_STEPS,
    )
    self._pool.cache = carry.cache
    state, out, image_length, failed, n_steps = _on_host((carry.state, carry.out, carry.image_length, carry.failed, carry.step))
    self.syncs += 1
    self.steps += int(n_steps)
    for place, row in enumerate(rows):
      n_new = int(state.drawn[place] - row.state.drawn[0])
      self.decoded += n_new
      row.take(jax.tree.map(lambda leaf, place=place: leaf[place : place + 1], state), out[place, :n_new], int(image_length[place]))
    return {row.ticket: int(failed[place]) for place, row in enumerate(rows) if failed[place]}

  def _enough_ended(self, n_rows: int) -> int:
    """Rows whose end stops a run: one makes room for a request that waits; otherwise as many as let the cache shrink."""
    if self._queue:
      return 1
    if self._pool.heavy:
      return max(n_rows // 2, 1)
    return n_rows * 3 // 4 if n_rows >= 4 else n_rows

  def _program(self, n_rows: int, steps: drawing.DrawSteps) -> tuple[int, drawing.DrawSteps]:
    """Rows and steps of the program to run: one that has been compiled before, if it does no more than a few times the work.

    A step that no row needs changes nothing (`logits.DrawSteps`), and rows beyond `n_rows` are done from the start.
    """
    shape = (self._pool.n_streams, self._pool.slots, self._limits.n_image_tokens)
    known = [
      (batch, has)
      for batch, *rest, has in self._functions.compiled
      if tuple(rest) == shape and n_rows <= batch <= 4 * n_rows * self._shards and has.covers(steps)
    ]
    batch, chosen = min(known, default=(size(n_rows, multiple=self._shards), steps), key=lambda found: (found[0], found[1].count))
    self._functions.compiled.add((batch, *shape, chosen))
    return batch, chosen

  def _retire(self, failed: dict[int, int]) -> list[Progress]:
    """Reports, and lets go of rows that have ended."""
    reports = []
    for rows in (self._rows, self._queue):
      for row in list(rows):
        progress = row.report(vocabulary=self.vocabulary, failed=failed.get(row.ticket, 0)) if rows is self._rows or row.cancelled else None
        if progress is None:
          continue
        reports.append(progress)
        if progress.finished:
          rows.remove(row)
          guidance.release(row, self._pool)
    if not self._rows:
      self._pool.forget_size()
    return reports

  def generate_tokens(self, prompts: Sequence[np.ndarray], options: SamplingOptions | Sequence[SamplingOptions]) -> list[np.ndarray]:
    """Continues every prompt, see `submit`.

    Args:
      prompts: int arrays [T], lengths may differ.
      options: the same for all, or one for each. Their seed and the row's place in `prompts` determine what a row draws.

    Returns:
      int32 arrays of the new tokens, the stop token included.

    Raises:
      PromptError: a request cannot be done; nothing has run.
      SamplingError: some rows failed while they were sampled; it carries what the others wrote.
    """
    each = [options] * len(prompts) if isinstance(options, SamplingOptions) else list(options)
    if len(each) != len(prompts):
      raise PromptError(f'{len(prompts)} prompts and {len(each)} options; give one for all, or one for each')
    tickets: dict[int, int] = {}
    try:
      for place, (prompt, option) in enumerate(zip(prompts, each)):
        tickets[self.submit(prompt, option, row=place, name=f'prompt {place}')] = place
    except PromptError:
      for _ in tickets:
        self._queue.pop()
      raise
    written: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in prompts]
    failures: dict[int, str] = {}
    n_ended = 0
    foreign: list[Progress] = []  # of requests submitted before: for whoever asks next
    while n_ended < len(prompts):
      for progress in self.advance():
        if progress.ticket not in tickets:
          foreign.append(progress)
          continue
        place = tickets[progress.ticket]
        written[place].append(progress.tokens)
        n_ended += progress.finished is not None
        if progress.error is not None:
          failures[place] = progress.error
    self._held = foreign
    results = [np.concatenate(parts) for parts in written]
    if failures:
      raise SamplingError(failures, results)
    return results
