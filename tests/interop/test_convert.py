"""Converting: every format to every other, and the comparison with the source afterwards."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.errors import CheckpointError, DataError
from chameleon_jax.interop import convert as converter
from chameleon_jax.interop import read_back
from chameleon_jax.interop.convert import convert
from chameleon_jax.interop.lazy import TensorSource
from chameleon_jax.interop.opening import detect_format, open_checkpoint
from chameleon_jax.tokens.text_json import JsonText
from tests.interop.conversions import META, MODELS, PORT, assert_same, names


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
