"""evals/emoji.py on a made-up world of six pictures, with answers whose score is known."""

import dataclasses
import types

import numpy as np
import pytest

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.data.sources.emoji_world import EmojiItem, EmojiWorld
from chameleon_jax.evals import emoji
from chameleon_jax.tokens.document import Codes, Document, Image, Text


def _item(index, name, base, tones, gender, split):
  return EmojiItem(
      index=index, emoji=('x',), names=(name,), languages={}, base=base, skin_tones=tones, gender=gender, split=split
  )


ITEMS = (
    _item(0, 'man running', 'person running', (), 'man', 'train'),
    _item(1, 'woman running', 'person running', (), 'woman', 'train'),
    _item(2, 'man running: dark skin tone', 'person running', ('dark',), 'man', 'train'),
    _item(3, 'woman running: dark skin tone', 'person running', ('dark',), 'woman', 'validation'),
    _item(4, 'red apple', 'red apple', (), None, 'train'),
    _item(5, 'ear: dark skin tone', 'ear', ('dark',), None, 'validation'),
)
PICTURES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
WORLD = EmojiWorld(ITEMS, PICTURES, ('training text',), ('held-out text',))


class Model:
  """Its image tokenizer has one code a picture and adds 1 to each value; answers come from a script."""

  def __init__(self, script):
    self.script = script
    self.prompts = []
    vqgan, transformer = types.SimpleNamespace(n_codes=8), types.SimpleNamespace(max_seq_len=16)
    vocabulary = VocabularyConfig(size=512, n_codes=8, n_sentinels=0, n_reserved=2)
    self.parts = types.SimpleNamespace(vqgan_config=vqgan, transformer_config=transformer, vocabulary=vocabulary, text_tokenizer=self)

  n_pieces = 256

  def encode(self, text):
    return list(text.encode())

  def decode(self, pieces):
    raise AssertionError('not used')

  def save(self, path):
    raise AssertionError('not used')

  def encode_images(self, pictures):
    rows = [next(k for k in range(6) if np.array_equal(picture, PICTURES[k])) for picture in pictures]
    return np.array(rows, np.int32)[:, None]

  def decode_codes(self, codes):
    return np.minimum(PICTURES[codes[:, 0]].astype(int) + 1, 255).astype(np.uint8)

  def generate(self, prompts, options):
    assert options.greedy and options.image_greedy and options.max_new_tokens < 4096
    self.prompts += prompts
    return [self.script(prompt) for prompt in prompts]

  def logits(self, tokens):
    return np.zeros((*tokens.shape, 512), np.float32)


def _picture(model, index):
  return Image(model.decode_codes(np.array([[index]], np.int32))[0])


def test_nearest_pictures_against_a_plain_loop():
  rng = np.random.default_rng(1)
  references = rng.integers(0, 256, (37, 5, 3, 3), np.uint8)
  drawn = np.concatenate([rng.integers(0, 256, (6, 5, 3, 3), np.uint8), references[[3, 36]]])
  errors = ((drawn[:, None].astype(int) - references[None].astype(int)) ** 2).sum((2, 3, 4))
  for chunk in (1, 8, 64):
    assert emoji.nearest_pictures(drawn, references, chunk=chunk).tolist() == errors.argmin(1).tolist()


def test_nearest_pictures_ties_go_to_the_first():
  references = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (10, 20, 10, 20, 0)])
  drawn = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (10, 20, 15, 5)])
  for chunk in (1, 2, 8):
    # 15 lies midway between 10 and 20, 5 midway between 0 (last) and 10 (first).
    assert emoji.nearest_pictures(drawn, references, chunk=chunk).tolist() == [0, 1, 0, 0]


def test_exact_name_rate():
  answers = [Document.plain(text) for text in ('man running', ' woman running\n', 'man running', 'Red apple')]
  assert emoji.exact_name_rate(answers, [ITEMS[0], ITEMS[1], ITEMS[2], ITEMS[4]]) == 50.0


def test_drawing_rates():
  model = Model(None)
  references = model.decode_codes(np.arange(6, dtype=np.int32)[:, None])
  wanted = [ITEMS[3], ITEMS[3], ITEMS[5], ITEMS[5], ITEMS[5]]
  answers = [
      Document.plain(_picture(model, 3)),  # right
      Document.plain(_picture(model, 2)),  # wrong gender, right base
      Document.plain(_picture(model, 4)),  # wrong
      Document.plain(_picture(model, 5), _picture(model, 5)),  # two pictures
      Document.plain(Codes(np.array([5])), Text('cut off')),
  ]
  assert emoji.drawing_rates(answers, wanted, references, ITEMS) == (20.0, 40.0)
  assert emoji.drawing_rates(answers[3:], wanted[3:], references, ITEMS) == (0.0, 0.0)


