"""Documents about emoji: the drawn examples, what each split may show, and the edits, told independently from the attributes."""

import numpy as np
import pytest

from chameleon_jax.data.sources import emoji_documents
from chameleon_jax.data.sources.emoji_documents import describe_prompt, draw_prompt, edit_pairs, edit_prompt
from chameleon_jax.data.sources.emoji_world import EmojiItem, EmojiWorld
from chameleon_jax.data.sources.source import SOURCES, make_source
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document, Text

WORLD = EmojiWorld.load()
BY_NAME = {name: item for item in WORLD.items for name in item.names}
CODES = np.arange(len(WORLD), dtype=np.int32)[:, None]  # the only code of a picture is its index
EMOJI_SOURCES = [name for name in SOURCES if name != 'emoji_text']


def shown(document: Document) -> list[EmojiItem]:
  """The items whose pictures a document holds."""
  return [WORLD.items[int(picture.codes[0])] for picture in document.pictures]


def read(document: Document) -> list[str]:
  """Each turn as text with [name] for a picture."""
  return [
    ''.join(s.text if isinstance(s, Text) else f'[{WORLD.items[int(s.codes[0])].name}]' for s in turn.segments) for turn in document.turns
  ]


def sample(name: str, split: str, n: int) -> list[Document]:
  source = make_source(name, split, CODES)
  rng = np.random.default_rng(0)
  return [source.document(int(rng.integers(len(source))), np.random.default_rng(seed)) for seed in range(n)]


def spoken(document: Document) -> str:
  """All text, a line for each turn."""
  return '\n'.join(''.join(s.text for s in turn.segments if isinstance(s, Text)) for turn in document.turns)


def names_in(text: str) -> set[str]:
  """All names in a text, the longest at each place: 'woman running: dark skin tone' does not hold 'man running'."""
  words = text.replace('\n', ' ')
  found, start = set(), 0
  while start < len(words):
    longest = next((words[start:end] for end in range(min(len(words), start + 100), start, -1) if words[start:end] in BY_NAME), None)
    if longest:
      found.add(longest)
      start += len(longest)
    else:
      following = words.find(' ', start)
      start = len(words) if following < 0 else following + 1
  return found


def test_names_in_takes_the_longest():
  assert names_in('Draw woman running: dark skin tone; mage and flag: Norway.') == {'woman running: dark skin tone', 'mage', 'flag: Norway'}
  assert 'man running' not in names_in('Is this woman running?')


@pytest.mark.parametrize('name', EMOJI_SOURCES)
def test_training_never_shows_a_validation_picture_or_name(name):
  for document in sample(name, 'train', 1500):
    assert all(item.split == 'train' for item in shown(document)), read(document)
    assert all(BY_NAME[name].split == 'train' for name in names_in(spoken(document))), read(document)


@pytest.mark.parametrize('name', EMOJI_SOURCES)
def test_validation_documents_are_about_validation_pictures(name):
  for document in sample(name, 'validation', 300):
    items = shown(document) + [BY_NAME[name] for name in names_in(spoken(document))]
    assert any(item.split == 'validation' for item in items), read(document)


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_every_item_of_the_split_comes_up(split):
  for name in ('emoji_pairs', 'emoji_describe', 'emoji_draw'):
    source = make_source(name, split, CODES)
    found = [shown(source.document(i, np.random.default_rng(i)))[0].index for i in range(len(source))]
    assert found == [item.index for item in WORLD.items if item.split == split]


def test_pairs_have_the_picture_first_in_half():
  first = 0
  for document in sample('emoji_pairs', 'train', 1000):
    (item,) = shown(document)
    assert document.is_plain and document.text in item.names and len(document.segments) == 2
    first += isinstance(document.segments[1], Text)
    if isinstance(document.segments[1], Text):
      assert document.text == item.name
  assert 450 < first < 550


