"""What the type of the sampler's cache does to what the shipped emoji model says: likelihoods through the cache, and greedy tokens.

    python tools/compare_caches.py --rows=32

Held-out texts and pictures are read whole through a cache of each type (every query attends to keys and values as they are stored), and
answers to prompts are written greedily, without guidance. Everything is compared with the float32 cache:

    bits per byte     of held-out documentation, as `chameleon evaluate` counts them
    nats a code       of held-out pictures, after the prompt that asks for them
    same best code    share of their positions at which the most likely token is that of the float32 cache
    describe, draw    share of the greedy tokens that are equal at their places, and of the answers that are equal as a whole
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from chameleon_jax.chameleon import Chameleon
from chameleon_jax.config import CacheDtype
from chameleon_jax.data.sources import emoji_documents
from chameleon_jax.data.sources.emoji_world import EmojiWorld
from chameleon_jax.data.sources.text import chunks
from chameleon_jax.evals.emoji import DESCRIBE_TOKENS, GREEDY, fixed_sample
from chameleon_jax.evals.text import bits_per_byte, nats_of_targets
from chameleon_jax.models.transformer.cache import init_cache
from chameleon_jax.models.transformer.model import Transformer

FLAGS = flags.FLAGS
TYPES: tuple[CacheDtype, ...] = ('float32', 'bfloat16', 'int8')  # the others are compared with the first
_BATCH = 8


def logits_through(model: Chameleon, dtype: CacheDtype) -> Callable[[np.ndarray], np.ndarray]:
  """int32 [B, T] -> float32 [B, T, V] of rows that are written into a new cache and read back from it."""
  network = Transformer(model.config)

  @jax.jit
  def program(params: Any, tokens: Any) -> Any:
    cache = init_cache(model.config, tokens.shape[0], tokens.shape[1], dtype)
    return network.apply({'params': params}, tokens, cache=cache)[0]

  return lambda tokens: np.asarray(program(model.parts.transformer_params, tokens))


def agreement(written: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> tuple[float, float]:
  """Shares of tokens that are equal at their places, of the longer answer of each pair, and of answers that are equal."""
  equal = sum(int(np.sum(a[: len(b)] == b[: len(a)])) for a, b in zip(written, expected, strict=True))
  n = sum(max(len(a), len(b)) for a, b in zip(written, expected, strict=True))
  return equal / n, float(np.mean([np.array_equal(a, b) for a, b in zip(written, expected, strict=True)]))


def compare(model: Chameleon, world: EmojiWorld, rows: int) -> dict[str, dict[str, float]]:
  """Figure -> type of cache -> value, over `rows` held-out texts, pictures and prompts."""
  v, context = model.vocabulary, model.config.max_seq_len
  items = fixed_sample([item for item in world.items if item.split == 'validation'], rows)
  texts = fixed_sample([piece for topic in world.text_validation for piece in chunks(topic)], rows)
  codes = model.encode_images(np.stack([world.pictures[item.index] for item in items]))
  of_world = np.zeros((len(world.items), codes.shape[1]), codes.dtype)
  of_world[[item.index for item in items]] = codes
  prompts = {
    'describe': ([model.prompt_tokens(emoji_documents.describe_prompt(item, codes=of_world)) for item in items], DESCRIBE_TOKENS),
    'draw': ([model.prompt_tokens(emoji_documents.draw_prompt(item)) for item in items], codes.shape[1] + 8),
  }
  drawn = [[*prompt, v.begin_image, *v.token_of_code[row]] for prompt, row in zip(prompts['draw'][0], codes)]
  found: dict[str, dict[str, float]] = {}
  best: np.ndarray | None = None
  answers: dict[str, list[np.ndarray]] = {}

  def put(figure: str, dtype: str, value: float) -> None:
    found.setdefault(figure, {})[dtype] = value

  for dtype in TYPES:
    logits = logits_through(model, dtype)
    assert model.parts.text_tokenizer is not None
    put('bits per byte', dtype, bits_per_byte(logits, texts, v, model.parts.text_tokenizer, context=context))
    nats, ranked = 0.0, []
    for start in range(0, len(drawn), _BATCH):
      batch, mask = np.full((_BATCH, context + 1), v.pad, np.int32), np.zeros((_BATCH, context), bool)
      for place, row in enumerate(drawn[start : start + _BATCH]):
        batch[place, : len(row)] = row
        mask[place, len(row) - 1 - codes.shape[1] : len(row) - 1] = True
      scores = logits(batch[:, :-1])
      nats += nats_of_targets(scores, batch[:, 1:], mask)
      ranked.append(scores.argmax(-1)[mask])
    put('nats a code', dtype, nats / codes.size)
    best = np.concatenate(ranked) if best is None else best
    put('same best code', dtype, float(np.mean(np.concatenate(ranked) == best)))
    sampler = Chameleon(model.parts, cache_dtype=dtype)
    for task, (asked, n_new) in prompts.items():
      written = sampler.generate_tokens(asked, dataclasses.replace(GREEDY, max_new_tokens=n_new))
      tokens, whole = agreement(written, answers.setdefault(task, written))
      put(f'{task}: equal greedy tokens', dtype, tokens)
      put(f'{task}: equal answers', dtype, whole)
  return found


def table(found: dict[str, dict[str, float]]) -> str:
  """Markdown."""
  lines = [f'| | {" | ".join(TYPES)} |', '|---' * (len(TYPES) + 1) + '|']
  for figure, values in found.items():
    shown = (f'{values[dtype]:.2%}' if ':' in figure or figure.startswith('same') else f'{values[dtype]:.5f}' for dtype in TYPES)
    lines.append(f'| {figure} | {" | ".join(shown)} |')
  return '\n'.join(lines)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  print(table(compare(Chameleon.load(FLAGS.model), EmojiWorld.load('all'), FLAGS.rows)))


if __name__ == '__main__':
  flags.DEFINE_string('model', 'emoji', 'Model folder, or the shipped weights; its image tokenizer must be that of the emoji world.')
  flags.DEFINE_integer('rows', 32, 'Texts, pictures and prompts.', lower_bound=1)
  app.run(main)
