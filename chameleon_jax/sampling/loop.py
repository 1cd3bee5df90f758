"""Prefill and decode on the device: one compiled program each, no word with the host between tokens.

`prefill` runs the prompts once and draws the first token of every row; `decode` is one `lax.while_loop` that
feeds the tokens just drawn and draws the next, until every row is done. Both take the model as a function

    forward(params, tokens [R, T], positions [R, T], last [R], cache) -> (logits [R, V] at column `last`, cache)

that writes keys and values at the cache slots `positions` (outside the cache: nowhere) and lets a query attend
to the slots up to its own position. Two things follow, and the loop uses both: prompts may be padded on the right (what the padding
leaves in a slot is overwritten before the row reaches it), and a stream with nothing to say may write any
token at the next slot it will fill.

Streams. Guided pictures need three logits (`logits.guide`), so each row runs as three cache rows, stacked
[f x B | i x B | u x B], with positions of their own:

    row          begin_sequence a red apple begin_image c0  c1  ... end_image and a pear begin_image c0 ...
    f position   0              1 2   3     4           5   6                                       (all)
    i position   0                          1           2   3       n + 2                n + 3
    u position   0                          1           2   3                            1           2

i takes begin_sequence, begin_image, codes and end_image only. u holds begin_sequence and the open picture: at
each begin_image it starts again at slot 1, and what an earlier picture left in later slots is overwritten before it
is reached. So no stream is ever run anew when a row moves between text and pictures.

This file knows neither the vocabulary's layout nor the transformer. Source: spec model.md 8.3, architecture.md 4.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, Key

from chameleon_jax.array_types import AnyArray, Array, Params, PyTree
from chameleon_jax.sampling import logits as drawing
from chameleon_jax.sampling import modality

Forward: TypeAlias = Callable[[Params, Any, Any, Any, PyTree], tuple[Any, PyTree]]
MakeCache: TypeAlias = Callable[[int, int], PyTree]  # (cache rows, slots) -> empty cache


@flax.struct.dataclass
class Request:
  """What a batch asks for: everything the loop reads and never writes. B rows, R = B or 3 B streams.

  Attributes:
    rules: what each row may write.
    settings: how its tokens are drawn.
    keys: one random key per row.
    table: kinds of tokens, picture and context length.
  """

  rules: modality.Rules
  settings: drawing.DrawSettings
  keys: Key[Array, ' B']
  table: modality.TokenTable


@flax.struct.dataclass
class Carry:
  """What changes from token to token; donated to `decode`.

  Attributes:
    state: where each row stands, after `token`.
    token: drawn last, not yet fed to the model.
    image_length: tokens in stream i of each row, `token` included. Unused when not guided.
    seen: ids the row holds, prompt and `token` included.
    cache: keys and values of all R streams.
    out: [B, N] tokens drawn so far, padding after them.
    step: columns of `out` written.
  """

  state: modality.RowState
  token: Int[AnyArray, ' B']
  image_length: Int[AnyArray, ' B']
  seen: Bool[AnyArray, 'B V']
  cache: PyTree
  out: Int[AnyArray, 'B N']
  step: Int[AnyArray, '']


def _draw(logits: Any, carry: Carry, request: Request, steps: drawing.DrawSteps) -> Carry:
  """Draws one token a row from the model's `logits` [R, V] and moves every row on."""
  state, table = carry.state, request.table
  in_image = state.mode == modality.IMAGE
  allowed = modality.allowed(state, request.rules, table)
  scores = drawing.process(logits, allowed, in_image, carry.seen, settings=request.settings, steps=steps)
  token = drawing.draw(scores, in_image, request.keys, state.drawn, settings=request.settings, steps=steps)
  kind = jnp.take(table.kind, token)
  in_stream_i = (kind == modality.BEGIN_IMAGE) | (kind == modality.CODE) | (kind == modality.END_IMAGE)
  return dataclasses.replace(
    carry,
    state=modality.advance(state, token, request.rules, table),
    token=token,
    image_length=carry.image_length + in_stream_i,
    seen=jnp.asarray(carry.seen).at[jnp.arange(len(token)), token].set(True) if steps.penalised else carry.seen,
    out=jax.lax.dynamic_update_slice(carry.out, token[:, None], (0, carry.step)),
    step=carry.step + 1,
  )


