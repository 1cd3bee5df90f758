"""Which streams a request has, and when: f always, i and u for guided pictures (`loop.py` says what they hold).

A row needs i only if the two scales differ, u only if the scale of pictures is not 1: in

    u + s_image (i - u) + s_text (f - i)

the other one cancels out. In the first picture of a row without earlier pictures i and u hold the same tokens, so one
stream serves as both; it becomes i afterwards. A row in text keeps i for its next picture (the pool may set it aside)
and needs no u. Source: spec model.md 8.3.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from chameleon_jax.sampling import loop, modality
from chameleon_jax.sampling.requests import Row, only_pictures
from chameleon_jax.sampling.stream_pool import Stream, StreamPool
from chameleon_jax.tokens.vocabulary import Vocabulary

LEAST_STEPS = 64  # for which a row gets slots at once


def provide_streams(rows: Sequence[Row], pool: StreamPool, vocabulary: Vocabulary) -> None:
  """Sees to it that every row has the streams that its next token needs. New ones have to be filled before they are used."""
  idle: list[Stream] = []
  wanted: list[tuple[Row, int]] = []
  for row in rows:
    if row.f is None:
      wanted.append((row, loop.STREAM_F))
    wanted += [(row, kind) for kind in _missing(row, vocabulary)]
    idle += _idle(row, pool, vocabulary)
  soon = max(row.room(max(LEAST_STEPS, len(row.tokens))) for row in rows)  # at most a compilation for every doubling
  pool.make_room(len(wanted), soon, finally_slots=max(row.room() for row in rows), idle=idle)
  for row, kind in wanted:
    if kind == loop.STREAM_F:
      row.f = pool.add(row.ticket, kind, np.array(row.tokens[:-1]))
    elif kind == loop.STREAM_U:
      open_picture = row.tokens[len(row.tokens) - 1 - int(row.state.codes[0]) :]
      row.u = pool.add(row.ticket, kind, np.array([vocabulary.begin_sequence, *open_picture[:-1]]))
    elif row.i is None:
      row.i = pool.add(row.ticket, kind, only_pictures(np.array(row.tokens), vocabulary)[:-1])
    else:
      pool.bring_back(row.i)


def _missing(row: Row, vocabulary: Vocabulary) -> list[int]:
  """Kinds of streams that a row inside a guided picture has not (in the cache)."""
  options, pictures = row.options, int(row.state.images[0])
  if row.mode != modality.IMAGE or not options.guided or row.shared_picture == pictures:
    return []
  wants_i, wants_u = _wants(row)
  if wants_i and wants_u and row.i is None:
    before = only_pictures(np.array(row.tokens), vocabulary)[: -1 - int(row.state.codes[0])]
    if before.tolist() == [vocabulary.begin_sequence]:
      row.shared_picture = pictures
      return [loop.STREAM_I]
  missing = [loop.STREAM_I] if wants_i and (row.i is None or row.i.place is None) else []
  return missing + ([loop.STREAM_U] if wants_u and (row.u is None or row.u.place is None) else [])


def _wants(row: Row) -> tuple[bool, bool]:
  """Whether the row's scales leave i and u in the formula."""
  return row.options.guidance_text != row.options.guidance_image, row.options.guidance_image != 1


def _idle(row: Row, pool: StreamPool, vocabulary: Vocabulary) -> list[Stream]:
  """Streams in the cache that the row does not use while it is in text; those it will never use again are released.

  The token that ends a picture must have been fed to i first, hence the look at the last token.
  """
  last = row.tokens[-1]
  if row.mode == modality.IMAGE or vocabulary.is_image[last] or last in (vocabulary.begin_image, vocabulary.end_image):
    return []
  options = row.options
  exhausted = options.max_images is not None and int(row.state.images[0]) >= options.max_images
  if exhausted or options.modalities != 'mixed':
    for stream in (row.i, row.u):
      if stream is not None:
        pool.release(stream)
    row.i = row.u = None
  return [stream for stream in (row.i, row.u) if stream is not None and stream.place is not None]


def waits(row: Row) -> bool:
  """Whether a stream of the row is still to be filled."""
  return any(stream is not None and len(stream.pending) > 0 for stream in (row.f, row.i, row.u))


def places(row: Row) -> tuple[Any, ...]:
  """f, i, u (None where it has none in the cache) and whether the row could open a picture now without new streams."""
  i, u = (stream if stream is not None and stream.place is not None else None for stream in (row.i, row.u))
  wants_i, wants_u = _wants(row)
  ready = not row.options.guided or ((i is not None or not wants_i) and (u is not None or not wants_u))
  return row.f, i or u, u or i, ready


def release(row: Row, pool: StreamPool) -> None:
  """Gives back all streams of a row that has ended."""
  for stream in (row.f, row.i, row.u):
    if stream is not None:
      pool.release(stream)
  row.f = row.i = row.u = None
