"""One shard: what is in it, what is rejected, what is left after a stop."""

import collections
import dataclasses
import json
import time

import jax
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.data import tokenize
from chameleon_jax.data.encode import make_encoder, prepared
from chameleon_jax.data.sources import source as registry
from chameleon_jax.data.sources.record import Record
from chameleon_jax.data.sources.source import make_source
from chameleon_jax.data.tokenize import Tokenization
from chameleon_jax.data.tokenize_folder import Report, TokenizeJob, TooManyRejects, finished, write_table
from chameleon_jax.errors import ConfigError, DataError
from chameleon_jax.interop.opening import load_tokenizers
from chameleon_jax.models.vqgan.model import VQGAN
from chameleon_jax.tokens import images
from chameleon_jax.tokens.document import Codes, Document, Image, Text, Turn

N = 23


class Mixed:
  """Documents with none to three pictures of several sizes; some cannot be used."""

  def __init__(self, bad=()):
    self.bad = bad

  def __len__(self):
    return N

  def document(self, index, rng):
    if index in self.bad:
      raise DataError(f'record {index} is bad')
    pictures = [Image(np.random.default_rng((index, k)).integers(0, 256, (16 + k, 16, 3), np.uint8)) for k in range(index % 4)]
    text = Text(f'd{index} {rng.integers(1000)}')
    return Document.chat([text, *pictures[:1]], [*pictures[1:], 'end']) if index % 3 == 0 else Document.plain(*pictures, text)


@pytest.fixture(scope='module')
def parts(tiny_model_folder):
  return load_tokenizers(tiny_model_folder)


@pytest.fixture(autouse=True)
def sources(monkeypatch):
  monkeypatch.setitem(registry.SOURCES, 'mixed', lambda split, codes: Mixed())
  monkeypatch.setitem(registry.SOURCES, 'mixed_bad', lambda split, codes: Mixed(bad=(0, 9)))


def _job(folder, source='mixed', **changes):
  return TokenizeJob(source, 'train', str(folder), **{'n_shards': 3, 'batch_size': 4, **changes})


def _documents(folder):
  source = make_source(f'array_record:{folder}', 'train')
  return [source.document(i, np.random.default_rng(0)) for i in range(len(source))]


def _coded(document, encode):
  def segment(one):
    return Codes(encode([one.pixels])[0]) if isinstance(one, Image) else one

  return Document(tuple(Turn([segment(one) for one in turn.segments], turn.role) for turn in document.turns))


def _all(job, parts):
  work = Tokenization(job, parts)
  return write_table(job, [work.shard(number) for number in range(job.n_shards)])


def test_shards_hold_the_documents_with_their_codes(parts, tmp_path):
  table = _all(_job(tmp_path), parts)
  encode = make_encoder(parts.vqgan_config, parts.vqgan_params)
  order = [i for shard in range(3) for i in range(shard, N, 3)]
  assert _documents(tmp_path) == [_coded(Mixed().document(i, np.random.default_rng((0, i))), encode) for i in order]
  assert table['counts']['pictures'] == sum(i % 4 for i in range(N))
  assert table['counts']['records'] == N == sum(shard['records'] for shard in table['shards'])
  assert table['image_tokenizer']['fingerprint'] == encode.fingerprint
  assert table['image_tokenizer']['n_image_tokens'] == 16
  assert sorted(path.name for path in tmp_path.iterdir()) == [*(f'shard-0000{i}-of-00003.array_record' for i in range(3)), 'tokenized.json']


def test_batches_side_by_side_give_the_bytes_of_one_after_the_other(parts, tmp_path, monkeypatch):
  """Also where the first of two batches takes longer than the second."""
  files = {}
  for at_once in (1, 2):
    work = Tokenization(_job(tmp_path / str(at_once), 'mixed_bad', n_shards=1, max_rejects=0.1), parts)
    assert work._at_once == 2  # the tiny encoder is small
    monkeypatch.setattr(work, '_at_once', at_once)
    encode, running, most = work._encode, collections.Counter(), []

    def slow(pictures, encode=encode, running=running, most=most):
      running['all'] += 1
      running['now'] += 1
      most.append(running['now'])
      time.sleep(0.3 if running['all'] == 1 else 0.01)
      running['now'] -= 1
      return encode(pictures)

    monkeypatch.setattr(work, '_encode', slow)
    work.shard(0)
    assert max(most) == at_once and len(most) == -(-sum(i % 4 for i in range(N) if i not in (0, 9)) // 4)
    files[at_once] = {path.name: path.read_bytes() for path in (tmp_path / str(at_once)).iterdir() if path.name != 'job.json'}
  assert len(files[1]) == 3 and files[1] == files[2]


def test_large_batches_are_encoded_one_after_the_other(parts):
  small = parts.vqgan_config
  assert tokenize._batches_at_once(small, 64) == 2
  assert tokenize._batches_at_once(presets.vqgan_512(), 64) == 1


@pytest.mark.parametrize(('preprocessing', 'fit', 'convention'), [('pad', 'pad', 'meta'), ('huggingface', 'crop', 'huggingface')])
def test_other_preprocessing(parts, tmp_path, preprocessing, fit, convention):
  _all(_job(tmp_path, n_shards=1, preprocessing=preprocessing), parts)
  network, side = VQGAN(parts.vqgan_config), parts.vqgan_config.resolution
  apply = jax.jit(lambda pixels: network.apply({'params': parts.vqgan_params}, pixels[None], method='encode')[0])
  for index, document in enumerate(_documents(tmp_path)):
    given = [segment.pixels for segment in Mixed().document(index, np.random.default_rng((0, index))).pictures]
    if index not in (6, 7):  # one conversation, one plain document; each has pictures of another size
      continue
    for pixels, found in zip(given, document.pictures, strict=True):
      fitted = pixels if pixels.shape[0] == side else images.preprocess(pixels, side, fit=fit, convention=convention)
      np.testing.assert_array_equal(found.codes, np.asarray(apply(images.to_float(fitted, convention))).reshape(-1))


def test_pictures_of_the_right_size_stay(parts):
  picture = np.zeros((16, 16, 3), np.uint8)
  assert prepared(picture, parts.vqgan_config, 'pad') is picture
  assert prepared(np.zeros((20, 30, 3), np.uint8), parts.vqgan_config, 'huggingface').shape == (16, 16, 3)


def test_rejects_are_listed(parts, tmp_path):
  table = _all(_job(tmp_path, 'mixed_bad', max_rejects=0.1), parts)
  assert table['counts']['rejected'] == 2
  (path,) = tmp_path.glob('rejects-*')  # 0 and 9 are of shard 0
  assert path.name == 'rejects-00000-of-00003.jsonl'
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
      {'document': i, 'where': f'mixed_bad, train, document {i}', 'reason': f'record {i} is bad'} for i in (0, 9)
  ]
  encode = make_encoder(parts.vqgan_config, parts.vqgan_params)
  good = [i for i in range(0, N, 3) if i not in (0, 9)]
  assert _documents(tmp_path)[: len(good)] == [_coded(Mixed().document(i, np.random.default_rng((0, i))), encode) for i in good]


