"""The shipped emoji world: what it holds, its splits, and damaged files."""

import collections
import json
import pathlib
import shutil
import struct
import zlib

import numpy as np
import pytest
from array_record.python import array_record_module

from chameleon_jax.data.sources import emoji_world
from chameleon_jax.data.sources.emoji_world import EmojiWorld, unpack_record
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.images import png_bytes

TONES = {'light', 'medium-light', 'medium', 'medium-dark', 'dark'}


@pytest.fixture(scope='module')
def world() -> EmojiWorld:
  return EmojiWorld.load()


def test_counts_and_order(world):
  assert len(world) == 3771
  assert world.pictures.shape == (3771, 64, 64, 3)
  assert [item.index for item in world.items] == list(range(3771))
  assert len(world.text_train) == 71 and len(world.text_validation) == 8
  assert sum(map(len, world.text_train + world.text_validation)) == 464_970


def test_assets_are_small_and_carry_their_licences():
  assert (emoji_world.ASSETS / 'emoji.array_record').stat().st_size <= 12e6
  font = (emoji_world.ASSETS / 'LICENSE-OFL.txt').read_text()
  assert 'SIL OPEN FONT LICENSE Version 1.1' in font and 'Copyright 2013-2017 Google Inc.' in font
  assert 'PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2' in (emoji_world.ASSETS / 'LICENSE-PSF.txt').read_text()


def test_loading_twice_gives_the_same_read_only_world(world):
  assert EmojiWorld.load() is world
  for one in (world, EmojiWorld.load('train')):
    with pytest.raises(ValueError, match='read-only'):
      one.pictures[0] = 0


@pytest.mark.parametrize(
  'emoji, name, base, skin_tones, gender',
  [
    ('\U0001f3c3\U0001f3fe\u200d\u2640\ufe0f', 'woman running: medium-dark skin tone', 'person running', ('medium-dark',), 'woman'),
    ('\U0001f3c3', 'person running', 'person running', (), 'person'),
    ('\U0001f9d1\u200d\U0001f3a8', 'artist', 'artist', (), 'person'),
    ('\U0001f468\U0001f3fb\u200d\U0001f3a8', 'man artist: light skin tone', 'artist', ('light',), 'man'),
    ('\U0001f469\U0001f3fd\u200d\U0001f9b0', 'woman: medium skin tone, red hair', 'person: red hair', ('medium',), 'woman'),
    ('\U0001f44b\U0001f3ff', 'waving hand: dark skin tone', 'waving hand', ('dark',), None),
    ('\U0001f46c\U0001f3ff', 'men holding hands: dark skin tone', 'people holding hands', ('dark',), 'man'),
    ('\U0001f1eb\U0001f1f7', 'flag: France', 'flag: France', (), None),
    ('1\ufe0f\u20e3', 'keycap: 1', 'keycap: 1', (), None),
    ('\u2642\ufe0f', 'male sign', 'male sign', (), None),
    ('\U0001f34e', 'red apple', 'red apple', (), None),
    (
      '\U0001f469\U0001f3fb\u200d\u2764\ufe0f\u200d\U0001f48b\u200d\U0001f468\U0001f3ff',
      'kiss: woman, man, light skin tone, dark skin tone',
      'kiss',
      ('light', 'dark'),
      'woman and man',
    ),
    (
      '\U0001f9d1\U0001f3fe\u200d\U0001f91d\u200d\U0001f9d1\U0001f3fe',
      'people holding hands: medium-dark skin tone',
      'people holding hands',
      ('medium-dark',),
      'person',
    ),
  ],
)
def test_names_and_attributes(world, emoji, name, base, skin_tones, gender):
  item = next(item for item in world.items if emoji in item.emoji)
  assert (item.name, item.base, item.skin_tones, item.gender) == (name, base, skin_tones, gender)


def test_equal_pictures_are_one_item_with_all_names(world):
  assert len({picture.tobytes() for picture in world.pictures}) == len(world)
  names = [name for item in world.items for name in item.names]
  assert len(names) == len(set(names)) == 3789
  norway = next(item for item in world.items if item.name == 'flag: Norway')
  assert norway.names == ('flag: Norway', 'flag: Bouvet Island', 'flag: Svalbard & Jan Mayen') and norway.is_flag


