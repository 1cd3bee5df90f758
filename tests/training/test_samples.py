"""Samples during training: how documents are cut, what is written, and that the run does not notice."""

import dataclasses
import glob
import io
import pathlib
import re

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from chameleon_jax.config import SamplesConfig
from chameleon_jax.data.pipeline import to_devices
from chameleon_jax.data.sources import source as registry
from chameleon_jax.tokens.document import Codes, Document, Text
from chameleon_jax.training import loop, samples
from chameleon_jax.training.checkpoint import Checkpoints
from chameleon_jax.training.metrics import MetricsWriter


def _picture():
  return Codes(np.arange(4, dtype=np.int32))


@pytest.mark.parametrize(
    ('document', 'given', 'rest'),
    [
        (Document.chat('a', 'b', 'c', 'd'), Document.chat('a', 'b', 'c'), ['d']),
        (Document.plain('a', _picture()), Document.plain('a'), [_picture()]),
        (Document.plain(_picture(), 'a', _picture()), Document.plain(_picture(), 'a'), [_picture()]),
        (Document.plain('one two three four five'), Document.plain('one two'), [Text(' three four five')]),
        (Document.plain(_picture()), None, None),
        (Document.plain('one'), None, None),
        (Document.chat('a'), None, None),
    ],
)
def test_documents_are_cut(document, given, rest):
  found = samples.split(document)
  if given is None:
    assert found is None
    return
  assert found[0] == given
  assert [segment if not isinstance(segment, str) else Text(segment) for segment in found[1].segments] == [
      Text(segment) if isinstance(segment, str) else segment for segment in rest
  ]


def _events(workdir):
  """(tag, kind) of every TensorBoard value."""
  found = []
  for path in glob.glob(str(workdir / 'tensorboard' / '*')):
    data = pathlib.Path(path).read_bytes()
    while data:
      length = int.from_bytes(data[:8], 'little')
      found += [(value.tag, value) for value in Event.FromString(data[12 : 12 + length]).summary.value]
      data = data[16 + length :]
  return found


def test_a_run_writes_a_page_and_shows_it(seen_run):
  folder = seen_run.workdir / 'samples' / 'step_0000008'
  assert sorted(path.name for path in (seen_run.workdir / 'samples').iterdir()) == ['step_0000008']
  text = (folder / 'index.html').read_text()
  assert '<h1>Samples at step 8</h1>' in text
  captions = re.findall(r'(numbers_\w+), validation document (\d+)\. It went on: (.*?)</div>', text)
  assert [(source, number) for source, number, _ in captions] == [('numbers_pairs', '0'), ('numbers_text', '0'), ('numbers_pairs', '1')]
  assert captions[0][2] == '[picture 1]' and captions[1][2].split() == ['24'] * len(captions[1][2].split())
  assert ' 24' in text and text.count('<article>') == 3
  # The prompt's picture, the sample's pictures and the original are all in the page.
  shown = _events(seen_run.workdir)
  texts = {tag: value for tag, value in shown if tag.startswith('samples/') and value.tensor.string_val}
  assert sorted(texts) == [f'samples/{number}_{source}/text_summary' for number, (source, _, _) in enumerate(captions)]
  content = texts['samples/1_numbers_text/text_summary'].tensor.string_val[0].decode()
  assert content.startswith('prompt:\n\n 24') and 'the document:' in content
  pictures = [tag for tag, value in shown if tag.startswith('samples/') and value.HasField('image')]
  assert len(pictures) == len(list(folder.glob('*.png')))


def test_the_run_does_not_notice(seen_run, tmp_path, monkeypatch):
  """Two steps with a drawing between them end in the state of two steps without, bit for bit, and samples repeat."""
  for name, factory in seen_run.module.SOURCES.items():
    monkeypatch.setitem(registry.SOURCES, name, factory)
  config = dataclasses.replace(seen_run.config, samples=dataclasses.replace(seen_run.config.samples, every_evaluations=1))
  parts, drawn = seen_run.module.tokenizers(), []
  monkeypatch.setattr(samples.Sampler, '_write', lambda self, step, prompts, shown: drawn.append(shown))
  ends = []
  for draws in (False, True):
    with MetricsWriter(tmp_path / str(draws), total_steps=8) as writer, Checkpoints(tmp_path / str(draws) / 'c', config.checkpoint) as kept:
      run = loop._Run(config, parts, loop.make_mesh(config.mesh), writer, kept, workdir=tmp_path, profile_steps=None)
      state = run.start()
      with jax.set_mesh(run.mesh):
        for step, batch in enumerate(seen_run.batches[:2]):
          state, _ = run.train_step(state, to_devices(batch, run.mesh), run.key)
          if draws and step == 0:
            run.sampler.draw(1, state.params)
            run.sampler.draw(1, state.params)
      ends.append(jax.device_get(state))
      run.batches.close()
  jax.tree.map(np.testing.assert_array_equal, *ends)
  assert len(drawn) == 2 and drawn[0] == drawn[1] and len(drawn[0]) == 3 * 3
  assert any(answer.segments for answer in drawn[0][1::3])


def test_when_it_draws(seen_run, monkeypatch, tmp_path):
  found = []
  monkeypatch.setattr(samples.Sampler, 'draw', lambda self, step, params: found.append(step))
  config = dataclasses.replace(seen_run.config, eval_every=10, n_steps=95, samples=SamplesConfig(every_evaluations=3))
  data = {'vocabulary': None, 'text_tokenizer': None}
  for changed, expected in ((config, [30, 60, 90, 95]), (dataclasses.replace(config, samples=SamplesConfig()), [])):
    writer = MetricsWriter(tmp_path, total_steps=95, stream=io.StringIO())
    sampler = samples.Sampler(changed, seen_run.module.tokenizers(), data=data, writer=writer, workdir=tmp_path)
    for step in (*range(10, 100, 10), 95):
      sampler.evaluated(step, lambda: None)
    writer.close()
    assert found == expected
    found.clear()
