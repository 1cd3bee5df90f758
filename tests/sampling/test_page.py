"""The page: self-contained, escaped, pictures intact; text and PNG files beside it."""

import base64
import html.parser
import re

import numpy as np
import pytest

from chameleon_jax.sampling import page
from chameleon_jax.tokens.document import Codes, Document, Image, Turn
from chameleon_jax.tokens.images import load_image


def pixels(seed=0):
  return np.random.default_rng(seed).integers(0, 256, (8, 6, 3)).astype(np.uint8)


def example_document():
  return Document.chat(('Draw <b>two</b> & more', Image(pixels(0))), ('Here: ', Image(pixels(1)), ' and ', Codes(np.arange(3))))


class _Balance(html.parser.HTMLParser):
  """Collects tags and fails on a closing tag that closes nothing."""

  def __init__(self):
    super().__init__()
    self.open, self.seen = [], []

  def handle_starttag(self, tag, attrs):
    self.seen.append((tag, dict(attrs)))
    if tag not in ('meta', 'img'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_page_is_self_contained_and_keeps_every_picture(tmp_path):
  section = page.Section(
    'A & B', (page.Example(example_document(), originals=(page.Original(pixels(2), 'truth "q"'),), caption='1 < 2'),), note='x < y'
  )
  path = page.write_page(tmp_path / 'new' / 'index.html', [section], title='T <1>')
  text = path.read_text(encoding='utf-8')
  parser = _Balance()
  parser.feed(text)
  assert parser.open == []
  sources = [attrs['src'] for tag, attrs in parser.seen if tag == 'img']
  assert len(sources) == 3
  for source, seed in zip(sources, (0, 1, 2)):
    decoded = load_image(base64.b64decode(source.removeprefix('data:image/png;base64,')))
    np.testing.assert_array_equal(decoded, pixels(seed))
  assert not re.search(r'(?:https?:)?//|<script|<link|url\(', re.sub(r'base64,[^"]*', '', text))
  assert 'Draw &lt;b&gt;two&lt;/b&gt; &amp; more' in text and 'truth &quot;q&quot;' in text and '1 &lt; 2' in text
  assert 'prefers-color-scheme: dark' in text
  assert 'unfinished picture, 3 codes' in text
  assert [child.name for child in path.parent.iterdir()] == ['index.html']


def test_small_pictures_are_enlarged_by_a_whole_factor():
  text = page.page_html([page.Section('', (page.Example(Document.plain(Image(pixels()))),))])
  assert 'width="96" height="128"' in text  # 6 x 8, 16 times


def test_text_names_its_pictures():
  document = example_document()
  assert page.document_text(document) == 'Draw <b>two</b> & more[picture 1]\nHere: [picture 2] and [unfinished picture, 3 codes]'
  assert page.document_text(document, picture_names=['a.png']).startswith('Draw <b>two</b> & more[a.png]\nHere: [picture 2]')


def test_png_files(tmp_path):
  paths = page.write_pictures(tmp_path / 'out', example_document(), name='cat')
  assert [path.name for path in paths] == ['cat_1.png', 'cat_2.png']
  np.testing.assert_array_equal(load_image(paths[1]), pixels(1))


@pytest.mark.parametrize(
  ('prompt', 'roles'), [(Document.plain('a'), ['document']), (Document((Turn(('a',), role='prompt'),)), ['prompt', 'answer'])]
)
def test_joined(prompt, roles):
  document = page.joined(prompt, Document.plain('b', Image(pixels())))
  assert [turn.role for turn in document.turns] == roles
  assert document.text == 'ab' and len(document.pictures) == 1


def test_a_failed_write_leaves_nothing(tmp_path):
  (tmp_path / 'index.html').mkdir()
  with pytest.raises(OSError):
    page.write_page(tmp_path / 'index.html', [])
  assert [child.name for child in tmp_path.iterdir()] == ['index.html']
