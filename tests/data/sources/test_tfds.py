"""A data set made here with tensorflow-datasets, read back by index and without TensorFlow."""

import importlib
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest

from chameleon_jax.data.sources.fingerprint import fingerprint
from chameleon_jax.data.sources.source import make_source
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document, Image

BUILDERS = '''
import io
import numpy as np
import tensorflow_datasets as tfds
from chameleon_jax.tokens.images import png_bytes


class {name}(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {features}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {splits}

  def _generate_examples(self, first, n):
    for i in range(first, first + n):
      image = io.BytesIO(png_bytes(np.full((3, 2, 3), i, np.uint8)))
      yield i, {example}
'''
CAPTIONS = """{
        'image': tfds.features.Image(),
        'captions': tfds.features.Sequence({'text': tfds.features.Text()}),
        'key': tfds.features.Text(),
    }"""
LABELS = "{'picture': tfds.features.Image(), 'label': tfds.features.ClassLabel(names=['red_fox', 'owl'])}"


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Folders of a data set like coco_captions with two splits, and of one with labels and a single split."""
  root = tmp_path_factory.mktemp('tfds')
  own = "{'train': self._generate_examples(0, 6), 'validation': self._generate_examples(6, 2)}"
  example = "{'image': image, 'captions': [{'text': f'caption {i}'}, {'text': f'also {i}'}], 'key': str(i)}"
  modules = {
      'tiny_captions': BUILDERS.format(name='TinyCaptions', features=CAPTIONS, splits=own, example=example),
      'tiny_labels': BUILDERS.format(
          name='TinyLabels',
          features=LABELS,
          splits="{'train': self._generate_examples(0, 40)}",
          example="{'picture': image, 'label': i % 2}",
      ),
  }
  sys.path.insert(0, str(root))
  found = {}
  try:
    for module, text in modules.items():
      (root / f'{module}.py').write_text(text)
      builders = importlib.import_module(module)
      kind = next(value for name, value in vars(builders).items() if name.lower() == module.replace('_', ''))
      builder = kind(data_dir=root / 'data', file_format='array_record')
      builder.download_and_prepare()
      found[module] = pathlib.Path(builder.data_dir)
  finally:
    sys.path.remove(str(root))
  return found


def _source(folder, options='', split='train'):
  return make_source(f'tfds:{folder}{options}', split)


def test_captions_and_pictures(folders):
  source = _source(folders['tiny_captions'], '?order=text_first')
  assert [len(source), len(_source(folders['tiny_captions'], split='validation'))] == [6, 2]
  seen = set()
  for index in range(6):
    texts = set()
    for seed in range(12):
      document = source.document(index, np.random.default_rng(seed))
      value = int(document.pictures[0].pixels[0, 0, 0])
      texts.add(document.text)
    assert document.segments[1] == Image(np.full((3, 2, 3), value, np.uint8))
    assert texts == {f'caption {value}', f'also {value}'}
    seen.add(value)
  assert seen == set(range(6))
  assert source.document(2, np.random.default_rng(0)) == pickle.loads(pickle.dumps(source)).document(2, np.random.default_rng(0))
  assert 'tiny_captions' in source.where(3)
  assert 'tensorflow' not in sys.modules


def test_features_by_name(folders):
  source = _source(folders['tiny_captions'], '?text=key&form=draw')
  document = source.document(0, np.random.default_rng(0))
  assert document == Document.chat(str(int(document.pictures[0].pixels[0, 0, 0])), document.pictures[0])
  with pytest.raises(DataError, match='no such feature text=kee; did you mean'):
    _source(folders['tiny_captions'], '?text=kee')


def test_labels_and_a_held_out_share(folders):
  source, held_out = (_source(folders['tiny_labels'], '?order=text_first&validation=0.2', split) for split in ('train', 'validation'))
  assert len(source) + len(held_out) == 40
  assert len(held_out) > 0
  documents = [one.document(i, np.random.default_rng(0)) for one in (source, held_out) for i in range(len(one))]
  assert {(int(d.pictures[0].pixels[0, 0, 0]), d.text) for d in documents} == {(i, ['red fox', 'owl'][i % 2]) for i in range(40)}


def test_fingerprints_tell_data_sets_apart(folders):
  prints = [fingerprint(_source(folders[name])) for name in ('tiny_captions', 'tiny_captions', 'tiny_labels')]
  assert prints[0] == prints[1] != prints[2]


def test_files_that_are_cut_off_or_missing_are_told_when_the_source_is_opened(folders, tmp_path):
  folder = tmp_path / 'tiny_captions' / '1.0.0'
  shutil.copytree(folders['tiny_captions'], folder)
  (file,) = folder.glob('*train*')
  data = file.read_bytes()
  for length in (len(data) // 2, len(data) - 10, 0):
    file.write_bytes(data[:length])
    with pytest.raises(DataError, match=r'train\.array_record\S+ is cut off.*; copy it again, or prepare the data set anew'):
      _source(folder)
  file.unlink()
  with pytest.raises(DataError, match=r'train\.array_record\S+ is missing, which source'):
    _source(folder)
  flipped = bytearray(data)
  flipped[100] ^= 255
  file.write_bytes(flipped)
  with pytest.raises(DataError, match='tiny_captions/1.0.0, train, example 0 cannot be read: .*; copy the files again'):
    _source(folder).document(0, np.random.default_rng(0))


def test_what_is_not_prepared(tmp_path):
  with pytest.raises(DataError, match='no_such_set'):
    make_source(f'tfds:no_such_set?data_dir={tmp_path}', 'train')
