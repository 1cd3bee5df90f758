"""The released sampler, plainly and slowly: its semantics from spec model.md section 8 alone (training.md section 9 agrees).

Lists, numpy in float64, and a network that is a function: `logits_of(tokens)` gives the logits [V] of what follows a list of tokens. Every
token is computed from the whole row anew; there is no cache and no padding in the network. The parts are the spec's own: a text decoder
(8.2), an image decoder (8.3), and `generate`, which starts one after the other (8.1). It shares no line with the package, which gives
only the names of the ids.

What the released sampler decides for the batch as a whole is decided for the batch here too:

| released, and here | the package, each row by itself |
|---|---|
| stops only when all rows hold the same stop id; rows that have theirs go on drawing | a row ends at its first stop token: `cut` |
| limit = min(max_seq_len, longest prompt + max_gen_len), one for all rows | max_new_tokens and the context of each row |
| max_gen_len counts anew after every picture, and no picture counts | max_new_tokens counts everything |
| begin_image is barred near max_seq_len, whatever max_gen_len is | also where max_new_tokens leaves less than a picture |
| text and pictures together: one prompt | any number |
| picture alone: nothing checks the context, no limit holds | the picture must fit |
| mixed: a prompt that ends in begin_image goes on with text | it goes on with a picture |

Open in the spec, and decided here: begin_image as the last id that max_gen_len allows still opens its picture.
Raises ValueError where the released sampler refuses.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from chameleon_jax.tokens.vocabulary import Vocabulary

LogitsOf = Callable[[list[int]], np.ndarray]
NEVER = -np.inf


@dataclasses.dataclass(frozen=True)
class TextOptions:
  """8.1, `txt`."""

  repetition_penalty: float = 1.2
  temperature: float = 0.7
  top_p: float = 0.9
  greedy: bool = False


@dataclasses.dataclass(frozen=True)
class ImageOptions:
  """8.1, `img`."""

  guidance_text: float = 3.0
  guidance_image: float = 1.2
  temperature: float = 0.7
  top_p: float = 0.9
  greedy: bool = False


@dataclasses.dataclass(frozen=True)
class Options:
  """8.1. `extra_eos` None: the release's default, begin_image. `n_image_tokens` is 1024 in the release."""

  text: TextOptions | None = TextOptions()
  image: ImageOptions | None = None
  max_seq_len: int = 4096
  max_gen_len: int = 4096
  extra_eos: tuple[int, ...] | None = None
  n_image_tokens: int = 1024


@dataclasses.dataclass(frozen=True)
class Step:
  """One item of the stream: ids of the rows, and the processed logits that they were drawn from (8.4)."""

  tokens: list[int]  # [B]
  scores: np.ndarray  # [B, V]; [3B, V] in a step of a picture


# ------------------------------------------------------------------------------------------ processors


def softmax(scores: np.ndarray) -> np.ndarray:
  """Probabilities of [V] scores, -inf allowed."""
  weights = np.exp(scores - scores.max())
  return weights / weights.sum()


def allow_only(scores: np.ndarray, allowed: Sequence[int]) -> np.ndarray:
  """All other ids -inf."""
  kept = np.full(scores.shape, NEVER)
  for token in allowed:
    kept[token] = scores[token]
  return kept


