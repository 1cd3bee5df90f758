"""Names, ids and preprocessing of two checkpoints."""

import dataclasses
import json

import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.lazy import Origin
from chameleon_jax.interop.verify import verify
from chameleon_jax.tokens.vocabulary import Vocabulary
from tests.interop.verified_models import VOCABULARY, failing, faults, model, row


def names_and_ids():
  vocabulary = Vocabulary(VOCABULARY)
  text = {f'piece{token}': token for token in range(vocabulary.text_start, vocabulary.size)}
  return {name: token for token, name in enumerate(vocabulary.names)} | text


def with_files(**files):
  contents = {f'{name}.json': json.dumps(value).encode() for name, value in files.items()}
  return model(vqgan=None, origin=Origin(format='huggingface', files=contents))


def test_equal_maps_pass_and_the_placeholder_of_the_port_counts_as_its_reserved_token():
  ids = names_and_ids()
  second = next(token for name, token in ids.items() if name.startswith('<reserved')) + 1
  renamed = {'<image>' if token == second else name: token for name, token in ids.items()}
  report = verify(with_files(config={'vocabulary_map': ids}), with_files(config={'vocabulary_map': renamed}))
  assert report.passed and row(report, 'vocabulary').value == '128 names'
  assert row(report, 'id map of B: vocabulary_map').value == '128 names'


@pytest.mark.parametrize(
    'change, fragment',
    [
        ({'piece90': 91}, "'piece90' and 'piece91' have the same id 91"),
        ({'IMGIMGFZ': 8}, "have the same id 8"),
        ({'IMGIMGFZ': '9'}, "'IMGIMGFZ' has the id '9'"),
        ({'piece100': None, 'IMGIMGDCZ': 100}, "code 32 has the token 'IMGIMGDCZ'"),
        ({'piece100': None, 'IMGIMGXZ': 100}, "'IMGIMGXZ' spells no code"),
        ({'IMGIMGFZ': None}, 'code 5 has no token'),
        ({'piece128': 128}, "'piece128' has the id 128, the transformer has 128"),
    ],
)
def test_a_map_that_is_no_bijection_is_found(change, fragment):
  ids = {name: token for name, token in (names_and_ids() | change).items() if token is not None}
  report = verify(with_files(config={'vocabulary_map': names_and_ids()}), with_files(config={'vocabulary_map': ids}))
  assert 'id map of B: vocabulary_map' in failing(report) and 'id map of A: vocabulary_map' not in failing(report)
  assert 'id_map' in faults(report) and fragment in report.findings[0].sentence


class Named:
  """A text tokenizer that can tell its table."""

  n_pieces = 88

  def __init__(self, ids):
    self.ids = ids

  def encode(self, text):
    return [ord(letter) % self.n_pieces for letter in text]

  def decode(self, pieces):
    raise NotImplementedError

  def save(self, path):
    raise NotImplementedError

  def to_json(self):
    return json.dumps({'model': {'vocab': self.ids}}).encode()


def test_the_maps_of_one_checkpoint_must_agree_and_that_of_the_tokenizer_is_checked_too():
  ids = names_and_ids()
  files = {'config.json': json.dumps({'vocabulary_map': ids}).encode()}
  moved = ids | {'piece99': ids['piece98'], 'piece98': ids['piece99']}
  good, other, bad = (
      model(vqgan=None, text_tokenizer=Named(table), origin=Origin(files=files)) for table in (ids, moved, ids | {'piece99': 98})
  )
  assert verify(good, good).passed
  report = verify(good, other)
  assert failing(report) == ['id maps of B', 'vocabulary']
  assert row(report, 'id maps of B').where == "'piece98' is 99 in text tokenizer and 98 in vocabulary_map"
  report = verify(good, bad)
  assert 'id map of B: text tokenizer' in failing(report) and faults(report) == ['id_map']


def test_a_name_that_stands_twice_is_found():
  text = json.dumps({'vocabulary_map': names_and_ids()})[:-2] + ', "piece99": 99}}'
  other = model(vqgan=None, origin=Origin(files={'config.json': text.encode()}))
  assert "'piece99' stands in it twice" in verify(model(), other).findings[0].sentence


def test_maps_that_differ_name_the_first_name_and_an_offset_of_the_codes():
  ids = names_and_ids()
  moved = dict(ids) | {'piece99': ids['piece98'], 'piece98': ids['piece99']}
  report = verify(with_files(config={'vocabulary_map': ids}), with_files(config={'vocabulary_map': moved}))
  assert row(report, 'vocabulary').where == "'piece98' is 98 in A and 99 in B"
  up = {name: token + 2 if 4 <= token < 36 else token - 32 if token in (36, 37) else token for name, token in ids.items()}
  report = verify(with_files(config={'vocabulary_map': ids}), with_files(config={'vocabulary_map': up}))
  assert row(report, 'tokens of the codes').where == 'code 0 is token 4 in A and 6 in B'
  assert faults(report) == ['code_offset'] and 'offset by 2' in report.findings[0].sentence


def test_other_layouts_of_the_vocabulary_fail():
  other = dataclasses.replace(VOCABULARY, n_reserved=3)
  assert 'n_reserved=3' in row(verify(model(), model(vocabulary=other)), 'vocabulary').where


class Pieces:
  """A text tokenizer of characters."""

  n_pieces = 300

  def __init__(self, offset=0):
    self.offset = offset

  def encode(self, text):
    return [ord(letter) % 256 + self.offset for letter in text]

  def decode(self, pieces):
    return ''.join(chr(piece - self.offset) for piece in pieces)

  def save(self, path):
    raise NotImplementedError


def test_text_tokenizers_are_compared_by_what_they_do():
  report = verify(model(text_tokenizer=Pieces()), model(text_tokenizer=Pieces()))
  assert row(report, 'text tokenizer').status == 'pass'
  assert failing(verify(model(text_tokenizer=Pieces()), model(text_tokenizer=Pieces(1)))) == ['text tokenizer']


PORT = {'do_rescale': True, 'do_normalize': True, 'rescale_factor': 0.0078, 'image_mean': [1.0] * 3, 'image_std': [1.0] * 3, 'resample': 1}
RELEASE = PORT | {'rescale_factor': 2 / 255}


def test_declared_preprocessing_that_differs_fails_and_the_scaling_is_named():
  one, two = with_files(preprocessor_config=PORT), with_files(preprocessor_config=RELEASE)
  report = verify(one, one)
  assert report.passed and row(report, 'preprocessing').value == 'A huggingface, B huggingface'
  report = verify(two, one)
  assert failing(report) == ['preprocessing'] and faults(report) == ['rescale']
  assert row(report, 'preprocessing').value == 'A meta, B huggingface'
  assert report.findings[0].sentence.startswith('B scales pixel values by 0.0078')
  report = verify(one, with_files(preprocessor_config=PORT | {'resample': 3}))
  assert row(report, 'preprocessing').where == 'resample: 1 in A, 3 in B' and not report.findings
  assert row(verify(model(), one), 'preprocessing').status == 'info'


def test_a_damaged_side_file_is_one_line():
  for name in ('config.json', 'preprocessor_config.json'):
    with pytest.raises(CheckpointError, match=f'{name} of there is not valid JSON'):
      verify(model(), model(origin=Origin(files={name: b'{'})))
  with pytest.raises(CheckpointError, match='is not understood'):
    verify(model(), with_files(preprocessor_config=PORT | {'image_std': 'wide'}))
