"""The builder of the emoji world: names, attributes, splits, records; and, with the font, pictures equal to the shipped ones."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

from chameleon_jax.data.sources.emoji_world import EmojiWorld, unpack_record
from chameleon_jax.tokens.images import load_image

ROOT = pathlib.Path(__file__).parents[2]
FONT = pathlib.Path('/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf')


@pytest.fixture(scope='module')
def tool():
  spec = importlib.util.spec_from_file_location('build_emoji_world', ROOT / 'tools' / 'build_emoji_world.py')
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  yield module
  del sys.modules[spec.name]


@pytest.mark.parametrize(
  'short_code, emoji, name',
  [
    (':woman_running_medium-dark_skin_tone:', '', 'woman running: medium-dark skin tone'),
    (':man_medium_skin_tone_red_hair:', '', 'man: medium skin tone, red hair'),
    (':man_bald:', '', 'man: bald'),
    (':person_beard:', '', 'person: beard'),
    (':kiss_woman_man_dark_skin_tone_light_skin_tone:', '', 'kiss: woman, man, dark skin tone, light skin tone'),
    (':couple_with_heart:', '', 'couple with heart'),
    (':family_man_woman_girl_boy:', '', 'family: man, woman, girl, boy'),
    (':men_holding_hands_light_skin_tone:', '', 'men holding hands: light skin tone'),
    (':keycap_#:', '#\ufe0f\u20e3', 'keycap: #'),
    (':France:', '\U0001f1eb\U0001f1f7', 'flag: France'),
    (':Wales:', '\U0001f3f4\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f', 'flag: Wales'),
    (':black_flag:', '\U0001f3f4', 'black flag'),
    (':nine_o’clock:', '', 'nine o’clock'),
    (':person_running_facing_right_dark_skin_tone:', '', 'person running facing right: dark skin tone'),
  ],
)
def test_readable_name(tool, short_code, emoji, name):
  assert tool.readable_name(short_code, emoji) == name


@pytest.mark.parametrize(
  'emoji, base_key, skin_tones, gender',
  [
    ('\U0001f3c3\U0001f3fe\u200d\u2640\ufe0f', '\U0001f3c3', ('medium-dark',), 'woman'),
    ('\U0001f3c3\u200d\u2642\ufe0f\u200d\u27a1\ufe0f', '\U0001f3c3\u200d\u27a1', (), 'man'),
    ('\U0001f469\u200d\U0001f3a8', '\U0001f9d1\u200d\U0001f3a8', (), 'woman'),
    ('\U0001f478\U0001f3fb', '\U0001fac5', ('light',), 'woman'),
    ('\U0001f44b\U0001f3ff', '\U0001f44b', ('dark',), None),
    ('\U0001faf1\U0001f3fb\u200d\U0001faf2\U0001f3ff', '\U0001f91d', ('light', 'dark'), None),
    ('\U0001f469\u200d\u2764\ufe0f\u200d\U0001f468', '\U0001f491', (), 'woman and man'),
    ('\U0001f468\u200d\u2764\ufe0f\u200d\U0001f468', '\U0001f491', (), 'man'),
    ('\U0001f468\u200d\U0001f469\u200d\U0001f467', '\U0001f46a', (), 'man, woman, girl'),
    ('\U0001f46b\U0001f3fd', '\U0001f9d1\u200d\U0001f91d\u200d\U0001f9d1', ('medium',), 'woman and man'),
    ('\u2640\ufe0f', '\u2640', (), None),
    ('\u2764\ufe0f', '\u2764', (), None),
  ],
)
def test_attributes(tool, emoji, base_key, skin_tones, gender):
  assert tool.attributes(emoji) == tool.Attributes(base_key, skin_tones, gender)


def test_equal_pictures_merge_and_take_the_plain_name(tool):
  black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
  pictures = {'\U0001f44b\U0001f3ff': black, '\U0001f44b': black, '\U0001f34e': white}
  names = {
    '\U0001f44b\U0001f3ff': {'en': ':waving_hand_dark_skin_tone:', 'de': ':winkende_hand_dunkle_hautfarbe:'},
    '\U0001f44b': {'en': ':waving_hand:', 'de': ':winkende_hand:'},
    '\U0001f34e': {'en': ':red_apple:'},
  }
  apple, hand = tool.build_items(names, pictures)
  assert (apple.names, apple.languages, apple.base) == (['red apple'], {}, 'red apple')
  assert hand.names == ['waving hand', 'waving hand: dark skin tone'] and hand.skin_tones == []
  assert hand.metadata('train') == {
    'emoji': ['\U0001f44b', '\U0001f44b\U0001f3ff'],
    'names': ['waving hand', 'waving hand: dark skin tone'],
    'languages': {'de': 'winkende hand'},
    'base': 'waving hand',
    'skin_tones': [],
    'gender': None,
    'split': 'train',
  }


def shipped_items(tool):
  world = EmojiWorld.load()
  return [
    tool.Item([*i.emoji], [*i.names], dict(i.languages), i.base, [*i.skin_tones], i.gender, picture)
    for i, picture in zip(world.items, world.pictures, strict=True)
  ]


def test_the_shipped_split_is_the_one_of_the_rule(tool):
  chosen = tool.held_out(shipped_items(tool))
  assert chosen == {item.index for item in EmojiWorld.load('validation').items}


def test_the_split_does_not_depend_on_the_order(tool):
  items = [item for item in shipped_items(tool) if item.base in ('waving hand', 'person running', 'kiss')]
  one = {items[i].names[0] for i in tool.held_out(items)}
  items.reverse()
  assert one == {items[i].names[0] for i in tool.held_out(items)}
  assert len(one) == 1 + 2 + 17


def test_held_out_topics(tool):
  topics = {f'topic {i}': '' for i in range(40)}
  held = tool.held_out_topics(topics)
  assert len(held) == 4 and held == tool.held_out_topics(dict(reversed(topics.items())))


def test_records_come_back(tool, tmp_path):
  from array_record.python import array_record_module

  tool.write_records(tmp_path / 'x.array_record', tool.pack_file({'format': 'x', 'items': [1]}, [b'abc', b'']))
  records = array_record_module.ArrayRecordReader(str(tmp_path / 'x.array_record')).read_all()
  assert [unpack_record(record, i) for i, record in enumerate(records)][1:] == [b'abc', b'']


def test_pictures_are_encoded_without_loss(tool):
  picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  np.testing.assert_array_equal(load_image(tool.encode_picture(picture)), picture)


@pytest.mark.skipif(not FONT.is_file(), reason="needs Debian's fonts-noto-color-emoji")
def test_rebuilt_pictures_are_the_shipped_ones(tool):
  world = EmojiWorld.load()
  rows = range(0, len(world), 97)
  rebuilt = tool.render_pictures(str(FONT), [emoji for row in rows for emoji in world.items[row].emoji])
  for row in rows:
    for emoji in world.items[row].emoji:
      np.testing.assert_array_equal(rebuilt[emoji], world.pictures[row])
  assert tool.render_pictures(str(FONT), ['\U0001f9d1\u200d\U0001fa70', 'ab']) == {}  # several glyphs
