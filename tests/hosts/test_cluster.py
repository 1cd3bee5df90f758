"""Where a process stands: flags, Slurm's variables, and what is no cluster at all."""

import pytest

from chameleon_jax.errors import HostError
from chameleon_jax.hosts.cluster import Place, find_place

SLURM = {'SLURM_JOB_ID': '4097', 'SLURM_STEP_NODELIST': 'node[07-10]', 'SLURM_PROCID': '2', 'SLURM_LOCALID': '0'}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
  import os

  for name in list(os.environ):
    if name.startswith(('SLURM_', 'OMPI_', 'KUBERNETES_', 'JAX_COORDINATOR', 'JOB_COMPLETION', 'TPU_')):
      monkeypatch.delenv(name)


def _set(monkeypatch, **values):
  for name, value in values.items():
    monkeypatch.setenv(name, value)


def test_flags_say_it_all():
  assert find_place('10.0.0.1:8476', 4, 3) == Place('10.0.0.1:8476', 4, 3)
  assert find_place() is None
  assert find_place('10.0.0.1:8476', 1, 0) is None  # alone whatever else is said


def test_slurm_with_one_task_a_node_takes_the_whole_node(monkeypatch):
  _set(monkeypatch, **SLURM, SLURM_NTASKS='4', SLURM_STEP_NUM_NODES='4')
  # jax's rule: the first node, and the job's number modulo 4,096 above 61,440.
  assert find_place() == Place('node07:61441', 4, 2)
  assert find_place(index=1) == Place('node07:61441', 4, 1)


def test_slurm_with_one_task_a_device_takes_one_device(monkeypatch):
  _set(monkeypatch, **{**SLURM, 'SLURM_LOCALID': '5', 'SLURM_PROCID': '13'}, SLURM_NTASKS='32', SLURM_STEP_NUM_NODES='4')
  monkeypatch.setenv('JAX_COORDINATOR_PORT', '9999')
  assert find_place() == Place('node07:9999', 32, 13, (5,))


def test_one_task_is_no_cluster(monkeypatch):
  _set(monkeypatch, **SLURM, SLURM_NTASKS='1', SLURM_STEP_NUM_NODES='1')
  assert find_place() is None


def test_a_container_that_is_no_job_is_no_cluster(monkeypatch, recwarn):
  monkeypatch.setenv('KUBERNETES_SERVICE_HOST', '10.0.0.1')
  assert find_place() is None
  assert not recwarn.list  # jax would advise to install its Kubernetes extra


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('10.0.0.1:8476', 2, None), '--process_id missing: no launcher'),
        ((None, 2, None), '--coordinator_address and --process_id missing'),
        (('10.0.0.1', 2, 0), "'10.0.0.1' is not HOST:PORT"),
        (('10.0.0.1:99999', 2, 0), 'is not HOST:PORT'),
        (('10.0.0.1:8476', 2, 2), 'process 2 of 2: processes are numbered 0 to 1'),
    ],
)
def test_one_line_for_each_mistake(arguments, message):
  with pytest.raises(HostError, match=message) as raised:
    find_place(*arguments)
  assert '\n' not in str(raised.value)


def test_a_launcher_that_cannot_be_read(monkeypatch):
  _set(monkeypatch, **{**SLURM, 'SLURM_PROCID': 'two'}, SLURM_NTASKS='4')
  with pytest.raises(HostError, match="the launcher 'slurm' cannot be read: invalid literal .*; use the flags"):
    find_place()
