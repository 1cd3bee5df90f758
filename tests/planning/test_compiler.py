"""planning/compiler.py: the refusal is read; with libtpu, tiny and (slow) the real thing are compiled for absent chips."""

import pytest

from chameleon_jax import presets
from chameleon_jax.config import DataConfig, FineTuneConfig, MeshConfig, OptimizerConfig, TrainConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.planning import compiler
from chameleon_jax.planning.layout import Layout
from chameleon_jax.planning.topologies import GIB, parse_topology
from chameleon_jax.planning.weights import weight_bytes

needs_libtpu = pytest.mark.skipif(not compiler.available(), reason='needs libtpu (extra tpu-aot)')

REFUSAL = (
  'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 40.61G of 15.75G hbm. '
  'Exceeded hbm capacity by 24.86G.\n\nTotal hbm usage >= 40.86G:\n    reserved 258.00M\n    program 40.61G'
)


EARLY_REFUSAL = (
  'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.56G) exceeds available HBM (15.75G).'
)


@pytest.mark.parametrize(('text', 'gib'), [(REFUSAL, 40.61), (EARLY_REFUSAL, 16.56)])
def test_a_refusal_is_read(text, gib):
  used, limit, line = compiler.read_refusal(text)
  assert (used, limit) == (round(gib * GIB), round(15.75 * GIB))
  assert line == f'the TPU compiler: {gib:.2f} GiB needed of 15.75 GiB'


@pytest.mark.parametrize('text', ['INTERNAL: something else broke', REFUSAL.replace('hbm.', 'vmem.').replace('G hbm', 'M vmem')])
def test_another_failure_is_passed_on(text):
  with pytest.raises(ConfigError, match='not for want of memory'):
    compiler.read_refusal(text)


def test_gpus_have_no_compiler_here():
  with pytest.raises(ConfigError, match='8xh100 is made of GPUs'):
    compiler.check_available(parse_topology('8xh100'))


def test_a_missing_compiler_names_the_extra(monkeypatch):
  monkeypatch.setattr(compiler, 'available', lambda: False)
  with pytest.raises(ConfigError, match='tpu-aot'):
    compiler.topology_mesh(parse_topology('v5e-4'), MeshConfig())


@needs_libtpu
def test_a_tiny_step_is_compiled_for_absent_chips():
  """Attention runs in blocks of 512 there, not in those of the CPU; the state is on the chip at the peak."""
  model = presets.tiny_transformer(d_model=256, d_head=64, d_ff=512, max_seq_len=1024, dtype='bfloat16', remat='full')
  config = TrainConfig(
    model=model, vocabulary=presets.tiny_vocabulary(), data=DataConfig(seq_len=1024, batch_size=4), mesh=MeshConfig(1, 2, 2)
  )
  verdict = compiler.compile_train_step(config, parse_topology('v5e-4'))
  assert verdict.fits and verdict.message == ''
  assert weight_bytes(config, Layout(1, 2, 2)).state < verdict.peak < GIB


@needs_libtpu
def test_a_step_with_frozen_weights_is_compiled_too():
  """Adapters, rows in pieces, Adafactor; the frozen weights are on the chip beside the state."""
  model = presets.tiny_transformer(d_model=256, d_head=64, d_ff=512, dtype='bfloat16', remat='full', sequence_parallel=True)
  config = TrainConfig(
    model=model,
    vocabulary=presets.tiny_vocabulary(),
    data=DataConfig(seq_len=32, batch_size=4),
    mesh=MeshConfig(1, 2, 2),
    optimizer=OptimizerConfig(name='adafactor'),
    fine_tune=FineTuneConfig(method='lora', lora_rank=4),
  )
  verdict = compiler.compile_train_step(config, parse_topology('v5e-4'))
  assert verdict.fits and 0 < weight_bytes(config, Layout(1, 2, 2)).frozen < weight_bytes(config, Layout(1, 2, 2)).resident < verdict.peak


@needs_libtpu
def test_an_unknown_slice_is_one_line():
  with pytest.raises(ConfigError, match='libtpu does not know the slice v5e:3x5'):
    compiler.topology_mesh(parse_topology('v5e:3x5'), MeshConfig())


@pytest.mark.slow
@needs_libtpu
def test_34b_fits_64_chips_of_v5e():
  """4,096 tokens a chip, fully sharded: the compiler itself says it stays below 15.75 GiB."""
  config = TrainConfig(
    model=presets.chameleon_34b(), vocabulary=presets.released_vocabulary(), data=DataConfig(batch_size=64), loss_chunks=16
  )
  verdict = compiler.compile_train_step(config, parse_topology('v5e-64'))
  assert verdict.fits and verdict.peak < 15.75 * GIB