def test_too_many_rejects_stop_the_job(parts, tmp_path):
  job = _job(tmp_path, 'mixed_bad', max_rejects=0.05)
  work = Tokenization(job, parts)
  line = r"2 of 23 documents of 'mixed_bad' rejected \(max_rejects 0.05\); the first: record 0 is bad; see .*rejects-00000"
  with pytest.raises(TooManyRejects, match=line):
    work.shard(0)
  assert len((tmp_path / 'rejects-00000-of-00003.jsonl').read_text().splitlines()) == 2
  assert not list(tmp_path.glob('*shard*'))
  with pytest.raises(TooManyRejects, match='3 of 23'):  # shards of before count
    work.shard(0, rejected_before=2)
  reports = [Report(i, f'{i}', 7, 1, 1, rejected=1, pictures=0, text_bytes=0, pieces=0) for i in range(3)]
  with pytest.raises(TooManyRejects, match='3 of 23'):
    write_table(job, reports)
  with pytest.raises(DataError, match=r'shards \[2\] are missing'):
    write_table(job, reports[:2])


def test_pictures_need_an_image_tokenizer(parts, tmp_path):
  text_only = dataclasses.replace(parts, vqgan_config=None, vqgan_params=None)
  table = _all(_job(tmp_path, max_rejects=1.0), text_only)
  assert table['counts']['rejected'] == sum(i % 4 > 0 for i in range(N))
  assert table['image_tokenizer'] is None
  assert 'the model has no image tokenizer' in (tmp_path / 'rejects-00000-of-00003.jsonl').read_text()


def test_a_finished_shard_is_done_once_and_a_damaged_one_again(parts, tmp_path, monkeypatch):
  job = _job(tmp_path)
  work = Tokenization(job, parts)
  report = work.shard(1)
  path = tmp_path / report.file
  data = path.read_bytes()
  assert finished(job, 1) == report
  monkeypatch.setattr(tokenize, 'open_writer', lambda path: pytest.fail('a finished shard was begun again'))
  assert work.shard(1) == report
  monkeypatch.undo()
  monkeypatch.setitem(registry.SOURCES, 'mixed', lambda split, codes: Mixed())
  path.write_bytes(data[:-10])
  assert finished(job, 1) is None
  assert work.shard(1) == report
  assert path.read_bytes() == data
  path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  assert finished(job, 1) is None


def test_nothing_half_written_after_an_error(parts, tmp_path, monkeypatch):
  work = Tokenization(_job(tmp_path), parts)
  monkeypatch.setattr(tokenize.os, 'replace', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
  with pytest.raises(OSError, match='No space left'):
    work.shard(0)
  assert [path.name for path in tmp_path.iterdir()] == ['job.json']


def test_another_job_is_refused(parts, tmp_path):
  Tokenization(_job(tmp_path), parts)
  changed = (({'n_shards': 4}, r'another n_shards \(3, now 4\)'), ({'seed': 1}, 'another seed'), ({'batch_size': 8}, 'another batch_size'))
  for changes, message in changed:
    with pytest.raises(DataError, match=message):
      Tokenization(_job(tmp_path, **changes), parts)
  with pytest.raises(DataError, match="another source \\('mixed', now 'mixed_bad'\\): give the same as before, or another --output"):
    Tokenization(_job(tmp_path, 'mixed_bad'), parts)
  _all(_job(tmp_path), parts)
  with pytest.raises(DataError, match='another seed'):
    Tokenization(_job(tmp_path, seed=1), parts)


def test_settings():
  wrong = (({'n_shards': 0}, 'n_shards must be at least 1'), ({'max_rejects': 2.0}, 'a share in'), ({'threads': 0}, 'threads must be'))
  for changes, message in wrong:
    with pytest.raises(ConfigError, match=message):
      _job('x', **changes)


def test_a_record_is_what_the_page_of_the_format_says(parts, tmp_path):
  _all(_job(tmp_path, n_shards=1), parts)
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(str(tmp_path / 'shard-00000-of-00001.array_record'))
  record = Record(reader.read([7])[0])
  assert record.codes.dtype == np.dtype('<u2')
  assert record.pieces is not None
  assert parts.text_tokenizer.decode(record.pieces.tolist()) == record.document().text
