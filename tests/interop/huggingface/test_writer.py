"""Checkpoints written for transformers: they open there, and what the format cannot hold is refused before anything is written."""

import contextlib
import dataclasses
import json
import tracemalloc

import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import mapping
from chameleon_jax.interop.huggingface import config as huggingface_config
from chameleon_jax.interop.huggingface.reader import open_huggingface, write_huggingface
from chameleon_jax.interop.lazy import Origin, TensorSource, TensorSpec
from chameleon_jax.tokens.text import train_text_tokenizer
from chameleon_jax.tokens.vocabulary import Vocabulary
from tests.interop.tiny_huggingface import (
  BFLOAT16,
  CONFIG,
  TRANSFORMER,
  VOCABULARY,
  VQ,
  lazy_model,
  load_with_transformers,
  our_logits,
  random_values,
  source_of,
  tensors_of,
  their_tensors,
  write_folder,
)


@pytest.fixture(scope='module')
def text():
  return train_text_tokenizer(['draw a red apple', 'a green pear'] * 20, n_pieces=290, character_coverage=1.0, seed=0)


@pytest.mark.parametrize('norm_position', ['pre', 'post'])
def test_a_model_from_elsewhere_opens_in_transformers(norm_position, text, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = dataclasses.replace(TRANSFORMER, norm_position=norm_position, rope_theta=500.0, norm_eps=1e-4)
  source = lazy_model(transformer_config=config, text_tokenizer=text)
  notes = write_huggingface(tmp_path, source)
  assert len(notes) == 1 and 'decoder was left out' in notes[0]
  model = load_with_transformers(tmp_path)
  assert model.dtype == torch.float32 and model.config.image_token_id == 4 + 16 + 2 + 1
  tokens = np.random.default_rng(0).integers(0, VOCABULARY.size, (1, 11))
  with torch.no_grad():
    expected = model(torch.tensor(tokens)).logits.numpy()
  outside = ~Vocabulary(VOCABULARY).is_image
  np.testing.assert_allclose(our_logits(source, tokens)[..., outside], expected[..., outside], rtol=0, atol=2e-4)
  assert model.generation_config.bos_token_id == 0 and model.generation_config.pad_token_id == 1

  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == ('<s>', '</s>', '<pad>', '<unk>')
  pieces = [VOCABULARY.text_start + piece for piece in text.encode('a red pear')]
  assert tokenizer('a red pear').input_ids == [0, *pieces]
  assert tokenizer('<image>').input_ids == [0, model.config.image_token_id]
  assert tokenizer.convert_tokens_to_ids(tokenizer.sep_token) == Vocabulary(VOCABULARY).end_turn
  processor = json.loads((tmp_path / 'processor_config.json').read_text())
  assert processor['image_seq_length'] == VQ.n_image_tokens == 64
  with open_huggingface(tmp_path) as opened:
    for field in ('norm_position', 'rope_theta', 'norm_eps', 'd_ff', 'n_kv_heads', 'max_seq_len'):
      assert getattr(opened.transformer_config, field) == getattr(config, field)
    assert opened.vqgan_config == VQ and opened.vocabulary == VOCABULARY
    assert opened.text_tokenizer.encode('a red pear') == text.encode('a red pear')
    for name in source.transformer.specs:
      np.testing.assert_array_equal(opened.transformer.read(name), source.transformer.read(name), name)


def test_without_an_image_tokenizer_transformers_invents_one(tmp_path):
  """What the note says: no error, random numbers in its place."""
  transformers = pytest.importorskip('transformers')
  notes = write_huggingface(tmp_path, lazy_model(vqgan=None, vqgan_config=None))
  assert any('random numbers' in note for note in notes)
  values = json.loads((tmp_path / 'config.json').read_text())
  values['vq_config'] = CONFIG['vq_config']  # the default is the full size
  (tmp_path / 'config.json').write_text(json.dumps(values))
  _, info = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
  assert info['missing_keys'] and all(name.startswith('model.vqmodel.') for name in info['missing_keys'])
  assert not info['unexpected_keys']


def test_a_decoder_from_elsewhere_is_written_when_asked_for(tmp_path):
  source = lazy_model()
  write_huggingface(tmp_path, source, decoder=True)
  with open_huggingface(tmp_path) as opened:
    for name in source.vqgan.specs:
      np.testing.assert_array_equal(opened.vqgan.read(name), source.vqgan.read(name), name)


def test_types_asked_for(tmp_path):
  with open_huggingface(write_folder(tmp_path / 'a', their_tensors())) as opened:
    for name in ('bfloat16', 'float16'):
      (tmp_path / name).mkdir()
      write_huggingface(tmp_path / name, opened, dtype=name)
      found = tensors_of(tmp_path / name)
      assert {str(value.dtype) for key, value in found.items() if 'vqmodel' not in key} == {name}
      assert {str(value.dtype) for key, value in found.items() if 'vqmodel' in key} == {'float32'}
      assert json.loads((tmp_path / name / 'config.json').read_text())['torch_dtype'] == name
  large = random_values(mapping.transformer_specs(TRANSFORMER))
  large['lm_head'][0, 0] = 1e6
  (tmp_path / 'c').mkdir()
  with pytest.raises(CheckpointError, match='lm_head.weight has values that float16 cannot hold'):
    write_huggingface(tmp_path / 'c', lazy_model(transformer=source_of(large)), dtype='float16')
  assert not list((tmp_path / 'c').iterdir()), 'nothing half-written stays'
  half = {name: value.astype(BFLOAT16) for name, value in random_values(mapping.vqgan_specs(VQ)).items()}
  write_huggingface(tmp_path / 'c', lazy_model(vqgan=source_of(half)))
  assert tensors_of(tmp_path / 'c')['model.vqmodel.quant_conv.bias'].dtype == np.float32


def test_one_tensor_in_memory_at_a_time(tmp_path):
  config = presets.tiny_transformer(vocab_size=8192, d_model=128, d_head=32, d_ff=2048, n_layers=6, scan_layers=False)
  specs = {name: TensorSpec(shape, np.dtype('f4')) for name, shape in mapping.transformer_specs(config).items()}
  source = TensorSource(specs, lambda name: np.ones(specs[name].shape, 'f4'))
  model = lazy_model(transformer_config=config, transformer=source, vqgan=None, vqgan_config=None, vocabulary=None)
  mapping.rules_for(mapping.HUGGINGFACE_RULES, config)
  largest = max(spec.nbytes for spec in specs.values())
  assert sum(spec.nbytes for spec in specs.values()) > 6 * largest
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
  tracemalloc.start()
  write_huggingface(tmp_path / 'a', model)
  with open_huggingface(tmp_path / 'a') as opened:
    write_huggingface(tmp_path / 'b', opened)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2.5 * largest, 'one tensor, and the same transposed'
  assert (tmp_path / 'a' / 'model.safetensors').read_bytes() == (tmp_path / 'b' / 'model.safetensors').read_bytes()


def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path):
  def fails(message, decoder=None, dtype=None, **changes):
    with pytest.raises(CheckpointError, match=message) as caught:
      write_huggingface(tmp_path, lazy_model(**changes), decoder=decoder, dtype=dtype)
    assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())

  def transformer(**changes):
    config = dataclasses.replace(TRANSFORMER, **changes)
    return {'transformer_config': config, 'transformer': source_of(random_values(mapping.transformer_specs(config)))}

  fails('it has no transformer', transformer=None, transformer_config=None)
  fails('no q/k norms', **transformer(qk_norm=False))
  fails('qk_norm_eps is 1e-06', **transformer(qk_norm_eps=1e-6))
  fails('4 heads of 16 channels are not d_model 32', **transformer(d_head=16))
  fails('patch_size 2', vqgan_config=dataclasses.replace(VQ, patch_size=2, resolution=32))
  fails('norm_groups is 8', vqgan_config=dataclasses.replace(VQ, norm_groups=8))
  fails('has 16 codes, the vocabulary 17', vocabulary=dataclasses.replace(VOCABULARY, n_codes=17))
  fails('the type must be one of', dtype='int8')
  fails('no image tokenizer', decoder=True, vqgan=None, vqgan_config=None)
  fails('and it has none', decoder=True, vqgan=source_of(random_values(mapping.vqgan_specs(VQ, decoder=False))))
  for name in ('../evil.json', 'tokenizer.json', '/x.json'):
    fails('cannot be the name of a file', origin=Origin(format='huggingface', files={name: b'{}'}))
  fails('is not valid JSON', origin=Origin(format='huggingface', files={'config.json': b'{'}))

  def broken(name):
    raise CheckpointError(f'{name} is damaged')

  fails('is damaged', transformer=TensorSource(lazy_model().transformer.specs, broken))
  with pytest.raises(CheckpointError, match='could not be written'):
    write_huggingface(tmp_path / 'absent', lazy_model())


