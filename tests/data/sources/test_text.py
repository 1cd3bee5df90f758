"""Cutting the documentation into documents."""

import numpy as np
import pytest

from chameleon_jax.data.sources.emoji_world import EmojiWorld
from chameleon_jax.data.sources.text import DocumentationText, chunks


@pytest.mark.parametrize(
  'text, max_characters, pieces',
  [
    ('aaa\n\nbbb\nccc', 8, ['aaa\n\n', 'bbb\nccc']),
    ('aaa bbb\nccc', 9, ['aaa bbb\n', 'ccc']),
    ('aaaaaa', 4, ['aaaa', 'aa']),
    ('a\n\nbbbbbbbbb\ncc', 12, ['a\n\n', 'bbbbbbbbb\ncc']),
    ('aaaa', 4, ['aaaa']),
    ('', 4, []),
  ],
)
def test_drawn_examples(text, max_characters, pieces):
  assert chunks(text, max_characters=max_characters) == pieces
  assert ''.join(pieces) == text


def test_pieces_join_to_the_topics():
  world = EmojiWorld.load()
  for split, topics in (('train', world.text_train), ('validation', world.text_validation)):
    source = DocumentationText(split)
    texts = [source.document(i, np.random.default_rng(i)).text for i in range(len(source))]
    assert ''.join(texts) == ''.join(topics)
    assert max(map(len, texts)) <= 1000
    assert np.mean([len(text) for text in texts]) > 600
