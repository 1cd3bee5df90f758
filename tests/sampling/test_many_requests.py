"""Ten thousand random requests on scripted logits: the grammar holds, limits hold, and everyone comes to an end."""

import numpy as np
import pytest

from chameleon_jax.config import SamplingOptions
from tests.sampling.scripted import CONTEXT, N, V, make_engine, scripts

LETTERS = {V.begin_image: 'B', V.end_image: 'E', V.end_sequence: '#', V.end_turn: '%'}


def letter(token):
  return 'c' if V.is_image[token] else 't' if V.is_text[token] else LETTERS[token]


def random_request(rng):
  """A prompt of text and whole pictures, perhaps left inside one, and options that fit it."""
  t = V.text_start
  prompt = [V.begin_sequence]
  for _ in range(rng.integers(0, 4)):
    if rng.random() < 0.3:
      prompt += [V.begin_image, *rng.choice(V.token_of_code, N), V.end_image]
    else:
      prompt += rng.integers(t, V.size, rng.integers(1, 6)).tolist()
  modalities = str(rng.choice(['mixed', 'mixed', 'text', 'image']))
  n_open = None
  if modalities != 'text' and rng.random() < 0.2:
    n_open = int(rng.integers(0, N))
    prompt += [V.begin_image, *rng.choice(V.token_of_code, n_open)]
  count = int(rng.integers(0, 3)) if modalities == 'mixed' else 0
  scale = rng.choice([1.0, 1.2, 3.0], 2)
  options = SamplingOptions(
    modalities=modalities,
    max_new_tokens=int(rng.integers(count * (N + 2) + N + 3, 40)),
    greedy=bool(rng.random() < 0.3),
    image_greedy=bool(rng.random() < 0.3),
    temperature=float(rng.uniform(0.3, 3)),
    top_p=float(rng.uniform(0.2, 1)),
    repetition_penalty=float(rng.choice([1.0, 1.2])),
    guidance_text=float(scale[0]),
    guidance_image=float(scale[1]),
    stop_at_end_turn=bool(rng.random() < 0.5),
    min_images=count if count and rng.random() < 0.5 else 0,
    max_images=count if rng.random() < 0.5 and modalities == 'mixed' and n_open is None else None,
    stop_tokens=tuple(int(x) for x in rng.integers(t, V.size, rng.integers(0, 2))),
    banned_tokens=tuple(int(x) for x in rng.integers(t, V.size - 2, rng.integers(0, 3))),
    seed=int(rng.integers(1000)),
  )
  return np.array(prompt, np.int32), options, n_open


def check(prompt, options, n_open, tokens, finished):
  """The row as letters against the grammar; `finished` against what it ended with."""
  line = ''.join(map(letter, tokens))
  assert not set(tokens) & set(options.banned_tokens)
  assert len(tokens) <= options.max_new_tokens and len(prompt) + len(tokens) <= CONTEXT + (options.modalities == 'image' and n_open is None)
  if options.modalities == 'image':
    assert line == 'c' * (N - (n_open or 0)) and finished == 'picture'
    return
  rest = line
  opened = line.count('B') + (n_open is not None)
  if n_open is not None:
    closing = 'c' * (N - n_open) + 'E'
    assert line.startswith(closing)
    rest = line[len(closing) :]
  text = rest.replace('B' + 'c' * N + 'E', '')
  assert set(text[:-1]) <= {'t'} and text[-1:] in ('', 't', '#', '%')
  assert opened >= options.min_images and (options.max_images is None or opened <= options.max_images)
  assert options.modalities == 'mixed' or opened == 0
  assert '%' not in text or options.stop_at_end_turn
  ended = line[-1:] in ('#', '%') or (len(tokens) > 0 and tokens[-1] in options.stop_tokens)
  assert finished == ('stop' if ended else 'length')
  assert ended or len(tokens) == min(options.max_new_tokens, CONTEXT - len(prompt))
  assert not set(tokens[:-1]) & set(options.stop_tokens)


@pytest.mark.slow
def test_ten_thousand_random_requests(types_unchecked):
  rng = np.random.default_rng(0)
  table = scripts()[1].copy()
  table[:, [V.end_sequence, V.end_turn]] += 2  # short rows among long ones
  engine = make_engine(table=table, max_rows=48, max_prompt_piece=16)
  asked, written, ended, waited = {}, {}, {}, {}
  total, n_turns = 10_000, 0
  while len(ended) < total:
    while len(asked) < total and len(asked) - len(ended) < 96:  # they keep coming
      prompt, options, n_open = random_request(rng)
      ticket = engine.submit(prompt, options, row=len(asked))
      asked[ticket], written[ticket], waited[ticket] = (prompt, options, n_open), [], n_turns
    n_turns += 1
    for progress in engine.advance():
      written[progress.ticket] += progress.tokens.tolist()
      if progress.finished:
        assert progress.ticket not in ended
        ended[progress.ticket] = progress.finished
        waited[progress.ticket] = n_turns - waited[progress.ticket]
  assert not engine.pending
  for ticket, (prompt, options, n_open) in asked.items():
    check(prompt, options, n_open, written[ticket], ended[ticket])
  # Every turn draws at least one token or fills one piece for each row, or ends with a free row: so nobody starves. A request
  # takes 40 steps at most, behind at most 96 others in 48 rows.
  assert max(waited.values()) < 400
  kinds = ''.join(letter(token) for line in written.values() for token in line)
  assert kinds.count('B') > 2000 and kinds.count('#') > 300
  assert len(engine._functions.compiled) < 100
