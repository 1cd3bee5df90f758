"""cli/demo.py and cli/demo_training.py: a few steps of tiny models through the whole path, page included."""

import dataclasses
import re

import numpy as np
import pytest

from chameleon_jax import config as configs
from chameleon_jax.chameleon import Chameleon
from chameleon_jax.cli import demo, demo_training
from chameleon_jax.cli import main as cli
from chameleon_jax.data.sources.emoji_world import EmojiWorld


def _tiny() -> demo_training.FromScratch:
  """The from-scratch run, shrunk: 16 tokens a picture, one narrow layer, a handful of steps."""
  small = demo_training.small_run()
  vocabulary = configs.VocabularyConfig(size=640, n_codes=16, n_sentinels=0, n_reserved=8)
  mesh = configs.MeshConfig(data=1, fsdp=-1)
  return demo_training.FromScratch(
      image_tokenizer=dataclasses.replace(
          small.image_tokenizer,
          model=dataclasses.replace(
              small.image_tokenizer.model, n_codes=16, d_code=8, z_channels=16, base_channels=16, patch_size=16, norm_groups=4
          ),
          batch_size=8,
          n_steps=3,
          eval_every=3,
          mesh=mesh,
      ),
      text_tokenizer=dataclasses.replace(small.text_tokenizer, vocabulary=vocabulary, sources=(('emoji_text', 1), ('emoji_pairs', 1))),
      transformer=dataclasses.replace(
          small.transformer,
          vocabulary=vocabulary,
          model=dataclasses.replace(
              small.transformer.model, vocab_size=640, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_head=8, d_ff=32, max_seq_len=256
          ),
          data=dataclasses.replace(small.transformer.data, seq_len=256, batch_size=8),
          n_steps=4,
          eval_every=4,
          eval_batches=1,
          mesh=mesh,
      ),
  )


def test_the_shipped_settings_are_consistent():
  runs = demo_training.small_run()
  assert runs.transformer.vocabulary == runs.text_tokenizer.vocabulary
  assert runs.transformer.vocabulary.n_codes == runs.image_tokenizer.model.n_codes
  assert runs.image_tokenizer.model.n_image_tokens == 64
  first, second = runs.transformer.data.stages
  assert {name: weight / 2 for name, weight in first.weights}.items() <= dict(second.weights).items()


def test_tasks_are_about_held_out_pictures():
  world = EmojiWorld.load('all')
  tasks = {task.kind: task for task in demo.make_tasks(world, np.random.default_rng(0), 5)}
  assert set(tasks) == {'draw', 'describe', 'edit'}
  for task in tasks.values():
    assert len(task.items) == len(task.prompts) == 5
    assert len({item.index for item in task.items}) == 5
    assert all(item.split == 'validation' for item in task.items)
  assert [prompt.text for prompt in tasks['draw'].prompts] == [f'Draw {item.name}.' for item in tasks['draw'].items]
  assert all(len(prompt.pictures) == 1 for task in ('describe', 'edit') for prompt in tasks[task].prompts)


def test_a_missing_model_is_one_line(tmp_path, capsys):
  assert cli.main(['demo', '--model=nowhere', f'--output={tmp_path / "out"}']) == 1
  err = capsys.readouterr().err
  assert 'nowhere' in err and 'Traceback' not in err


@pytest.mark.slow
def test_from_scratch_and_page(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(demo, 'small_run', _tiny)
  output = tmp_path / 'out'
  assert cli.main(['demo', '--from_scratch', '--count=2', f'--output={output}']) == 0
  assert str(output / 'index.html') in capsys.readouterr().out
  page = (output / 'index.html').read_text(encoding='utf-8')
  assert re.findall('<h2>(.*?)</h2>', page) == ['Draw', 'Describe', 'Edit', 'A document']
  # Two originals and two copies for each of draw and edit, and the pictures of four prompts, whatever the model says.
  assert len(re.findall(r'<img src="data:image/png;base64,', page)) >= 12
  assert 'http' not in page
  assert (output / 'document.txt').read_text(encoding='utf-8').startswith('Three pictures:\n- ')
  # The second time everything is trained already, and the parts fit one another.
  lines = []
  folder = demo_training.train_from_scratch(_tiny(), output / 'training', log=lines.append)
  assert lines == ['3 of 3: transformer']
  model = Chameleon.load(folder)
  assert model.n_image_tokens == 16 and model.vocabulary.size == 640