def test_pictures_look_right(world):
  def mean_colour(name):
    return world.pictures[next(item.index for item in world.items if item.name == name)][24:40, 24:40].mean((0, 1))

  red, green, blue = mean_colour('red apple')
  assert red > 150 and green < 100 and blue < 100
  red, green, blue = mean_colour('green apple')
  assert green > 120 and green > blue + 50
  assert (world.pictures[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean((1, 2)) > 250).mean() > 0.9  # the ground is white


def test_other_languages(world):
  apple = next(item for item in world.items if item.name == 'red apple')
  assert (apple.languages['de'], apple.languages['fr']) == ('roter apfel', 'pomme rouge')
  assert set(apple.languages) == {'es', 'ja', 'ko', 'pt', 'it', 'fr', 'de', 'fa', 'id', 'zh', 'ru', 'tr', 'ar'}


def test_splits_divide_the_world(world):
  train, validation = EmojiWorld.load('train'), EmojiWorld.load('validation')
  assert sorted(item.index for item in train.items + validation.items) == list(range(len(world)))
  assert len(validation) == 283
  for part in (train, validation):
    for row in (0, len(part) // 2, len(part) - 1):
      np.testing.assert_array_equal(part.pictures[row], world.pictures[part.items[row].index])
  with pytest.raises(DataError, match="unknown split 'test'"):
    EmojiWorld.load('test')


def test_validation_is_combinations_whose_parts_are_seen_in_training(world):
  train = [item for item in world.items if item.split == 'train']
  seen = {(item.base, item.skin_tones, item.gender) for item in train}
  of_base = collections.defaultdict(list)
  for item in train:
    of_base[item.base].append(item)
  tones_seen = collections.Counter(tone for item in train for tone in item.skin_tones)
  assert set(tones_seen) == TONES
  held_out = [item for item in world.items if item.split == 'validation']
  for item in held_out:
    assert (item.base, item.skin_tones, item.gender) not in seen
    assert set(item.skin_tones) <= TONES and item.skin_tones
    assert sum(other.gender == item.gender for other in of_base[item.base]) >= 4, item.name
    if len({other.gender for other in of_base[item.base]}) > 1:  # the tone is seen on this base, on another gender or partner
      assert {tone for other in of_base[item.base] for tone in other.skin_tones} >= set(item.skin_tones), item.name
  assert len({item.base for item in held_out}) >= 140  # spread over the bases


def test_combinations_are_unique_where_they_can_be_edited(world):
  combinations = [(i.base, i.skin_tones, i.gender) for i in world.items if ',' not in (i.gender or '')]
  assert len(combinations) == len(set(combinations))


# --------------------------------------------------------------------------------------------- damaged files


def record(index: int, payload: bytes) -> bytes:
  body = struct.pack('<I', index) + payload
  return body + struct.pack('<I', zlib.crc32(body))


def write_world(folder: pathlib.Path, *, picture: bytes, fields: dict | None = None, form: str = 'chameleon_jax emoji world 1') -> None:
  item = {'emoji': ['x'], 'names': ['x'], 'languages': {}, 'base': 'x', 'skin_tones': [], 'gender': None, 'split': 'train'}
  topic = {'topic': 'if', 'split': 'train'}
  for name, metadata, payload, found in (
    ('emoji', item | (fields or {}), picture, form),
    ('topics', topic, zlib.compress(b'text'), 'chameleon_jax topics 1'),
  ):
    manifest = json.dumps({'format': found, 'items': [metadata]}).encode()
    writer = array_record_module.ArrayRecordWriter(str(folder / f'{name}.array_record'), 'group_size:1,uncompressed')
    writer.write(record(0, zlib.compress(manifest)))
    writer.write(record(1, payload))
    writer.close()


WHITE = png_bytes(np.full((64, 64, 3), 255, np.uint8))


def test_a_world_of_another_folder(tmp_path):
  write_world(tmp_path, picture=WHITE)
  small = EmojiWorld.load(path=tmp_path)
  assert [item.name for item in small.items] == ['x'] and small.text_train == ('text',) and (small.pictures == 255).all()


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'picture': b'no picture'}, r'emoji.array_record, record 1: .*reinstall'),
    ({'picture': png_bytes(np.zeros((32, 64, 3), np.uint8))}, r'record 1: picture of shape \(32, 64, 3\)'),
    ({'picture': WHITE, 'fields': {'colour': 'red'}}, r"record 1: .*'colour'"),
    ({'picture': WHITE, 'form': 'something else'}, r"'something else' with 1 of 1 records"),
  ],
)
def test_foreign_content(tmp_path, changes, message):
  write_world(tmp_path, **changes)
  with pytest.raises(DataError, match=message) as error:
    EmojiWorld.load(path=tmp_path)
  assert '\n' not in str(error.value)


def test_missing_cut_off_and_damaged_files(tmp_path):
  with pytest.raises(DataError, match='emoji.array_record is missing'):
    EmojiWorld.load(path=tmp_path)
  for name in ('emoji', 'topics'):
    shutil.copy(emoji_world.ASSETS / f'{name}.array_record', tmp_path)
  path = tmp_path / 'emoji.array_record'
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(DataError, match='cut off or not an ArrayRecord file'):
    EmojiWorld.load(path=tmp_path)
  damaged = bytearray(whole)
  damaged[len(whole) // 2] ^= 0xFF
  path.write_bytes(damaged)
  with pytest.raises(DataError, match=r'emoji.array_record, record \d+: ') as error:
    EmojiWorld.load(path=tmp_path)
  assert '\n' not in str(error.value)


def test_unpack_record():
  good = record(7, b'payload')
  assert unpack_record(good, 7) == b'payload'
  with pytest.raises(ValueError, match='holds index 7'):
    unpack_record(good, 8)
  with pytest.raises(ValueError, match='wrong checksum'):
    unpack_record(good[:5] + b'!' + good[6:], 7)
  with pytest.raises(ValueError, match='3 bytes are too few'):
    unpack_record(b'abc', 0)
