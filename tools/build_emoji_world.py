"""Builds the shipped emoji world from Debian's Noto Color Emoji font and Python's documentation topics.

Nobody but a maintainer runs this: the two ArrayRecord files it writes are part of the package.

  apt-get install fonts-noto-color-emoji
  pip install array_record emoji==2.16.0 fonttools uharfbuzz pillow
  python3.11 tools/build_emoji_world.py --font=/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf \
      --out=chameleon_jax/assets/emoji_world

What becomes an item: every fully qualified emoji (as listed by PyPI's `emoji`) that the font shapes into exactly one
glyph with a bitmap. The 136x128 bitmap goes onto a white 136x136 square, which LANCZOS shrinks to 64x64. Emoji whose
64x64 pictures are equal are one item with several names.

Names: the `emoji` package has the CLDR short names without their punctuation (':kiss_man_man_dark_skin_tone:').
`readable_name` puts it back by one rule, "head: qualifier, qualifier", where the qualifiers are the people of a
couple or family, then skin tones, then hair: 'kiss: man, man, dark skin tone'. Flags of regions and countries get
CLDR's head 'flag'. Typographic apostrophes and accents stay.

Attributes come from the code points, not from the names: skin tones from the five modifiers, gender from the signs and the
man, woman, person characters, and the base is what remains (named after its neutral form).

Splits: see `held_out`. They hash the names, so they depend neither on order nor on Python's hash seed.

It does not know the package: `chameleon_jax/data/sources/emoji_world.py` reads what is written here, and documents the records.
"""

import argparse
import collections
import dataclasses
import hashlib
import io
import json
import pathlib
import re
import struct
import sys
import zlib

import numpy as np

SIDE = 64
LANGUAGES = ('es', 'ja', 'ko', 'pt', 'it', 'fr', 'de', 'fa', 'id', 'zh', 'ru', 'tr', 'ar')

TONES = ('light', 'medium-light', 'medium', 'medium-dark', 'dark')
TONE_OF_CHARACTER = {chr(0x1F3FB + i): tone for i, tone in enumerate(TONES)}
JOINER, EMOJI_STYLE, MALE, FEMALE = '\u200d', '\ufe0f', '\u2642', '\u2640'
PERSON, MAN, WOMAN = '\U0001f9d1', '\U0001f468', '\U0001f469'

# Characters that CLDR treats as the man and woman forms of a third one: character -> (neutral sequence, gender).
GENDERED = {
  MAN: (PERSON, 'man'),
  WOMAN: (PERSON, 'woman'),
  PERSON: (PERSON, 'person'),
  '\U0001f466': ('\U0001f9d2', 'man'),  # boy, girl -> child
  '\U0001f467': ('\U0001f9d2', 'woman'),
  '\U0001f9d2': ('\U0001f9d2', 'person'),
  '\U0001f474': ('\U0001f9d3', 'man'),  # old man, old woman -> older person
  '\U0001f475': ('\U0001f9d3', 'woman'),
  '\U0001f9d3': ('\U0001f9d3', 'person'),
  '\U0001f934': ('\U0001fac5', 'man'),  # prince, princess -> person with crown
  '\U0001f478': ('\U0001fac5', 'woman'),
  '\U0001fac5': ('\U0001fac5', 'person'),
  '\U0001fac3': ('\U0001fac4', 'man'),  # pregnant man, woman -> person
  '\U0001f930': ('\U0001fac4', 'woman'),
  '\U0001fac4': ('\U0001fac4', 'person'),
  '\U0001f385': ('\U0001f9d1\u200d\U0001f384', 'man'),  # Santa Claus, Mrs. Claus -> Mx Claus
  '\U0001f936': ('\U0001f9d1\u200d\U0001f384', 'woman'),
  '\U0001f57a': ('\U0001f57a', 'man'),  # man dancing, woman dancing: drawn differently, so two bases
  '\U0001f483': ('\U0001f483', 'woman'),
  '\U0001f9d5': ('\U0001f9d5', 'woman'),  # woman with headscarf
  '\U0001f46d': ('\U0001f9d1\u200d\U0001f91d\u200d\U0001f9d1', 'woman'),  # women, men, woman and man holding hands
  '\U0001f46c': ('\U0001f9d1\u200d\U0001f91d\u200d\U0001f9d1', 'man'),
  '\U0001f46b': ('\U0001f9d1\u200d\U0001f91d\u200d\U0001f9d1', 'woman and man'),
}
# Longer ways to write the same base, once tones and genders are gone.
SAME_BASE = {
  '\U0001f9d1\u200d\u2764\u200d\U0001f48b\u200d\U0001f9d1': '\U0001f48f',  # kiss
  '\U0001f9d1\u200d\u2764\u200d\U0001f9d1': '\U0001f491',  # couple with heart
  '\U0001f9d1\u200d\U0001f430\u200d\U0001f9d1': '\U0001f46f',  # people with bunny ears
  '\U0001faf1\u200d\U0001faf2': '\U0001f91d',  # handshake
}
FAMILY = '\U0001f46a'

