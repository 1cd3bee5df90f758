"""The figures of the emoji world: image tokenizer, describing, drawing, editing, documentation text.

Validation pictures are held-out combinations (base x skin tone x gender) that training never shows, in no role.

How drawing and editing are scored. Let rec(p) = decode(encode(p)) for each of the ~3,800 pictures p of the world, so
the image tokenizer's own loss is on both sides. A drawn picture d = decode(sampled codes) is compared with every
rec(p) by mean squared error over all uint8 values; the nearest p is what was drawn, ties going to the first in the
order of the world. "Right picture" asks that p be the wanted one, "right base" that p have the base of the wanted
one, in any tone or gender. An answer without exactly one finished picture is wrong in both.

How describing is scored. The answer's text, stripped of white space around it, must be the picture's English CLDR
name character by character. How text is scored: see `evals/text.py`. Sampling is greedy unless options say otherwise.

Knows no file and no flag; the model is handed in. Metric functions are numpy.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from chameleon_jax.array_types import Codes, Logits, Pictures, Tokens
from chameleon_jax.config import SamplingOptions
from chameleon_jax.data.sources import emoji_documents
from chameleon_jax.data.sources.emoji_world import EmojiItem, EmojiWorld
from chameleon_jax.data.sources.text import chunks, fresh_pieces
from chameleon_jax.evals.reconstruction import codebook_use, psnr
from chameleon_jax.evals.text import bits_per_byte
from chameleon_jax.tokens import document as documents
from chameleon_jax.tokens.document import Document
from chameleon_jax.tokens.vocabulary import Vocabulary

Task = Literal['reconstruction', 'describe', 'draw', 'edit', 'text']
TASKS: tuple[Task, ...] = ('reconstruction', 'describe', 'draw', 'edit', 'text')

GREEDY = SamplingOptions(greedy=True, image_greedy=True, repetition_penalty=1.0, guidance_text=1.0, guidance_image=1.0)
DESCRIBE_TOKENS = 96  # more than the longest name needs
_GENERATE_BATCH = 256


@runtime_checkable
class Model(Protocol):
  """What this evaluation asks of `chameleon_jax.chameleon.Chameleon`."""

  parts: Any  # interop.native.ModelParts

  def encode_images(self, pictures: Pictures) -> Codes:
    """Pictures -> codes."""
    ...

  def decode_codes(self, codes: Codes) -> Pictures:
    """Codes -> pictures."""
    ...

  def generate(self, prompts: Sequence[Document], options: SamplingOptions) -> list[Document]:
    """Continues documents; pictures come back decoded."""
    ...

  def logits(self, tokens: Tokens) -> Logits:
    """Next-token logits."""
    ...


# key -> name, unit, aim: a value must be at least it, or at most it where it is marked '<='.
FIGURES: dict[str, tuple[str, str, str]] = {
    'psnr_validation': ('image tokenizer: PSNR, validation', 'dB', '>= 28'),
    'psnr_train': ('image tokenizer: PSNR, training pictures', 'dB', '>= 26'),
    'image_tokens': ('image tokenizer: tokens a picture', '', '<= 64'),
    'codebook_use': ('codebook use on validation pictures', '%', '>= 70'),
    'describe_validation': ('describe: exact English name, validation', '%', '>= 80'),
    'describe_train': ('describe: exact English name, train', '%', '>= 97'),
    'draw_validation': ('draw: right picture nearest, validation', '%', '>= 60'),
    'draw_base_validation': ('draw: right base picture (any tone or gender), validation', '%', '>= 90'),
    'draw_train': ('draw: right picture nearest, train', '%', '>= 90'),
    'draw_base_train': ('draw: right base picture (any tone or gender), train', '%', ''),
    'edit': ('edit: right picture nearest, validation', '%', '>= 60'),
    'text_bits_per_byte': ('text: bits per byte, held-out documentation', '', ''),
    'text_bits_per_byte_fresh': ('text: bits per byte, its pieces that no training topic quotes', '', ''),
}


@dataclasses.dataclass(frozen=True)
class Figure:
  """One line of the table: `value` in `unit` over `n` examples; `aim` is '>= 80', '<= 64', or '' where none is set."""

  key: str
  name: str
  value: float
  unit: str
  aim: str
  n: int

  @property
  def reached(self) -> bool | None:
    """Whether the value meets the aim; None without one."""
    if not self.aim:
      return None
    sign, limit = self.aim.split()
    return self.value >= float(limit) if sign == '>=' else self.value <= float(limit)


def make_figure(key: str, value: float, n: int) -> Figure:
  """The figure `key` of FIGURES with its value over n examples."""
  name, unit, aim = FIGURES[key]
  return Figure(key, name, float(value), unit, aim, n)


def format_table(figures: Sequence[Figure]) -> str:
  """A Markdown table of the figures."""
  lines = ['| figure | value | aim | reached | of |', '|---|---|---|---|---|']
  for figure in figures:
    value, aim = f'{figure.value:.2f} {figure.unit}'.strip(), f'{figure.aim} {figure.unit if figure.aim else ""}'.strip()
    reached = {None: '', True: 'yes', False: 'no'}[figure.reached]
    lines.append(f'| {figure.name} | {value} | {aim} | {reached} | {figure.n:,} |')
  return '\n'.join(lines)


# ----------------------------------------------------------------------------------------- metric functions


def nearest_pictures(
    drawn: UInt8[np.ndarray, 'k H W 3'], references: UInt8[np.ndarray, 'n H W 3'], *, chunk: int = 256
) -> Int[np.ndarray, ' k']:
  """Index of the reference with the least mean squared error, for each drawn picture; ties to the first.

  Squared distances are sums of integers below 2^53 in float64, hence exact:
  |a - b|^2 = |a|^2 + |b|^2 - 2 a b.
  """
  flat = drawn.reshape(len(drawn), math.prod(drawn.shape[1:])).astype(np.float64)
  best = np.full(len(drawn), np.inf)
  index = np.zeros(len(drawn), np.int64)
  for start in range(0, len(references), chunk):
    part = references[start : start + chunk].reshape(-1, flat.shape[1]).astype(np.float64)
    distances = (part**2).sum(1)[None] - 2 * flat @ part.T  # |a|^2 is the same for all references
    nearest = distances.argmin(1)
    least = distances[np.arange(len(flat)), nearest]
    index = np.where(least < best, start + nearest, index)
    best = np.minimum(least, best)
  return index


def exact_name_rate(answers: Sequence[Document], items: Sequence[EmojiItem]) -> float:
  """Share of answers in percent whose stripped text is the English name."""
  return 100 * float(np.mean([answer.text.strip() == item.name for answer, item in zip(answers, items, strict=True)]))


def only_picture(answer: Document) -> np.ndarray | None:
  """The picture of an answer that holds exactly one, finished; else None."""
  pictures = answer.pictures
  return pictures[0].pixels if len(pictures) == 1 and isinstance(pictures[0], documents.Image) else None


def drawing_rates(
    answers: Sequence[Document], wanted: Sequence[EmojiItem], references: Pictures, items: Sequence[EmojiItem]
) -> tuple[float, float]:
  """(right picture, right base) in percent; `references[k]` is rec(picture of items[k]), items in the order of their index."""
  right_picture = right_base = 0
  found = [(picture, item) for answer, item in zip(answers, wanted, strict=True) if (picture := only_picture(answer)) is not None]
  if found:
    nearest = nearest_pictures(np.stack([picture for picture, _ in found]), references)
    right_picture = sum(int(row) == item.index for row, (_, item) in zip(nearest, found))
    right_base = sum(items[row].base == item.base for row, (_, item) in zip(nearest, found))
  return 100 * right_picture / len(answers), 100 * right_base / len(answers)


# ---------------------------------------------------------------------------------------------- evaluation


class EmojiEvaluation:
  """One model measured on the emoji world. Reconstructions of all pictures are made once, when first needed."""

  def __init__(
      self,
      model: Model,
      *,
      options: SamplingOptions = GREEDY,
      n_train: int | None = 500,
      n_validation: int | None = None,
      n_edits: int | None = 500,
      world: EmojiWorld | None = None,
      log: Callable[[str], None] = lambda line: None,
  ):
    """Draws the examples.

    Args:
      model: as `Chameleon`.
      options: sampling of all answers; lengths are set per task.
      n_train: size of the fixed sample of training pictures, None for all of them.
      n_validation: the same for held-out pictures.
      n_edits: the same for edits that end in a held-out picture.
      world: all items; the shipped world when None.
      log: called with a line of progress.
    """
    self.model, self.options, self.log = model, options, log
    self.world = EmojiWorld.load('all') if world is None else world
    self.train = fixed_sample([item for item in self.world.items if item.split == 'train'], n_train)
    self.validation = fixed_sample([item for item in self.world.items if item.split == 'validation'], n_validation)
    self.edits = fixed_sample(emoji_documents.edit_pairs(self.world, 'validation'), n_edits)
    self._codes: Codes | None = None
    self._reconstructions: Pictures | None = None

  @property
  def codes(self) -> Codes:
    """Codes of every picture of the world."""
    if self._codes is None:
      self.log(f'encoding {len(self.world):,} pictures')
      self._codes = self.model.encode_images(self.world.pictures)
    return self._codes

  @property
  def reconstructions(self) -> Pictures:
    """rec(p) of every picture p of the world."""
    if self._reconstructions is None:
      self._reconstructions = self.model.decode_codes(self.codes)
    return self._reconstructions

  def run(self, tasks: Sequence[Task] = TASKS) -> list[Figure]:
    """Figures of the tasks, in the order of the table."""
    return [figure for task in TASKS if task in tasks for figure in getattr(self, f'_{task}')()]

  def _reconstruction(self) -> list[Figure]:
    ratios = psnr(self.world.pictures, self.reconstructions)
    held_out = np.array([item.split == 'validation' for item in self.world.items])
    used = codebook_use(self.codes[held_out], self.model.parts.vqgan_config.n_codes)
    n = int(held_out.sum())
    return [
        make_figure('psnr_validation', float(ratios[held_out].mean()), n),
        make_figure('psnr_train', float(ratios[~held_out].mean()), len(ratios) - n),
        make_figure('image_tokens', self.codes.shape[1], len(ratios)),
        make_figure('codebook_use', 100 * used['use'], n),
    ]

  def _describe(self) -> list[Figure]:
    figures = []
    for split, items in (('validation', self.validation), ('train', self.train)):
      prompts = [emoji_documents.describe_prompt(item, codes=self.codes) for item in items]
      answers = self._answers(prompts, f'describe, {split}', DESCRIBE_TOKENS)
      figures.append(make_figure(f'describe_{split}', exact_name_rate(answers, items), len(items)))
    return figures

  def _draw(self) -> list[Figure]:
    figures = []
    for split, items in (('validation', self.validation), ('train', self.train)):
      prompts = [emoji_documents.draw_prompt(item) for item in items]
      answers = self._answers(prompts, f'draw, {split}', self.codes.shape[1] + 8)
      picture, base = drawing_rates(answers, items, self.reconstructions, self.world.items)
      figures += [make_figure(f'draw_{split}', picture, len(items)), make_figure(f'draw_base_{split}', base, len(items))]
    return figures

  def _edit(self) -> list[Figure]:
    pairs = [(self.world.items[source], self.world.items[target]) for source, target in self.edits]
    prompts = [emoji_documents.edit_prompt(source, target, codes=self.codes) for source, target in pairs]
    answers = self._answers(prompts, 'edit', self.codes.shape[1] + 8)
    picture, _ = drawing_rates(answers, [target for _, target in pairs], self.reconstructions, self.world.items)
    return [make_figure('edit', picture, len(pairs))]

  def _text(self) -> list[Figure]:
    parts = self.model.parts
    vocabulary, context = Vocabulary(parts.vocabulary), parts.transformer_config.max_seq_len
    texts = [piece for topic in self.world.text_validation for piece in chunks(topic)]  # the documents of training's source
    # Models trained before the source left out what held-out topics share with training topics have seen most of them.
    groups = {'text_bits_per_byte': texts, 'text_bits_per_byte_fresh': fresh_pieces(texts, self.world.text_train)}
    figures = []
    for key, group in groups.items():
      self.log(f'text: {len(group):,} documents')
      if group:
        value = bits_per_byte(self.model.logits, group, vocabulary, parts.text_tokenizer, context=context)
        figures.append(make_figure(key, value, len(group)))
    return figures

  def _answers(self, prompts: Sequence[Document], name: str, max_new_tokens: int) -> list[Document]:
    options = dataclasses.replace(self.options, max_new_tokens=max_new_tokens)
    answers: list[Document] = []
    for start in range(0, len(prompts), _GENERATE_BATCH):
      self.log(f'{name}: {start:,} of {len(prompts):,}')
      answers += self.model.generate(prompts[start : start + _GENERATE_BATCH], options)
    return answers


def fixed_sample(values: Sequence[Any], n: int | None) -> list[Any]:
  """All values, or the same n of them on every call, in their order."""
  if n is None or n >= len(values):
    return list(values)
  rows = np.sort(np.random.default_rng(0).choice(len(values), n, replace=False))
  return [values[row] for row in rows]
