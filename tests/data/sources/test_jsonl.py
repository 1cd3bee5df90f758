"""JSON lines by index: places, splits, damage."""

import json
import pickle

import numpy as np
import pytest

from chameleon_jax.data.sources import jsonl
from chameleon_jax.data.sources.fingerprint import fingerprint
from chameleon_jax.data.sources.source import make_source
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document, Image
from chameleon_jax.tokens.images import save_png

RNG = np.random.default_rng(0)


def _source(path, split='train', options='?validation=0'):
  return make_source(f'jsonl:{path}{options}', split)


def _texts(source):
  return [source.document(i, RNG).text for i in range(len(source))]


@pytest.mark.parametrize('piece', [3, 1 << 20])
@pytest.mark.parametrize('text', ['{}\n\n[]', 'a\r\n\r\nbb\r\n', '', '\n', 'x', '  \nyy\n   \n'])
def test_lines_are_where_splitting_finds_them(tmp_path, monkeypatch, text, piece):
  monkeypatch.setattr(jsonl, '_PIECE', piece)
  path = tmp_path / 'a.jsonl'
  path.write_bytes(text.encode())
  index = jsonl.index_lines(path)
  found = [text[start : start + size] for start, size in zip(index['starts'], index['sizes'])]
  expected = [(number, line) for number, line in enumerate(text.split('\n'), start=1) if line.strip()]
  assert list(zip(index['numbers'].tolist(), found)) == expected


def test_documents_with_pictures_beside_them(tmp_path):
  pixels = RNG.integers(0, 256, (3, 4, 3), np.uint8)
  (tmp_path / 'pics').mkdir()
  save_png(tmp_path / 'pics' / 'a.png', pixels)
  (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': f'{i}', 'image': 'pics/a.png'}) for i in range(5)))
  source = _source(tmp_path / 'a.jsonl')
  assert len(source) == 5
  assert source.document(3, RNG) == Document.plain('3', Image(pixels))
  assert source.where(3) == f'{tmp_path}/a.jsonl, line 4'
  assert pickle.loads(pickle.dumps(source)).document(4, RNG).text == '4'
  (tmp_path / 'b').mkdir()
  (tmp_path / 'a.jsonl').rename(tmp_path / 'b' / 'a.jsonl')
  moved = _source(tmp_path / 'b', options=f'?validation=0&images={tmp_path}')
  assert moved.document(3, RNG) == Document.plain('3', Image(pixels))


def test_a_list_of_records(tmp_path):
  (tmp_path / 'a.json').write_text(json.dumps([{'text': 'one'}, {'text': 'two'}]))
  assert _texts(_source(tmp_path / 'a.json')) == ['one', 'two']
  (tmp_path / 'a.json').write_text('{"text": "one"}\n{"text": "two"}')
  with pytest.raises(DataError, match='one object a line belongs into a .jsonl'):
    _source(tmp_path / 'a.json')
  (tmp_path / 'a.json').write_text('{"text": "one"}')
  with pytest.raises(DataError, match='holds a list of records, this one holds a dict'):
    _source(tmp_path / 'a.json')


def test_splits(tmp_path):
  lines = [json.dumps({'text': f't{i}'}) + '\n' for i in range(300)]
  (tmp_path / 'all.jsonl').write_text(''.join(lines))
  train, validation = (_texts(_source(tmp_path / 'all.jsonl', split, '?validation=0.1')) for split in ('train', 'validation'))
  assert sorted(train + validation) == sorted(f't{i}' for i in range(300))
  assert 10 < len(validation) < 60
  (tmp_path / 'all.jsonl').write_text(''.join(lines) + '{"text": "new"}\n' * 50)
  assert set(_texts(_source(tmp_path / 'all.jsonl', 'validation', '?validation=0.1'))) - {'new'} == set(validation)
  (tmp_path / 'my_train.jsonl').write_text('{"text": "a"}')
  (tmp_path / 'my_validation.jsonl').write_text('{"text": "b"}')
  assert [_texts(_source(tmp_path / 'my_train.jsonl', split, '')) for split in ('train', 'validation')] == [['a'], ['b']]


@pytest.mark.parametrize(
    ('lines', 'index', 'message'),
    [
        (['{"text": "a"}', '', '{"text": 3}'], 1, r"a.jsonl, line 3: 'text' must be text"),
        (['{"text": "a"', '{"text": "b"}'], 0, r'a.jsonl, line 1: not JSON'),
        (['{"image": "no.png", "text": "a"}', '{"text": "b"}'], 0, r'line 1: cannot read picture .*no.png: No such file'),
    ],
)
def test_a_bad_record_is_named(tmp_path, lines, index, message):
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  with pytest.raises(DataError, match=message):
    _source(tmp_path / 'a.jsonl').document(index, RNG)


def test_a_file_that_was_cut_off_is_refused_at_once(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"text": "b')
  with pytest.raises(DataError, match=r'line 2: not JSON: .*was the file cut off\?'):
    _source(tmp_path / 'a.jsonl')
  (tmp_path / 'a.jsonl').write_bytes(b'{"text": "a"}\n"\xff"')
  with pytest.raises(DataError, match='line 2: not UTF-8'):
    _source(tmp_path / 'a.jsonl')


def test_the_fingerprint_is_of_the_contents(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"text": "b"}\n')
  before = fingerprint(_source(tmp_path / 'a.jsonl'))
  (tmp_path / 'x').mkdir()
  (tmp_path / 'a.jsonl').rename(tmp_path / 'x' / 'a.jsonl')
  assert fingerprint(_source(tmp_path / 'x' / 'a.jsonl')) == before
  (tmp_path / 'x' / 'a.jsonl').write_text('{"text": "a"}\n{"text": "c"}\n')
  after = fingerprint(_source(tmp_path / 'x' / 'a.jsonl'))
  assert after['documents'] == before['documents'] == 2
  assert after['content'] != before['content']
