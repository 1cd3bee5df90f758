"""Curves read from metrics files."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

_FILE = pathlib.Path(__file__).parents[2] / 'tools' / 'plot_metrics.py'
_SPEC = importlib.util.spec_from_file_location('plot_metrics', _FILE)
plot_metrics = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(plot_metrics)


def _write(path, records):
  path.write_text('\n'.join(json.dumps(record) for record in records) + '\n')
  return path


def test_runs_are_joined_and_a_resumed_step_counts_once(tmp_path):
  twice = [{'step': 2, 'loss': 9.0}, {'step': 2, 'loss': 2.0}]
  first = _write(tmp_path / 'a.jsonl', [{'step': 1, 'loss': 3.0}, *twice, {'step': 4, 'other': 1.0}])
  second = _write(tmp_path / 'b.jsonl', [{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 'nan'}])
  assert plot_metrics.read_curve((first, second), 'loss') == ([1, 2, 5], [3.0, 2.0, 1.0])


def test_a_panel_names_what_is_wrong(tmp_path):
  with pytest.raises(ValueError, match='has 2 parts'):
    plot_metrics.Panel.parse('title|label')
  with pytest.raises(ValueError, match='does not exist'):
    plot_metrics.Panel.parse(f'title|label|{tmp_path / "none.jsonl"}|loss')


def test_a_star_names_every_layer(tmp_path):
  names = ['d/gradient_norm/layer_00', 'd/gradient_norm/layer_01', 'd/gradient_norm/head', 'd/gradient_norm/norms/layer_00']
  file = _write(tmp_path / 'a.jsonl', [{'step': 1, names[1]: 1.0, names[2]: 1.0}, {'step': 2, names[0]: 2.0, names[3]: 1.0}])
  assert plot_metrics.matching([file], 'd/gradient_norm/layer_*') == names[:2]
  assert plot_metrics.matching([file], 'd/gradient_norm/*') == [names[2], *names[:2]]
  assert plot_metrics.matching([file], 'd/none') == ['d/none']
  with pytest.raises(ValueError, match='matches no metric in .*a.jsonl'):
    plot_metrics.matching([file], 'd/*_ratio')


def test_a_panel_compares_runs_by_name(tmp_path):
  files = [_write(tmp_path / f'lr=1{name}.jsonl', [{'step': 1, 'loss': 3.0}]) for name in 'abc']
  panel = plot_metrics.Panel.parse(f'Loss|nats|no norm={files[0]};base={files[1]}+{files[2]}|loss')
  assert panel.compared == (('no norm', (files[0],)), ('base', (files[1], files[2]))) and panel.files == ()
  assert plot_metrics.Panel.parse(f'Loss|nats|{files[0]}|loss').compared == ()


def test_a_picture_is_written(tmp_path):
  pytest.importorskip('matplotlib')
  file = _write(tmp_path / 'a.jsonl', [{'step': 1, 'loss': 3.0}, {'step': 2, 'loss': 2.0}])
  plot_metrics.draw([plot_metrics.Panel('Loss', 'nats', (file,), ('loss',))], tmp_path / 'curves.png')
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_the_command_line_draws_and_refuses_one_line(tmp_path):
  pytest.importorskip('matplotlib')
  file = _write(tmp_path / 'a.jsonl', [{'step': 1, 'loss': 3.0}, {'step': 2, 'loss': 2.0}])
  command = [sys.executable, str(_FILE), f'--panel=Loss|nats|{file}|loss', f'--output={tmp_path / "curves.png"}']
  assert subprocess.run(command, capture_output=True, check=False).returncode == 0
  assert (tmp_path / 'curves.png').exists()
  without = subprocess.run(command[:2], capture_output=True, check=False, text=True)
  assert without.returncode != 0 and '--panel' in without.stderr
