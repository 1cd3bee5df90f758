"""Runs with spoilt batches."""

import importlib.util
import pathlib

import numpy as np
import pytest

from chameleon_jax.data.pipeline import make_batches
from chameleon_jax.data.sources import source as registry
from chameleon_jax.training import loop, run_inputs


@pytest.fixture
def spoilt_runs():
  """`make(monkeypatch, {number of a batch: weight or None})` -> (train, config, watch): the batches of these numbers carry this loss
  weight, or targets that no document has; `watch(leave_out=numbers)` has the runs after it never see those of the numbers."""
  spec = importlib.util.spec_from_file_location('seen_run', pathlib.Path(__file__).with_name('seen_run.py'))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)

  def make(monkeypatch, spoilt):
    for name, factory in module.SOURCES.items():
      monkeypatch.setitem(registry.SOURCES, name, factory)
    parts, to_devices = module.tokenizers(), loop.to_devices
    config = module.config()
    options = run_inputs.data_options(config, parts, say=print)
    numbers = {}
    plain = make_batches(config.data, n_steps=14, endless=True, **options)
    for number in range(1, max(spoilt) + 1):
      numbers[next(plain)['tokens'].tobytes()] = number
    plain.close()

    def spoil(batch, mesh):
      number = numbers.get(batch['tokens'].tobytes())
      if number in spoilt:
        weight = spoilt[number]
        targets = np.where(batch['loss_weights'] > 0, 511, batch['targets']).astype(np.int32)
        batch = {**batch, 'targets': targets}
        if weight is not None:
          batch['loss_weights'] = np.full_like(batch['loss_weights'], weight)
      return to_devices(batch, mesh)

    monkeypatch.setattr(loop, 'to_devices', spoil)
    train = lambda *arguments, **changes: loop.train(*arguments, tokenizers=parts, **changes)
    return train, module.config, lambda **options: module.watch(monkeypatch, **options)

  return make