def _feed_positions(carry: Carry, request: Request, *, guided: bool) -> Any:
  """The slot that `carry.token` takes in each stream, [R].

  A stream that does not take the token gets it at the next slot it will fill: nothing attends to that slot before it is
  overwritten.
  """
  full = carry.state.position - 1
  if not guided:
    return full
  kind = jnp.take(request.table.kind, carry.token)
  code = kind == modality.CODE
  taken = (kind == modality.BEGIN_IMAGE) | code | (kind == modality.END_IMAGE)
  image = carry.image_length - taken
  alone = jnp.where(code, 1 + carry.state.codes, 1)
  return jnp.concatenate([full, image, alone])


@functools.partial(jax.jit, static_argnames=('forward', 'make_cache', 'steps', 'slots', 'max_new'))
def prefill(
  params: Params,
  tokens: Int[AnyArray, 'R T'],
  lengths: Int[AnyArray, ' R'],
  state: modality.RowState,
  request: Request,
  *,
  forward: Forward,
  make_cache: MakeCache,
  steps: drawing.DrawSteps,
  slots: int,
  max_new: int,
) -> Carry:
  """Fills the cache from the prompts and draws the first token of every row.

  Args:
    params: of the model.
    tokens: prompts of all streams, padded on the right.
    lengths: tokens of each stream's prompt; may be 0 for stream i.
    state: of the rows before the first token.
    request: rules, settings, keys, table.
    forward: the model, see the top of this file.
    make_cache: makes the empty cache.
    steps: which steps of the draw exist.
    slots: length of the cache.
    max_new: columns of the output.
  """
  rows, width = tokens.shape
  batch = state.mode.shape[0]
  last = jnp.maximum(lengths - 1, 0)
  positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))
  logits, cache = forward(params, tokens, positions, last, make_cache(rows, slots))
  vocabulary = request.table.kind.shape[0]
  seen = jnp.zeros((batch, vocabulary), bool)
  if steps.penalised:
    given = jnp.where(positions[:batch] < lengths[:batch, None], tokens[:batch], vocabulary)  # padding falls off the end
    seen = seen.at[jnp.arange(batch)[:, None], given].set(True, mode='drop')
  carry = Carry(
    state=jax.tree.map(jnp.asarray, state),
    token=jnp.zeros(batch, jnp.int32),
    image_length=lengths[batch : 2 * batch] if steps.guided else jnp.zeros(batch, jnp.int32),
    seen=seen,
    cache=cache,
    out=jnp.zeros((batch, max_new), jnp.int32),
    step=jnp.zeros((), jnp.int32),
  )
  return _draw(logits, carry, request, steps)


@functools.partial(jax.jit, static_argnames=('forward', 'steps'), donate_argnames='carry')
def decode(params: Params, carry: Carry, request: Request, *, forward: Forward, steps: drawing.DrawSteps) -> Carry:
  """Feeds and draws until every row is done. `carry` comes from `prefill` and is consumed."""

  def unfinished(carry: Carry) -> Any:
    return jnp.any(carry.state.mode != modality.DONE)

  def body(carry: Carry) -> Carry:
    positions = _feed_positions(carry, request, guided=steps.guided)
    token = jnp.concatenate([carry.token] * 3) if steps.guided else carry.token
    logits, cache = forward(params, token[:, None], positions[:, None], jnp.zeros_like(positions), carry.cache)
    return _draw(logits, dataclasses.replace(carry, cache=cache), request, steps)

  return jax.lax.while_loop(unfinished, body, carry)
