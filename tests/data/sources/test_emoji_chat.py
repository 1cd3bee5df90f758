"""Conversations: every answer is checked against the attributes of the picture, by reading the question."""

import collections

import numpy as np
import pytest

from chameleon_jax.data.sources.emoji_chat import Chat, enumerated
from chameleon_jax.data.sources.emoji_documents import DESCRIBE
from chameleon_jax.data.sources.emoji_world import EmojiItem, EmojiWorld
from chameleon_jax.tokens.document import Document, Text

WORLD = EmojiWorld.load()
CODES = np.arange(len(WORLD), dtype=np.int32)[:, None]


def parts(document: Document) -> list[tuple[list[EmojiItem], str]]:
  """Pictures and text of each turn."""
  return [
    (
      [WORLD.items[int(s.codes[0])] for s in turn.segments if not isinstance(s, Text)],
      ''.join(s.text for s in turn.segments if isinstance(s, Text)),
    )
    for turn in document.turns
  ]


def check(document: Document) -> str:
  """Asserts that every answer is right and returns the task."""
  turns = parts(document)
  (asked, question), (drawn, answer) = turns[:2]
  if len(turns) == 4:
    start, result = turns[1][0][0], turns[3][0][0]
    assert start.base == result.base and (start.gender != result.gender) != (start.skin_tones != result.skin_tones)
    assert (result.gender if start.gender != result.gender else ' and '.join(result.skin_tones) or 'yellow') in turns[2][1]
    return 'draw_edit'
  if not asked:
    assert all(any(name in question for name in item.names) for item in drawn)
    if len(drawn) == 1:
      return 'draw'
    assert not answer or answer == '\n'.join(f' {item.name}' for item in drawn)
    assert bool(answer) == ('name' in question.split(', each')[-1] and ('each' in question or 'below' in question))
    return 'draw_several'
  if drawn:
    assert asked[0].base == drawn[0].base
    return 'edit'
  item = asked[0]
  if question in DESCRIBE:
    assert answer == item.name
    return 'describe'
  if 'skin tone is' in question or 'the skin tone here' in question:
    assert answer == (' and '.join(item.skin_tones) or 'yellow')
    return 'tone'
  if 'Which gender' in question or 'a man, a woman or a person' in question:
    assert answer == item.gender
    return 'gender'
  if 'country or region' in question:
    assert answer == f'{"Yes, " if item.name.startswith("flag: ") else "No, it is "}{item.name}.'
    return 'flag'
  if 'first' in question:
    wanted = asked[{'The first.': 0, 'The second.': 1}[answer]]
    other = asked[{'The first.': 1, 'The second.': 0}[answer]]
    assert wanted.name in question and wanted is not other
    return 'which'
  name = question.removeprefix('Is this ').removeprefix('Does the picture show ').removesuffix('?')
  assert answer == ('Yes.' if name == item.name else f'No, it is {item.name}.')
  return 'is_this'


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_answers_are_right_and_tasks_have_their_shares(split):
  source = Chat(split, CODES)
  n = 3000
  tasks: collections.Counter = collections.Counter()
  for seed in range(n):
    document = source.document(seed % len(source), np.random.default_rng((seed, 1)))
    assert [turn.role for turn in document.turns] == ['prompt', 'answer'] * (len(document.turns) // 2)
    tasks[check(document)] += 1
  questions = ('tone', 'gender', 'flag', 'which', 'is_this')
  assert all(tasks[name] > 0 for name in questions)
  found = {name: count for name, count in tasks.items() if name not in questions} | {'question': sum(tasks[q] for q in questions)}
  assert set(found) == set(Chat.SHARES) and sum(Chat.SHARES.values()) == pytest.approx(1)
  for name, share in Chat.SHARES.items():
    assert found[name] / n == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5), name


def test_enumerated():
  assert [enumerated(names) for names in (['a'], ['a', 'b'], ['a', 'b', 'c'])] == ['a', 'a and b', 'a; b and c']
