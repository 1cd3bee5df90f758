"""A changed data set has another fingerprint, and a resumed run says so."""

import numpy as np
import pytest

from chameleon_jax.data.sources.fingerprint import check_same, fingerprint
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Codes, Document, Image


class Numbers:
  def __init__(self, n, change=None):
    self.n, self.change = n, change

  def __len__(self):
    return self.n

  def document(self, index, rng):
    picture = Codes(np.array([index])) if index % 2 else Image(np.full((1, 2, 3), index % 250, np.uint8))
    return Document.plain(f'{index} {rng.random()}{"!" if index == self.change else ""}', picture)


def test_the_same_for_the_same_data():
  assert fingerprint(Numbers(40)) == fingerprint(Numbers(40))
  assert fingerprint(Numbers(40))['documents'] == 40
  assert fingerprint(Numbers(0)) == {'documents': 0, 'content': '00000000'}
  prints = {fingerprint(source)['content'] for source in (Numbers(10), Numbers(10, change=3), Numbers(10, change=9))}
  assert len(prints) == 3


def test_a_change_is_one_line():
  one, more, other = ({'documents': n, 'content': content} for n, content in ((10, 'a'), (12, 'b'), (10, 'c')))
  check_same({'x': one, 'gone': one}, {'x': one, 'new': more})
  with pytest.raises(DataError, match="source 'x' changed since the checkpoint was saved: 10 documents then, 12 now; .*changed=accept"):
    check_same({'x': one}, {'x': more})
  with pytest.raises(DataError, match='still 10 documents, but with another content'):
    check_same({'x': one}, {'x': other})
