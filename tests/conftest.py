"""Set-up of every test run: eight CPU devices, compiled programs kept between runs and barely optimised, shapes and types checked.

All of it must happen before jax starts, so nothing of the package is imported here but what says where programs are kept.
"""

import os
import pathlib
import sys
import types

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'.strip()
# XLA sizes its thread pool by this; with fewer than two threads a device, un-waited collective steps deadlock.
os.environ.setdefault('NPROC', '32')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
# Tiny programs take longer to optimise than to run. With 0 the tests run the programs that users do.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

from chameleon_jax.cli.compiled import keep_compiled_programs  # noqa: E402

keep_compiled_programs()

import beartype  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# The checker that the hook below puts on every function of the package: as PEP 484 has it, an int is a fine float.
_checker = types.ModuleType('chameleon_jax_type_checker')
_checker.check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # type: ignore[attr-defined]
sys.modules[_checker.__name__] = _checker
jaxtyping.install_import_hook('chameleon_jax', f'{_checker.__name__}.check')


@pytest.fixture
def types_unchecked():
  """For a test of many small calls, whose types other tests check: the checks take longer than the calls."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


@pytest.fixture
def optimised_programs():
  """For a test of how rounding adds up: new jitted functions are compiled as users have them."""
  import jax

  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture(scope='session')
def tiny_model_folder(tmp_path_factory) -> pathlib.Path:
  """A model folder with random weights and all parts: 16 codes a picture, a vocabulary with room for all bytes."""
  import flax.linen as nn
  import jax
  import numpy as np

  from chameleon_jax import presets
  from chameleon_jax.config import VocabularyConfig
  from chameleon_jax.interop import native
  from chameleon_jax.tokens.text import train_text_tokenizer

  def random_params(boxed):
    """Parameters of the right shapes; the networks' own initialisation would have to be compiled."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32), nn.meta.unbox(boxed))

  vocabulary = VocabularyConfig(size=34 + 4 + 2 + 300, n_codes=32, n_sentinels=0, n_reserved=2)
  transformer = presets.tiny_transformer(vocab_size=vocabulary.size, max_seq_len=64, n_layers=1)
  vqgan = presets.tiny_vqgan()
  text = train_text_tokenizer(['draw a red apple', 'a green pear'] * 20, n_pieces=vocabulary.n_text, character_coverage=1.0, seed=0)
  parts = native.ModelParts(
      transformer_config=transformer,
      transformer_params=random_params(native.abstract_transformer(transformer)),
      vqgan_config=vqgan,
      vqgan_params=random_params(native.abstract_vqgan(vqgan)),
      vocabulary=vocabulary,
      text_tokenizer=text,
  )
  path = tmp_path_factory.mktemp('model') / 'tiny'
  native.save_model(path, parts)
  return path


@pytest.fixture(scope='session')
def seen_run(tmp_path_factory):
  """A small run with all that shows its inside, of tests/training/seen_run.py: (module, its folder, batches it drew, its config)."""
  import importlib.util

  path = pathlib.Path(__file__).with_name('training') / 'seen_run.py'
  spec = importlib.util.spec_from_file_location('seen_run', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  folder = tmp_path_factory.mktemp('seen')
  batches, config = module.make(folder)
  return types.SimpleNamespace(module=module, workdir=folder / 'run', batches=batches, config=config)
