"""The released layout, checked against the table of spec model.md 5.1 and 5.2."""

import dataclasses
import doctest
import pickle

import numpy as np
import pytest

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import CheckpointError, DataError
from chameleon_jax.tokens import vocabulary as module
from chameleon_jax.tokens.vocabulary import Vocabulary, config_of_names, image_token_name, parse_image_token_name


@pytest.fixture(scope='module')
def released():
  return Vocabulary(VocabularyConfig())


def test_released_ids(released):
  names = {
    0: '<s>',
    1: '<pad>',
    2: '</s>',
    3: '<unk>',
    4: 'IMGIMGAZ',
    57: 'IMGIMGFDZ',
    1028: 'IMGIMGBACEZ',
    8195: 'IMGIMGIBJBZ',
    8196: '<eoss>',
    8197: '<racm3:break>',
    8198: '<sentinel:0>',
    8709: '<sentinel:511>',
    8710: '<reserved08706>',
    8711: '<reserved08707>',
    8800: '<reserved08796>',
    16304: '<reserved16300>',
  }
  assert {token: released.name(token) for token in names} == names
  assert (released.begin_sequence, released.pad, released.end_sequence, released.unknown) == (0, 1, 2, 3)
  assert (released.image_start, released.end_image, released.begin_image, released.end_turn) == (4, 8196, 8197, 8710)
  assert released.size == 65_536
  assert released.n_codes == 8192


def test_special_tokens_have_the_names_of_their_properties(vocabulary):
  names = {
    'begin_sequence': '<s>',
    'pad': '<pad>',
    'end_sequence': '</s>',
    'unknown': '<unk>',
    'image_start': 'IMGIMGAZ',
    'end_image': '<eoss>',
    'begin_image': '<racm3:break>',
  }
  assert {name: vocabulary.name(getattr(vocabulary, name)) for name in names} == names
  assert vocabulary.name(vocabulary.end_turn).startswith('<reserved')
  assert not vocabulary.name(vocabulary.end_turn - 1).startswith('<reserved'), 'end_turn is the first reserved token'
  assert vocabulary.text_start == 4 + 12 + 2 + 2 + 3
  assert vocabulary.name(vocabulary.text_start) == 'text:0'


def test_names_parse_back_and_are_unique():
  names = [image_token_name(code) for code in range(8192)]
  assert len(set(names)) == 8192
  assert [parse_image_token_name(name) for name in names] == list(range(8192))


@pytest.mark.parametrize(
  'name', ['', '<s>', 'IMGIMG', 'IMGIMGZ', 'IMGIMGA', 'IMGIMGKZ', 'IMGIMGAAZ', 'IMGIMGABZ', 'xIMGIMGAZ', 'IMGIMGaZ', 'IMGIMG1Z']
)
def test_other_names_do_not_parse(name):
  assert parse_image_token_name(name) is None


def test_every_token_has_one_class(released):
  classes = np.stack([released.is_image, released.is_text, released.is_special])
  assert (classes.sum(0) == 1).all()
  assert np.flatnonzero(released.is_image).tolist() == list(range(4, 8196))
  assert np.flatnonzero(released.is_special).tolist() == [0, 1, 2, 3, *range(8196, released.text_start)]
  assert released.is_text[released.text_start :].all()


@pytest.mark.parametrize('n_codes', [1, 9, 10, 11, 1024])
def test_codes_and_tokens_are_a_bijection(n_codes):
  vocabulary = Vocabulary(VocabularyConfig(size=n_codes + 300, n_codes=n_codes, n_sentinels=0, n_reserved=1))
  codes = np.arange(n_codes)
  tokens = vocabulary.codes_to_tokens(codes)
  np.testing.assert_array_equal(tokens, codes + 4)
  np.testing.assert_array_equal(vocabulary.tokens_to_codes(tokens), codes)
  np.testing.assert_array_equal(vocabulary.code_of_token[vocabulary.token_of_code], codes)
  assert (vocabulary.code_of_token >= 0).sum() == n_codes


def test_shapes_and_types_are_kept(vocabulary):
  tokens = vocabulary.codes_to_tokens(np.array([[[0, 11]]], np.uint8))
  assert (tokens.shape, tokens.dtype) == ((1, 1, 2), np.int32)
  assert vocabulary.tokens_to_codes(tokens).dtype == np.int32
  assert vocabulary.codes_to_tokens(np.zeros((0,))).shape == (0,)


@pytest.mark.parametrize('codes', [[12], [-1], [0, 300]])
def test_codes_outside_the_codebook(vocabulary, codes):
  with pytest.raises(DataError, match='outside the codebook of 12'):
    vocabulary.codes_to_tokens(np.array(codes))


@pytest.mark.parametrize('token', [-1, 0, 3, 16, 17, 372, 373])
def test_tokens_that_are_no_codes(vocabulary, token):
  with pytest.raises(DataError, match=f'token {token} is not an image token'):
    vocabulary.tokens_to_codes(np.array([4, token]))


