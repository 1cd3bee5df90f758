"""Small checkpoints of the Hugging Face family, and what the tests of reading and writing them share."""

import dataclasses
import json
import logging

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import VocabularyConfig, VQGANConfig
from chameleon_jax.interop import mapping
from chameleon_jax.interop.files.safetensors_file import SafetensorsWriter, open_safetensors
from chameleon_jax.interop.lazy import LazyModel, TensorSource, TensorSpec
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.tokens.vocabulary import Vocabulary

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
VOCABULARY = VocabularyConfig(size=24 + 290, n_codes=16, n_sentinels=0, n_reserved=2)
TRANSFORMER = presets.tiny_transformer(vocab_size=VOCABULARY.size, d_ff=48, max_seq_len=64, scan_layers=False)
VQ = VQGANConfig(resolution=16, n_codes=16, d_code=8, z_channels=16, base_channels=32, channel_multipliers=(1, 2), n_res_blocks=1)
CONFIG = {
    'architectures': ['ChameleonForConditionalGeneration'],
    'model_type': 'chameleon',
    'vocab_size': VOCABULARY.size,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
    'rope_theta': 10000.0,
    'swin_norm': False,
    'torch_dtype': 'float32',
    'vq_config': {
        'embed_dim': 8,
        'num_embeddings': 16,
        'latent_channels': 16,
        'resolution': 16,
        'base_channels': 32,
        'channel_multiplier': [1, 2],
        'num_res_blocks': 1,
    },
}


def names_of_tokens():
  """As a vocabulary_map has them, with names for the text that the layout does not know."""
  vocabulary = Vocabulary(VOCABULARY)
  names = {name: i for i, name in enumerate(vocabulary.names)} | {f't{i}': i for i in range(vocabulary.text_start, vocabulary.size)}
  return {'<image>' if token == vocabulary.end_turn + 1 else name: token for name, token in names.items()}


def random_values(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {name: (0.2 * rng.normal(size=shape) + (1 if 'norm' in name else 0)).astype('f4') for name, shape in shapes.items()}


def source_of(values):
  return TensorSource({name: TensorSpec(value.shape, value.dtype) for name, value in values.items()}, values.__getitem__)


def lazy_model(**changes):
  """A model that comes from elsewhere, with everything but a text tokenizer."""
  fields = {
      'path': 'elsewhere',
      'format': 'orbax',
      'transformer_config': TRANSFORMER,
      'transformer': source_of(random_values(mapping.transformer_specs(TRANSFORMER))),
      'vqgan_config': VQ,
      'vqgan': source_of(random_values(mapping.vqgan_specs(VQ), 1)),
      'vocabulary': VOCABULARY,
  }
  return LazyModel(**(fields | changes))


def their_tensors(dtype='f4', decoder=False, norm_rows=None):
  """A checkpoint's tensors by their names, the language model in `dtype`."""
  found = {}
  for rule in mapping.rules_for(mapping.HUGGINGFACE_RULES, TRANSFORMER):
    shape = rule.shape(TRANSFORMER)
    shape = (norm_rows, shape[1]) if norm_rows and len(shape) == 2 and '_norm.' in rule.theirs else shape
    found |= {name: value.astype(dtype) for name, value in random_values({rule.theirs: shape}, len(found)).items()}
  for name, value in random_values(mapping.vqgan_specs(VQ, decoder=decoder), 1).items():
    found['model.vqmodel.' + mapping.vqgan_name(name)] = mapping.vqgan_to_theirs(name, value)
  return found


def write_folder(folder, tensors, config=CONFIG, **options):
  folder.mkdir(exist_ok=True)
  specs = {name: TensorSpec(value.shape, value.dtype) for name, value in tensors.items()}
  with SafetensorsWriter(folder, specs, **options) as writer:
    for name, value in tensors.items():
      writer.write(name, value)
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


def tensors_of(folder):
  file = open_safetensors(folder)
  return {name: file.read(name) for name in file.specs}


def assert_same_tensors(found, expected):
  assert set(found) == set(expected)
  for name, value in expected.items():
    assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
    assert found[name].tobytes() == value.tobytes(), name


def tree(source, names=None):
  nested = {}
  for name in source.specs if names is None else names:
    *parents, last = name.split('/')
    node = nested
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = jnp.asarray(source.read(name), jnp.float32)
  return nested


def our_logits(model, tokens):
  config = dataclasses.replace(model.transformer_config, dtype='float32', param_dtype='float32')
  logits, _ = Transformer(config).apply({'params': tree(model.transformer)}, jnp.asarray(tokens))
  return np.asarray(logits)


def load_with_transformers(folder):
  """The model, after a look that nothing was missing, left over or warned about."""
  transformers = pytest.importorskip('transformers')
  messages = []
  logger = transformers.utils.logging.get_logger('transformers')

  class Listener(logging.Handler):
    def emit(self, record):
      messages.append(record.getMessage())

  listener = Listener(level='WARNING')
  logger.addHandler(listener)
  try:
    model, info = transformers.ChameleonForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
  finally:
    logger.removeHandler(listener)
  assert not any(info.values()), info
  assert not messages, messages
  return model.eval()
