"""A caption and its picture in each of the forms."""

import numpy as np
import pytest

from chameleon_jax.data.sources.naming import SourceName
from chameleon_jax.data.sources.pairs import QUESTION, PairForm, texts_of
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document, Image

PIXELS = np.zeros((2, 2, 3), np.uint8)
PICTURE = Image(PIXELS)


def _form(options):
  return PairForm.of(SourceName.parse(f'image_folder:x{options}'))


def _made(options, captions=('A cat',), seed=0):
  return _form(options).document(captions, PIXELS, np.random.default_rng(seed))


def test_forms():
  assert _made('?form=draw') == Document.chat('A cat', PICTURE)
  assert _made('?form=describe') == Document.chat([PICTURE, QUESTION], 'A cat')
  assert _made('?order=text_first') == Document.plain('A cat', PICTURE)
  assert _made('?order=image_first') == Document.plain(PICTURE, 'A cat')
  first = [_made('', seed=seed) == Document.plain(PICTURE, 'A cat') for seed in range(400)]
  assert np.mean(first) == pytest.approx(0.5, abs=0.1)


def test_one_of_several_captions():
  drawn = {_made('?order=text_first', ('a', ' ', 'b'), seed).text for seed in range(30)}
  assert drawn == {'a', 'b'}
  with pytest.raises(DataError, match='no caption'):
    _made('', (' \n',))


def test_texts():
  assert texts_of('a') == ['a']
  assert texts_of([b'\xc3\xa9', 'b']) == ['é', 'b']
  with pytest.raises(DataError, match='not UTF-8'):
    texts_of(b'\xff')
  with pytest.raises(DataError, match='must be text, got int'):
    texts_of([3])
  with pytest.raises(DataError, match='form=x is none of plain, draw, describe'):
    _form('?form=x')
