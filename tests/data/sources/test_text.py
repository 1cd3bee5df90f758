"""Cutting the documentation into documents."""

import numpy as np
import pytest

from chameleon_jax.data.sources.emoji_world import EmojiWorld
from chameleon_jax.data.sources.text import DocumentationText, chunks, fresh_pieces


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
    whole = ''.join(topics)
    assert all(text in whole for text in texts)
    assert (''.join(texts) == whole) == (split == 'validation')
    assert len(''.join(texts)) > 0.7 * len(whole)
    assert max(map(len, texts)) <= 1000
    assert np.mean([len(text) for text in texts]) > 600


def test_pieces_that_quote_are_left_out():
  assert fresh_pieces(['abcdef', 'xyz'], ['zzcdezz'], window=3) == ['xyz']
  assert fresh_pieces(['ab', 'cd', 'ef'], ['xxabxx', 'c', 'd'], window=3) == ['cd', 'ef']
  assert fresh_pieces(['abc'], [], window=3) == ['abc']


def test_no_sentence_of_the_held_out_topics_is_learned():
  held_out = ''.join(EmojiWorld.load().text_validation)
  runs = {held_out[i : i + 60] for i in range(len(held_out) - 59)}
  source = DocumentationText('train')
  for index in range(len(source)):
    text = source.document(index, np.random.default_rng(0)).text
    assert not any(text[i : i + 60] in runs for i in range(len(text) - 59))
