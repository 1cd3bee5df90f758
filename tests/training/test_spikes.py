"""Spikes: found by a closed form, and a run that goes on as if it had never seen the batches it threw away."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import CheckpointConfig, OptimizerConfig, SpikeConfig
from chameleon_jax.training.spikes import Spike, SpikeGuard, batch_of_step, z_score


def test_z_score_in_closed_form():
  assert z_score(5.0, [1, 2, 2, 2, 3], min_deviation=0.5) == (5 - 2) / 0.5  # the MAD is 0
  assert z_score(10.0, [1, 2, 3, 4, 5], min_deviation=0.01) == pytest.approx((10 - 3) / 1.4826)  # distances 2 1 0 1 2
  assert z_score(1.0, [1, 2, 3, 4, 5], min_deviation=0.01) < 0
  losses = np.random.default_rng(0).normal(3.0, 0.2, 10_001).tolist()
  assert z_score(4.0, losses, min_deviation=0.01) == pytest.approx(5.0, rel=0.05)  # as sigmas of a normal distribution


@pytest.mark.parametrize(
    ('step', 'skipped', 'batch'),
    [
        (5, [], 5),
        (4, [(5, 9)], 4),
        (5, [(5, 9)], 10),
        (1, [(1, 3)], 4),
        (6, [(5, 9), (12, 13)], 11),
        (7, [(5, 9), (12, 13)], 14),
        (7, [(12, 13), (5, 7), (5, 9), (6, 8)], 14),  # pieces in any order, over one another
    ],
)
def test_batch_of_step(step, skipped, batch):
  assert batch_of_step(step, skipped) == batch
  left = [number for number in range(1, 40) if not any(first <= number <= last for first, last in skipped)]
  assert left[step - 1] == batch


def _step(loss, finite=True):
  return {'loss': jnp.float32(loss), 'gradient_norm': jnp.float32(1.0), 'finite': jnp.float32(finite), 'other': None}


def _guard(losses=(), **changes):
  guard = SpikeGuard(SpikeConfig(**{'threshold': 5.0, 'window': 8, 'min_deviation': 0.1, **changes}))
  for step, loss in enumerate(losses, start=1):
    guard.add(step, _step(loss))
    assert guard.judge(wait=True) is None
  return guard


def test_a_jump_is_seen_when_the_window_is_full_and_only_upwards():
  _guard([3.0, 9.0, 3.0])  # not full yet
  guard = _guard([3.0] * 8)
  guard.add(9, _step(1.0))
  assert guard.judge(wait=True) is None
  guard.add(10, _step(3.49))
  assert guard.judge(wait=True) is None
  guard.add(11, _step(3.51))
  spike = guard.judge(wait=True)
  assert spike == Spike(11, 11, float(np.float32(3.51)), 1.0, spike.z_score, True)
  assert spike.z_score == pytest.approx((3.51 - 3.0) / 0.1, rel=1e-5)


def test_without_waiting_the_newest_step_is_left():
  guard = _guard([3.0] * 8)
  guard.add(9, _step(7.0))
  assert guard.judge(wait=False) is None
  guard.add(10, _step(3.0))
  spike = guard.judge(wait=False)
  assert (spike.step, spike.batch) == (9, 9)
  # Whether a batch more was drawn before the spike was seen makes no difference to what is thrown away.
  assert guard.rewind(spike, {'batch': 6, 'losses': [3.0] * 6}) == 0
  late = guard.books()
  prompt = _guard([3.0] * 8)
  prompt.add(9, _step(7.0))
  assert prompt.rewind(prompt.judge(wait=True), {'batch': 6, 'losses': [3.0] * 6}) == 1
  assert late == prompt.books() == {'batch': 10, 'skipped': [[7, 10]], 'losses': [3.0] * 6, 'rewinds': 1}


def test_a_second_return_to_the_same_checkpoint_joins_the_first():
  guard = _guard([3.0] * 8, skip_batches=3, max_rewinds=2)
  books = guard.books()
  for batch, n_drawn in ((9, 3), (13, 3)):
    guard.add(9, _step(8.0))
    spike = guard.judge(wait=True)
    assert spike.batch == batch and guard.may_rewind
    assert guard.rewind(spike, books) == n_drawn
  assert guard.skipped == [(9, 16)] and guard.batch == 16 and not guard.may_rewind
  guard.add(9, _step(8.0))
  assert guard.judge(wait=True).step == 9  # seen, and left to the run
  assert guard.books()['losses'] == [3.0] * 7 + [8.0]
  again = SpikeGuard(SpikeConfig(threshold=5.0, window=8))
  again.restore(json.loads(json.dumps(guard.books())), step=9)
  assert again.books() == guard.books()


def test_off_it_sees_only_what_is_not_finite():
  guard = _guard([3.0] * 9 + [1000.0], threshold=None)
  guard.add(11, _step(np.nan, finite=False))
  assert not guard.judge(wait=True).finite and not guard.may_rewind
  guard.restore(None, step=7)  # a checkpoint without books
  assert guard.books() == {'batch': 7, 'skipped': [], 'losses': [], 'rewinds': 0}


@pytest.mark.parametrize('values', [{'window': 4}, {'threshold': 0.0}, {'skip_batches': 0}, {'max_rewinds': 0}, {'min_deviation': 0.0}])
def test_settings_that_make_no_sense(values):
  with pytest.raises(ValueError, match=next(iter(values))):
    SpikeConfig(**values)


def _lines(workdir, prefix):
  """step -> its last values that begin with the prefix, without those of the clock."""
  found = {}
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    record = json.loads(line)
    kept = {name: value for name, value in record.items() if name.startswith(prefix) and 'second' not in name and 'wait' not in name}
    if kept:
      found[record['step']] = kept
  return found


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_never_seen_the_batches(tmp_path, monkeypatch, capsys, spoilt_runs):
  """Batch 2 is not finite and batch 15 a jump. The first throws away 1 to 3, the second, step 12, goes back to step 9: 13 to 16."""
  train, config, watch = spoilt_runs(monkeypatch, {2: np.inf, 15: None})
  spikes = SpikeConfig(threshold=8.0, window=8, min_deviation=0.1, max_rewinds=2)
  optimizer = OptimizerConfig(learning_rate=0.03, warmup_steps=0, schedule='constant', eps=1e-8)
  config = config(n_steps=14, eval_every=100, checkpoint=CheckpointConfig(every_steps=3), spikes=spikes, optimizer=optimizer)
  train(config, tmp_path / 'spoilt', stop_after=13)  # saved at 9, 12 and 13, then resumed
  train(config, tmp_path / 'spoilt')
  said = capsys.readouterr().err
  assert 'step 2: the loss nan is a spike (z-score inf); back to the start, 3 batches skipped (1 to 3)' in said
  assert 'back to the checkpoint of step 9, 4 batches skipped (13 to 16)' in said
  recorded = _lines(tmp_path / 'spoilt', 'spike/')
  assert sorted(recorded) == [2, 12]
  assert recorded[12]['spike/rewound_to'] == 9 and recorded[12]['spike/z_score'] > 8
  assert (recorded[12]['spike/first_skipped'], recorded[12]['spike/last_skipped']) == (13, 16)

  watch(leave_out=(1, 2, 3, 13, 14, 15, 16))
  train(dataclasses.replace(config, spikes=SpikeConfig(), checkpoint=CheckpointConfig(every_steps=100)), tmp_path / 'without')
  without, spoilt = (_lines(tmp_path / name, 'train/') for name in ('without', 'spoilt'))
  assert sorted(without) == list(range(1, 15))
  assert spoilt == without  # every figure of every step, bit for bit
