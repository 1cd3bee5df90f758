"""Converting: every format to every other, what is refused, what lies beside the weights, and that nothing is left behind."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.errors import CheckpointError, DataError
from chameleon_jax.interop import convert as converter
from chameleon_jax.interop import read_back
from chameleon_jax.interop.convert import convert
from chameleon_jax.interop.lazy import Origin, TensorSource
from chameleon_jax.interop.notices import notice
from chameleon_jax.interop.opening import detect_format, open_checkpoint
from chameleon_jax.tokens.text_json import JsonText

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
MODELS = GOLDEN / 'models'
META, PORT = MODELS / 'meta_7b_like', MODELS / 'hf_7b_like'


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def values(model):
  found = {}
  for part in ('transformer', 'vqgan'):
    source = getattr(model, part)
    found |= {} if source is None else {f'{part}/{name}': np.array(source.read(name)) for name in source.specs}
  return found


def assert_same(folder, other, *, without=()):
  with open_checkpoint(folder) as a, open_checkpoint(other) as b:
    ours, theirs = values(a), values(b)
  ours = {name: value for name, value in ours.items() if not name.startswith(without)} if without else ours
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    assert value.dtype == theirs[name].dtype and value.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize('layout', ['meta_30b_like', 'anole_like'])
@pytest.mark.parametrize('middle', ['orbax', 'meta', 'huggingface'])
@pytest.mark.parametrize('last', ['orbax', 'meta', 'huggingface'])
def test_any_format_to_any_other_keeps_every_bit(tmp_path, layout, middle, last):
  convert(MODELS / layout, tmp_path / 'middle', middle, decoder=True if middle == 'huggingface' else None)
  assert detect_format(tmp_path / 'middle') == middle
  report = convert(tmp_path / 'middle', tmp_path / 'last', last, decoder=True if last == 'huggingface' else None)
  assert detect_format(tmp_path / 'last') == last and report.verified and report.source_format == middle
  assert_same(MODELS / layout, tmp_path / 'last')
  assert names(tmp_path) == ['last', 'middle']


def test_the_shipped_form_of_version_1_becomes_version_2(tiny_model_folder, tmp_path):
  convert(tiny_model_folder, tmp_path / 'copy', 'orbax')
  assert json.loads((tmp_path / 'copy' / 'config.json').read_text())['version'] == 2
  assert_same(tiny_model_folder, tmp_path / 'copy')
  with open_checkpoint(tmp_path / 'copy') as copy, open_checkpoint(tiny_model_folder) as model:
    assert copy.text_tokenizer == model.text_tokenizer and copy.transformer_config == model.transformer_config


def test_progress_counts_to_the_end_twice(tmp_path):
  seen = []
  report = convert(PORT, tmp_path / 'copy', 'orbax', on_progress=seen.append)
  for phase in ('writing', 'verifying'):
    steps = [step for step in seen if step.phase == phase]
    assert [step.tensors for step in steps] == list(range(1, report.n_tensors + 1))
    assert steps[-1].nbytes == steps[-1].n_nbytes == report.n_bytes > 0
  assert 'read back and compared' in report.lines()[-1] and report.lines()[0].startswith('note: the image tokenizer has no decoder')


def test_the_type_of_the_transformer_is_changed_and_that_of_the_image_tokenizer_not(tmp_path):
  report = convert(PORT, tmp_path / 'half', 'orbax', dtype='bfloat16')
  with open_checkpoint(PORT) as model, open_checkpoint(tmp_path / 'half') as half:
    assert {spec.dtype.name for spec in half.transformer.specs.values()} == {'bfloat16'}
    assert {spec.dtype for spec in half.vqgan.specs.values()} == {spec.dtype for spec in model.vqgan.specs.values()}
    for name in model.transformer.specs:
      expected = model.transformer.read(name).astype(ml_dtypes.bfloat16)
      np.testing.assert_array_equal(half.transformer.read(name), expected)
    stored = [*half.transformer.specs.values(), *half.vqgan.specs.values()]
    assert report.n_bytes == sum(spec.nbytes for spec in stored)


@pytest.mark.parametrize('n_shards', [1, 2])
def test_the_number_of_shards_is_asked_for(tmp_path, n_shards):
  convert(META, tmp_path / 'shards', 'meta', n_shards=n_shards)
  (model,) = (tmp_path / 'shards' / 'models').iterdir()
  assert len(list(model.glob('consolidated*.pth'))) == n_shards
  assert_same(META, tmp_path / 'shards')


# --------------------------------------------------------------------------------------------- refusals


def a_copy(tmp_path, source=PORT):
  return pathlib.Path(shutil.copytree(source, tmp_path / 'source'))


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


@pytest.mark.parametrize('target_format', ['orbax', 'huggingface'])
def test_a_difference_after_writing_is_found_and_the_target_discarded(tmp_path, monkeypatch, target_format):
  opened = converter.open_checkpoint

  def spoiled(path, **options):
    model = opened(path, **options)
    if pathlib.Path(path) == PORT:
      return model

    def read(name):
      values = np.array(model.transformer.read(name))
      if name == 'layers_1/ffn_norm/weight':
        values[3] *= 1.5
      return values

    return dataclasses.replace(model, transformer=TensorSource(model.transformer.specs, read))

  monkeypatch.setattr(converter, 'open_checkpoint', spoiled)
  with pytest.raises(CheckpointError, match='tensor layers_1/ffn_norm/weight reads back differently'):
    convert(PORT, tmp_path / 'target', target_format)
  assert names(tmp_path) == []
  assert not convert(PORT, tmp_path / 'target', target_format, verify=False).verified


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda m: dataclasses.replace(m, transformer=None), 'the transformer differs from the source in embedding'),
        (lambda m: dataclasses.replace(m, text_tokenizer=None), 'the text tokenizer reads back differently'),
        (
            lambda m: dataclasses.replace(m, transformer_config=dataclasses.replace(m.transformer_config, rope_theta=5.0)),
            'rope_theta 10000.0 reads back as 5.0',
        ),
        (
            lambda m: dataclasses.replace(m, vqgan_config=dataclasses.replace(m.vqgan_config, resolution=1024)),
            'resolution .* reads back as 1024',
        ),
    ],
)
def test_everything_that_makes_a_model_is_compared(change, message):
  with open_checkpoint(META) as model:
    read_back.compare(model, model, None, META)
    with pytest.raises(CheckpointError, match=message):
      read_back.compare(model, change(model), None, META)


def test_a_tokenizer_without_a_piece_for_some_byte_is_compared_all_the_same():
  class Lacking(JsonText):
    piece = 1

    def encode(self, text):
      if '\x00' in text:
        raise DataError('no piece for the byte 0x00')
      return [self.piece] * len(text)

  class Other(Lacking):
    piece = 2

  with open_checkpoint(META) as model:
    data = model.text_tokenizer.to_json()
    one, two, other = (dataclasses.replace(model, text_tokenizer=kind(data)) for kind in (Lacking, Lacking, Other))
    read_back.compare(one, two, None, META)
    with pytest.raises(CheckpointError, match='the text tokenizer reads back differently'):
      read_back.compare(one, other, None, META)


# ---------------------------------------------------------------------------------------- what lies beside


def test_licences_go_along_and_a_notice_says_where_weights_came_from(tmp_path):
  source = a_copy(tmp_path)
  (source / 'LICENSE').write_text('the terms')
  (source / 'USE_POLICY.md').write_text('the policy')
  convert(source, tmp_path / 'ours', 'orbax')
  assert (tmp_path / 'ours' / 'LICENSE').read_text() == 'the terms'
  assert (tmp_path / 'ours' / 'USE_POLICY.md').read_text() == 'the policy'
  text = (tmp_path / 'ours' / 'NOTICE.txt').read_text()
  for part in ("Hugging Face's Chameleon form", 'preprocessor_config.json', 'chameleon_jax 0.', 'Chameleon Research License'):
    assert part in text
  convert(source, tmp_path / 'again', 'orbax')
  assert (tmp_path / 'again' / 'NOTICE.txt').read_text() == text, 'the same source gives the same notice'
  convert(tmp_path / 'ours', tmp_path / 'back', 'huggingface')
  assert (tmp_path / 'back' / 'NOTICE.txt').read_text() == text, 'the same origin is told once'
  assert (tmp_path / 'back' / 'LICENSE').read_text() == 'the terms'


def test_a_notice_of_the_source_goes_on(tmp_path):
  source = a_copy(tmp_path, MODELS / 'anole_like')
  (source / 'NOTICE.txt').write_text('Weights by somebody.\n')
  convert(source, tmp_path / 'ours', 'orbax')
  assert (tmp_path / 'ours' / 'NOTICE.txt').read_text().startswith('Weights by somebody.\n\nThe weights in this folder were converted')


def test_our_own_weights_need_no_notice(tiny_model_folder, tmp_path):
  convert(tiny_model_folder, tmp_path / 'copy', 'orbax')
  assert not (tmp_path / 'copy' / 'NOTICE.txt').exists()


def test_the_notice_names_files_of_the_source_and_none_of_ours():
  with open_checkpoint(META) as model:
    text = notice(model)
    assert 'params.json' in text and 'vqgan.yaml' in text and '.tree.json' not in text
    assert notice(dataclasses.replace(model, origin=Origin())) is None


# -------------------------------------------------------------------------------------------- interruption

SLOW = """
import pathlib, signal, sys, time
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # a suite under nohup hands on that they are ignored
  signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
