"""planning/speed.py: counts against the published ones, and the roofline against hand-worked cases."""

import dataclasses

import pytest

from chameleon_jax import presets
from chameleon_jax.config import DataConfig, FineTuneConfig, TrainConfig
from chameleon_jax.planning.layout import Layout, decoding_bytes
from chameleon_jax.planning.speed import Assumptions, Requests, decode_speed, executed_flops, matmul_weights, model_flops, train_speed
from chameleon_jax.planning.topologies import parse_topology


def run(rows=64, chunks=16, **model):
  config = dataclasses.replace(presets.chameleon_7b(), **model)
  return TrainConfig(model=config, vocabulary=presets.released_vocabulary(), data=DataConfig(batch_size=rows), loss_chunks=chunks)


LORA = FineTuneConfig(method='lora')
ROWS = FineTuneConfig(method='selected', trainable=('lm_head',), head_rows=(4, 8196))


def test_flops_of_a_token():
  """7B at 4,096: 6.476e9 weights in layers, 0.268e9 in the head, 1.07e9 FLOPs of causal attention forward: 43.7e9 in all."""
  assert matmul_weights(presets.chameleon_7b()) == (32 * (4 * 4096**2 + 3 * 4096 * 11_008), 4096 * 65_536)
  assert model_flops(run()) == pytest.approx(43.7e9, rel=2e-3)
  assert model_flops(dataclasses.replace(run(), model=presets.chameleon_34b())) == pytest.approx(212e9, rel=2e-3)


def test_what_recomputation_costs():
  """Without any: forward and backward, and the scores of attention once more. Full: all layers again. Logits in pieces: nothing."""
  layers, head = matmul_weights(presets.chameleon_7b())
  attention = 32 * 2 * 32 * 128 * 2048  # one of the two products
  plain = executed_flops(run(remat='none', chunks=1))
  assert plain == 6 * (layers + head) + 7 * attention
  assert executed_flops(run(remat='dots', chunks=1)) == plain
  assert executed_flops(run(remat='full', chunks=1)) - plain == 2 * layers + 2 * attention
  assert executed_flops(run(remat='none', chunks=16)) == plain


def test_one_card_is_bound_by_products():
  config, card = run(rows=1), parse_topology('1xh200')
  speed = train_speed(config, card, Layout(1, 1, 1), Assumptions(efficiency=0.5))
  compute = executed_flops(config) * 4096 / (0.5 * 989e12)
  update = speed.parts['update']  # reads and writes weights and two moments
  assert update == pytest.approx(2 * 12 * 7.01e9 / 4.8e12, rel=2e-3)
  assert speed.seconds == pytest.approx(compute + update)
  assert speed.bound == 'compute' and speed.tokens == pytest.approx(4096 / speed.seconds)
  assert speed.mfu == pytest.approx(model_flops(config) * speed.tokens / 989e12)


def test_gathers_hide_behind_products_and_tensor_collectives_do_not():
  config, slice_ = run(), parse_topology('v5e-64')
  fully, mixed = (train_speed(config, slice_, layout, Assumptions()) for layout in (Layout(1, 64, 1), Layout(1, 16, 4)))
  assert fully.seconds == pytest.approx(fully.parts['compute'] + fully.parts['update'])
  assert mixed.seconds == pytest.approx(mixed.parts['compute'] + mixed.parts['tensor collectives'] + mixed.parts['update'])
  gathered = sum(matmul_weights(config.model)) * (2 * 2 + 2 * 4) * 63 / 64
  assert fully.parts['weight gathers'] == pytest.approx(gathered / (0.7 * 200e9))
  stream = 4 * 4096 * 4096 * 2  # of four rows a device
  reduced = 6 * 32 * (2 * 3 / 4 * stream / (0.7 * 100e9) + 10e-6)
  assert mixed.parts['tensor collectives'] == pytest.approx(reduced)