def _perfect(prompt):
  """Answers every prompt rightly: it reads the wording of the prompts, knowing the six pictures."""
  model = Model(None)
  text = prompt.text
  pictures = prompt.pictures
  if text.startswith('Draw '):
    return Document.plain(_picture(model, next(item.index for item in ITEMS if f'Draw {item.name}.' == text)))
  source = ITEMS[int(pictures[0].codes[0])]
  if text.startswith('Change the skin tone to '):
    wanted = (source.base, source.gender, text.removeprefix('Change the skin tone to ').removesuffix('.'))
  elif text.startswith('Change the gender to '):
    wanted = (source.base, text.removeprefix('Change the gender to ').removesuffix('.'), ' and '.join(source.skin_tones) or 'yellow')
  else:
    return Document.plain(source.name)
  found = [item for item in ITEMS if (item.base, item.gender, ' and '.join(item.skin_tones) or 'yellow') == wanted]
  return Document.plain(_picture(model, found[0].index))


def test_a_perfect_model():
  model = Model(_perfect)
  lines = []
  figures = {figure.key: figure for figure in emoji.EmojiEvaluation(model, world=WORLD, log=lines.append).run()}
  assert list(figures) == list(emoji.FIGURES)
  for key in ('describe_validation', 'describe_train', 'draw_validation', 'draw_train', 'draw_base_validation', 'draw_base_train', 'edit'):
    assert figures[key].value == 100.0
  assert figures['describe_validation'].n == 2 and figures['describe_train'].n == 4
  # Into picture 3 lead 1 (tone) and 2 (gender); 0 differs in both; no edit leads to the ear.
  assert figures['edit'].n == 2
  # Two of eight codes occur in validation; every value is off by one except at 255.
  assert figures['codebook_use'].value == 25.0 and figures['image_tokens'].value == 1
  assert figures['psnr_train'].value == pytest.approx(10 * np.log10(255.0**2), abs=0.5)
  # 'held-out text' has 13 bytes and 14 targets, each among 512 equally likely tokens.
  assert figures['text_bits_per_byte'].value == pytest.approx(14 * 9 / 13)
  assert any(line.startswith('draw, validation') for line in lines)
  # Pictures reach the model as codes.
  assert not any(isinstance(segment, Image) for prompt in model.prompts for segment in prompt.segments)


def test_a_model_that_always_says_the_same():
  model = Model(lambda prompt: Document.plain('red apple'))
  figures = {figure.key: figure.value for figure in emoji.EmojiEvaluation(model, world=WORLD).run(('describe', 'draw', 'edit'))}
  assert figures == {
      'describe_validation': 0.0,
      'describe_train': 25.0,
      'draw_validation': 0.0,
      'draw_base_validation': 0.0,
      'draw_train': 0.0,
      'draw_base_train': 0.0,
      'edit': 0.0,
  }


def test_samples_are_fixed_and_ordered():
  first, second = emoji.fixed_sample(range(100), 10), emoji.fixed_sample(range(100), 10)
  assert first == second == sorted(first) and len(set(first)) == 10
  assert emoji.fixed_sample(range(5), 10) == emoji.fixed_sample(range(5), None) == [0, 1, 2, 3, 4]


def test_table_and_aims():
  figures = [
      emoji.make_figure('psnr_validation', 28.5, 283),
      emoji.make_figure('edit', 59.9, 2720),
      emoji.make_figure('image_tokens', 64, 3771),
      emoji.make_figure('text_bits_per_byte', 2.5, 8),
  ]
  assert [figure.reached for figure in figures] == [True, False, True, None]
  assert emoji.format_table(figures).splitlines() == [
      '| figure | value | aim | reached | of |',
      '|---|---|---|---|---|',
      '| image tokenizer: PSNR, validation | 28.50 dB | >= 28 dB | yes | 283 |',
      '| edit: right picture nearest, validation | 59.90 % | >= 60 % | no | 2,720 |',
      '| image tokenizer: tokens a picture | 64.00 | <= 64 | yes | 3,771 |',
      '| text: bits per byte, held-out documentation | 2.50 |  |  | 8 |',
  ]
  assert dataclasses.asdict(figures[0])['key'] == 'psnr_validation'
