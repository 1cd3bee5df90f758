"""Exact round trips, no way from text to anything but text, and clear errors."""

import pickle
import random

import pytest
import sentencepiece

from chameleon_jax.errors import CheckpointError, DataError
from chameleon_jax.tokens.text import SentencePieceText, TextTokenizer, train_text_tokenizer
from tests.tokens.conftest import HOSTILE, SENTENCES, random_text


@pytest.mark.parametrize('text', HOSTILE, ids=lambda text: ascii(text[:12]))
def test_hostile_text_comes_back_exactly(tokenizer, text):
  pieces = tokenizer.encode(text)
  assert tokenizer.decode(pieces) == text
  assert all(0 <= piece < tokenizer.n_pieces for piece in pieces)


def test_random_text_comes_back_exactly(tokenizer):
  rng = random.Random(0)
  for _ in range(2000):
    text = random_text(rng)
    assert tokenizer.decode(tokenizer.encode(text)) == text, ascii(text)


def test_every_character_of_the_basic_plane_comes_back(tokenizer):
  text = ''.join(chr(point) for point in range(0x10000) if not 0xD800 <= point < 0xE000)
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_are_bytes_first(tokenizer):
  assert tokenizer.n_pieces == 340
  assert [tokenizer.piece(byte) for byte in (0, 0x41, 255)] == ['<0x00>', '<0x41>', '<0xFF>']
  assert tokenizer.decode(list('é☃'.encode())) == 'é☃'
  assert tokenizer.encode('☃') == list('☃'.encode()), 'an unseen character goes as its bytes'
  assert all(piece >= 256 for piece in tokenizer.encode('light skin tone'))


def test_frequent_words_are_one_piece(tokenizer):
  assert [tokenizer.piece(piece) for piece in tokenizer.encode(' skin tone')] == [' skin', ' tone']


def test_digits_stay_single(tokenizer):
  assert [tokenizer.piece(piece) for piece in tokenizer.encode('123')] == ['1', '2', '3']


def test_broken_bytes_become_replacement_characters(tokenizer):
  assert tokenizer.decode([0xE2, 0x96, 0x41]) == '\ufffd\ufffdA'
  assert tokenizer.decode([]) == ''


@pytest.mark.parametrize('text', ['\ud800', 'ab\udfff', '\ud83d text'])
def test_lone_surrogate_is_a_clear_error(tokenizer, text):
  with pytest.raises(DataError, match=r'lone surrogate U\+D[0-9A-F]{3} at character \d+: remove'):
    tokenizer.encode(text)


@pytest.mark.parametrize('piece', [-1, 340, 10**9])
def test_piece_outside_the_table(tokenizer, piece):
  with pytest.raises(DataError, match=f'text piece {piece} lies outside the table of 340'):
    tokenizer.decode([300, piece])


def test_training_depends_on_arguments_alone(tokenizer):
  again = train_text_tokenizer(iter(SENTENCES), n_pieces=340, character_coverage=1.0, seed=0)
  assert again == tokenizer
  assert hash(again) == hash(tokenizer)
  assert again != train_text_tokenizer(SENTENCES, n_pieces=339, character_coverage=1.0, seed=0)


def test_subset_of_sentences_is_drawn_by_the_seed():
  sentences = [f'{chr(97 + i // 26)}{chr(97 + i % 26)} word' for i in range(400)]
  first, again, other = (
    train_text_tokenizer(sentences, n_pieces=300, character_coverage=1.0, seed=seed, max_sentences=40) for seed in (0, 0, 1)
  )
  assert first == again
  assert first != other


def test_long_sentences_are_not_dropped():
  tokenizer = train_text_tokenizer(['abcd ' * 100_000], n_pieces=262, character_coverage=1.0, seed=0)
  assert len(tokenizer.encode('abcd')) < 4, 'the trainer drops sentences over its limit'


@pytest.mark.parametrize(
  ('sentences', 'n_pieces', 'message'),
  [
    ([], 300, 'there is no training text'),
    ([''], 300, 'there is no training text'),
    (['ab'], 300, 'supports at most 260'),
    (['abcdefgh'], 260, 'distinct characters alone need more'),
    (['abc'], 256, 'more than the 256 byte pieces'),
    (['a\ud800'], 300, 'lone surrogate'),
  ],
)
def test_training_errors(sentences, n_pieces, message):
  with pytest.raises(DataError, match=message) as caught:
    train_text_tokenizer(sentences, n_pieces=n_pieces, character_coverage=1.0, seed=0)
  assert '\n' not in str(caught.value)


def test_the_number_in_the_error_works():
  assert train_text_tokenizer(['ab'], n_pieces=260, character_coverage=1.0, seed=0).n_pieces == 260


def test_save_and_load(tokenizer, tmp_path):
  path = tmp_path / 'text_tokenizer.model'
  tokenizer.save(path)
  assert SentencePieceText.load(path) == tokenizer
  assert [file.name for file in tmp_path.iterdir()] == ['text_tokenizer.model']
  assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
  assert isinstance(tokenizer, TextTokenizer)


def test_save_into_a_missing_folder_leaves_nothing(tokenizer, tmp_path):
  with pytest.raises(OSError):
    tokenizer.save(tmp_path / 'no' / 'text_tokenizer.model')
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('content', [b'', b'junk', b'{"model": {"vocab": {}}}'])
def test_foreign_file(tmp_path, content):
  path = tmp_path / 'foreign.model'
  path.write_bytes(content)
  with pytest.raises(CheckpointError, match=r'foreign\.model: not a sentencepiece model'):
    SentencePieceText.load(path)


def test_truncated_file(tokenizer, tmp_path):
  path = tmp_path / 'cut.model'
  tokenizer.save(path)
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(CheckpointError, match=r'cut\.model'):
    SentencePieceText.load(path)


def test_missing_file(tmp_path):
  with pytest.raises(CheckpointError, match='cannot read the text tokenizer .*missing.model: No such file'):
    SentencePieceText.load(tmp_path / 'missing.model')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({}, 'is not <unk>, 256 byte pieces and text pieces'),
    ({'byte_fallback': True}, 'is not <unk>, 256 byte pieces and text pieces'),  # <s> and </s> are in it
    ({'byte_fallback': True, 'bos_id': -1, 'eos_id': -1}, 'changes text'),  # NFKC, dummy prefix
  ],
)
def test_model_of_another_form(tmp_path, options, message):
  prefix = tmp_path / 'other'
  options = {'vocab_size': 330 if options else 60, 'model_type': 'bpe', 'minloglevel': 2, **options}
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES), model_prefix=str(prefix), **options)
  with pytest.raises(CheckpointError, match=message):
    SentencePieceText.load(f'{prefix}.model')
