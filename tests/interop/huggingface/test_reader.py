"""Hugging Face checkpoints: equal outputs, equal bytes after the way back, and one line for everything that does not fit."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import mapping
from chameleon_jax.interop.huggingface import config as huggingface_config
from chameleon_jax.interop.huggingface.reader import is_huggingface, open_huggingface, write_huggingface
from chameleon_jax.models.vqgan.model import VQGAN
from chameleon_jax.tokens.text import train_text_tokenizer
from chameleon_jax.tokens.text_export import export_json
from chameleon_jax.tokens.vocabulary import Vocabulary
from tests.interop.tiny_huggingface import (
  BFLOAT16,
  CONFIG,
  TRANSFORMER,
  VOCABULARY,
  VQ,
  assert_same_tensors,
  load_with_transformers,
  names_of_tokens,
  our_logits,
  tensors_of,
  their_tensors,
  tree,
  write_folder,
)


@pytest.fixture(scope='module')
def text():
  return train_text_tokenizer(['draw a red apple', 'a green pear'] * 20, n_pieces=290, character_coverage=1.0, seed=0)


def refused(folder, message):
  with pytest.raises(CheckpointError) as caught, open_huggingface(folder):
    pass
  text = str(caught.value)
  assert message in text and '\n' not in text and str(folder) in text, text


# Against transformers.


@pytest.fixture(scope='module', params=[False, True], ids=['pre', 'post'])
def theirs(request, tmp_path_factory):
  """(a transformers model with random parameters, the folder it was saved in)."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  values = {name: value for name, value in CONFIG.items() if name not in ('torch_dtype', 'rope_theta', 'architectures', 'model_type')}
  config = transformers.ChameleonConfig(**values | {'swin_norm': request.param, 'vocabulary_map': names_of_tokens()})
  model = transformers.ChameleonForConditionalGeneration(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      center = 1 if 'norm' in name and name.endswith('weight') else 0
      parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
  folder = tmp_path_factory.mktemp('theirs')
  model.save_pretrained(folder)
  return model, folder


def test_logits_are_those_of_transformers(theirs):
  import torch

  model, folder = theirs
  tokens = np.random.default_rng(0).integers(0, VOCABULARY.size, (2, 19))
  with torch.no_grad():
    expected = model(torch.tensor(tokens)).logits.numpy()
  with open_huggingface(folder) as opened:
    assert opened.transformer_config.norm_position == ('post' if model.config.swin_norm else 'pre')
    found = our_logits(opened, tokens)
  images = Vocabulary(VOCABULARY).is_image
  assert (expected[..., images] < -1e30).all(), 'they bar image tokens'
  assert expected[..., ~images].std() > 0.3
  np.testing.assert_allclose(found[..., ~images], expected[..., ~images], rtol=0, atol=2e-4)


def test_codes_are_those_of_transformers(theirs):
  import torch

  model, folder = theirs
  pixels = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype('f4')
  with torch.no_grad():
    expected = model.model.vqmodel.encode(torch.tensor(pixels.transpose(0, 3, 1, 2)), return_dict=True).image_tokens.numpy()
  with open_huggingface(folder) as opened:
    assert opened.vqgan_config == VQ
    codes, _ = VQGAN(VQ).apply({'params': tree(opened.vqgan)}, jnp.asarray(pixels), method='encode')
  assert len(set(expected.reshape(-1).tolist())) > 5
  np.testing.assert_array_equal(np.asarray(codes).reshape(-1), expected.reshape(-1))


def test_the_way_back_is_bitwise_and_opens_in_transformers(theirs, tmp_path):
  _, folder = theirs
  with open_huggingface(folder) as opened:
    assert opened.vocabulary == VOCABULARY
    assert write_huggingface(tmp_path, opened) == ()
  assert_same_tensors(tensors_of(tmp_path), tensors_of(folder))
  for name in ('config.json', 'generation_config.json'):
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
  assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
  load_with_transformers(tmp_path)


# Forms of the family, without transformers.


@pytest.mark.parametrize('max_shard_bytes', [10**9, 20_000])
def test_mixed_types_extras_and_shards_come_back_bitwise(tmp_path, max_shard_bytes):
  tensors = their_tensors(BFLOAT16)
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.arange(4, dtype='f4')
  tensors['model.vqmodel.loss.logvar'] = np.zeros((), 'f4')
  tensors['model.vqmodel.quantize.counts'] = np.arange(16)
  folder = write_folder(tmp_path / 'a', tensors, max_shard_bytes=max_shard_bytes)
  (folder / 'preprocessor_config.json').write_text('{"size": {"shortest_edge": 16}}')
  (tmp_path / 'b').mkdir()
  with open_huggingface(folder) as opened:
    assert opened.transformer_config.param_dtype == opened.transformer_config.dtype == 'bfloat16'
    assert list(opened.transformer.specs) == list(mapping.transformer_specs(TRANSFORMER))
    assert set(opened.vqgan.specs) == set(mapping.vqgan_specs(VQ, decoder=False))
    for source in (opened.transformer, opened.vqgan):
      for name, spec in source.specs.items():
        assert source.read(name).shape == spec.shape and source.read(name).dtype == spec.dtype
    assert len(opened.origin.extras.specs) == 3 and set(opened.origin.files) == {'config.json', 'preprocessor_config.json'}
    assert any('no decoder' in note for note in opened.notes)
    write_huggingface(tmp_path / 'b', opened)
  assert_same_tensors(tensors_of(tmp_path / 'b'), tensors)
  assert (tmp_path / 'b' / 'preprocessor_config.json').read_text() == '{"size": {"shortest_edge": 16}}'


def test_anole_has_a_decoder_and_keeps_it(tmp_path):
  tensors = their_tensors(decoder=True)
  folder = write_folder(tmp_path / 'a', tensors)
  with open_huggingface(folder) as opened:
    assert set(opened.vqgan.specs) == set(mapping.vqgan_specs(VQ))
    np.testing.assert_array_equal(
        opened.vqgan.read('decoder/conv_out/kernel'), tensors['model.vqmodel.decoder.conv_out.weight'].transpose(2, 3, 1, 0)
    )
    for name, decoder in (('b', None), ('c', False)):
      (tmp_path / name).mkdir()
      notes = write_huggingface(tmp_path / name, opened, decoder=decoder)
      kept = {key: value for key, value in tensors.items() if decoder is None or '.decoder.' not in key}
      assert_same_tensors(tensors_of(tmp_path / name), kept)
      assert bool(notes and 'decoder was left out' in notes[0]) == (decoder is False)
  folder = write_folder(folder, {name: value for name, value in tensors.items() if name != 'model.vqmodel.decoder.norm_out.bias'})
  refused(folder, 'lacks the tensor model.vqmodel.decoder.norm_out.bias')


@pytest.mark.parametrize('rows', [1, 2])
def test_lumina_has_norms_by_group_and_no_image_tokenizer(tmp_path, rows):
  tensors = {name: value for name, value in their_tensors(norm_rows=rows).items() if 'vqmodel' not in name}
  config = CONFIG | {'architectures': ['ChameleonXLLMXForConditionalGeneration'], 'model_parallel_size': rows}
  folder = write_folder(tmp_path / 'a', tensors, config)
  assert is_huggingface(folder)
  (tmp_path / 'b').mkdir()
  with open_huggingface(folder) as opened:
    assert opened.vqgan is None and opened.vqgan_config is None
    write_huggingface(tmp_path / 'b', opened)
    for kind, heads in (('q', 4), ('k', 2)):
      stored = tensors[f'model.layers.1.self_attn.{kind}_norm.bias']
      found = opened.transformer.read(f'layers_1/attention/{kind}_norm/bias')
      for head in range(heads):
        np.testing.assert_array_equal(found[head], stored[head // (heads // rows)])
  written = tensors_of(tmp_path / 'b')
  assert set(written) == set(tensors)
  assert written['model.layers.0.self_attn.q_norm.weight'].shape == (4, 8), 'the mainline form'
  assert json.loads((tmp_path / 'b' / 'config.json').read_text())['architectures'] == ['ChameleonForConditionalGeneration']


@pytest.mark.parametrize('sharded', [False, True])
def test_torch_files_of_older_checkpoints(tmp_path, sharded):
  torch = pytest.importorskip('torch')
  tensors = their_tensors()
  parts = [{}, {}]
  for i, (name, value) in enumerate(tensors.items()):
    parts[i % 2 if sharded else 0][name] = torch.tensor(value)
  files = ['pytorch_model-00001-of-00002.bin', 'pytorch_model-00002-of-00002.bin'] if sharded else ['pytorch_model.bin']
  for file, part in zip(files, parts):
    torch.save(part, tmp_path / file)
  if sharded:
    weight_map = {name: file for file, part in zip(files, parts) for name in part}
    (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  assert is_huggingface(tmp_path)
  (tmp_path / 'b').mkdir()
  with open_huggingface(tmp_path) as opened:
    write_huggingface(tmp_path / 'b', opened)
  assert_same_tensors(tensors_of(tmp_path / 'b'), tensors)


# What is recognised.


def test_what_is_a_checkpoint_of_this_family(tmp_path):
  folder = write_folder(tmp_path / 'a', {'x': np.zeros(1, 'f4')})
  assert is_huggingface(folder)
  for config, expected in (
      ({'model_type': 'chameleon'}, True),
      ({'architectures': ['ChameleonForCausalLM']}, True),
      ({'model_type': 'llama', 'architectures': ['LlamaForCausalLM']}, False),
      ({'architectures': 'Chameleon'}, False),
      ({'format': 'chameleon_jax', 'version': 2, 'model_type': 'chameleon'}, False),
      ([], False),
  ):
    (folder / 'config.json').write_text(json.dumps(config))
    assert is_huggingface(folder) == expected, config
  (folder / 'config.json').write_text('{')
  assert not is_huggingface(folder)
  (folder / 'config.json').write_text(json.dumps(CONFIG))
  (folder / 'model.safetensors').unlink()
  assert not is_huggingface(folder) and not is_huggingface(tmp_path) and not is_huggingface(tmp_path / 'absent')


def test_tensors_that_do_not_fit(tmp_path):
  tensors = their_tensors()

  def with_tensors(changes, config=CONFIG):
    found = {name: value for name, value in (tensors | changes).items() if value is not None}
    return write_folder(tmp_path / 'a', found, config)

  refused(with_tensors({'lm_head.weight': None}), 'lacks the tensor lm_head.weight')
  refused(with_tensors({'model.layers.1.self_attn.k_norm.bias': None}), 'lacks the tensor model.layers.1.self_attn.k_norm.bias')
  refused(with_tensors({'model.vqmodel.quant_conv.bias': None}), 'lacks the tensor model.vqmodel.quant_conv.bias')
  refused(with_tensors({'model.layers.1.mlp.up_proj.bias': np.zeros(4, 'f4')}), "unknown tensor 'model.layers.1.mlp.up_proj.bias'")
  refused(with_tensors({'model.norm.weight': np.zeros(33, 'f4')}), 'model.norm.weight has shape [33], config.json asks for [32]')
  refused(with_tensors({'model.layers.0.self_attn.q_norm.weight': np.zeros((3, 8), 'f4')}), 'has shape [3, 8], config.json asks for [4, 8]')
  refused(with_tensors({'model.layers.0.self_attn.q_norm.weight': np.zeros((0, 8), 'f4')}), 'has shape [0, 8]')
  refused(with_tensors({'model.layers.0.self_attn.q_norm.weight': np.zeros((2, 4), 'f4')}), 'has shape [2, 4]')
  refused(with_tensors({'lm_head.weight': np.zeros((VOCABULARY.size, 32), 'i1')}), 'quantised checkpoints are not read')
  refused(with_tensors({}, CONFIG | {'num_hidden_layers': 3}), 'says num_hidden_layers 3, the files hold 2 layers')
  refused(with_tensors({}, CONFIG | {'num_hidden_layers': 1 << 24}), 'the files hold 2 layers')
  refused(with_tensors({}, CONFIG | {'hidden_size': 64}), 'config.json asks for')
  for vq, message in (
      ({'channel_multiplier': [1, 2, 2]}, 'says 3 levels of 1 blocks, the files hold 2 levels of 1'),
      ({'num_res_blocks': 1 << 24}, 'the files hold 2 levels of 1'),
      ({'num_embeddings': 17}, 'model.vqmodel.quantize.embedding.weight has shape [16, 8], config.json asks for [17, 8]'),
      ({'base_channels': 1 << 23}, 'encoder.conv_in.weight has shape [32, 3, 3, 3]'),
      ({'channel_multiplier': [2, 2]}, 'config.json asks for'),
      ({'channel_multiplier': [1, 1 << 23]}, 'encoder.conv_out.weight has shape'),
  ):
    refused(with_tensors({}, CONFIG | {'vq_config': CONFIG['vq_config'] | vq}), message)
  (with_tensors({}) / 'config.json').unlink()
  refused(tmp_path / 'a', 'config.json cannot be read: No such file')


def test_damaged_files_are_told_or_seen(tmp_path):
  """Bit flips anywhere in the weights or in config.json: a CheckpointError, or the same model with another value somewhere."""
  folder = write_folder(tmp_path, their_tensors())
  with open_huggingface(folder) as opened:
    expected = {**opened.transformer.specs, **opened.vqgan.specs}
  rng = np.random.default_rng(0)
  counts = {'refused': 0, 'opened': 0}
  for name, n, upto in (('model.safetensors', 150, 9000), ('config.json', 250, 10**9)):
    whole = (folder / name).read_bytes()
    for i in range(n):
      at = int(rng.integers(min(upto, len(whole))))
      flipped = whole[:at] + bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1 :]
      (folder / name).write_bytes(flipped if i % 5 else whole[:at])
      try:
        with open_huggingface(folder) as opened:
          assert {**opened.transformer.specs, **(opened.vqgan.specs if opened.vqgan else {})} == expected
        counts['opened'] += 1
      except CheckpointError as error:
        assert '\n' not in str(error)
        counts['refused'] += 1
    (folder / name).write_bytes(whole)
  assert counts['refused'] > 150 and counts['opened'] > 20, counts


# Vocabulary.


def test_the_vocabulary_comes_from_the_tokenizer_or_the_map(tmp_path, text):
  tensors = their_tensors()
  folder = write_folder(tmp_path, tensors)
  with open_huggingface(folder) as opened:
    assert opened.vocabulary is None and opened.text_tokenizer is None
    assert any('no tokenizer and no vocabulary_map' in note for note in opened.notes)
  write_folder(tmp_path, tensors, CONFIG | {'vocabulary_map': names_of_tokens()})
  with open_huggingface(folder) as opened:
    assert opened.vocabulary == VOCABULARY and opened.text_tokenizer is None
  data = export_json(text, VOCABULARY, form='huggingface')
  (folder / 'tokenizer.json').write_bytes(data)
  names = huggingface_config.names_of_tokenizer(data)
  assert names['<image>'] == Vocabulary(VOCABULARY).end_turn + 1
  refused(folder, "vocabulary_map in config.json gives 't24' the id 24, tokenizer.json has no such token")
  write_folder(tmp_path, tensors, CONFIG | {'vocabulary_map': names})
  with open_huggingface(folder) as opened:
    assert opened.vocabulary == VOCABULARY
    assert opened.text_tokenizer.encode('a red apple') == text.encode('a red apple')
    (tmp_path / 'b').mkdir()
    assert write_huggingface(tmp_path / 'b', opened) == ()
  assert (tmp_path / 'b' / 'config.json').read_bytes() == (folder / 'config.json').read_bytes()
  assert json.loads((tmp_path / 'b' / 'tokenizer.json').read_bytes()) == json.loads(data)
  swapped = names | {'IMGIMGAZ': names['IMGIMGBZ'], 'IMGIMGBZ': names['IMGIMGAZ']}
  write_folder(tmp_path, tensors, CONFIG | {'vocabulary_map': swapped})
  refused(folder, "gives 'IMGIMGAZ' the id 5, tokenizer.json has it at 4")
  (folder / 'tokenizer.json').write_bytes(export_json(text, dataclasses.replace(VOCABULARY, size=VOCABULARY.size + 1), form='huggingface'))
  write_folder(tmp_path, tensors)
  refused(folder, f'the tokenizer has {VOCABULARY.size + 1} tokens, the network {VOCABULARY.size}')


def test_maps_that_are_no_vocabulary(tmp_path):
  names = names_of_tokens()
  tensors = their_tensors()
  for changes, message in (
      ({'t24': 25}, "the same id 25"),
      ({'t24': 10**6}, 'an id from 0 to'),
      ({'t24': -1}, 'an id from 0 to'),
      ({'t24': '24'}, 'an id from 0 to'),
      ({'t24': True}, 'an id from 0 to'),
  ):
    refused(write_folder(tmp_path, tensors, CONFIG | {'vocabulary_map': names | changes}), message)
  refused(write_folder(tmp_path, tensors, CONFIG | {'vocabulary_map': [1]}), 'vocabulary_map must give every name an id')
  for changes, message in (
      ({'IMGIMGAZ': 5, 'IMGIMGBZ': 4}, "has 'IMGIMGBZ' at id 4, the release 'IMGIMGAZ'"),
      ({'<s>': 1, '<pad>': 0}, "has '<pad>' at id 0, the release '<s>'"),
      ({'IMGIMGXZ': 4, 'IMGIMGAZ': None}, 'spells no code'),
      ({'<eoss>': None}, 'missing'),
  ):
    found = {name: token for name, token in (names | changes).items() if token is not None}
    with open_huggingface(write_folder(tmp_path, tensors, CONFIG | {'vocabulary_map': found})) as opened:
      assert opened.vocabulary is None
      assert any(note.startswith('no vocabulary: ') and message in note for note in opened.notes), opened.notes
  other = dataclasses.replace(VOCABULARY, n_codes=15)
  found = {name: token for token, name in enumerate(Vocabulary(other).names)}
  refused(write_folder(tmp_path, tensors, CONFIG | {'vocabulary_map': found}), 'has 16 codes, the vocabulary 15 image tokens')
