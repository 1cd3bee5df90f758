"""Decoding for `benchmark.py`: tokens one after the other through the sampler, against Hugging Face and a plain torch loop.

The prompts are filled in, and the first token drawn, before the clock starts. Each family of peers is tried in all its settings first; the
fastest of each takes part. Gates: float32 logits, and the greedy float32 tokens of every peer.
"""

import functools
from collections.abc import Sequence
from typing import Any

import benchmark_torch
import jax
import numpy as np
from benchmark_models import WAYS, Subject
from benchmark_protocol import Contestant, Protocol, Row, race
from benchmark_torch_plain import PlainDecoder
from benchmark_transformer import PEER, Bench, difference, first_token, options, rounded_off, submitted


def rest(engine: Any) -> int:
  """Draws what is left; returns how many tokens there are."""
  while engine.pending:
    engine.advance()
  return engine.decoded


def greedy(subject: Subject, way: str, prompts: np.ndarray, n_new: int) -> np.ndarray:
  """int32 [rows, n_new] through the sampler."""
  return np.stack(subject.engine(way).generate_tokens(list(prompts), options(subject, n_new)))


def decode(bench: Bench, rows: int) -> list[Row]:
  """Tokens drawn one after the other, the prompts filled in before the clock starts."""
  subject, sizes, case = bench.subject, bench.subject.sizes, f'decode, batch {rows}'
  prompts, n_new = subject.text(rows, sizes.prompt, seed=rows), sizes.new + 1
  mine = {way: Contestant(f'ours {way}', rest, lambda way=way: first_token(submitted(subject, way, prompts, n_new))) for way in WAYS}
  if not bench.peers:
    seen = race(list(mine.values()), bench.protocol, bench.clock)
    rates = ', '.join(f'{name} {rows * sizes.new / seen.median(name):,.0f} tokens/s' for name in seen.seconds)
    return [bench.left_out(case), bench.row(case, f'{sizes.new} tokens after {sizes.prompt}', '-', rates)]
  families = _peers(bench, prompts.shape[1] + n_new)
  problem = _unequal(bench, prompts, families)
  if problem:
    return [bench.refused(case, problem)]
  fast, readings = {}, {}
  for family, peers in families.items():
    readings[family] = {name: _least(peer, prompts, n_new) for name, peer in peers.items()}
    name = min(readings[family], key=lambda name: readings[family][name])  # noqa: B023
    fast[family] = Contestant(f'{family} ({name})', peers[name].run, functools.partial(peers[name].prepare, prompts, n_new))
  seen = race([*mine.values(), *fast.values()], bench.protocol, bench.clock)
  # The aim is for the faster of ours against the faster of theirs.
  best = seen.fastest(mine[way].name for way in WAYS if not way.startswith('int8'))
  aims = {best: {1: 1.3, 8: 1.1}.get(rows), 'ours int8': 2.0 if rows in (1, 8) else None}
  found = []
  for way, contestant in mine.items():
    nbytes = sum(leaf.nbytes for name, tree in subject.way(way)[1].items() if name != 'embedding' for leaf in jax.tree.leaves(tree))
    more = (
      f'; weights at {nbytes * sizes.new / seen.median(contestant.name) / bench.ceilings.read:.0%} of the read rate' if rows == 1 else ''
    )
    for family, peer in fast.items():
      aim = aims.get(contestant.name) if family == PEER else None
      what = f'{sizes.new} tokens after {sizes.prompt}, ours {way} against {peer.name}'
      row = bench.ratio(case, what, seen, contestant.name, peer.name, aim=aim, each=rows * sizes.new, more=more)
      row.details['peers_s'] = readings
      found.append(row)
  return found


def _peers(bench: Bench, slots: int) -> dict[str, dict[str, Any]]:
  """Family -> setting -> decoder."""
  subject = bench.subject
  hugging: dict[str, Any] = {}
  plain: dict[str, Any] = {}
  for dtype in benchmark_torch.DTYPES:
    model = benchmark_torch.load(bench.checkpoint, dtype)
    hugging |= {f'{dtype}, {cache} cache': benchmark_torch.Decoder(model, subject.allowed, cache=cache) for cache in benchmark_torch.CACHES}
    plain[dtype] = PlainDecoder(subject.params, subject.sizes.transformer, subject.allowed, dtype=dtype, slots=slots)
  return {PEER: hugging, 'plain torch': plain}


def _unequal(bench: Bench, prompts: np.ndarray, families: dict[str, dict[str, Any]]) -> str | None:
  """Which float32 contestant writes other tokens than ours, or has other logits; None where none does."""
  n = min(bench.subject.sizes.gate, bench.subject.sizes.new)
  problem = difference(bench, prompts[:1]) or next(filter(None, (rounded_off(bench.subject, way, prompts[:1]) for way in WAYS)), None)
  if problem:
    return problem
  ours = greedy(bench.subject, 'float32', prompts, n)
  for family, peers in families.items():
    for name, peer in peers.items():
      if not name.startswith('float32'):
        continue
      theirs = peer.run(peer.prepare(prompts, n))
      if not np.array_equal(ours, theirs):
        return f'{n} greedy float32 tokens of {family} ({name}) differ in {int(np.sum(np.any(ours != theirs, axis=1)))} of {len(ours)} rows'
  return None


def _least(peer: Any, prompts: np.ndarray, n_new: int, turns: int = 2) -> float:
  """Least seconds of a few runs."""
  seen = race([Contestant('', peer.run, functools.partial(peer.prepare, prompts, n_new))], Protocol(1, turns, 1), _Unseen())  # type: ignore[arg-type]
  return min(seen.seconds[''])


class _Unseen:
  """In place of a clock where nothing of jax runs."""

  seconds, programs = 0.0, 0


def decodes(bench: Bench) -> Sequence[Row]:
  """Decoding at every batch."""
  return [row for rows in bench.subject.sizes.batches for row in decode(bench, rows)]
