"""Documents about the emoji world: pairs, interleaved documents, and the prompts of its three tasks.

The name of a picture is always written as in the data set ('man running: medium-dark skin tone'), so an exact match can be
scored. Split 'train' never shows a validation picture or name in any role. In split 'validation' every document has a
validation picture in the role that is tested (described, drawn, result of an edit); partners come from the whole world.

Conversations of several tasks are in `emoji_chat.py`. Kinds of documents: paper sections 2.2 and 3.1.
"""

import collections
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from chameleon_jax.array_types import Codes as CodeTable
from chameleon_jax.data.sources.emoji_world import EmojiItem, EmojiWorld
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Codes, Document, Image, Segment

# The first of each list is the one that evaluation asks with; half of the training prompts use it.
DESCRIBE = ('What is this?', 'Describe this picture.', 'Name this picture.', 'What does the picture show?', 'What do you see here?')
DRAW = (
  'Draw {name}.',
  'Please draw {name}.',
  'Show me {name}.',
  'Make a picture of {name}.',
  'Can you draw {name}?',
  'I would like to see {name}.',
)
EDIT_TONES = (
  'Change the skin tone to {value}.',
  'Make the skin tone {value}.',
  'The same with skin tone {value}, please.',
  'Draw this again, but with skin tone {value}.',
)
EDIT_GENDER = (
  'Change the gender to {value}.',
  'Make the gender {value}.',
  'The same with gender {value}, please.',
  'Draw this again, but with gender {value}.',
)

T = TypeVar('T')


def pick(options: Sequence[T], rng: np.random.Generator | None) -> T:
  """The first option without `rng` and in half of the draws, else any."""
  if rng is None or rng.random() < 0.5:
    return options[0]
  return options[int(rng.integers(len(options)))]


def tones_text(item: EmojiItem) -> str:
  """'dark', 'light and dark' for two, 'yellow' for none."""
  return ' and '.join(item.skin_tones) or 'yellow'


def segment_of(item: EmojiItem, codes: CodeTable | None = None) -> Image | Codes:
  """The picture of an item: its row of the table of codes, or its pixels without a table."""
  return Image(EmojiWorld.load().pictures[item.index]) if codes is None else Codes(np.asarray(codes[item.index]))


# ------------------------------------------------------------------------------------------------- prompts


def describe_prompt(item: EmojiItem, *, codes: CodeTable | None = None, rng: np.random.Generator | None = None) -> Document:
  """`[picture] What is this?` The right answer is exactly `item.name`. Without `rng` the wording of evaluation."""
  return Document.chat([segment_of(item, codes), pick(DESCRIBE, rng)])


def draw_prompt(item: EmojiItem, *, rng: np.random.Generator | None = None) -> Document:
  """`Draw woman running.` The right answer is exactly the picture. Without `rng` the wording of evaluation."""
  name = item.name if rng is None else pick(item.names, rng)
  return Document.chat(pick(DRAW, rng).format(name=name))


def edit_instruction(from_item: EmojiItem, to_item: EmojiItem, *, rng: np.random.Generator | None = None) -> str:
  """'Change the skin tone to dark.' or 'Change the gender to woman.'

  Raises:
    DataError: the two do not differ in exactly one of skin tones and gender, or not only there.
  """
  if from_item.base == to_item.base and from_item.gender == to_item.gender and from_item.skin_tones != to_item.skin_tones:
    return pick(EDIT_TONES, rng).format(value=tones_text(to_item))
  if from_item.base == to_item.base and from_item.skin_tones == to_item.skin_tones and from_item.gender != to_item.gender:
    return pick(EDIT_GENDER, rng).format(value=to_item.gender)
  raise DataError(f'no single edit leads from {from_item.name!r} to {to_item.name!r}: only skin tones or only the gender may differ')


def edit_prompt(
  from_item: EmojiItem, to_item: EmojiItem, *, codes: CodeTable | None = None, rng: np.random.Generator | None = None
) -> Document:
  """`[picture] Change the skin tone to dark.` The right answer is exactly the picture of `to_item`.

  Raises:
    DataError: see `edit_instruction`.
  """
  return Document.chat([segment_of(from_item, codes), edit_instruction(from_item, to_item, rng=rng)])


