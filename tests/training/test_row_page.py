"""The page of a row: every claim in it is that of the arrays that the step drew."""

import base64
import dataclasses
import html.parser
import re

import numpy as np
import pytest

from chameleon_jax.cli.values import frozen
from chameleon_jax.config import TrainConfig
from chameleon_jax.data.sources import source as registry
from chameleon_jax.models.vqgan.model import decode_pixels
from chameleon_jax.tokens.images import load_image, to_uint8
from chameleon_jax.training import replay
from chameleon_jax.training.row_page import row_html

STEP, ROW = 7, 3


class _Reader(html.parser.HTMLParser):
  """Sections, tokens (attributes and text) and pictures in their order; fails on a closing tag that closes nothing."""

  def __init__(self):
    super().__init__()
    self.open, self.sections, self.tokens, self.pictures, self.headings = [], [], [], [], []

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    if tag in ('meta', 'img'):
      if tag == 'img':
        self.pictures.append((attrs['src'], attrs['alt'], self.sections[-1]['data-segment']))
      return
    self.open.append((tag, attrs))
    if tag == 'section':
      self.sections.append(attrs)
    if 'data-id' in attrs:
      self.tokens.append(attrs | {'text': ''})

  def handle_endtag(self, tag):
    assert self.open.pop()[0] == tag

  def handle_data(self, data):
    if self.open and 'data-id' in self.open[-1][1]:
      self.tokens[-1]['text'] += data
    if self.open and self.open[-1][0] == 'h3':
      self.headings.append(data)


@pytest.fixture(scope='module')
def page(seen_run):
  with pytest.MonkeyPatch.context() as patch:
    for name, factory in seen_run.module.SOURCES.items():
      patch.setitem(registry.SOURCES, name, factory)
    config = frozen(replay.saved_config(seen_run.workdir, STEP), TrainConfig)
    seen = replay.rebuild(seen_run.workdir, config, STEP, say=lambda line: None)
  text = row_html(seen, ROW, workdir='runs/x & y')
  reader = _Reader()
  reader.feed(text)
  assert reader.open == []
  return seen, text, reader, {name: value[ROW] for name, value in seen_run.batches[STEP - 1].items()}


def test_tokens_targets_positions_and_weights_are_those_of_the_step(page):
  seen, _, reader, drawn = page
  used = drawn['segment_ids'] > 0
  named = {'id': 'tokens', 'target': 'targets', 'position': 'positions', 'segment': 'segment_ids'}
  for attribute, name in named.items():
    assert [int(token[f'data-{attribute}']) for token in reader.tokens] == drawn[name][used].tolist(), name
  is_image = seen.vocabulary.is_image[drawn['targets']]
  weights = drawn['loss_weights'] * np.where(is_image, 0.5, 1.0)
  assert [float(token['data-weight']) for token in reader.tokens] == weights[used].tolist()
  assert {0.0, 0.5, 1.0} == set(weights.tolist())
  shades = [float(token['style'].removeprefix('--w:')) for token in reader.tokens]
  assert shades == weights[used].tolist()  # the largest weight is 1
  for token, position in zip(reader.tokens, drawn['positions'][used]):
    assert token['title'].startswith(f'id {token["data-id"]}')
    assert f'target {token["data-target"]} ' in token['title'] and f'position {position}; segment' in token['title']


def test_segments_name_their_documents(page, seen_run):
  seen, text, reader, drawn = page
  arrays = {name: value[ROW] for name, value in seen.arrays.items()}
  sections = [section for section in reader.sections if section['data-segment'] != '0']
  assert len(sections) == drawn['segment_ids'].max() >= 2
  for segment, section in enumerate(sections, start=1):
    start, end = int(section['data-start']), int(section['data-end'])
    assert np.flatnonzero(drawn['segment_ids'] == segment).tolist() == list(range(start, end))
    assert section['data-source'] == seen.sources[arrays['sources'][start]] in ('numbers_pairs', 'numbers_text')
    number = int(section['data-document'])
    assert reader.headings[segment - 1] == f'{segment}. {section["data-source"]}, document {number:,}'
    words = ''.join(token['text'] for token in reader.tokens[start:end] if token['class'] == 't').split()
    assert words and set(words) == {str(number)}  # the documents of `Numbers` say their index
    learned = int(np.count_nonzero(drawn['loss_weights'][start:end]))
    assert f'places {start} to {end - 1}, {learned} of {end - start} learned' in text
  n_padding = int(np.count_nonzero(drawn['segment_ids'] == 0))
  padding = [section for section in reader.sections if section['data-segment'] == '0']
  assert sum(int(section['data-end']) - int(section['data-start']) for section in padding) == n_padding
  assert f'{len(sections)} documents, {64 - n_padding} of 64 places used, {np.count_nonzero(drawn["loss_weights"])} tokens learned' in text


def test_pictures_are_decoded_as_read_and_as_learned(page):
  seen, _, reader, drawn = page
  v = seen.vocabulary
  expected = []
  for segment in range(1, drawn['segment_ids'].max() + 1):
    places = np.flatnonzero((drawn['segment_ids'] == segment) & v.is_image[drawn['tokens']])
    if len(places) == 0:
      continue
    read = v.code_of_token[drawn['tokens'][places]]
    learned = v.code_of_token[drawn['targets'][places - 1]]  # the targets are never noisy
    expected.append((read, segment))
    if np.any(read != learned):
      expected.append((learned, segment))
  assert len(expected) >= 2 and len(expected) == len(reader.pictures)
  for (codes, segment), (source, _, shown_in) in zip(expected, reader.pictures):
    assert shown_in == str(segment)
    pixels = load_image(base64.b64decode(source.removeprefix('data:image/png;base64,')))
    np.testing.assert_array_equal(pixels, to_uint8(decode_pixels(seen.parts.vqgan_config, seen.parts.vqgan_params, codes[None]))[0])
  noisy = [token for token in reader.tokens if 'noise' in token['class'].split()]
  used = np.flatnonzero(drawn['segment_ids'] > 0)
  changed = [place for place in used[1:] if v.is_image[drawn['tokens'][place]] and drawn['tokens'][place] != drawn['targets'][place - 1]]
  assert len(noisy) == len(changed) > 0
  for token, place in zip(noisy, changed):
    assert int(token['data-clean']) == drawn['targets'][place - 1] and f'noise for {token["data-clean"]}' in token['title']
  assert re.search(r'as read: \d+ of 16 codes replaced', ' '.join(alt for _, alt, _ in reader.pictures))


def test_the_page_is_self_contained_and_says_where_it_is_from(page):
  _, text, _, _ = page
  assert not re.search(r'(?:https?:)?//|<script|<link|url\(', re.sub(r'base64,[^"]*', '', text))
  assert '<h1>Step 7, row 3</h1>' in text and 'runs/x &amp; y' in text
  assert 'Row 3 of 8; the data was read from the checkpoint of step 6.' in text


def test_without_an_image_tokenizer_codes_are_said(page):
  seen, _, _, _ = page
  bare = dataclasses.replace(seen, parts=dataclasses.replace(seen.parts, vqgan_config=None, vqgan_params=None), number=9, read_from=None)
  text = row_html(bare, ROW)
  assert 'picture of 16 codes' in text and '(no picture decoder)' in text and '<img' not in text
  assert 'Row 3 of 8, batch 9 of the data; the data was read from the start of the run.' in text
