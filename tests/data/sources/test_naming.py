"""Names of sources are taken apart as their page says."""

import pytest

from chameleon_jax.data.sources.naming import SourceName, nearest
from chameleon_jax.errors import DataError


@pytest.mark.parametrize(
    ('name', 'kind', 'argument', 'options'),
    [
        ('jsonl:data/train.jsonl', 'jsonl', 'data/train.jsonl', {}),
        ('webdataset:shards/*-0000?.tar', 'webdataset', 'shards/*-0000?.tar', {}),
        ('webdataset:a?.tar?form=draw&validation=0.1', 'webdataset', 'a?.tar', {'form': 'draw', 'validation': '0.1'}),
        ('tfds:coco_captions?text=captions.text', 'tfds', 'coco_captions', {'text': 'captions.text'}),
        ('text:C:/code', 'text', 'C:/code', {}),
        ('jsonl:a.jsonl?images=/x/y=z', 'jsonl', 'a.jsonl', {'images': '/x/y=z'}),
    ],
)
def test_parts(name, kind, argument, options):
  assert SourceName.parse(name) == SourceName(name, kind, argument, options)


@pytest.mark.parametrize(
    ('name', 'message'), [('jsonl:', 'has not the form'), ('a b:c', 'has not the form'), ('text:a?x=1&x=2', 'an option twice')]
)
def test_bad_names(name, message):
  with pytest.raises(DataError, match=message):
    SourceName.parse(name)


def test_options_are_checked():
  name = SourceName.parse('text:a?form=draw&validation=0.25&max_bytes=20&bad=x')
  assert name.choice('form', ('plain', 'draw')) == 'draw'
  assert name.choice('order', ('random', 'text_first')) == 'random'
  assert name.share('validation', 0.5) == 0.25
  assert name.share('other', 0.5) == 0.5
  assert name.count('max_bytes', 5, least=20) == 20
  with pytest.raises(DataError, match="unknown option 'bad'; known are form, validation"):
    SourceName.parse('text:a?bad=x').allow('form', 'validation')
  with pytest.raises(DataError, match="'validatoin'; did you mean 'validation'"):
    SourceName.parse('text:a?validatoin=x').allow('form', 'validation')
  with pytest.raises(DataError, match='bad=x is no number'):
    name.share('bad', 0.5)
  with pytest.raises(DataError, match='form=draw is none of plain, describe'):
    name.choice('form', ('plain', 'describe'))
  with pytest.raises(DataError, match='max_bytes=20 is less than 21'):
    name.count('max_bytes', 5, least=21)
  with pytest.raises(DataError, match=r'validation=1.0 is no share'):
    SourceName.parse('text:a?validation=1').share('validation', 0.0)


def test_nearest():
  assert nearest('jsnl', ['jsonl', 'tfds']) == "did you mean 'jsonl'?"
  assert nearest('zzz', ['jsonl', 'tfds']) == 'known are jsonl, tfds'
