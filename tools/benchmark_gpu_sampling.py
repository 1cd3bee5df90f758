"""Sampling for `benchmark_gpu.py`: decoding of one row and of many, prefill, a guided picture, the plain torch loop; one set of weights.

The gate holds the sampler's greedy tokens against a forward pass without a cache, all scores at once.
"""

import dataclasses
import functools
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from benchmark_decoding import greedy, rest
from benchmark_gpu_cases import GpuSizes, Work, device_params, parts, vocabulary_of
from benchmark_models import INT8_CACHE, Sizes, Subject
from benchmark_protocol import Contestant, Row, importable, race, spread
from benchmark_torch_plain import PlainDecoder
from benchmark_transformer import NARROW, first_token, last_logits, logits_program, prefill_flops, relative, submitted

from chameleon_jax.config import SamplingOptions

# A drawn token lies this near to the best of the forward pass, and so many are the best at least: of 32 bfloat16 layers with random
# weights, whose best two logits lie 0.3 apart on average. Another function agrees on none.
LOGIT, AGREE = 0.2, 0.7


def subject_of(sizes: GpuSizes, params: Any) -> Subject:
  """The sampler's subject with these weights."""
  given = Sizes(sizes.name, sizes.transformer, vocabulary_of(sizes), sizes.vqgan)
  return Subject(given, params)


def drawn_otherwise(work: Work, subject: Subject) -> str | None:
  """What is wrong with greedy tokens of the sampler, by a forward pass over them without a cache."""
  n = min(32, work.sizes.new)
  prompt = subject.text(1, work.sizes.short)
  drawn = greedy(subject, 'bfloat16', prompt, n)
  config, params = subject.way('bfloat16')
  with work.plain():
    plain = logits_program(config, all_positions=True)  # a program of its own, traced in the plain form
    logits = np.asarray(plain(params, np.concatenate([prompt, drawn], 1)))[0, prompt.shape[1] - 1 : -1]
  logits = np.where(subject.allowed, logits, -np.inf)
  behind = logits.max(-1) - logits[np.arange(n), drawn[0]]
  agree = float(np.mean(behind == 0))
  ok = agree >= AGREE and behind.max() <= LOGIT
  return None if ok else f'{agree:.0%} of {n} greedy tokens are the best of a forward pass, the worst lies {behind.max():.2f} behind'


def rounded_too_far(work: Work, subject: Subject) -> str | None:
  """What an int8 cache does to the logits of a short prompt beside a bfloat16 one, where that is too much; int8 weights in both."""
  tokens = subject.text(1, work.sizes.short)
  int8, bfloat16 = (last_logits(*subject.way(INT8_CACHE), all_positions=True, cache=dtype)(tokens) for dtype in ('int8', 'bfloat16'))
  off = relative(int8, bfloat16)
  return None if off <= NARROW else f'an int8 cache moves the logits by {off:.1e} of their size (root mean square, limit {NARROW})'


def read_bytes(work: Work, params: Any, slots: float, rows: int, way: str = 'bfloat16') -> float:
  """Of a decode step: weights (one row of the embedding is nothing) and the keys and values of the tokens so far."""
  config = work.sizes.transformer
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - sum(leaf.nbytes for leaf in jax.tree.leaves(params['embedding']))
  head = config.d_head + 4 if way == INT8_CACHE else 2 * config.d_head
  return weights + rows * slots * 2 * config.n_layers * config.n_kv_heads * head


def sample(work: Work, subject: Subject | None = None) -> Iterator[Row]:
  """Decoding of one row and of many, prefill, a picture: one set of weights, by default new ones."""
  subject = subject or subject_of(work.sizes, device_params(work.sizes.transformer))
  problem = drawn_otherwise(work, subject)
  if problem:
    yield work.row('decode', 'gate', '-', f'not timed: {problem}', False)
    return
  yield from parts(
    work,
    {
      'decode, batch 1': (30, functools.partial(decode_one, work, subject, 'bfloat16')),
      'prefill': (30, functools.partial(_prefill, work, subject)),
      'picture': (40, functools.partial(_picture, work, subject)),
      'decode, batch 1, int8': (40, functools.partial(decode_one, work, subject, 'int8')),
      f'decode, batch {work.sizes.many}': (45, functools.partial(decode_many, work, subject, 'bfloat16')),
      f'decode, batch {work.sizes.many}, {INT8_CACHE}': (45, functools.partial(decode_many, work, subject, INT8_CACHE)),
      'decode, plain torch': (40, functools.partial(_decode_torch, work, subject)),
    },
  )


def decode_one(work: Work, subject: Subject, way: str) -> Iterator[Row]:
  sizes, case = work.sizes, 'decode, batch 1'
  prompt = subject.text(1, sizes.short)
  seconds, details = work.seconds(rest, lambda: first_token(submitted(subject, way, prompt, sizes.new + 1)))
  rate = sizes.new / seconds
  share = read_bytes(work, subject.way(way)[1], sizes.short + sizes.new / 2, 1) * rate / work.ceilings.copy
  what, value = f'{sizes.new} tokens after {sizes.short}, {way}', f'{rate:,.0f} tokens/s, {share:.0%} of the measured copy rate'
  if way == 'int8':
    yield work.row(case, what, '>= 350 tokens/s', value, rate >= 350, details | {'share': share})
  else:
    yield work.row(case, what, '>= 70 % of the copy rate, aim 85 %', value, share >= 0.7, details | {'share': share})


