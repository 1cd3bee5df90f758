"""The registry: every name gives a source, and wrong names say what to do."""

import numpy as np
import pytest

from chameleon_jax.data.sources.emoji_world import EmojiWorld
from chameleon_jax.data.sources.source import KINDS, SOURCES, make_source
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Codes, Image, Text

CODES = np.stack([np.arange(3771), np.arange(3771) % 7], axis=1).astype(np.int32)


@pytest.mark.parametrize('name', SOURCES)
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_documents_are_a_function_of_index_and_rng(name, split):
  source, again = make_source(name, split, CODES), make_source(name, split, CODES)
  assert len(source) == len(again) > 0
  for index in (0, len(source) // 3, len(source) - 1):
    first = source.document(index, np.random.default_rng(index))
    source.document(1, np.random.default_rng(5))  # no memory between calls
    assert first == again.document(index, np.random.default_rng(index)) == source.document(index, np.random.default_rng(index))
  if name != 'emoji_text':
    drawn = {source.document(0, np.random.default_rng(seed)) for seed in range(20)}
    assert len(drawn) > 1


@pytest.mark.parametrize('name', [name for name in SOURCES if name != 'emoji_text'])
def test_codes_are_the_rows_of_the_table(name):
  with_codes, with_pixels = make_source(name, 'train', CODES), make_source(name, 'train')
  pictures = EmojiWorld.load().pictures
  for seed in range(30):
    one, two = (source.document(seed * 40, np.random.default_rng(seed)) for source in (with_codes, with_pixels))
    assert [type(s) for s in two.segments] == [Image if isinstance(s, Codes) else Text for s in one.segments]
    assert one.text == two.text
    for left, right in zip(one.pictures, two.pictures, strict=True):
      row = left.codes[0]
      np.testing.assert_array_equal(left.codes, CODES[row])
      np.testing.assert_array_equal(right.pixels, pictures[row])


def test_bad_names_and_tables():
  with pytest.raises(DataError, match="unknown source 'emoji_pair': did you mean 'emoji_pairs'"):
    make_source('emoji_pair', 'train')
  with pytest.raises(DataError, match='known are emoji_text, emoji_pairs.*jsonl:...'):
    make_source('zzz', 'train')
  with pytest.raises(DataError, match="unknown kind 'jsnl' of source 'jsnl:x': did you mean 'jsonl'"):
    make_source('jsnl:x', 'train')
  with pytest.raises(DataError, match="unknown split 'test'"):
    make_source('jsonl:x', 'test')
  with pytest.raises(DataError, match="unknown split 'test'"):
    make_source('emoji_pairs', 'test')
  with pytest.raises(DataError, match='has 3488 rows, the emoji world 3771 pictures'):
    make_source('emoji_pairs', 'train', CODES[:3488])


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_names_what_is_missing(kind, tmp_path):
  with pytest.raises(DataError, match=f"source '{kind}:{tmp_path}/none'.*(does not exist|[Nn]ot found|[Cc]ould not|No such)"):
    make_source(f'{kind}:{tmp_path}/none', 'train')