_TONE_WORDS = r'(?:(?:light|medium-light|medium|medium-dark|dark) skin tone)'
_NAME = re.compile(rf'(?P<head>.+?)(?P<tones>(?: {_TONE_WORDS})*)(?: (?P<hair>(?:red|curly|white|blond) hair|bald|beard))?')
_GROUP = re.compile(r'(?P<head>kiss|couple with heart|family)(?P<people>(?: (?:man|woman|person|boy|girl|adult|child))+)')


def readable_name(short_code: str, emoji: str = '') -> str:
  """Turns a name of the `emoji` package into readable text.

  >>> readable_name(':woman_running_medium-dark_skin_tone:')
  'woman running: medium-dark skin tone'
  >>> readable_name(':man_medium_skin_tone_red_hair:')
  'man: medium skin tone, red hair'
  >>> readable_name(':kiss_woman_man_dark_skin_tone_light_skin_tone:')
  'kiss: woman, man, dark skin tone, light skin tone'

  Args:
    short_code: the name between colons, words joined by underscores.
    emoji: the emoji itself; flags are told by it.
  """
  text = short_code.strip(':').replace('_', ' ')
  if _is_flag(emoji):
    return f'flag: {text}'
  if emoji.endswith('\u20e3'):
    return f'keycap: {text.removeprefix("keycap ")}'
  match = _NAME.fullmatch(text)
  assert match is not None
  head, qualifiers = match['head'], re.findall(_TONE_WORDS, match['tones'])
  if match['hair']:
    qualifiers.append(match['hair'])
  group = _GROUP.fullmatch(head)
  if group:
    head, qualifiers = group['head'], group['people'].split() + qualifiers
  return f'{head}: {", ".join(qualifiers)}' if qualifiers else head


def _is_flag(emoji: str) -> bool:
  """Regional indicators (countries) or the black flag with tags (England, Scotland, Wales)."""
  return '\U0001f1e6' <= emoji[:1] <= '\U0001f1ff' or (emoji[:1] == '\U0001f3f4' and '\U000e007f' in emoji)


@dataclasses.dataclass(frozen=True)
class Attributes:
  """What the code points of an emoji say; `base_key` is the sequence without tones, genders and style marks."""

  base_key: str
  skin_tones: tuple[str, ...]
  gender: str | None


def attributes(emoji: str) -> Attributes:
  """Splits an emoji into base, skin tones (in order, 0 to 2) and gender.

  The gender of several people is theirs where they agree, else joined in order: 'woman and man',
  'man, woman, girl' for a family. Without any sign it is None here; `build_items` makes it 'person' where
  the base has other genders.
  """
  tones = tuple(TONE_OF_CHARACTER[c] for c in emoji if c in TONE_OF_CHARACTER)
  parts: list[str] = []
  genders: list[str] = []
  for place, part in enumerate(''.join(c for c in emoji if c not in TONE_OF_CHARACTER and c != EMOJI_STYLE).split(JOINER)):
    if place and part in (MALE, FEMALE):
      genders.append('man' if part == MALE else 'woman')
    elif part in GENDERED:
      neutral, gender = GENDERED[part]
      parts.append(neutral)
      genders.append(gender)
    else:
      parts.append(part)
  adults_and_children = {PERSON, '\U0001f9d2'}
  if len(parts) > 1 and set(parts) <= adults_and_children:
    children = {'man': 'boy', 'woman': 'girl', 'person': 'child'}
    members = [children[g] if part != PERSON else g for part, g in zip(parts, genders, strict=True)]
    return Attributes(FAMILY, tones, ', '.join(members))
  key = JOINER.join(parts)
  agreed = ' and '.join(genders if len(set(genders)) > 1 else genders[:1])
  return Attributes(SAME_BASE.get(key, key), tones, agreed or None)


# ------------------------------------------------------------------------------------------------ pictures


