"""A folder appears whole or not at all, whatever stops the writing."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import staging
from chameleon_jax.interop.staging import clear_leftovers, remove_tree, signals_as_exceptions, staged


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_appears_at_the_end(tmp_path):
  target = tmp_path / 'a' / 'b' / 'model'
  with staged(target) as folder:
    (folder / 'x').write_text('1')
    assert not target.exists() and folder.parent == target.parent
  assert names(tmp_path / 'a' / 'b') == ['model'] and names(target) == ['x']


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing_not_even_the_parents_it_made(tmp_path, error):
  with pytest.raises(error), staged(tmp_path / 'a' / 'b' / 'model') as folder:
    (folder / 'x').write_text('1')
    raise error
  assert names(tmp_path) == []


def test_what_was_there_is_replaced_or_kept(tmp_path):
  target = tmp_path / 'model'
  target.mkdir()
  (target / 'old').write_text('1')
  with pytest.raises(ValueError), staged(target):
    raise ValueError
  assert names(target) == ['old']
  with staged(target) as folder:
    (folder / 'new').write_text('1')
  assert names(target) == ['new'] and names(tmp_path) == ['model']


@pytest.mark.parametrize('call', [1, 2])
def test_a_failure_between_the_two_renames_brings_the_old_folder_back(tmp_path, monkeypatch, call):
  target = tmp_path / 'model'
  target.mkdir()
  (target / 'old').write_text('1')
  rename, calls = type(target).rename, []

  def failing(self, other):
    calls.append(other)
    if len(calls) == call:
      raise KeyboardInterrupt
    return rename(self, other)

  monkeypatch.setattr(type(target), 'rename', failing)
  with pytest.raises(KeyboardInterrupt), staged(target):
    pass
  assert names(target) == ['old'] and names(tmp_path) == ['model']


def test_leftovers_of_killed_processes_are_cleared(tmp_path):
  others = ['.model.old-backup', '.model.writing-', '.model.writing-1.writing-1', '.models.writing-1']  # not ours, or not of this folder
  for name in ('.model.writing-1', '.model.old-1', *others):
    (tmp_path / name).mkdir()
  (tmp_path / 'model').mkdir()
  with staged(tmp_path / 'model'):
    pass
  assert names(tmp_path) == [*others, 'model']


def test_a_replaced_folder_whose_successor_never_came_is_moved_back(tmp_path):
  (tmp_path / '.model.old-1').mkdir()
  (tmp_path / '.model.old-1' / 'weights').write_text('1')
  with pytest.raises(ValueError), staged(tmp_path / 'model'):
    raise ValueError
  assert names(tmp_path) == ['model'] and names(tmp_path / 'model') == ['weights']


WRITER = """
import pathlib, signal, sys, time
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # a suite under nohup hands on that they are ignored
  signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
from chameleon_jax.interop.staging import signals_as_exceptions, staged
with signals_as_exceptions(), staged(pathlib.Path(sys.argv[1])) as folder:
  (folder / 'x').write_text('1')
  print('ready', flush=True)
  time.sleep(60)
"""


def start(target):
  process = subprocess.Popen([sys.executable, '-c', WRITER, str(target)], stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == 'ready\n'
  return process


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_leaves_nothing(tmp_path, number, code):
  process = start(tmp_path / 'model')
  process.send_signal(number)
  assert process.wait(20) == code
  assert names(tmp_path) == []


def test_two_writers_of_one_folder_and_one_killed_outright(tmp_path):
  target = tmp_path / 'model'
  process = start(target)
  try:
    with pytest.raises(CheckpointError, match='is being written by another process'), staged(target):
      pass
    assert names(tmp_path) == [f'.model.writing-{process.pid}'], 'the other one goes on undisturbed'
  finally:
    process.kill()
    process.wait(20)
  assert names(tmp_path) == [f'.model.writing-{process.pid}']
  with staged(target):
    pass
  assert names(tmp_path) == ['model']


def test_handlers_are_put_back_and_others_are_left_alone():
  before = signal.getsignal(signal.SIGTERM)
  mine = lambda number, frame: None
  try:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(SystemExit) as raised, signals_as_exceptions():
      os.kill(os.getpid(), signal.SIGTERM)
    assert raised.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, mine)
    with signals_as_exceptions():
      assert signal.getsignal(signal.SIGTERM) is mine
  finally:
    signal.signal(signal.SIGTERM, before)


def test_an_error_of_the_file_system_is_one_line_and_names_the_place(tmp_path, monkeypatch):
  def refuse(self):
    raise PermissionError(errno.EACCES, 'Permission denied', str(self))

  monkeypatch.setattr(type(tmp_path), 'iterdir', refuse)
  with pytest.raises(CheckpointError, match='cannot be searched .* of model: Permission denied') as caught:
    clear_leftovers(tmp_path / 'model')
  assert '\n' not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_parents_half_made_are_removed(tmp_path):
  with pytest.raises(OSError), staged(tmp_path / 'a' / ('b' * 300) / 'model'):
    pass
  assert names(tmp_path) == []


def test_without_posix_locks_a_folder_still_appears_whole_and_nothing_foreign_is_removed(tmp_path, monkeypatch):
  monkeypatch.setattr(staging, 'fcntl', None)
  for name in ('.model.writing-1', f'.model.writing-{os.getpid()}'):
    (tmp_path / name).mkdir()
  with staged(tmp_path / 'model') as folder:
    (folder / 'x').write_text('1')
  assert names(tmp_path) == ['.model.writing-1', 'model'] and names(tmp_path / 'model') == ['x']
  with pytest.raises(ValueError), staged(tmp_path / 'other'):
    raise ValueError
  assert names(tmp_path) == ['.model.writing-1', 'model']


def test_a_system_without_fcntl_imports_it_all_the_same():
  code = 'import sys; sys.modules["fcntl"] = None; from chameleon_jax.interop import staging; print(staging.fcntl)'
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert run.stdout == 'None\n', run.stderr


def test_removing_tolerates_what_is_gone(tmp_path):
  remove_tree(tmp_path / 'nothing')
  (tmp_path / 'a' / 'b').mkdir(parents=True)
  remove_tree(tmp_path / 'a')
  assert names(tmp_path) == []