from chameleon_jax.interop import convert
seen = []
def slowly(progress):
  seen.append(progress)
  if progress.phase == sys.argv[3] and progress.tensors == 20:
    print('under way', flush=True)
    time.sleep(60)
convert.convert(sys.argv[1], sys.argv[2], sys.argv[4], overwrite=True, on_progress=slowly)
"""


def interrupted(target, number, *, phase='writing', target_format='orbax'):
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
  process = subprocess.Popen(
      [sys.executable, '-c', SLOW, str(META), str(target), phase, target_format], stdout=subprocess.PIPE, text=True, env=environment
  )
  assert process.stdout.readline() == 'under way\n'
  beside = names(target.parent)
  process.send_signal(number)
  return process, process.wait(60), beside


@pytest.mark.parametrize(
    ('number', 'phase', 'target_format'),
    [
        (signal.SIGTERM, 'writing', 'orbax'),
        (signal.SIGINT, 'verifying', 'orbax'),
        (signal.SIGTERM, 'writing', 'meta'),
        (signal.SIGTERM, 'writing', 'huggingface'),
    ],
)
def test_an_interrupted_conversion_leaves_nothing(tmp_path, number, phase, target_format):
  target = tmp_path / 'a' / 'target'
  target.parent.mkdir()
  process, code, beside = interrupted(target, number, phase=phase, target_format=target_format)
  assert code == (143 if number == signal.SIGTERM else -signal.SIGINT)
  assert beside == [f'.target.writing-{process.pid}'], 'it was killed mid-way'
  assert names(tmp_path / 'a') == []


def test_a_conversion_killed_outright_is_cleared_by_the_next(tmp_path):
  target = tmp_path / 'target'
  convert(PORT, target, 'orbax')
  process, code, _ = interrupted(target, signal.SIGKILL)
  assert code == -signal.SIGKILL
  assert names(tmp_path) == [f'.target.writing-{process.pid}', 'target']
  assert_same(PORT, target)
  convert(META, target, 'orbax', overwrite=True)
  assert names(tmp_path) == ['target']
  assert_same(META, target)


# -------------------------------------------------------------------------------------------------- memory

BIG = """
import pathlib, shutil, sys
import numpy as np
from chameleon_jax.config import TransformerConfig
from chameleon_jax.interop import convert as converter
from chameleon_jax.interop.lazy import LazyModel, TensorSource, TensorSpec
from chameleon_jax.interop.mapping import transformer_specs
from chameleon_jax.interop.opening import open_checkpoint

