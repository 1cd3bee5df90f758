"""The compiled programs of the sampler: fill the cache from a prompt, decode many steps, move cache rows about.

Both `fill` and `decode` take the model as a function

    forward(params, tokens [R, T], positions [R, T], cache) -> (hidden [R, T, D], cache)

that writes keys and values at the cache slots `positions` (outside the cache: nowhere) and lets a query attend to the
slots up to its own position; `unembed(params, hidden) -> logits [R, T, V]` goes with it. Two things follow, and this file
uses both: prompts may be padded on the right (what the padding leaves in a slot is overwritten before the row
reaches it), and a stream with nothing to say may write any token at the next slot it will fill.

Rows and streams. A **row** is one request; a **stream** is one row of the cache. Every row has the stream f, the whole of
what it holds. Guided pictures need three logits (`logits.guide`), so a row inside a guided picture has streams i and u too,
with positions of their own:

    row          begin_sequence a red apple begin_image c0  c1  ... end_image and a pear begin_image c0 ...
    f position   0              1 2   3     4           5   6                                       (all)
    i position   0                          1           2   3       n + 2                n + 3
    u position   0                          1           2   3                            1           2

i takes begin_sequence, begin_image, codes and end_image only. u holds begin_sequence and the open picture: at
each begin_image it starts again at slot 1, and what an earlier picture left in later slots is overwritten before it
is reached. So no stream is ever run anew when a row moves between text and pictures. Where the streams lie, and
which of them exist, is the host's business (`stream_pool.py`): it hands in `Places`. A guided row that opens a picture
before its streams are there ends the run of steps, so that the host can provide them.

A step feeds the token of every row and draws the next; so the last token of a prompt is fed by the first step, and
`fill` draws nothing. This file knows neither the vocabulary's layout nor the transformer. Source: spec model.md 8.3,
architecture.md 4.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, UInt8

from chameleon_jax.array_types import AnyArray, Params, PyTree
from chameleon_jax.sampling import logits as drawing
from chameleon_jax.sampling import modality

Forward: TypeAlias = Callable[[Params, Any, Any, PyTree], tuple[Any, PyTree]]
Unembed: TypeAlias = Callable[[Params, Any], Any]

STREAM_F, STREAM_I, STREAM_U, STREAM_NONE = range(4)

# Bits of `Carry.marks`.
SEEN, BANNED, STOP = 1, 2, 4

# Values of `Carry.failed`.
NOT_FINITE, NOTHING_ALLOWED = 1, 2


@flax.struct.dataclass
class Places:
  """Where the streams lie. B rows, R streams.

  Attributes:
    f, i, u: [B], the stream that gives each of the three logits. f where a row has no other; the same stream for i and u
      where they hold the same tokens.
    ready: [B], whether the row could open a picture now without new streams.
    owner: [R], the row of each stream; any row for a stream that is not used.
    kind: [R], STREAM_F, STREAM_I, STREAM_U, or STREAM_NONE for one that takes no part in this run.
  """

  f: Int[AnyArray, ' B']
  i: Int[AnyArray, ' B']
  u: Int[AnyArray, ' B']
  ready: Bool[AnyArray, ' B']
  owner: Int[AnyArray, ' R']
  kind: Int[AnyArray, ' R']


@flax.struct.dataclass
class Request:
  """What the rows ask for: everything the loop reads and never writes.

  Attributes:
    rules: what each row may write.
    settings: how its tokens are drawn.
    key_data: raw data of one random key per row.
    fixed: [B, n] tokens of the first picture that are given, -1 where the model is free.
    places: streams of the rows.
    table: kinds of tokens, picture and context length.
  """

  rules: modality.Rules
  settings: drawing.DrawSettings
  key_data: AnyArray
  fixed: Int[AnyArray, 'B n']
  places: Places
  table: modality.TokenTable


@flax.struct.dataclass
class Carry:
  """What changes from step to step.

  Attributes:
    state: where each row stands, after `token`.
    token: of each row, drawn last (or the prompt's last), not yet fed to the model.
    image_length: tokens in stream i of each row, `token` included.
    marks: bits SEEN, BANNED and STOP of every id, by row.
    failed: 0, or why a row was ended: NOT_FINITE, NOTHING_ALLOWED.
    cache: keys and values of all R streams.
    out: [B, K] tokens drawn in this run, padding after them.
    step: steps of this run.
    starved: whether a row opened a picture for which it has no streams.
  """

  state: modality.RowState
  token: Int[AnyArray, ' B']
  image_length: Int[AnyArray, ' B']
  marks: UInt8[AnyArray, 'B V']
  failed: Int[AnyArray, ' B']
  cache: PyTree
  out: Int[AnyArray, 'B K']
  step: Int[AnyArray, '']
  starved: Bool[AnyArray, '']


def _draw(logits: Any, carry: Carry, request: Request, steps: drawing.DrawSteps) -> Carry:
  """Draws one token a row from `logits` ([B, V], or [3 B, V] when guided) and moves every row on."""
  state, table, rules = carry.state, request.table, request.rules
  batch = carry.token.shape[0]
  in_image, active = state.mode == modality.IMAGE, state.mode != modality.DONE
  owes = (state.mode == modality.TEXT) & (state.images < rules.min_images)  # such a row may not end: no stop token
  may = modality.allowed(state, rules, table, (carry.marks & jnp.where(owes, BANNED | STOP, BANNED)[:, None].astype(jnp.uint8)) > 0)
  keys = jax.random.wrap_key_data(jnp.asarray(request.key_data))
  seen = (carry.marks & SEEN) > 0
  scores = drawing.process(logits, may, in_image, seen, settings=request.settings, steps=steps)
  token = drawing.draw(scores, in_image, keys, state.drawn, settings=request.settings, steps=steps)

  n = table.n_image_tokens
  given = jnp.take_along_axis(request.fixed, jnp.minimum(state.codes, n - 1)[:, None], axis=1)[:, 0]
  inside = in_image & (state.codes < n)
  is_given = inside & (state.images == 1) & (given >= 0)
  token = jnp.where(is_given, given, token)

  broken = jnp.any(jnp.isnan(logits) | (logits == jnp.inf), axis=-1)
  broken = jnp.any(broken.reshape(-1, batch) & jnp.stack([jnp.ones_like(in_image), in_image, in_image])[: 3 if steps.guided else 1], axis=0)
  nothing = ~jnp.any(may, axis=-1) & ~is_given
  failed = jnp.where(active & broken, NOT_FINITE, jnp.where(active & nothing, NOTHING_ALLOWED, 0))
  failed = jnp.where(carry.failed > 0, carry.failed, failed)

  rows = jnp.arange(batch)
  moved = modality.advance(state, token, rules, table, stop=(carry.marks[rows, token] & STOP) > 0)
  lost = failed > 0  # such a row ends as it was before this token
  halted = dataclasses.replace(state, mode=jnp.full_like(state.mode, modality.DONE))
  moved = jax.tree.map(lambda old, new: jnp.where(lost, old, new), halted, moved)
  kind = jnp.take(table.kind, token)
  in_stream_i = (kind == modality.BEGIN_IMAGE) | (kind == modality.CODE) | (kind == modality.END_IMAGE)
  opened = (kind == modality.BEGIN_IMAGE) & (moved.mode == modality.IMAGE)
  return dataclasses.replace(
    carry,
    state=moved,
    token=token,
    image_length=carry.image_length + (in_stream_i & active),
    marks=jnp.asarray(carry.marks).at[rows, token].set(carry.marks[rows, token] | SEEN) if steps.penalised else carry.marks,
    failed=failed,
    out=jax.lax.dynamic_update_slice(carry.out, token[:, None], (0, carry.step)),
    step=carry.step + 1,
    starved=jnp.any(opened & ~request.places.ready),
  )


def _feed_positions(carry: Carry, request: Request) -> Any:
  """The slot that its row's token takes in each stream, [R].

  A stream that does not take the token gets it at the next slot it will fill: nothing attends to that slot before it is
  overwritten. A stream that takes no part gets it outside the cache.
  """
  kind = jnp.take(request.table.kind, carry.token)
  code = kind == modality.CODE
  taken = (kind == modality.BEGIN_IMAGE) | code | (kind == modality.END_IMAGE)
  outside = jnp.full_like(carry.token, np.iinfo(np.int32).max // 2)
  by_kind = jnp.stack([carry.state.position - 1, carry.image_length - taken, jnp.where(code, 1 + carry.state.codes, 1), outside])
  places = request.places
  return by_kind[places.kind, places.owner]


@functools.partial(jax.jit, static_argnames=('forward', 'unembed', 'steps', 'max_steps'), donate_argnames='cache')
def decode(
  params: Params,
  cache: PyTree,
  state: modality.RowState,
  rows: dict[str, Any],
  request: Request,
  limits: Int[AnyArray, '2'],
  *,
  forward: Forward,
  unembed: Unembed,
  steps: drawing.DrawSteps,
  max_steps: int,
) -> Carry:
  """Feeds and draws until a limit is reached, every row is done, or a row needs streams that it has not.

  Args:
    params: of the model.
    cache: of all streams; consumed.
    state: of the rows.
    rows: `token`, `image_length` and `marks` as in `Carry`.
    request: what the rows ask for.
    limits: steps at most (`max_steps` or less), and after how many rows that end the run stops.
    forward, unembed: the model, see the top of this file.
    steps: which steps of the draw exist.
    max_steps: columns of the output.
  """
  batch = state.mode.shape[0]
  n_active = jnp.sum(state.mode != modality.DONE)
  places = request.places

  def unfinished(carry: Carry) -> Any:
    active = jnp.sum(carry.state.mode != modality.DONE)
    return (carry.step < limits[0]) & (active > 0) & ~carry.starved & (n_active - active < limits[1])

  def body(carry: Carry) -> Carry:
    token = jnp.take(carry.token, places.owner)
    hidden, cache = forward(params, token[:, None], _feed_positions(carry, request)[:, None], carry.cache)
    if steps.guided:  # each stream is unembedded once, though a row may read it twice
      logits = jnp.take(unembed(params, hidden)[:, 0], jnp.concatenate([places.f, places.i, places.u]), axis=0)
    else:
      logits = unembed(params, jnp.take(hidden, places.f, axis=0))[:, 0]
    return _draw(logits, dataclasses.replace(carry, cache=cache), request, steps)

  carry = Carry(
    state=jax.tree.map(jnp.asarray, state),
    token=jnp.asarray(rows['token']),
    image_length=jnp.asarray(rows['image_length']),
    marks=jnp.asarray(rows['marks']),
    failed=jnp.zeros(batch, jnp.int32),
    cache=cache,
    out=jnp.zeros((batch, max_steps), jnp.int32),
    step=jnp.zeros((), jnp.int32),
    starved=jnp.zeros((), bool),
  )
  return jax.lax.while_loop(unfinished, body, carry)


@functools.partial(jax.jit, static_argnames='forward', donate_argnames='part')
def fill(
  params: Params, part: PyTree, tokens: Int[AnyArray, 'b T'], starts: Int[AnyArray, ' b'], *, forward: Forward
) -> PyTree:
  """Writes a piece of `b` streams' tokens into their part of the cache, from position `starts` on.

  Padding behind a piece may be any token. Apart from the cache, so that the number of its streams is not part of this program.
  """
  positions = jnp.asarray(starts)[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
  return forward(params, tokens, positions, part)[1]


@functools.partial(jax.jit, donate_argnames='cache')
def put_streams(cache: PyTree, part: PyTree, streams: Int[AnyArray, ' b']) -> PyTree:
  """Overwrites the given rows of the cache, in place; numbers outside it are dropped. The others must differ from each other."""
  return jax.tree.map(lambda whole, new: whole.at[streams].set(new, mode='drop'), cache, part)


@functools.partial(jax.jit, static_argnames='slots')
def resize(cache: PyTree, streams: Int[AnyArray, ' R'], *, slots: int) -> PyTree:
  """A cache of the given streams, in this order, with `slots` slots each (arrays [R, K, S, ...]); numbers outside give any stream."""

  def fitted(whole: Any) -> Any:
    missing = slots - whole.shape[2]
    behind = tuple((0, missing if axis == 2 else 0) for axis in range(whole.ndim))
    return jnp.pad(whole, behind) if missing > 0 else whole[:, :, :slots]

  return jax.tree.map(lambda whole: fitted(jnp.take(whole, jnp.asarray(streams), axis=0, mode='clip')), cache)