def edit_pairs(world: EmojiWorld, split: str) -> list[tuple[int, int]]:
  """All edits of a split as (from, to) indices into the full world, ordered.

  A pair has one base and differs either in skin tones or in gender. The start is always a training picture, the
  result a picture of the split. Families are left out: they differ in their members.

  Args:
    world: the full world ('all').
    split: 'train' | 'validation'.
  """
  by_base = collections.defaultdict(list)
  for item in world.items:
    if ',' not in (item.gender or ''):
      by_base[item.base].append(item)
  pairs = []
  for relatives in by_base.values():
    for start in relatives:
      for result in relatives:
        tones, gender = start.skin_tones != result.skin_tones, start.gender != result.gender
        if start.split == 'train' and result.split == split and tones != gender:
          pairs.append((start.index, result.index))
  return sorted(pairs)


# ------------------------------------------------------------------------------------------------- sources


class EmojiSource:
  """What the sources share: the items of the split, their pictures, and the partners that may appear beside them.

  Args:
    split: 'train' | 'validation'.
    codes: int32 [3771, n], codes of every picture of the world; None for documents with pixels.

  Raises:
    DataError: `codes` has another number of rows than the world has pictures.
  """

  def __init__(self, split: str, codes: CodeTable | None = None):
    self.world = EmojiWorld.load()
    if codes is not None and len(codes) != len(self.world):
      raise DataError(f'the table of codes has {len(codes)} rows, the emoji world {len(self.world)} pictures: encode the whole world')
    self.codes = codes
    self.split = split
    self.items = tuple(item for item in self.world.items if item.split == split)
    self.partners = self.items if split == 'train' else self.world.items
    self._place = {item.index: place for place, item in enumerate(self.partners)}
    self._relatives = collections.defaultdict(list)
    for item in self.partners:
      self._relatives[item.base].append(item)

  def __len__(self) -> int:
    return len(self.items)

  def picture(self, item: EmojiItem) -> Image | Codes:
    """The picture segment of an item."""
    return segment_of(item, self.codes)

  def relatives(self, item: EmojiItem) -> list[EmojiItem]:
    """Partners with the same base, without the item itself."""
    return [other for other in self._relatives[item.base] if other is not item]

  def group(self, item: EmojiItem, n: int, rng: np.random.Generator) -> list[EmojiItem]:
    """The item and n - 1 different partners in random order: of the same base, close by in the world, or any."""
    kind = rng.integers(3)
    pool: Sequence[EmojiItem] = ()
    if kind == 0:
      pool = self.relatives(item)
    elif kind == 1:
      drawn = {self.partners[i].index: self.partners[i] for i in rng.integers(len(self.partners), size=2 * n)}
      pool = [other for other in drawn.values() if other is not item]
    if len(pool) < n - 1:  # neighbours are of a kind: fruit, clocks, faces
      place = self._place[item.index]
      pool = [other for other in self.partners[max(0, place - 8) : place + 9] if other is not item]
    chosen = [item, *(pool[i] for i in rng.permutation(len(pool))[: n - 1])]
    return [chosen[i] for i in rng.permutation(len(chosen))]


class Pairs(EmojiSource):
  """Source 'emoji_pairs': `[picture] name` or `name [picture]`, each half of the time."""

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """Picture and name of item `index` of the split."""
    item = self.items[index]
    picture_first = rng.random() < 0.5
    if picture_first:
      return Document.plain(self.picture(item), item.name)
    return Document.plain(pick(item.names, rng), self.picture(item))


