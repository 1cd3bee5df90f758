"""What hosts gather: one host here, two by their parts; two processes do it in test_loop.py."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from chameleon_jax.config import MeshConfig
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.training.agreement import Largest, gather


def test_one_host_agrees_with_itself():
  assert gather('position') == ['position']
  largest = Largest(make_mesh(MeshConfig()))
  assert [largest(value) for value in (0, 15, 2)] == [0, 15, 2]


@pytest.mark.parametrize('texts', [('a', 'longer, é'), ('', ''), ('{"n": 1}', '')])
def test_texts_of_different_lengths_come_back_whole(monkeypatch, texts):
  """Both hosts' calls, one after the other, through an all-gather that checks their shapes."""
  given = {host: [] for host in range(2)}

  def run(host, answers):
    def all_gather(value):
      given[host].append(value)
      return np.stack(answers.pop(0)) if answers else np.stack([value, value])

    monkeypatch.setattr(multihost_utils, 'process_allgather', all_gather)
    return gather(texts[host])

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  lengths = [np.array([len(text.encode())], np.int32) for text in texts]
  for host in range(2):
    run(host, [lengths])  # what each would send once it knows the lengths
  sent = [given[host][1] for host in range(2)]
  assert sent[0].shape == sent[1].shape
  for host in range(2):
    assert run(host, [lengths, sent]) == list(texts)


def test_the_largest_number_is_known_one_step_later(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)  # the devices of this process stand for those of two
  largest = Largest(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
  assert [largest(value) for value in (0, 15, 15, 0, 0)] == [0, 0, 15, 15, 0]