def repetition_penalty(scores: np.ndarray, row: Sequence[int], penalty: float) -> np.ndarray:
  """Every id that the row holds, once however often it does: a negative score times the penalty, any other divided by it."""
  changed = scores.copy()
  for token in set(row):
    changed[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
  return changed


def top_p(scores: np.ndarray, p: float) -> np.ndarray:
  """From the least likely id upwards, removes while their probabilities add up to no more than 1 - p; the likeliest stays."""
  changed = scores.copy()
  probabilities = softmax(scores)
  total = 0.0
  for token in np.argsort(scores, kind='stable')[:-1]:
    total += probabilities[token]
    if total > 1 - p:
      break
    changed[token] = NEVER
  return changed


def guide(full: np.ndarray, image: np.ndarray, none: np.ndarray, options: ImageOptions) -> np.ndarray:
  """Raw logits of the three streams -> their mix (8.3)."""
  return none + options.guidance_image * (image - none) + options.guidance_text * (full - image)


def pick(scores: np.ndarray, greedy: bool, rng: np.random.Generator | None) -> int:
  """The id of a step."""
  if greedy:
    return int(np.argmax(scores))
  if rng is None:
    raise ValueError('without greedy, draws need a generator')
  return int(rng.choice(len(scores), p=softmax(scores)))


# ------------------------------------------------------------------------------------------ text (8.2)


def text_tokens(vocabulary: Vocabulary) -> list[int]:
  """What is neither image nor special; names that start with '<' are special (5.3)."""
  return [token for token in range(vocabulary.size) if vocabulary.is_text[token] and not vocabulary.is_barred[token]]


def stop_ids(vocabulary: Vocabulary, options: Options) -> list[int]:
  """End of sequence and the extra ones."""
  extra = (vocabulary.begin_image,) if options.extra_eos is None else options.extra_eos
  return [vocabulary.end_sequence, *extra]


def process_text(logits: np.ndarray, row: Sequence[int], vocabulary: Vocabulary, options: Options) -> np.ndarray:
  """Steps 1 to 5 of 8.2 for what follows `row`, its padding included."""
  allowed = [vocabulary.end_sequence]
  allowed += text_tokens(vocabulary) if options.text is not None else []
  allowed += [vocabulary.begin_image] if options.image is not None else []
  scores = allow_only(np.asarray(logits, np.float64), allowed)
  if options.image is not None and len(row) >= options.max_seq_len - (options.n_image_tokens + 2):
    scores[vocabulary.begin_image] = NEVER
  if options.text is not None:
    scores = repetition_penalty(scores, row, options.text.repetition_penalty)
    scores = scores / options.text.temperature
    scores = top_p(scores, options.text.top_p)
  return scores


class TextDecoder:
  """Writes text until it stops, or until the whole batch has drawn begin_image."""

  def __init__(self, logits_of: LogitsOf, vocabulary: Vocabulary, prompts: Sequence[Sequence[int]], options: Options):
    self.logits_of, self.vocabulary, self.options = logits_of, vocabulary, options
    self.start = max(len(prompt) for prompt in prompts)
    self.pads = [self.start - len(prompt) for prompt in prompts]  # right alignment: all rows are `start` long
    self.rows = [[vocabulary.pad] * pads + list(prompt) for pads, prompt in zip(self.pads, prompts)]
    self.limit = min(options.max_seq_len, self.start + options.max_gen_len)

  def stopped(self) -> bool:
    """By length, or by one stop id that every row has drawn."""
    if len(self.rows[0]) >= self.limit:
      return True
    return any(all(token in row[self.start :] for row in self.rows) for token in stop_ids(self.vocabulary, self.options))

  def wants_picture(self) -> bool:
    """Whether the last id is begin_image in every row and does not stop."""
    begin = self.vocabulary.begin_image
    if self.options.image is None or begin in stop_ids(self.vocabulary, self.options) or len(self.rows[0]) == self.start:
      return False
    return all(row[-1] == begin for row in self.rows)

  def step(self, rng: np.random.Generator | None) -> Step:
    """One id a row."""
    scores = []
    for pads, row in zip(self.pads, self.rows):
      raw = self.logits_of(row[pads:])  # no padding reaches the network, positions start behind it
      scores.append(process_text(raw, row, self.vocabulary, self.options))
    greedy = self.options.text is not None and self.options.text.greedy
    tokens = [pick(row_scores, greedy, rng) for row_scores in scores]
    for row, token in zip(self.rows, tokens):
      row.append(token)
    return Step(tokens, np.stack(scores))


# ---------------------------------------------------------------------------------------- pictures (8.3)


def image_conditioned(prompt: Sequence[int], vocabulary: Vocabulary) -> list[int]:
  """The prompt's image codes, begin_sequence, begin_image and end_image, in their order."""
  kept = (vocabulary.begin_sequence, vocabulary.begin_image, vocabulary.end_image)
  return [token for token in prompt if vocabulary.is_image[token] or token in kept]


def process_image(full: np.ndarray, image: np.ndarray, none: np.ndarray, vocabulary: Vocabulary, options: ImageOptions) -> np.ndarray:
  """Raw logits of the three streams -> what the id is drawn from."""
  mixed = guide(*(np.asarray(logits, np.float64) for logits in (full, image, none)), options)
  scores = allow_only(mixed, [int(token) for token in vocabulary.token_of_code])
  return top_p(scores / options.temperature, options.top_p)


class ImageDecoder:
  """Writes exactly `n_image_tokens` codes; then `close` forces end_image."""

  def __init__(self, logits_of: LogitsOf, vocabulary: Vocabulary, prompts: Sequence[Sequence[int]], options: Options):
    if options.image is None:
      raise ValueError('pictures are not asked for')
    self.logits_of, self.vocabulary, self.options = logits_of, vocabulary, options.image
    begin = vocabulary.begin_image
    self.full = [list(prompt) if prompt and prompt[-1] == begin else [*prompt, begin] for prompt in prompts]
    self.image = [image_conditioned(prompt, vocabulary) for prompt in self.full]
    self.none = [[vocabulary.begin_sequence, begin] for _ in prompts]

  def step(self, rng: np.random.Generator | None) -> Step:
    """One code a row, appended to all three streams."""
    chunk = [
      process_image(*(self.logits_of(list(stream)) for stream in streams), self.vocabulary, self.options)
      for streams in zip(self.full, self.image, self.none)
    ]
    tokens = [pick(scores, self.options.greedy, rng) for scores in chunk]
    for streams in (self.full, self.image, self.none):
      for stream, token in zip(streams, tokens):
        stream.append(token)
    return Step(tokens, np.stack([*chunk, *chunk, *chunk]))

  def close(self) -> Step:
    """The forced end_image."""
    scores = np.full((len(self.full), self.vocabulary.size), NEVER)
    scores[:, self.vocabulary.end_image] = 0.0
    for row in self.full:
      row.append(self.vocabulary.end_image)
    return Step([self.vocabulary.end_image] * len(self.full), scores)


# -------------------------------------------------------------------------------------------- both (8.1)


def generate(
  logits_of: LogitsOf,
  vocabulary: Vocabulary,
  prompts: Sequence[Sequence[int]],
  options: Options,
  rng: np.random.Generator | None = None,
) -> list[Step]:
  """All steps of a batch, text and pictures in turn."""
  if options.text is None and options.image is None:
    raise ValueError('neither text nor pictures are asked for')
  if options.text is not None and options.image is not None and len(prompts) != 1:
    raise ValueError(f'text and pictures together take one prompt, got {len(prompts)}')
  steps: list[Step] = []
  if options.text is None:
    picture = ImageDecoder(logits_of, vocabulary, prompts, options)
    return [picture.step(rng) for _ in range(options.n_image_tokens)]  # neither begin_image nor end_image
  text = TextDecoder(logits_of, vocabulary, prompts, options)
  while not text.stopped():
    steps.append(text.step(rng))
    if text.wants_picture():
      picture = ImageDecoder(logits_of, vocabulary, text.rows, options)
      steps += [picture.step(rng) for _ in range(options.n_image_tokens)]
      steps.append(picture.close())
      text = TextDecoder(logits_of, vocabulary, picture.full, options)  # the limit is counted anew
  return steps


def rows_of(steps: Sequence[Step], n_rows: int) -> list[list[int]]:
  """The ids of each row."""
  return [[step.tokens[row] for step in steps] for row in range(n_rows)]


def cut(row: Sequence[int], stops: Sequence[int]) -> list[int]:
  """A row up to its first stop token, that one included: what its consumer keeps of what it drew while others went on."""
  for index, token in enumerate(row):
    if token in stops:
      return list(row[: index + 1])
  return list(row)


def margins(steps: Sequence[Step], row: int) -> list[float]:
  """By how much the best id of a row led in each step: a float32 network decides alike where that is well above its rounding."""
  found = []
  for step in steps:
    best = np.sort(step.scores[row])[-2:]
    found.append(float(best[1] - best[0]))
  return found