def decode_many(work: Work, subject: Subject, way: str) -> Iterator[Row]:
  sizes, case = work.sizes, f'decode, batch {work.sizes.many}'
  problem = rounded_too_far(work, subject) if way == INT8_CACHE else None
  if problem:
    yield work.row(case, f'gate, {way}', '-', f'not timed: {problem}', False)
    return
  n_new = min(64, sizes.new)
  prompts = subject.text(sizes.many, sizes.long - n_new - 2)
  quick = dataclasses.replace(work, protocol=dataclasses.replace(work.protocol, repetitions=2))
  seconds, details = quick.seconds(rest, lambda: first_token(submitted(subject, way, prompts, n_new + 1)))
  rate = sizes.many * n_new / seconds
  limit = sizes.many * work.ceilings.copy / read_bytes(work, subject.way(way)[1], sizes.long, sizes.many, way)
  value = f'{rate:,.0f} tokens/s, {rate / limit:.0%} of the limit ({limit:,.0f}: weights and cache at the measured copy rate)'
  what = f'{n_new} tokens up to {sizes.long}, {way}'
  aim, reached = ('>= 60 % of the limit', rate >= 0.6 * limit) if way == 'bfloat16' else ('-', None)
  yield work.row(case, what, aim, value, reached, details)


def _prefill(work: Work, subject: Subject) -> Iterator[Row]:
  sizes = work.sizes
  config, params = subject.way('bfloat16')
  logits, tokens = last_logits(config, params), subject.text(1, sizes.long)
  flops = prefill_flops(config, sizes.long)
  ways = {
    'last logits': (lambda _: logits(tokens), lambda: None),
    'first token through the sampler': (first_token, lambda: submitted(subject, 'bfloat16', tokens[:, : sizes.long - 2], 1)),
  }
  for what, (run, prepare) in ways.items():
    seconds, details = work.seconds(run, prepare)  # type: ignore[arg-type]
    value = f'{1e3 * seconds:.1f} ms, {flops / seconds / work.ceilings.flops["bfloat16"]:.0%} of the measured product'
    yield work.row('prefill', f'1 x {sizes.long}, {what}', '<= 55 ms', value, seconds <= 0.055, details)


def _picture(work: Work, subject: Subject) -> Iterator[Row]:
  sizes, v = work.sizes, subject.vocabulary
  n = sizes.vqgan.n_image_tokens
  options = SamplingOptions('image', image_greedy=True, max_new_tokens=n + 1)
  rng = np.random.default_rng(3)
  plain = subject.text(1, min(32, sizes.short))[0]
  before = np.array([v.begin_sequence, v.begin_image, *rng.choice(v.token_of_code, n), v.end_image, *plain[1:]], np.int32)
  prompts = {'no picture before it (two streams hold the three)': plain, 'a picture before it (three streams)': before}
  for place, (what, prompt) in enumerate(prompts.items()):
    if len(prompt) + n + 2 > sizes.transformer.max_seq_len or (place and work.left < 45):
      yield work.row('picture', what, '-', 'not measured: no time left, or the context is too short', None)
      continue
    quick = dataclasses.replace(work, protocol=dataclasses.replace(work.protocol, repetitions=2))
    seconds, details = quick.seconds(lambda _: subject.engine('bfloat16').generate_tokens([prompt], options))  # noqa: B023
    yield work.row('picture', f'{n} tokens, three-way guidance, {what}', '<= 5.5 s', f'{seconds:.2f} s', seconds <= 5.5, details)


def _decode_torch(work: Work, subject: Subject) -> Iterator[Row]:
  sizes, case, what = work.sizes, 'decode, batch 1', 'ours against the plain torch loop (one CUDA graph a step), bfloat16'
  device = 'cpu' if jax.default_backend() == 'cpu' else 'cuda'
  if not importable('torch'):
    yield work.row(case, what, '>= 1.0x', 'left out: torch is not installed', None)
    return
  import torch

  if device == 'cuda' and not torch.cuda.is_available():
    yield work.row(case, what, '>= 1.0x', 'left out: this torch has no CUDA', None)
    return
  prompt = subject.text(1, sizes.short)
  slots = sizes.short + sizes.new + 1
  peer = PlainDecoder(subject.params, sizes.transformer, subject.allowed, dtype='bfloat16', slots=slots, device=device)
  contestants = [
    Contestant('ours', rest, lambda: first_token(submitted(subject, 'bfloat16', prompt, sizes.new + 1))),
    Contestant('torch', peer.run, lambda: peer.prepare(prompt, sizes.new + 1)),
  ]
  seen = race(contestants, work.protocol, work.clock)
  ratios = seen.ratios('ours', 'torch')
  value = f'{spread(ratios)}: {sizes.new / seen.median("ours"):,.0f} against {sizes.new / seen.median("torch"):,.0f} tokens/s'
  yield work.row(case, what, '>= 1.0x', value, statistics.median(ratios) >= 1, seen.record())
