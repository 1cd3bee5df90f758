"""Folders of pictures: where captions are found, in which order, and what is wrong."""

import json

import numpy as np
import pytest

from chameleon_jax.data.sources.fingerprint import fingerprint
from chameleon_jax.data.sources.source import make_source
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.images import save_png


@pytest.fixture
def folder(tmp_path):
  for i, name in enumerate(['cats/one.png', 'cats/two.png', 'red_dogs/three.png', 'four.png']):
    path = tmp_path / 'pics' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, np.full((2, 2, 3), i, np.uint8))
  (tmp_path / 'pics' / 'four.txt').write_text('the fourth\n')
  return tmp_path / 'pics'


def _pairs(folder, options='?validation=0', split='train', rng=None):
  source = make_source(f'image_folder:{folder}{options}', split)
  documents = [source.document(i, rng or np.random.default_rng(i)) for i in range(len(source))]
  return {(int(document.pictures[0].pixels[0, 0, 0]), document.text) for document in documents}


def test_captions_beside_pictures_and_names_of_folders(folder):
  assert _pairs(folder) == {(0, 'cats'), (1, 'cats'), (2, 'red dogs'), (3, 'the fourth')}


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('metadata.jsonl', '{"file_name": "cats/two.png", "text": "b"}\n\n{"file_name": "four.png", "caption": "d"}\n'),
        ('captions.jsonl', '{"image": "cats/two.png", "captions": ["b"]}\n{"file": "four.png", "text": "d"}'),
        ('captions.json', json.dumps({'cats/two.png': 'b', 'four.png': ['d']})),
        ('captions.json', json.dumps([{'image': 'cats/two.png', 'caption': 'b'}, {'file_name': 'four.png', 'text': 'd'}])),
        (
            'captions.json',
            json.dumps(
                {
                    'images': [{'id': 5, 'file_name': 'cats/two.png'}, {'id': 6, 'file_name': 'four.png'}],
                    'annotations': [{'image_id': 6, 'caption': 'd'}, {'image_id': 5, 'caption': 'b'}],
                }
            ),
        ),
    ],
)
def test_a_list_of_captions_goes_first(folder, name, text):
  (folder / name).write_text(text)
  assert _pairs(folder) == {(1, 'b'), (3, 'd')}


def test_several_captions_of_a_picture(folder):
  (folder / 'captions.jsonl').write_text('{"file": "four.png", "text": "d"}\n{"file": "four.png", "text": "e"}')
  source = make_source(f'image_folder:{folder}?validation=0', 'train')
  assert len(source) == 1
  assert {source.document(0, np.random.default_rng(seed)).text for seed in range(20)} == {'d', 'e'}


def test_splits_go_by_the_name_of_the_picture(folder):
  train, validation = (_pairs(folder, '?validation=0.5', split) for split in ('train', 'validation'))
  assert train | validation == _pairs(folder)
  assert not train & validation
  for split in ('train', 'validation'):
    (folder.parent / 'two' / split / 'x').mkdir(parents=True)
    save_png(folder.parent / 'two' / split / 'x' / 'p.png', np.zeros((2, 2, 3), np.uint8))
  assert len(make_source(f'image_folder:{folder.parent / "two"}', 'validation')) == 1


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('metadata.jsonl', '{"file_name": "four.png"}', r'metadata.jsonl, line 1: needs one of file_name'),
        ('metadata.jsonl', '{"file_name": ', r'metadata.jsonl, line 1: not JSON'),
        ('captions.json', '3', 'captions are an object or a list'),
        ('captions.json', '{"a.png": 3}', r'captions.json, entry 1: a caption must be text'),
        ('captions.json', '{"images": [], "annotations": [{}]}', "not COCO's form"),
        ('captions.json', '{}', 'names no picture'),
    ],
)
def test_bad_lists(folder, name, text, message):
  (folder / name).write_text(text)
  with pytest.raises(DataError, match=message):
    _pairs(folder)


def test_bad_folders(folder):
  (folder / 'four.txt').unlink()
  with pytest.raises(DataError, match=r'four.png has no caption: list it in .*metadata.jsonl, write four.txt beside it'):
    _pairs(folder)
  with pytest.raises(DataError, match='does not exist'):
    _pairs(folder / 'none')
  with pytest.raises(DataError, match='is a file; name the folder'):
    _pairs(folder / 'four.png')
  with pytest.raises(DataError, match="unknown option 'frm'; did you mean 'form'"):
    _pairs(folder, '?frm=draw')
  (folder / 'four.txt').write_text('x')
  (folder / 'four.png').write_bytes(b'no picture')
  with pytest.raises(DataError, match=r'four.png is not a picture'):
    _pairs(folder)


def test_the_fingerprint_sees_captions_and_sizes(folder):
  (folder / 'metadata.jsonl').write_text('{"file_name": "four.png", "text": "d"}')
  prints = [fingerprint(make_source(f'image_folder:{folder}?validation=0', 'train'))['content']]
  (folder / 'metadata.jsonl').write_text('{"file_name": "four.png", "text": "e"}')
  prints.append(fingerprint(make_source(f'image_folder:{folder}?validation=0', 'train'))['content'])
  save_png(folder / 'four.png', np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
  prints.append(fingerprint(make_source(f'image_folder:{folder}?validation=0', 'train'))['content'])
  assert len(set(prints)) == 3
