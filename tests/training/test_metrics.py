"""Metrics files and the progress line."""

import io
import json
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from chameleon_jax.training import metrics
from chameleon_jax.training.metrics import MetricsWriter, duration, figure


def _records(path):
  """Payloads of a TFRecord file: length u64, its crc u32, payload, its crc u32."""
  content = path.read_bytes()
  while content:
    size = int.from_bytes(content[:8], 'little')
    yield content[12 : 12 + size]
    content = content[16 + size :]


def test_both_files_hold_the_values(tmp_path):
  with MetricsWriter(tmp_path, total_steps=10) as writer:
    writer.write(3, {'loss': 1.5, 'rate': 2})
    writer.write(4, {'loss': float('nan')})
    writer.write(4, {'loss_text': 0.25}, prefix='validation')
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [{k: v for k, v in line.items() if k != 'time'} for line in lines] == [
      {'step': 3, 'train/loss': 1.5, 'train/rate': 2.0},
      {'step': 4, 'train/loss': 'nan'},
      {'step': 4, 'validation/loss_text': 0.25},
  ]
  (events,) = (tmp_path / 'tensorboard').iterdir()
  parsed = [Event.FromString(record) for record in _records(events)]
  found = [(event.step, value.tag, value.simple_value) for event in parsed for value in event.summary.value]
  assert found == [(3, 'train/loss', 1.5), (3, 'train/rate', 2.0), (4, 'validation/loss_text', 0.25)]


def test_a_resumed_run_appends(tmp_path):
  for step in (1, 2):
    with MetricsWriter(tmp_path, total_steps=2) as writer:
      writer.write(step, {'loss': 1.0})
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 2


def test_a_rewound_run_has_each_step_once(tmp_path):
  with MetricsWriter(tmp_path, total_steps=9) as writer:
    for step in (1, 2, 3):
      writer.write(step, {'loss': float(step)})
      writer.write(step, {'loss': 10.0 * step}, prefix='validation')
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 4, "time": 17')  # the kill came here
  stream = io.StringIO()
  with MetricsWriter(tmp_path, total_steps=9, stream=stream) as writer:
    writer.rewind(2)
    for step in (3, 4):
      writer.write(step, {'loss': 0.5})
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  losses = [(line['step'], line.get('train/loss'), line.get('validation/loss')) for line in lines]
  assert losses == [(1, 1.0, None), (1, None, 10.0), (2, 2.0, None), (2, None, 20.0), (3, 0.5, None), (4, 0.5, None)]
  assert stream.getvalue() == f'{path}: 3 lines after step 2 taken back\n'
  events = [Event.FromString(record) for file in (tmp_path / 'tensorboard').iterdir() for record in _records(file)]
  assert [event.step for event in events if event.session_log.status == SessionLog.START] == [3]  # TensorBoard hides steps 3 and on


def test_nothing_to_rewind_leaves_the_file_alone(tmp_path):
  with MetricsWriter(tmp_path, total_steps=9) as writer:
    writer.write(2, {'loss': 1.0})
    before = (tmp_path / 'metrics.jsonl').stat().st_ino
    writer.rewind(2)
  assert (tmp_path / 'metrics.jsonl').stat().st_ino == before
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 1


def test_progress_line(tmp_path, monkeypatch):
  now = iter([100.0, 110.0])
  monkeypatch.setattr(metrics, 'time', types.SimpleNamespace(monotonic=lambda: next(now)))
  stream = io.StringIO()
  with MetricsWriter(tmp_path, total_steps=1000, stream=stream) as writer:
    writer.progress(100, {'loss': 4.0})
    writer.progress(120, {'loss': 3.2144, 'tok/s': 4120})
  assert stream.getvalue().splitlines() == [
      'step 100/1,000 (10%)  loss 4',
      'step 120/1,000 (12%)  loss 3.214  tok/s 4,120  2 steps/s  7m20s left',
  ]


@pytest.mark.parametrize(
    ('seconds', 'text'), [(0.2, '0s'), (42, '42s'), (59.7, '1m00s'), (754, '12m34s'), (7384, '2h03m'), (-3, '0s')]
)
def test_duration(seconds, text):
  assert duration(seconds) == text


@pytest.mark.parametrize(
    ('value', 'text'),
    [(3.14159, '3.142'), (0.000123, '1.23e-04'), (51234.0, '51,234'), (7, '7'), (0.0, '0'), (float('nan'), 'nan'), (float('inf'), 'inf')],
)
def test_figure(value, text):
  assert figure(value) == text