def test_floats_are_refused(vocabulary):
  with pytest.raises(DataError, match='must be integers'):
    vocabulary.codes_to_tokens(np.array([1.0]))


@pytest.mark.parametrize('token', [-1, 373])
def test_name_outside_the_vocabulary(vocabulary, token):
  with pytest.raises(DataError, match='outside the vocabulary of 373'):
    vocabulary.name(token)


def test_it_is_a_value(vocabulary):
  same = Vocabulary(vocabulary.config)
  assert same == vocabulary
  assert hash(same) == hash(vocabulary)
  with pytest.raises(dataclasses.FrozenInstanceError):
    same.config = VocabularyConfig()
  with pytest.raises(ValueError, match='read-only'):
    same.is_text[0] = True


def swapped(vocabulary, first, second):
  names = list(vocabulary.names)
  names[first], names[second] = names[second], names[first]
  return tuple(names)


def test_names_of_the_layout_change_nothing(vocabulary):
  same = Vocabulary(vocabulary.config, names=vocabulary.names, barred_text=())
  assert same == vocabulary
  assert hash(same) == hash(vocabulary)
  assert repr(same) == repr(vocabulary) == f'Vocabulary(config={vocabulary.config!r})'
  copy = pickle.loads(pickle.dumps(vocabulary))
  assert (copy, copy.end_turn, copy.names) == (vocabulary, vocabulary.end_turn, vocabulary.names)
  assert not vocabulary.is_barred.any()


def test_tokens_are_found_by_name(vocabulary):
  other = Vocabulary(vocabulary.config, names=swapped(vocabulary, 4, 15))
  assert other != vocabulary
  assert other.codes_to_tokens(np.array([0, 1, 11])).tolist() == [15, 5, 4]
  assert other.tokens_to_codes(np.array([4, 5, 15])).tolist() == [11, 1, 0]
  assert other.image_start == 15
  assert other.name(4) == 'IMGIMGBBZ'
  np.testing.assert_array_equal(other.is_image, vocabulary.is_image)
  assert Vocabulary(vocabulary.config, names=swapped(vocabulary, 2, 17)).end_sequence == 17
  assert Vocabulary(vocabulary.config, names=swapped(vocabulary, 20, 21)).end_turn == 21, 'the lowest number, not the first place'
  assert pickle.loads(pickle.dumps(other)) == other


def test_barred_text_stays_text(vocabulary):
  barred = Vocabulary(vocabulary.config, barred_text=(30, 23, 30))
  assert barred.barred_text == (23, 30)
  assert np.flatnonzero(barred.is_barred).tolist() == [23, 30]
  np.testing.assert_array_equal(barred.is_text, vocabulary.is_text)
  assert barred != vocabulary
  assert barred == Vocabulary(vocabulary.config, barred_text=(23, 30))
  with pytest.raises(ValueError, match='read-only'):
    barred.is_barred[0] = True
  for token in (22, 373, -1):
    with pytest.raises(CheckpointError, match=rf'barred token {token} is no text token \(these are 23 to 372\)'):
      Vocabulary(vocabulary.config, barred_text=(token,))


def test_layout_of_names(vocabulary, released):
  for table in (vocabulary, released):
    assert config_of_names(table.names, table.size) == table.config
    assert config_of_names(table.names[::-1], table.size) == table.config
  assert config_of_names([*vocabulary.names, '<mask>'], 373).n_reserved == 4, 'what is not known by name counts as reserved'


@pytest.mark.parametrize(
  ('place', 'name', 'message'),
  [
    (0, '<x>', "'<s>' is missing"),
    (17, '<eoss>', "tokens 16 and 17 have the same name '<eoss>'"),
    (9, 'IMGIMGAFZ', r"'IMGIMGAFZ' \(token 9\) spells no code"),
    (9, 'IMGIMGCAZ', r"'IMGIMGFZ' \(code 5\) is missing, though 'IMGIMGCAZ' is there"),
    (9, '<x>', r"'IMGIMGFZ' \(code 5\) is missing, though 'IMGIMGBBZ' is there"),
    (15, '<x>', 'are those of VocabularyConfig'),
    (18, '<x>', 'are those of VocabularyConfig'),
  ],
)
def test_names_of_another_table(vocabulary, place, name, message):
  names = list(vocabulary.names)
  names[place] = name
  with pytest.raises(CheckpointError, match=message):
    Vocabulary(vocabulary.config, names=tuple(names))


def test_names_need_room_for_text(vocabulary):
  with pytest.raises(CheckpointError, match='no usable layout: vocabulary of 23 leaves no room for text'):
    config_of_names(vocabulary.names, 23)
  with pytest.raises(CheckpointError, match='no usable layout: .*n_codes must be positive'):
    config_of_names([name for name in vocabulary.names if not name.startswith('IMG')], 373)
  with pytest.raises(CheckpointError, match='no reserved token'):
    config_of_names([name for name in vocabulary.names if not name.startswith('<reserved')], 373)


def test_docstring_examples():
  assert doctest.testmod(module).failed == 0