def memory(key):
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

folder, *formats = pathlib.Path(sys.argv[1]), *sys.argv[2:]
config = TransformerConfig(vocab_size=8192, d_model=2048, n_layers=10, n_heads=16, n_kv_heads=16, d_head=128, d_ff=8192, scan_layers=False)
specs = {name: TensorSpec(shape, np.dtype(np.float32)) for name, shape in transformer_specs(config).items()}
zeros = TensorSource(specs, lambda name: np.zeros(specs[name].shape, np.float32))
model = LazyModel(path='zeros', format='orbax', transformer_config=config, transformer=zeros)
(folder / 'first').mkdir()
converter._writer(formats[0], n_shards=None, dtype=None, decoder=None)(folder / 'first', model)
source = folder / 'first'
with open_checkpoint(source) as model:  # everything that is loaded once
  model.transformer.read('final_norm/weight')
largest = max(spec.nbytes for spec in specs.values())
for target_format in formats[1:]:
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak is counted from here
  before = memory('VmRSS')
  report = converter.convert(source, folder / target_format, target_format)
  print(target_format, report.n_bytes, largest, memory('VmHWM') - before)
  shutil.rmtree(source)
  source = folder / target_format
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path('/proc/self/clear_refs').exists(), reason='the peak of memory is read from Linux')
def test_memory_stays_near_the_largest_tensor(tmp_path):
  """Every format is read and written: the target is read back for comparison."""
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
  try:
    command = [sys.executable, '-c', BIG, str(tmp_path), 'meta', 'orbax', 'huggingface']
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
  finally:
    shutil.rmtree(tmp_path)
  lines = [line.split() for line in run.stdout.splitlines()]
  assert [line[0] for line in lines] == ['orbax', 'huggingface']
  for name, *numbers in lines:
    n_bytes, largest, peak = map(int, numbers)
    assert n_bytes > 2.5 * 2**30
    assert peak < 3 * largest + 2**30, f'{name}: {peak / 2**20:.0f} MiB'
