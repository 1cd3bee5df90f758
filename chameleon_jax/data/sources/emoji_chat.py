"""Source 'emoji_chat': conversations that mix describing, drawing, editing and questions.

Wording and single tasks come from `emoji_documents.py`, which also says what each split may show. Every answer to a question
can be told from the picture. Kinds of conversations after paper section 3.1.
"""

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from chameleon_jax.array_types import Codes as CodeTable
from chameleon_jax.data.sources.emoji_documents import Describe, Draw, Edit, EmojiSource, draw_prompt, edit_instruction, pick, tones_text
from chameleon_jax.data.sources.emoji_world import EmojiItem
from chameleon_jax.tokens.document import Document, Segment

DRAW_SEVERAL = ('Draw {names}.', 'Please draw {names}.', 'Show me {names}.', 'Make pictures of {names}.')
DRAW_NAMED = ('Draw {names}, each with its name.', 'Show me {names} and write the name below each.')
IS_THIS = ('Is this {name}?', 'Does the picture show {name}?')
WHICH = ('Which picture is {name}, the first or the second?', 'Where is {name}, in the first or in the second picture?')
TONE = ('Which skin tone is this?', 'What is the skin tone here?')
GENDER = ('Is this a man, a woman or a person?', 'Which gender is shown?')
FLAG = ('Is this the flag of a country or region?', 'Does the picture show the flag of a country or region?')


def enumerated(names: list[str]) -> str:
  """'a', 'a and b', 'a; b and c': semicolons, because names hold commas."""
  return names[0] if len(names) == 1 else f'{"; ".join(names[:-1])} and {names[-1]}'


class Chat(EmojiSource):
  """One conversation for each item of the split; its task is drawn by `SHARES`.

  describe      [picture] What is this?                          woman running
  draw          Draw woman running.                              [picture]
  draw_several  Draw woman running and mage.                     [picture][picture]
  edit          [picture] Change the skin tone to dark.          [picture]
  draw_edit     Draw woman running.   [picture]   Change the gender to man.   [picture]
  question      [picture] Which skin tone is this?               dark
  """

  SHARES: ClassVar[dict[str, float]] = {'describe': 0.3, 'draw': 0.3, 'draw_several': 0.1, 'edit': 0.15, 'draw_edit': 0.05, 'question': 0.1}

  def __init__(self, split: str, codes: CodeTable | None = None):
    super().__init__(split, codes)
    self._describe, self._draw, self._edit = Describe(split, codes), Draw(split, codes), Edit(split, codes)
    self._tasks = tuple(self.SHARES)
    self._limits = np.cumsum(list(self.SHARES.values()))
    # Bases of which some items have a skin tone: there, none means yellow.
    self._toned_bases = {item.base for item in self.partners if item.skin_tones}

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """A conversation about item `index` of the split; edits are about any editable one."""
    task = self._tasks[min(int(np.searchsorted(self._limits, rng.random(), side='right')), len(self._tasks) - 1)]
    item = self.items[index]
    if task == 'describe':
      return self._describe.document(index, rng)
    if task == 'draw':
      return self._draw.document(index, rng)
    if task == 'draw_several':
      return self._draw_several(item, rng)
    if task == 'edit':
      return self._edit.document(int(rng.integers(len(self._edit))), rng)
    if task == 'draw_edit':
      return self._draw_edit(rng)
    return self._question(item, rng)

  def _draw_several(self, item: EmojiItem, rng: np.random.Generator) -> Document:
    group = self.group(item, int(rng.integers(2, 4)), rng)
    names = enumerated([one.name for one in group])
    if rng.random() < 0.5:
      return Document.chat(pick(DRAW_SEVERAL, rng).format(names=names), [self.picture(one) for one in group])
    answer: list[Segment | str] = []
    for place, one in enumerate(group):
      answer += [self.picture(one), f' {one.name}' + ('\n' if place < len(group) - 1 else '')]
    return Document.chat(pick(DRAW_NAMED, rng).format(names=names), answer)

  def _draw_edit(self, rng: np.random.Generator) -> Document:
    start, result = self._edit.pair(int(rng.integers(len(self._edit))), rng)
    return Document.chat(
      *draw_prompt(start, rng=rng).turns, self.picture(start), edit_instruction(start, result, rng=rng), self.picture(result)
    )

  def _question(self, item: EmojiItem, rng: np.random.Generator) -> Document:
    questions: list[Callable[[EmojiItem, np.random.Generator], Document]] = [self._is_this, self._which, self._flag]
    if item.base in self._toned_bases:
      questions.append(self._tone)
    if item.gender in ('man', 'woman', 'person') and item.base != 'child':  # boys and girls have the gender of men and women
      questions.append(self._gender)
    return questions[rng.integers(len(questions))](item, rng)

  def _other(self, item: EmojiItem, rng: np.random.Generator) -> EmojiItem:
    return next(one for one in self.group(item, 2, rng) if one is not item)

  def _is_this(self, item: EmojiItem, rng: np.random.Generator) -> Document:
    if rng.random() < 0.5:
      return Document.chat([self.picture(item), pick(IS_THIS, rng).format(name=item.name)], 'Yes.')
    question = pick(IS_THIS, rng).format(name=self._other(item, rng).name)
    return Document.chat([self.picture(item), question], f'No, it is {item.name}.')

  def _which(self, item: EmojiItem, rng: np.random.Generator) -> Document:
    pair = [item, self._other(item, rng)]
    if rng.random() < 0.5:
      pair.reverse()
    question = pick(WHICH, rng).format(name=item.name)
    return Document.chat([*(self.picture(one) for one in pair), question], 'The first.' if pair[0] is item else 'The second.')

  def _flag(self, item: EmojiItem, rng: np.random.Generator) -> Document:
    answer = f'Yes, {item.name}.' if item.is_flag else f'No, it is {item.name}.'
    return Document.chat([self.picture(item), pick(FLAG, rng)], answer)

  def _tone(self, item: EmojiItem, rng: np.random.Generator) -> Document:
    return Document.chat([self.picture(item), pick(TONE, rng)], tones_text(item))

  def _gender(self, item: EmojiItem, rng: np.random.Generator) -> Document:
    assert item.gender is not None
    return Document.chat([self.picture(item), pick(GENDER, rng)], item.gender)