@pytest.mark.parametrize(('remat', 'sums', 'gathers'), [('none', 4, 4), ('dots', 4, 6), ('full', 6, 6)])
def test_rows_in_pieces_are_scattered_and_gathered(remat, sums, gathers):
  """An all-reduce moves a stream twice; in pieces float32 sums are scattered and bfloat16 inputs gathered, with `dots` once more."""
  slice_, layout = parse_topology('v5e-64'), Layout(1, 16, 4)
  stream = 4 * 4096 * 4096 * 2
  whole, pieces = (
    train_speed(run(remat=remat, sequence_parallel=on), slice_, layout, Assumptions()).parts['tensor collectives'] for on in (False, True)
  )
  once = 3 / 4 * stream / (0.7 * 100e9)
  assert whole == pytest.approx(32 * sums * (2 * once + 10e-6))
  assert pieces == pytest.approx(32 * (sums * (2 * once + 10e-6) + gathers * (once + 10e-6)))


def test_what_is_frozen_has_no_gradient_of_its_own():
  """Adapters: two of three products are left, and those of the thin pairs. Rows of the head: layers run forward, the head learns."""
  layers, head = matmul_weights(presets.chameleon_7b())
  attention = 32 * 2 * 32 * 128 * 2048  # one of the two products
  lora, rows = (dataclasses.replace(run(remat='none', chunks=1), fine_tune=fine_tune) for fine_tune in (LORA, ROWS))
  thin = 32 * 16 * (8 * 4096 + 3 * (4096 + 11_008))
  assert executed_flops(lora) == 4 * (layers + head) + 6 * thin + 7 * attention
  assert executed_flops(rows) == model_flops(rows) == 2 * layers + 4 * head + 2 * attention


def test_only_gradients_there_are_go_over_the_network():
  slice_, layout = parse_topology('v5e-64'), Layout(4, 16, 1)
  full, lora = (train_speed(config, slice_, layout, Assumptions()).parts for config in (run(), dataclasses.replace(run(), fine_tune=LORA)))
  thin, weights = 32 * 16 * (8 * 4096 + 3 * (4096 + 11_008)), sum(matmul_weights(presets.chameleon_7b()))
  assert lora['gradient exchange'] / full['gradient exchange'] == pytest.approx(thin / weights)
  assert lora['weight gathers'] / full['weight gathers'] == pytest.approx((2 * 2 * weights + 2 * 4 * thin) / (12 * weights))
  assert lora['update'] < full['update'] / 15


def test_few_tokens_a_chip_are_bound_by_the_network():
  speed = train_speed(run(rows=64), parse_topology('64xh100'), Layout(1, 64, 1), Assumptions(link_efficiency=0.05))
  assert speed.bound == 'weight gathers' and speed.seconds == pytest.approx(speed.parts['weight gathers'] + speed.parts['update'])


def test_decoding_reads_weights_and_every_slot():
  model, card = presets.chameleon_7b(), parse_topology('1xh200')
  speed = decode_speed(model, Requests(1, 4096, guided=False), card, Layout(1, 1, 1), Assumptions())
  cache = 2 * 32 * 4096 * 32 * 128 * 2
  assert speed.seconds == pytest.approx((2 * sum(matmul_weights(model)) + cache) / (0.7 * 4.8e12))
  assert speed.bound == 'memory' and speed.tokens == pytest.approx(1 / speed.seconds)
  assert 2 * sum(matmul_weights(model)) < decoding_bytes(model, Layout(1, 1, 1))  # the embedding table is looked up, not read


def test_fully_sharded_decoding_gathers_all_weights_each_step():
  model, node = presets.chameleon_34b(), parse_topology('8xh100')
  sharded, tensor = (decode_speed(model, Requests(1), node, layout, Assumptions()) for layout in (Layout(1, 8, 1), Layout(1, 1, 8)))
  assert sharded.bound == 'weight gathers' and sharded.seconds > 5 * tensor.seconds