def test_notes_of_what_is_missing(tmp_path):
  for i, (changes, found) in enumerate((
      ({}, ['the image decoder was left out', 'there is no text tokenizer']),
      ({'vocabulary': None}, ['the image decoder was left out', 'there is no vocabulary']),
      ({'vqgan': None, 'vqgan_config': None}, ['there is no image tokenizer', 'there is no text tokenizer']),
  )):
    (tmp_path / str(i)).mkdir()
    notes = write_huggingface(tmp_path / str(i), lazy_model(**changes))
    assert len(notes) == len(found) and all(note.startswith(start) for note, start in zip(notes, found)), notes
    with contextlib.closing(open_huggingface(tmp_path / str(i))) as opened:
      assert opened.vocabulary == lazy_model(**changes).vocabulary


def test_config_json_changes_only_where_the_model_differs(tmp_path):
  base = CONFIG | {'own_field': [1, 2], 'vq_config': CONFIG['vq_config'] | {'quant_state_dims': [2, 2], 'n_embed': 16}}
  origin = Origin(format='huggingface', files={'config.json': json.dumps(base).encode()})
  write_huggingface(tmp_path, lazy_model(origin=origin, vocabulary=None))
  assert (tmp_path / 'config.json').read_bytes() == origin.files['config.json']
  write_huggingface(tmp_path, lazy_model(origin=origin))
  changed = json.loads((tmp_path / 'config.json').read_text())
  assert changed.pop('vocabulary_map')['IMGIMGAZ'] == 4 and changed == base
  config = dataclasses.replace(TRANSFORMER, rope_theta=7.0, norm_position='post')
  write_huggingface(tmp_path, lazy_model(origin=origin, transformer_config=config))
  changed = json.loads((tmp_path / 'config.json').read_text())
  assert huggingface_config.transformer_config(changed, 'c').rope_theta == 7 and changed['swin_norm'] and changed['own_field'] == [1, 2]
  assert changed['vq_config'] == base['vq_config']