def test_interleaved_layouts():
  seen = set()
  for document in sample('emoji_interleaved', 'train', 1000):
    items, (text,) = shown(document), read(document)
    assert document.is_plain and 2 <= len(items) <= 4 and len(set(items)) == len(items)
    names = [item.name for item in items]
    number = {2: 'Two', 3: 'Three', 4: 'Four'}[len(items)]
    tones = [' and '.join(item.skin_tones) for item in items]
    last = ' and ' if len(items) == 2 else ' and last '
    layouts = {
      'list': f'{number} pictures:\n' + ''.join(f'- {name}: [{name}]\n' for name in names),
      'caption': ''.join(f'[{name}] {name}\n' for name in names),
      'sentence': 'Here is ' + ', then '.join(f'{n} [{n}]' for n in names[:-1]) + f'{last}{names[-1]} [{names[-1]}].',
      'tones': f'{items[0].base} in several skin tones.' + ''.join(f' {t}: [{n}]' for t, n in zip(tones, names)) + '\n',
    }
    layouts['tones of a gender'] = layouts['tones'].replace(' in several', f', {items[0].gender} in several', 1)
    (layout,) = (name for name, wanted in layouts.items() if wanted == text)
    if 'tones' in layout:
      assert len({(item.base, item.gender) for item in items}) == 1
    seen.add(layout)
  assert len(seen) == 5


def test_prompts_of_the_evaluation():
  item = BY_NAME['woman running']
  assert read(describe_prompt(item, codes=CODES)) == ['[woman running]What is this?']
  assert read(draw_prompt(item)) == ['Draw woman running.']
  dark, man = BY_NAME['woman running: dark skin tone'], BY_NAME['man running']
  assert read(edit_prompt(item, dark, codes=CODES)) == ['[woman running]Change the skin tone to dark.']
  assert read(edit_prompt(dark, item, codes=CODES)) == ['[woman running: dark skin tone]Change the skin tone to yellow.']
  assert read(edit_prompt(item, man, codes=CODES)) == ['[woman running]Change the gender to man.']
  two = BY_NAME['handshake: light skin tone, dark skin tone']
  assert read(edit_prompt(BY_NAME['handshake'], two, codes=CODES)) == ['[handshake]Change the skin tone to light and dark.']
  for prompt in (describe_prompt(item), draw_prompt(item), edit_prompt(item, man)):
    assert [turn.role for turn in prompt.turns] == ['prompt']
  np.testing.assert_array_equal(describe_prompt(item).pictures[0].pixels, WORLD.pictures[item.index])
  for other in ('man running: dark skin tone', 'mage', 'woman running'):
    with pytest.raises(DataError, match='no single edit'):
      edit_prompt(item, BY_NAME[other])


def test_wording_of_the_evaluation_is_half_of_the_training():
  texts = [document.turns[0].segments[-1].text for document in sample('emoji_describe', 'train', 1000)]
  share = texts.count('What is this?') / 1000
  assert 0.55 < share < 0.65  # 1/2 + 1/2 * 1/5
  assert set(texts) == set(emoji_documents.DESCRIBE)


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_edit_pairs(split):
  pairs = edit_pairs(WORLD, split)
  rows = np.array(pairs)
  bases = {base: k for k, base in enumerate(sorted({item.base for item in WORLD.items}))}
  base = np.array([bases[item.base] for item in WORLD.items])
  tones = np.array(['/'.join(item.skin_tones) for item in WORLD.items])
  gender = np.array([str(item.gender) for item in WORLD.items])
  part = np.array([item.split for item in WORLD.items])
  family = np.array([item.base == 'family' for item in WORLD.items])
  same = base[:, None] == base[None]
  one = (tones[:, None] != tones[None]) ^ (gender[:, None] != gender[None])
  wanted = same & one & (part == 'train')[:, None] & (part == split)[None] & ~(family[:, None] | family[None])
  np.testing.assert_array_equal(rows, np.argwhere(wanted))
  if split == 'validation':
    assert len(set(rows[:, 1])) == 283  # every held-out picture can be reached by an edit


def test_edit_changes_what_it_says():
  for document in sample('emoji_edit', 'train', 1000):
    start, result = shown(document)
    instruction = document.text
    assert [turn.role for turn in document.turns] == ['prompt', 'answer'] and len(document.turns[1].segments) == 1
    assert start.base == result.base
    if 'gender' in instruction:
      assert start.skin_tones == result.skin_tones and start.gender != result.gender
      assert f' {result.gender}' in instruction
    else:
      assert start.gender == result.gender and start.skin_tones != result.skin_tones
      assert f' {" and ".join(result.skin_tones) or "yellow"}' in instruction


def test_describe_and_draw_answers():
  for document in sample('emoji_describe', 'validation', 200):
    (item,) = shown(document)
    assert read(document)[1] == item.name
  for document in sample('emoji_draw', 'validation', 200):
    (item,) = shown(document)
    prompt, answer = read(document)
    assert any(name in prompt for name in item.names) and answer == f'[{item.name}]'
