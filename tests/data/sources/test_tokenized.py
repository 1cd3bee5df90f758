"""Shards of tokenized documents: read as they were written, and refused where they no longer are."""

import json
import pickle

import numpy as np
import pytest

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.data.sources import tokenized
from chameleon_jax.data.sources.fingerprint import fingerprint
from chameleon_jax.data.sources.source import make_source
from chameleon_jax.data.tokenize_folder import TokenizeJob
from chameleon_jax.data.tokenize_run import run
from chameleon_jax.errors import DataError
from chameleon_jax.interop.native import ModelParts
from chameleon_jax.tokens.document import Document
from chameleon_jax.tokens.render import render
from chameleon_jax.tokens.text import train_text_tokenizer
from chameleon_jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(VocabularyConfig(size=34 + 4 + 2 + 300, n_codes=32, n_sentinels=0, n_reserved=2))
RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def texts():
  words = ('a line of text 0123456789', 'other words')
  return [train_text_tokenizer([text] * 30, n_pieces=280, character_coverage=1.0, seed=0) for text in words]


@pytest.fixture
def folder(tmp_path, texts):
  """Two shards of seven conversations and texts, of a job without pictures."""
  records = [{'text': f'a line {i}'} for i in range(4)]
  records += [{'turns': [{'role': 'prompt', 'segments': ['ask']}, {'role': 'answer', 'segments': [f'line {i}']}]} for i in range(3)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, records)))
  job = TokenizeJob(f'jsonl:{tmp_path}/a.jsonl?validation=0', 'train', str(tmp_path / 'out' / 'train'), n_shards=2)
  run(job, lambda: ModelParts(text_tokenizer=texts[0]))
  return tmp_path / 'out'


def _source(folder, split='train', options=''):
  return make_source(f'array_record:{folder}{options}', split)


def test_documents_come_back(folder):
  original = make_source(f'jsonl:{folder.parent}/a.jsonl?validation=0', 'train')
  for source in (_source(folder), _source(folder / 'train'), _source(f'{folder}/train/*.array_record')):
    assert len(source) == 7
    order = [*range(0, 7, 2), *range(1, 7, 2)]  # shard 0 holds every second document
    assert [source.document(i, RNG) for i in range(7)] == [original.document(i, RNG) for i in order]
  assert len(_source(folder, 'validation')) == 0
  assert len(_source(folder, 'validation', '?validation=0.5')) + len(_source(folder, 'train', '?validation=0.5')) == 7
  assert _source(folder).where(5) == f'{folder}/train/shard-00001-of-00002.array_record, record 1'
  assert pickle.loads(pickle.dumps(_source(folder))).document(6, RNG) == original.document(5, RNG)


def test_pieces_are_used_where_the_tokenizer_made_them(folder, texts):
  source = _source(folder).fitted(VOCABULARY, texts[0], None)
  assert source.has_pieces
  for i in range(7):
    found, expected = source.rendered(i), render(source.document(i, RNG), VOCABULARY, texts[0])
    for name in ('tokens', 'targets', 'loss_weights'):
      np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
  assert pickle.loads(pickle.dumps(source)).has_pieces
  assert not _source(folder).fitted(VOCABULARY, texts[1], None).has_pieces


def _edit(folder, **changes):
  path = folder / 'train' / tokenized.TABLE
  table = json.loads(path.read_text())
  path.write_text(json.dumps({**table, **changes}))


def test_codes_of_another_tokenizer_are_refused(folder, texts):
  _edit(folder, image_tokenizer={'fingerprint': 'aa', 'n_codes': 32}, counts={'pictures': 3})
  _source(folder).fitted(VOCABULARY, texts[0], 'aa')
  _source(folder).fitted(VOCABULARY, texts[0], None)  # a run without an image tokenizer reads codes as they are
  with pytest.raises(DataError, match=r'another image tokenizer \(aa\) than that of the run \(bb\)'):
    _source(folder).fitted(VOCABULARY, texts[0], 'bb')
  _edit(folder, image_tokenizer={'fingerprint': 'aa', 'n_codes': 64}, counts={'pictures': 3})
  with pytest.raises(DataError, match='a codebook of 64, the vocabulary has room for 32'):
    _source(folder).fitted(VOCABULARY, texts[0], None)


def test_damage_is_seen_before_the_first_step(folder):
  shard = folder / 'train' / 'shard-00001-of-00002.array_record'
  data = shard.read_bytes()
  for length in (0, 100, len(data) // 2, len(data) - 1):
    shard.write_bytes(data[:length])
    with pytest.raises(DataError, match=f'shard-00001-of-00002.array_record is cut off: {length:,} of {len(data):,} bytes'):
      _source(folder)
  shard.write_bytes(data + b'x')
  with pytest.raises(DataError, match='is not the shard that tokenized.json lists'):
    _source(folder)
  shard.unlink()
  with pytest.raises(DataError, match='shard-00001-of-00002.array_record is missing'):
    _source(folder)
  shard.write_bytes(data)
  (folder / 'train' / 'stray.array_record').write_bytes(data)
  with pytest.raises(DataError, match='stray.array_record is not listed'):
    _source(folder)


def test_a_flipped_bit_names_shard_and_record(folder):
  shard = folder / 'train' / 'shard-00001-of-00002.array_record'
  data = bytearray(shard.read_bytes())
  for place in range(64, 1024, 3):
    data[place] ^= 255
  shard.write_bytes(bytes(data))
  with pytest.raises(DataError, match=r'shard-00001-of-00002.array_record(, record 0: .*; copy the shard again| cannot be read)'):
    _source(folder).document(4, RNG)


def test_tables(folder):
  _edit(folder, format='chameleon_jax tokenized 9')
  with pytest.raises(DataError, match="has the format 'chameleon_jax tokenized 9', this version reads"):
    _source(folder)
  (folder / 'train' / tokenized.TABLE).write_text('{')
  with pytest.raises(DataError, match='tokenized.json cannot be read'):
    _source(folder)
  (folder / 'train' / tokenized.TABLE).unlink()
  with pytest.raises(DataError, match='holds no tokenized.json: name a folder that `chameleon tokenize` has finished'):
    _source(folder)


def test_fingerprints(folder):
  before = fingerprint(_source(folder))
  folder.rename(folder.with_name('moved'))
  assert fingerprint(_source(folder.with_name('moved'))) == before
  table = json.loads((folder.with_name('moved') / 'train' / tokenized.TABLE).read_text())
  table['shards'][1]['crc32'] += 1
  _edit(folder.with_name('moved'), shards=table['shards'])
  assert fingerprint(_source(folder.with_name('moved'))) != before


def test_empty_shards_are_no_obstacle(tmp_path, texts):
  (tmp_path / 'a.jsonl').write_text('{"text": "one"}\n{"text": "two"}')
  job = TokenizeJob(f'jsonl:{tmp_path}/a.jsonl?validation=0', 'train', str(tmp_path / 'out'), n_shards=5)
  run(job, lambda: ModelParts(text_tokenizer=texts[0]))
  source = _source(tmp_path / 'out')
  assert [source.document(i, RNG) for i in range(len(source))] == [Document.plain('one'), Document.plain('two')]
