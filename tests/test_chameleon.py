"""The object a user holds: pictures to codes and back, documents in and out, and what it says when a part is missing."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

import chameleon_jax as cj
from chameleon_jax.config import MeshConfig
from chameleon_jax.errors import CheckpointError, ConfigError, ImageError
from chameleon_jax.interop.native import ModelParts, save_model
from chameleon_jax.interop.opening import check_quantization
from chameleon_jax.models.transformer.model import Transformer, dequantize_params
from chameleon_jax.models.vqgan.model import VQGAN, to_pixels
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.sampling.scoring import Scorer
from chameleon_jax.tokens import images

GOLDEN = pathlib.Path(__file__).parent / 'golden'
MODELS = GOLDEN / 'models'

GREEDY = cj.SamplingOptions(
    greedy=True, image_greedy=True, guidance_text=1.0, guidance_image=1.0, repetition_penalty=1.0, max_new_tokens=20
)


@pytest.fixture(scope='module')
def model(tiny_model_folder):
  return cj.load(tiny_model_folder)


@pytest.fixture(scope='module')
def pictures():
  return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def test_codes_are_those_of_the_network_in_row_major_order(model, pictures):
  codes = model.encode_images(pictures)
  network = VQGAN(model.parts.vqgan_config)
  grid, _ = network.apply({'params': model.parts.vqgan_params}, images.to_float(pictures[1:2]), method='encode')
  assert codes.shape == (3, 16) and codes.dtype == np.int32
  for row, column in [(0, 0), (0, 3), (2, 1)]:
    assert codes[1, 4 * row + column] == grid[0, row, column]


def test_a_batch_gives_what_its_rows_give_alone(model, pictures):
  codes = model.encode_images(pictures)
  np.testing.assert_array_equal(codes, np.concatenate([model.encode_images(pictures[i : i + 1]) for i in range(3)]))
  decoded = model.decode_codes(codes)
  assert decoded.shape == (3, 16, 16, 3) and decoded.dtype == np.uint8
  assert np.abs(decoded[2].astype(int) - model.decode_codes(codes[2:])[0]).max() <= 1


def test_other_sizes_are_resized_and_cropped(model):
  wide = np.zeros((16, 48, 3), np.uint8)
  wide[:, 16:32] = 255
  np.testing.assert_array_equal(model.encode_images(wide[None]), model.encode_images(np.full((1, 16, 16, 3), 255, np.uint8)))


def test_logits_are_raw_and_of_every_position(model):
  tokens = np.array([[0, 40, 41, 7]], np.int32)
  expected, _ = Transformer(model.parts.transformer_config).apply({'params': model.parts.transformer_params}, tokens)
  logits = model.logits(tokens)
  assert logits.shape == (1, 4, 340) and logits.dtype == np.float32
  np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_generate_returns_only_what_was_written_with_pictures_decoded(model):
  prompt = cj.Document.chat('draw a red apple')
  options = dataclasses.replace(GREEDY, modalities='image')
  (answer,) = model.generate([prompt], options)
  (tokens,) = model.generate_tokens([model.prompt_tokens(prompt)], options)
  assert tokens.shape == (16,) and model.vocabulary.is_image[tokens].all()
  (picture,) = answer.pictures
  np.testing.assert_array_equal(picture.pixels, model.decode_codes(model.vocabulary.tokens_to_codes(tokens)[None])[0])
  assert model.generate([], options) == []


def test_a_part_that_is_missing_is_named_by_the_call_that_needs_it(model):
  only_images = cj.Chameleon(ModelParts(vqgan_config=model.parts.vqgan_config, vqgan_params=model.parts.vqgan_params), name='half')
  assert only_images.encode_images(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 16)
  with pytest.raises(CheckpointError, match='half holds no text tokenizer'):
    only_images.generate([cj.Document.chat('draw')])
  with pytest.raises(CheckpointError, match='half holds no transformer'):
    only_images.logits(np.zeros((1, 2), np.int32))
  only_text = cj.Chameleon(ModelParts(), name='empty')
  with pytest.raises(CheckpointError, match='empty holds no vocabulary'):
    only_text.vocabulary  # noqa: B018  (the property raises)
  with pytest.raises(CheckpointError, match='empty holds no image tokenizer'):
    only_text.decode_codes(np.zeros((1, 16), np.int32))


def test_a_partial_picture_is_refused_by_its_length(model):
  with pytest.raises(ImageError, match=r'has 16 codes, got an array of shape \[1, 9\]'):
    model.decode_codes(np.zeros((1, 9), np.int32))


def test_public_names_load_on_first_use():
  assert cj.Text('a').text == 'a'
  assert not hasattr(cj, 'nothing_of_that_name')
  assert set(cj.__all__) <= {*dir(cj), *cj._HOMES}


def test_the_network_and_the_host_see_the_same_pixels():
  levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)[None, None]
  np.testing.assert_array_equal(to_pixels(levels[0]), images.to_float(levels[0]))


# ------------------------------------------------------------------------------------ weights of other people


def test_the_settings_and_the_words_are_those_of_the_files():
  with pytest.warns(UserWarning, match='image output is suppressed'):
    model = cj.load(MODELS / 'meta_30b_like')
  assert len(model.notes) == 1 and 'noimggen' in model.notes[0]
  assert model.config.norm_position == 'post' and not model.config.scan_layers
  assert model.vocabulary.names == model.parts.text_tokenizer.names
  logits = model.logits(np.array([[0, 40, 41]], np.int32))
  assert logits.shape == (1, 3, model.config.vocab_size) and logits.dtype == np.float32
  codes = model.encode_images(np.zeros((2, 20, 31, 3), np.uint8))
  assert codes.shape == (2, model.n_image_tokens) and codes.dtype == np.int32
  assert model.decode_codes(codes).shape == (2, *2 * (model.parts.vqgan_config.resolution,), 3)


@pytest.mark.filterwarnings('ignore:.*image tokenizer')
def test_without_a_picture_decoder_only_drawing_fails():
  model = cj.load(MODELS / 'hf_7b_like')
  codes = model.encode_images(np.zeros((1, 20, 20, 3), np.uint8))
  with pytest.raises(CheckpointError, match='holds no picture decoder'):
    model.decode_codes(codes)
  with pytest.raises(CheckpointError, match='holds no picture decoder'):
    model.generate([cj.Document.chat('draw')], dataclasses.replace(GREEDY, modalities='image'))
  (answer,) = model.generate([cj.Document.chat('say')], dataclasses.replace(GREEDY, modalities='text', max_new_tokens=3))
  assert not answer.pictures
  picture = cj.Document.chat(cj.Image(np.zeros((20, 20, 3), np.uint8)), 'what is this?')
  assert len(model.generate([picture], dataclasses.replace(GREEDY, modalities='text', max_new_tokens=3))) == 1


@pytest.mark.filterwarnings('ignore:.*image tokenizer')
def test_without_an_image_tokenizer_text_is_written():
  model = cj.load(MODELS / 'lumina_like')
  (answer,) = model.generate([cj.Document.chat('say')], dataclasses.replace(GREEDY, modalities='text', max_new_tokens=3))
  assert isinstance(answer, cj.Document)
  for call in (
      lambda: model.generate([cj.Document.chat('draw')], GREEDY),
      lambda: model.generate_tokens([[0, 5]], dataclasses.replace(GREEDY, modalities='image')),
      lambda: model.encode_images(np.zeros((1, 8, 8, 3), np.uint8)),
      lambda: model.encode_images(np.zeros((1, 8, 8, 3), np.uint8), convention='huggingface'),
  ):
    with pytest.raises(CheckpointError, match='holds no image tokenizer'):
      call()
  whole = cj.load(MODELS / 'lumina_like', tokenizer=GOLDEN / 'tokenizer')
  assert whole.decode_codes(whole.encode_images(np.zeros((1, 8, 8, 3), np.uint8))).dtype == np.uint8


def test_both_conventions_of_pictures(model):
  picture = np.random.default_rng(1).integers(0, 256, (1, 23, 41, 3), dtype=np.uint8)
  network = VQGAN(model.parts.vqgan_config)
  found = {}
  for convention in ('meta', 'huggingface'):
    fitted = images.preprocess(picture[0], 16, convention=convention)
    pixels = images.to_float(fitted[None], convention=convention)
    expected, _ = network.apply({'params': model.parts.vqgan_params}, pixels, method='encode')
    found[convention] = model.encode_images(picture, convention=convention)
    assert found[convention].dtype == np.int32
    np.testing.assert_array_equal(found[convention], np.asarray(expected).reshape(1, -1))
  np.testing.assert_array_equal(model.encode_images(picture), found['meta'])
  assert model.encode_images(picture[:0], convention='huggingface').shape == (0, 16)


def test_the_type_of_computation_can_be_chosen(tiny_model_folder, model):
  half = cj.load(tiny_model_folder, dtype='bfloat16')
  assert {leaf.dtype.name for leaf in jax.tree.leaves(half.parts.transformer_params)} == {'bfloat16'}
  assert {leaf.dtype.name for leaf in jax.tree.leaves(half.parts.vqgan_params)} == {'float32'}
  tokens = np.array([[0, 40, 41, 7]], np.int32)
  difference = np.abs(half.logits(tokens) - model.logits(tokens)).max()
  assert half.config.dtype == 'bfloat16' and 0 < difference < 0.1


@pytest.fixture(scope='module')
def int8_model(tiny_model_folder):
  return cj.load(tiny_model_folder, quantization='int8')


def test_int8_weights_write_what_the_weights_they_stand_for_write(model, int8_model):
  parts = dataclasses.replace(int8_model.parts, transformer_params=dequantize_params(int8_model.parts.transformer_params))
  prompts, options = [cj.Document.chat('draw a red apple')], dataclasses.replace(GREEDY, modalities='text', max_new_tokens=8)
  written, expected = (m.generate(prompts, options) for m in (int8_model, cj.Chameleon(parts)))
  assert [d.turns for d in written] == [d.turns for d in expected] and written[0].turns
  scores = [m.score(prompts[:1], ['red'])[0].log_likelihood for m in (int8_model, cj.Chameleon(parts), model)]
  assert scores[0] == pytest.approx(scores[1], rel=1e-4) and scores[0] == pytest.approx(scores[2], rel=0.05) and scores[0] != scores[2]
  size, whole = (sum(leaf.nbytes for leaf in jax.tree.leaves(m.parts.transformer_params)) for m in (int8_model, model))
  assert size < 0.35 * whole  # of a tiny network, whose norms and scales count for something


def test_int8_weights_on_a_mesh_are_those_of_one_device(tiny_model_folder, int8_model):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  spread = cj.load(tiny_model_folder, mesh=mesh, quantization='int8')
  kernels = [m.parts.transformer_params['layers_0']['attention']['q_proj'] for m in (spread, int8_model)]
  np.testing.assert_array_equal(kernels[0].values, kernels[1].values)
  assert kernels[0].values.sharding.spec[:2] == ('fsdp', 'tensor') and kernels[0].scale.sharding.spec[0] == 'tensor'
  placed = Scorer(int8_model.config, int8_model.parts.transformer_params, int8_model.vocabulary, mesh=mesh)
  lies = [jax.tree.map(lambda leaf: leaf.sharding, params) for params in (placed.params, spread.parts.transformer_params)]
  assert lies[0] == lies[1]
  prompt, options = [np.array([0, 40, 41])], dataclasses.replace(GREEDY, modalities='text', max_new_tokens=4)
  np.testing.assert_array_equal(spread.generate_tokens(prompt, options), int8_model.generate_tokens(prompt, options))


def test_the_cache_can_be_kept_in_int8(tiny_model_folder, model):
  small = cj.load(tiny_model_folder, cache_dtype='int8')
  assert {leaf.dtype.name for leaf in jax.tree.leaves(small.engine()._functions.make_cache(1, 2))} == {'int8', 'float32'}
  prompts, options = [cj.Document.chat('draw a red apple')], dataclasses.replace(GREEDY, modalities='text', max_new_tokens=8)
  assert small.generate(prompts, options)[0].turns
  scores = [each.score(prompts, ['red'])[0].log_likelihood for each in (small, model)]
  assert scores[0] == scores[1]  # scoring keeps no keys


def test_quantized_weights_are_not_saved_and_others_are_unknown(int8_model, tmp_path):
  with pytest.raises(CheckpointError, match='these are quantized; load them without quantization'):
    save_model(tmp_path / 'model', int8_model.parts)
  assert not (tmp_path / 'model').exists()
  with pytest.raises(ConfigError, match="quantization 'int4' is not known; 'int8' stores"):
    check_quantization('int4')  # what `load` asks first


def test_a_mesh_of_devices_gives_the_same(tiny_model_folder, model, pictures):
  spread = cj.load(tiny_model_folder, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
  leaf = spread.parts.transformer_params['layers_0']['feed_forward']['gate_proj']
  assert leaf.addressable_shards[0].data.size == leaf.size // 4 and len(leaf.sharding.device_set) == 8
  tokens = np.array([[0, 40, 41, 7], [0, 90, 5, 6]], np.int32)
  np.testing.assert_allclose(spread.logits(tokens), model.logits(tokens), atol=1e-5)
  np.testing.assert_array_equal(spread.encode_images(pictures), model.encode_images(pictures))
  options = dataclasses.replace(GREEDY, modalities='image')
  for ours, theirs in zip(spread.generate_tokens([[0, 90], [0]], options), model.generate_tokens([[0, 90], [0]], options)):
    np.testing.assert_array_equal(ours, theirs)
