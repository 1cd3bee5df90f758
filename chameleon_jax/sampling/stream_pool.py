"""The rows of the cache: which stream of which request lies where, grown and shrunk as requests come and go.

A request holds one stream while it writes text and up to three inside a guided picture (`loop.py`). Stream i has to
outlive its picture, since the next one goes on from it; while its request is in text it lies idle, and is set aside
(copied out of the cache) as soon as that lets the cache shrink, so that decoding never pays for it:

    one request     text        picture       text          picture
    cache rows      f           f i  (i = u)  f             f i u
    set aside                                 i

Sizes. The cache has R streams of S slots: R is a power of two (times the mesh's batch shards), S a power of two from 32 up
to the model's context. Every step reads all of it, and every size costs a compilation. So it depends on its weight beside
the parameters, which every step reads too. A light cache (`light_bytes`) gets the slots that will be needed in the end at
once, and shrinks only where the smaller size has been used before or is a quarter. A heavy one gets what the coming steps
need, grows as rows grow, and shrinks by halves as rows end. Prompts are filled in pieces of 32, 128 or 512 tokens, 1, 4 or
16 prompts at a time.

This file knows streams and slots; it knows neither tokens' meaning nor how they are drawn.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from chameleon_jax.array_types import Params, PyTree
from chameleon_jax.sampling import loop

MakeCache: TypeAlias = Callable[[int, int], PyTree]  # (streams, slots) -> empty cache of arrays [R, K, S, ...]

MIN_SLOTS = 32
LIGHT_BYTES = 1 << 20  # a cache below it is light beside any parameters
FILL_ROWS = 16


def power_of_two(n: int, *, smallest: int = 1) -> int:
  """The least power of two that is at least `n` and `smallest` (itself a power of two)."""
  return max(smallest, 1 << max(n - 1, 0).bit_length())


def power_of_four(n: int) -> int:
  """The least power of four that is at least n."""
  return 1 << 2 * (((max(n, 1) - 1).bit_length() + 1) // 2)


def size(n: int, *, multiple: int = 1) -> int:
  """The least power of two times `multiple` that is at least n."""
  return multiple * power_of_two(-(-n // multiple))


@dataclasses.dataclass(eq=False)
class Stream:
  """One stream: whose it is, of which kind, where it lies, and what has still to be filled in.

  Attributes:
    owner: whatever the caller knows its request by.
    kind: loop.STREAM_F, STREAM_I or STREAM_U.
    place: row of the cache, None while set aside.
    pending: tokens to fill in before the stream can be decoded, from `filled` on.
    filled: tokens filled in by the pool.
    aside: keys and values, while set aside.
  """

  owner: Hashable
  kind: int
  place: int | None = None
  pending: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
  filled: int = 0
  aside: PyTree = None

  @property
  def index(self) -> int:
    """Its row of the cache; it must be there."""
    assert self.place is not None, 'the stream is set aside'
    return self.place


class StreamPool:
  """The cache of a sampler and its streams."""

  def __init__(
    self,
    make_cache: MakeCache,
    *,
    forward: loop.Forward,
    max_slots: int,
    known: set[tuple[int, int]],
    multiple: int = 1,
    piece: int = 512,
    light_bytes: int = LIGHT_BYTES,
  ):
    """Makes a pool without a cache; the first stream makes one.

    Args:
      make_cache: makes an empty cache.
      forward: the model, see `loop`.
      max_slots: slots a stream can ever need.
      known: streams and slots of caches used before; added to.
      multiple: the number of streams is a multiple of it (batch shards of a mesh).
      piece: tokens of a prompt that are filled in at once, at most.
      light_bytes: up to this size of a cache, the number of programs counts for more than the size.
    """
    self._make_cache = make_cache
    self._forward = forward
    self._max_slots = max_slots
    self._multiple = multiple
    self._piece = piece
    self._known = known
    self._light_bytes = light_bytes
    least = jax.make_jaxpr(functools.partial(make_cache, multiple, MIN_SLOTS))().out_avals
    self._slot_bytes = sum(array.size * array.dtype.itemsize for array in least) / (multiple * MIN_SLOTS)
    self._streams: list[Stream | None] = []
    self.slots = 0
    self.cache: PyTree = None

  @property
  def n_streams(self) -> int:
    """Rows of the cache (R)."""
    return len(self._streams)

  @property
  def streams(self) -> list[Stream | None]:
    """The stream in each row of the cache, None where a row is free."""
    return self._streams

  @property
  def heavy(self) -> bool:
    """Whether the cache, as it is, weighs so much beside the parameters that a smaller one is worth a compilation."""
    return self._weighs(self.n_streams, self.slots)

  def _weighs(self, streams: int, slots: int) -> bool:
    return streams * slots * self._slot_bytes > self._light_bytes

  def make_room(self, n: int, slots: int, *, finally_slots: int | None = None, idle: Sequence[Stream] = ()) -> None:
    """Sees to `n` free rows beside those in use, and shrinks what has become too large.

    Args:
      n: free rows wanted.
      slots: slots that every stream must have now.
      finally_slots: slots that the streams will come to need, by default the same.
      idle: streams to set aside if that spares a larger cache, or lets the cache shrink.
    """
    used = sum(stream is not None for stream in self._streams)
    least = size(used - len(idle) + n, multiple=self._multiple)
    streams = self.n_streams
    if used + n > streams or self._may_shrink(least):
      for stream in idle:
        self.set_aside(stream)
      streams = least
    now, final = (min(power_of_two(k, smallest=MIN_SLOTS), self._max_slots) for k in (slots, finally_slots or slots))
    wanted = now if self._weighs(streams, final) else final
    if not (self.heavy and wanted * 4 <= self.slots):
      wanted = max(wanted, self.slots)
    self._resize(streams, wanted)

  def _may_shrink(self, target: int) -> bool:
    return target < self.n_streams and (self.heavy or target * 4 <= self.n_streams or (target, self.slots) in self._known)

  def steps_within(self, lengths: Sequence[tuple[int, int]]) -> int:
    """Steps for which the slots suffice.

    Args:
      lengths: of each row, the slots that it has filled, and those that it will come to need.
    """
    growing = [filled for filled, needed in lengths if self.slots < min(needed, self._max_slots)]
    return self.slots - max(growing) if growing else self._max_slots

  def _resize(self, n: int, slots: int) -> None:
    """Moves the streams into the first rows of a cache of `n` rows of `slots` slots, unless it is of that size."""
    if (n, slots) == (self.n_streams, self.slots):
      return
    kept = [stream for stream in self._streams if stream is not None]
    if kept:
      places = np.zeros(n, np.int32)
      places[: len(kept)] = [stream.index for stream in kept]
      self.cache = loop.resize(self.cache, places, slots=slots)
    else:  # nothing to move: the old cache goes before the new one comes
      self.cache = None
      self.cache = self._make_cache(n, slots)
    for place, stream in enumerate(kept):
      stream.place = place
    self._streams = [*kept, *[None] * (n - len(kept))]
    self.slots = slots
    self._known.add((n, slots))

  def forget_size(self) -> None:
    """Drops the cache when no stream is left, so that the next one starts at its own size."""
    if not any(stream is not None for stream in self._streams):
      self.cache, self._streams, self.slots = None, [], 0

  def add(self, owner: Hashable, kind: int, tokens: np.ndarray) -> Stream:
    """Puts a new stream into a free row; `fill` has to run before it holds `tokens`."""
    stream = Stream(owner, kind, pending=np.asarray(tokens, np.int32))
    self._place(stream)
    return stream

  def _place(self, stream: Stream) -> None:
    stream.place = self._streams.index(None)
    self._streams[stream.place] = stream

  def release(self, stream: Stream) -> None:
    """Frees the row of a stream that is not wanted any more."""
    if stream.place is not None:
      self._streams[stream.place] = None
    stream.place = stream.aside = None

  def set_aside(self, stream: Stream) -> None:
    """Copies a stream out of the cache and frees its row; stream u is only freed, since each picture starts it again."""
    if stream.kind == loop.STREAM_U:
      self.release(stream)
    elif stream.place is not None:
      stream.aside = loop.resize(self.cache, np.array([stream.index], np.int32), slots=self.slots)
      self._streams[stream.index] = None
      stream.place = None

  def bring_back(self, stream: Stream) -> None:
    """Puts a stream that was set aside into a free row."""
    self._place(stream)
    part = loop.resize(stream.aside, np.zeros(1, np.int32), slots=self.slots)
    self.cache = loop.put_streams(self.cache, part, np.array([stream.index], np.int32))
    stream.aside = None

  def fill(self, params: Params) -> bool:
    """Fills one piece of every stream that waits for it, together where lengths are alike; returns whether any still waits."""
    waiting = [stream for stream in self._streams if stream is not None and len(stream.pending)]
    groups: dict[int, list[Stream]] = {}
    for stream in waiting:
      n = len(stream.pending)
      groups.setdefault(min(max(2 * power_of_four(-(-n // 2)), MIN_SLOTS), self._piece), []).append(stream)
    for width, group in sorted(groups.items()):
      for start in range(0, len(group), FILL_ROWS):
        self._fill_group(params, group[start : start + FILL_ROWS], width)
    return any(len(stream.pending) for stream in waiting)

  def _fill_group(self, params: Params, group: list[Stream], width: int) -> None:
    rows = self._multiple * power_of_four(-(-len(group) // self._multiple))
    tokens = np.zeros((rows, width), np.int32)
    starts = np.zeros(rows, np.int32)
    places = np.arange(self.n_streams, self.n_streams + rows, dtype=np.int32)  # outside: dropped
    for row, stream in enumerate(group):
      piece = stream.pending[:width]
      tokens[row, : len(piece)] = piece
      starts[row], places[row] = stream.filled, stream.index
      stream.pending = stream.pending[width:]
      stream.filled += len(piece)
    part = loop.fill(params, loop.resize(self.cache, places, slots=self.slots), tokens, starts, forward=self._forward)
    self.cache = loop.put_streams(self.cache, part, places)

  def places(self, rows: Sequence[tuple[Stream, Stream | None, Stream | None, bool]], owners: Sequence[Hashable]) -> loop.Places:
    """Where the streams of the given rows lie.

    Args:
      rows: f, i, u and `ready` of each row; i and u None where a row has none.
      owners: the owner of each row, in order.
    """
    index = {owner: row for row, owner in enumerate(owners)}
    f = np.array([stream.index for stream, _, _, _ in rows], np.int32)
    i = np.array([(row[1] or row[0]).index for row in rows], np.int32)
    u = np.array([(row[2] or row[0]).index for row in rows], np.int32)
    owner, kind = np.zeros(self.n_streams, np.int32), np.full(self.n_streams, loop.STREAM_NONE, np.int32)
    for place, stream in enumerate(self._streams):
      if stream is not None and stream.owner in index:
        owner[place], kind[place] = index[stream.owner], stream.kind
    return loop.Places(f=f, i=i, u=u, ready=np.array([row[3] for row in rows], bool), owner=owner, kind=kind)


def batch_shards(params: Params) -> tuple[Any, int]:
  """The mesh that parameters lie on (None off a mesh), and over how many devices it splits a batch."""
  for leaf in jax.tree.leaves(params):
    mesh = getattr(getattr(leaf, 'sharding', None), 'mesh', None)
    if mesh is not None and mesh.size > 1:
      return mesh, mesh.shape.get('data', 1) * mesh.shape.get('fsdp', 1)
  return None, 1
