"""Conversions that are refused: one line, and nothing that was there is touched."""

import errno
import pathlib
import shutil

import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.convert import convert
from chameleon_jax.interop.opening import detect_format
from tests.interop.conversions import GOLDEN, META, PORT, a_copy, assert_same, names


@pytest.mark.parametrize(
    ('arguments', 'options', 'message'),
    [
        (('source', 'source', 'orbax'), {'overwrite': True}, 'is itself a folder to read from'),
        (('source', 'source/inner', 'orbax'), {}, 'lie one inside the other'),
        (('source', '.', 'orbax'), {'overwrite': True}, 'lie one inside the other'),
        (('source', 'tokenizer', 'orbax'), {'overwrite': True, 'tokenizer': 'tokenizer'}, 'is itself a folder to read from'),
        (('source', 'target', 'torch'), {}, "unknown format 'torch'"),
        (('source', 'target', 'orbax'), {'n_shards': 2}, 'n_shards is for targets in the form of Meta'),
        (('source', 'target', 'meta'), {'decoder': True}, 'decoder is for targets in the form of Hugging Face'),
        (('source', 'target', 'meta'), {}, 'the image tokenizer has no decoder'),
        (('source', 'target', 'huggingface'), {'decoder': True}, 'it has none'),
        (('nowhere', 'target', 'orbax'), {}, 'does not exist'),
        (('source', 'there', 'orbax'), {}, 'there exists; choose another target, or give --overwrite'),
    ],
)
def test_what_is_refused_leaves_no_trace(tmp_path, monkeypatch, arguments, options, message):
  a_copy(tmp_path)
  shutil.copytree(GOLDEN / 'tokenizer', tmp_path / 'tokenizer')
  (tmp_path / 'there').mkdir()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(CheckpointError, match=message) as raised:
    convert(*arguments, **options)
  assert '\n' not in str(raised.value)
  assert names(tmp_path) == ['source', 'there', 'tokenizer'] and names(tmp_path / 'source') == names(PORT)


def test_overwriting_replaces_a_checkpoint_and_nothing_else(tmp_path):
  target = tmp_path / 'target'
  convert(PORT, target, 'orbax')
  convert(META, target, 'huggingface', overwrite=True)
  assert detect_format(target) == 'huggingface' and names(tmp_path) == ['target']
  (target / 'thesis.txt').write_text('years of work')
  with pytest.raises(CheckpointError, match='holds thesis.txt, which is no part of a checkpoint'):
    convert(META, target, 'orbax', overwrite=True)
  assert (target / 'thesis.txt').exists() and detect_format(target) == 'huggingface'
  (tmp_path / 'run' / 'model').mkdir(parents=True)
  with pytest.raises(CheckpointError, match='holds model, which is no part'):
    convert(META, tmp_path / 'run', 'orbax', overwrite=True)
  (tmp_path / 'json').mkdir()
  (tmp_path / 'json' / 'data.json').write_text('{}')
  with pytest.raises(CheckpointError, match='is no checkpoint, so it is not replaced'):
    convert(META, tmp_path / 'json', 'orbax', overwrite=True)
  (tmp_path / 'file').write_text('')
  with pytest.raises(CheckpointError, match='is a file'):
    convert(META, tmp_path / 'file', 'orbax', overwrite=True)
  (tmp_path / 'empty').mkdir()
  convert(PORT, tmp_path / 'empty', 'orbax', overwrite=True)
  assert detect_format(tmp_path / 'empty') == 'orbax'


def test_overwriting_spares_what_a_checkpoint_does_not_consist_of(tmp_path):
  release = tmp_path / 'data'
  shutil.copytree(META, release / 'models' / '7b')
  shutil.copytree(GOLDEN / 'tokenizer', release / 'tokenizer')

  def refused(message, target, source=PORT):
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(CheckpointError, match=message) as raised:
      convert(source, target, 'orbax', overwrite=True)
    assert '\n' not in str(raised.value) and sorted(tmp_path.rglob('*')) == before

  refused('is itself a folder to read from', release / 'tokenizer', source=release / 'models' / '7b')  # found by itself, and needed
  (release / 'models' / '7b' / 'notes').mkdir()
  refused('holds models/7b/notes, which is no part', release)
  (release / 'models' / '7b' / 'notes').rmdir()
  (release / 'tokenizer' / 'train.txt').touch()
  refused('holds tokenizer/train.txt, which is no part', release)
  (release / 'tokenizer' / 'train.txt').unlink()
  shutil.copytree(META, release / 'models' / '30b')
  refused('holds 2 models', release)
  shutil.rmtree(release / 'models' / '30b')
  (release / '.git').mkdir()  # a history that may be nowhere else
  refused('holds .git, which is no part', release)
  (release / '.git').rmdir()
  convert(PORT, release, 'orbax', overwrite=True)
  assert detect_format(release) == 'orbax' and names(tmp_path) == ['data']


def test_an_interrupted_replacement_is_undone_before_the_target_is_looked_at(tmp_path):
  convert(PORT, tmp_path / 'target', 'orbax')
  (tmp_path / 'target').rename(tmp_path / '.target.old-1')  # killed between two renames
  with pytest.raises(CheckpointError, match='target exists'):
    convert(META, tmp_path / 'target', 'orbax')
  assert names(tmp_path) == ['target']
  assert_same(PORT, tmp_path / 'target')


def test_a_failed_overwrite_keeps_what_was_there(tmp_path):
  target = tmp_path / 'target'
  convert(META, target, 'orbax')
  with pytest.raises(CheckpointError, match='no decoder'):
    convert(PORT, target, 'meta', overwrite=True)
  assert_same(META, target)
  assert names(tmp_path) == ['target']


def test_a_disk_that_is_too_small_is_told_beforehand(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1_234_567))
  with pytest.raises(CheckpointError, match=r'needs [0-9,]+ bytes \(0.1 GiB\) of disk, 1,234,567 are free'):
    convert(PORT, tmp_path / 'a' / 'target', 'orbax')
  assert names(tmp_path) == []


def _a_loop(tmp_path):
  (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
  return tmp_path / 'loop'


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize(
    'place',
    [
        lambda tmp_path: tmp_path / 'file' / 'model',
        lambda tmp_path: tmp_path / ('n' * 300),
        lambda tmp_path: tmp_path / ('n' * 300) / 'model',
        _a_loop,
        lambda tmp_path: _a_loop(tmp_path) / 'model',
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, place, overwrite):
  (tmp_path / 'file').touch()
  target = place(tmp_path)
  before = names(tmp_path)
  for source in (PORT, target):
    with pytest.raises(CheckpointError) as raised:
      convert(source, target if source is PORT else tmp_path / 'new', 'orbax', overwrite=overwrite)
    assert '\n' not in str(raised.value) and str(tmp_path) in str(raised.value)
    assert names(tmp_path) == before


def test_a_folder_above_the_target_that_cannot_be_listed_is_one_line(tmp_path, monkeypatch):
  listed = pathlib.Path.iterdir

  def refuse(self):
    if self == tmp_path:
      raise PermissionError(errno.EACCES, 'Permission denied', str(self))
    return listed(self)

  monkeypatch.setattr(pathlib.Path, 'iterdir', refuse)
  with pytest.raises(CheckpointError, match='cannot be searched .*: Permission denied'):
    convert(PORT, tmp_path / 'target', 'orbax')
  monkeypatch.undo()
  assert names(tmp_path) == []