class Interleaved(EmojiSource):
  """Source 'emoji_interleaved': two to four pictures that share something, with text between them.

  list      Two pictures:\n- woman running: [picture]\n- man running: [picture]\n
  caption   [picture] woman running\n[picture] man running\n
  sentence  Here is woman running [picture], then man running [picture] and last mage [picture].
  tones     person running in several skin tones. dark: [picture] light: [picture]\n
  """

  def __init__(self, split: str, codes: CodeTable | None = None, *, max_pictures: int = 4):
    super().__init__(split, codes)
    self._max_pictures = max_pictures

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """A document with item `index` of the split and its partners."""
    item = self.items[index]
    variants = [other for other in self.relatives(item) if other.gender == item.gender and other.skin_tones]
    n = int(rng.integers(2, self._max_pictures + 1))
    if item.skin_tones and len(variants) >= n - 1 and rng.random() < 0.3:
      return self._tones([item, *(variants[i] for i in rng.permutation(len(variants))[: n - 1])], rng)
    group = self.group(item, n, rng)
    layout = (self._list, self._caption, self._sentence)[rng.integers(3)]
    return layout(group)

  def _list(self, group: Sequence[EmojiItem]) -> Document:
    segments: list[Segment | str] = [f'{("Two", "Three", "Four")[len(group) - 2]} pictures:\n']
    for item in group:
      segments += [f'- {item.name}: ', self.picture(item), '\n']
    return _joined(segments)

  def _caption(self, group: Sequence[EmojiItem]) -> Document:
    return _joined([part for item in group for part in (self.picture(item), f' {item.name}\n')])

  def _sentence(self, group: Sequence[EmojiItem]) -> Document:
    segments: list[Segment | str] = []
    for place, item in enumerate(group):
      last = ' and ' if len(group) == 2 else ' and last '
      lead = 'Here is ' if place == 0 else (last if place == len(group) - 1 else ', then ')
      segments += [f'{lead}{item.name} ', self.picture(item)]
    return _joined([*segments, '.'])

  def _tones(self, group: Sequence[EmojiItem], rng: np.random.Generator) -> Document:
    subject = group[0].base if group[0].gender in (None, 'person') else f'{group[0].base}, {group[0].gender}'
    segments: list[Segment | str] = [f'{subject} in several skin tones.']
    for i in rng.permutation(len(group)):
      segments += [f' {tones_text(group[i])}: ', self.picture(group[i])]
    return _joined([*segments, '\n'])


def _joined(segments: Sequence[Segment | str]) -> Document:
  """A plain document; strings that follow one another become one segment."""
  merged: list[Segment | str] = []
  for segment in segments:
    if isinstance(segment, str) and merged and isinstance(merged[-1], str):
      merged[-1] += segment
    else:
      merged.append(segment)
  return Document.plain(*merged)


class Describe(EmojiSource):
  """Source 'emoji_describe': picture in, exact name out."""

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """Item `index` of the split, described."""
    item = self.items[index]
    return Document.chat(*describe_prompt(item, codes=self.codes, rng=rng).turns, item.name)


class Draw(EmojiSource):
  """Source 'emoji_draw': name in, picture out."""

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """Item `index` of the split, drawn."""
    item = self.items[index]
    return Document.chat(*draw_prompt(item, rng=rng).turns, self.picture(item))


class Edit(EmojiSource):
  """Source 'emoji_edit': picture and change in, picture out; one document for each possible result."""

  def __init__(self, split: str, codes: CodeTable | None = None):
    super().__init__(split, codes)
    starts = collections.defaultdict(list)
    for start, result in edit_pairs(self.world, split):
      starts[result].append(start)
    self._edits = [(self.world.items[result], [self.world.items[start] for start in of]) for result, of in sorted(starts.items())]

  def __len__(self) -> int:
    return len(self._edits)

  def pair(self, index: int, rng: np.random.Generator) -> tuple[EmojiItem, EmojiItem]:
    """(start, result) of an edit that ends in result `index`; in half of them the gender changes, where it can."""
    result, starts = self._edits[index]
    of_gender = [start for start in starts if start.gender != result.gender]
    of_tones = [start for start in starts if start.gender == result.gender]
    pool = of_gender if of_gender and (not of_tones or rng.random() < 0.5) else of_tones
    return pool[rng.integers(len(pool))], result

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """An edit that ends in result `index`."""
    start, result = self.pair(index, rng)
    return Document.chat(*edit_prompt(start, result, codes=self.codes, rng=rng).turns, self.picture(result))