def render_pictures(font_path: str, emoji: list[str]) -> dict[str, np.ndarray]:
  """Draws each emoji that the font has as one glyph.

  Returns:
    emoji -> uint8 [64, 64, 3]; emoji that need several glyphs, or none, are left out.
  """
  import uharfbuzz
  from fontTools.ttLib import TTFont
  from PIL import Image

  table = TTFont(font_path, lazy=True)
  bitmaps = table['CBDT'].strikeData[0]
  glyph_names = table.getGlyphOrder()
  font = uharfbuzz.Font(uharfbuzz.Face(uharfbuzz.Blob.from_file_path(font_path)))
  pictures = {}
  for text in emoji:
    buffer = uharfbuzz.Buffer()
    buffer.add_str(text)
    buffer.guess_segment_properties()
    uharfbuzz.shape(font, buffer)
    names = [glyph_names[info.codepoint] for info in buffer.glyph_infos]
    if len(names) != 1 or names[0] not in bitmaps:
      continue
    glyph = Image.open(io.BytesIO(bitmaps[names[0]].imageData)).convert('RGBA')
    side = max(glyph.size)
    square = Image.new('RGBA', (side, side), (255, 255, 255, 255))
    square.alpha_composite(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    pictures[text] = np.asarray(square.convert('RGB').resize((SIDE, SIDE), Image.Resampling.LANCZOS))
  return pictures


def encode_picture(picture: np.ndarray) -> bytes:
  """Lossless WebP: about a third smaller than PNG at this size."""
  from PIL import Image

  stream = io.BytesIO()
  Image.fromarray(picture).save(stream, 'WEBP', lossless=True, quality=100, method=6, exact=True)
  return stream.getvalue()


# --------------------------------------------------------------------------------------------------- items


@dataclasses.dataclass
class Item:
  """One different picture: the fields of the manifest, and the picture itself, uint8 [64, 64, 3]."""

  emoji: list[str]
  names: list[str]
  languages: dict[str, str]
  base: str
  skin_tones: list[str]
  gender: str | None
  picture: np.ndarray

  def metadata(self, split: str) -> dict:
    """What the manifest says about this item."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != 'picture'}
    return {**fields, 'split': split}


def build_items(names: dict[str, dict], pictures: dict[str, np.ndarray]) -> list[Item]:
  """One item per different picture, ordered by base so that relatives are neighbours.

  Args:
    names: emoji -> language -> name of the `emoji` package; 'en' is always there.
    pictures: emoji -> uint8 [64, 64, 3].

  Returns:
    items; of equal pictures the emoji without tones and with the shortest name comes first and gives the attributes.
  """
  readable = {e: readable_name(names[e]['en'], e) for e in pictures}
  parsed = {e: attributes(e) for e in pictures}
  genders_of = collections.defaultdict(set)
  for a in parsed.values():
    genders_of[a.base_key].add(a.gender)
  for e, a in parsed.items():
    is_person = len(genders_of[a.base_key]) > 1 or re.match(r'(person|people)\b', readable[e])
    if a.gender is None and is_person:
      parsed[e] = dataclasses.replace(a, gender='person')

  base_names: dict[str, str] = {}
  for e in sorted(pictures, key=lambda e: (parsed[e].gender not in (None, 'person'), len(parsed[e].skin_tones), len(readable[e]), e)):
    base_names.setdefault(parsed[e].base_key, re.sub(rf'(, |: ){_TONE_WORDS}', '', readable[e]))

  by_picture = collections.defaultdict(list)
  for e, picture in pictures.items():
    by_picture[picture.tobytes()].append(e)
  items = []
  for equal in by_picture.values():
    equal.sort(key=lambda e: (len(parsed[e].skin_tones), len(readable[e]), readable[e]))
    first = equal[0]
    items.append(
      Item(
        emoji=equal,
        names=[readable[e] for e in equal],
        languages={lang: names[first][lang].strip(':').replace('_', ' ') for lang in LANGUAGES if lang in names[first]},
        base=base_names[parsed[first].base_key],
        skin_tones=list(parsed[first].skin_tones),
        gender=parsed[first].gender,
        picture=pictures[first],
      )
    )
  items.sort(key=lambda i: (attributes(i.emoji[0]).base_key, i.gender or '', [TONES.index(t) for t in i.skin_tones], i.names[0]))
  for item in items:  # two people of one tone: CLDR names the tone once
    item.skin_tones = list(dict.fromkeys(item.skin_tones))
  all_names = [name for item in items for name in item.names]
  if len(set(all_names)) != len(all_names):
    raise SystemExit(f'names are not unique: {[n for n, k in collections.Counter(all_names).items() if k > 1]}')
  return items


def _rank(text: str) -> bytes:
  return hashlib.sha256(text.encode()).digest()


def held_out(items: list[Item], share: int = 6, min_difference: float = 0.5) -> set[int]:
  """Picks the validation pictures: held-out combinations of base, skin tones and gender.

  Only items with a skin tone can be held out, and only while training keeps, after the choice,
  - four or more items of the same base and gender,
  - where the base has several genders: the same tone on another gender, or for two tones each tone in its place,
  - no picture of the base nearer than `min_difference` (mean absolute difference in 0..255): some tones hardly show.
  Of the candidates of a base, one in `share` is taken (at least one where the base has six combinations), in hash order.

  Returns:
    indices into `items`.
  """
  tones = [attributes(item.emoji[0]).skin_tones for item in items]  # here two people of one tone have two
  by_base = collections.defaultdict(list)
  for index, item in enumerate(items):
    by_base[item.base].append(index)
  chosen: set[int] = set()
  for base, members in sorted(by_base.items()):
    toned = [i for i in members if tones[i]]
    if len(toned) < 5:
      continue
    train = set(members)
    quota = max(1, round(len(toned) / share))
    for index in sorted(toned, key=lambda i: _rank('/'.join([base, str(items[i].gender), *tones[i]]))):
      if quota == 0:
        break
      rest = [i for i in train if i != index]
      gender = items[index].gender
      same_gender = sum(items[i].gender == gender for i in rest)
      same_tones = sum(tones[i] == tones[index] for i in rest)
      one_gender = len({items[i].gender for i in rest}) == 1
      places = all(any(tones[i][k : k + 1] == (tone,) for i in rest) for k, tone in enumerate(tones[index]))
      enough = same_gender >= 4 and (one_gender or (same_tones >= 1 if len(tones[index]) == 1 else places))
      picture = items[index].picture.astype(int)
      difference = min(float(np.abs(items[i].picture.astype(int) - picture).mean()) for i in members if i != index)
      if enough and difference >= min_difference:
        chosen.add(index)
        train.discard(index)
        quota -= 1
  return chosen


def held_out_topics(topics: dict[str, str], share: int = 10) -> set[str]:
  """About one topic in `share`, the first in hash order."""
  return set(sorted(topics, key=_rank)[: round(len(topics) / share)])


# ------------------------------------------------------------------------------------------------- records


def pack_record(index: int, payload: bytes) -> bytes:
  """uint32 index, payload, uint32 CRC-32 of all before (little endian)."""
  body = struct.pack('<I', index) + payload
  return body + struct.pack('<I', zlib.crc32(body))


def pack_file(manifest: dict, payloads: list[bytes]) -> list[bytes]:
  """Record 0 is the manifest, zlib-compressed JSON; record i + 1 holds payload i."""
  text = json.dumps(manifest, ensure_ascii=False, separators=(',', ':')).encode()
  return [pack_record(i, payload) for i, payload in enumerate([zlib.compress(text, 9), *payloads])]


def write_records(path: pathlib.Path, records: list[bytes]) -> None:
  """Writes an ArrayRecord file that can be read at random."""
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
  for record in records:
    writer.write(record)
  writer.close()


def main() -> None:
  parser = argparse.ArgumentParser(description='Builds the emoji world that the package ships.')
  parser.add_argument('--font', default='/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('chameleon_jax/assets/emoji_world'))
  arguments = parser.parse_args()
  if sys.version_info[:2] != (3, 11):
    raise SystemExit(f'the shipped topics are those of Python 3.11, this is {sys.version.split()[0]}')
  from pydoc_data.topics import topics

  import emoji
  from fontTools.ttLib import TTFont

  for language in LANGUAGES:
    emoji.config.load_language(language)
  names = {e: data for e, data in emoji.EMOJI_DATA.items() if data['status'] == emoji.STATUS['fully_qualified']}
  items = build_items(names, render_pictures(arguments.font, list(names)))
  validation = held_out(items)

  arguments.out.mkdir(parents=True, exist_ok=True)
  manifest = {
    'format': 'chameleon_jax emoji world 1',
    'font': TTFont(arguments.font, lazy=True)['name'].getDebugName(5),
    'names_from': f'emoji {emoji.__version__}',
    'items': [item.metadata('validation' if index in validation else 'train') for index, item in enumerate(items)],
  }
  write_records(arguments.out / 'emoji.array_record', pack_file(manifest, [encode_picture(item.picture) for item in items]))

  held = held_out_topics(topics)
  manifest = {
    'format': 'chameleon_jax topics 1',
    'source': f'pydoc_data.topics of Python {sys.version.split()[0]}',
    'items': [{'topic': topic, 'split': 'validation' if topic in held else 'train'} for topic in sorted(topics)],
  }
  write_records(arguments.out / 'topics.array_record', pack_file(manifest, [zlib.compress(topics[t].encode(), 9) for t in sorted(topics)]))
  print(f'{len(items)} pictures, {len(validation)} of them validation; {len(topics)} topics, {len(held)} of them validation')


if __name__ == '__main__':
  main()
