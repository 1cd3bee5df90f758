"""Where this process stands among those of its run: from flags, else from what the cluster's launcher left in the environment.

Known launchers are those of jax (Slurm, Open MPI, TPU VMs, TPUs on GKE, and Kubernetes' indexed jobs where the `kubernetes`
package is installed); their private classes are used in this file only. A single process is not a cluster: inside one task
of Slurm, or in a container of Kubernetes that is no job, a run stays alone unless flags say otherwise.

Does not start anything.
"""

import dataclasses
import os
from typing import Any

from chameleon_jax.errors import HostError


@dataclasses.dataclass(frozen=True)
class Place:
  """One process of a run. `local_devices` are the accelerators it may use, None for all of its machine."""

  address: str  # host:port at which process 0 listens
  count: int
  index: int
  local_devices: tuple[int, ...] | None = None

  def __post_init__(self):
    host, _, port = self.address.rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
      raise HostError(f'coordinator address {self.address!r} is not HOST:PORT; give that of process 0, such as 10.0.0.1:8476')
    if not 0 <= self.index < self.count:
      raise HostError(f'process {self.index} of {self.count}: processes are numbered 0 to {self.count - 1}; set --process_id')


def find_place(address: str | None = None, count: int | None = None, index: int | None = None) -> Place | None:
  """This process's place, None where it is alone.

  What is not given comes from the environment: `JAX_COORDINATOR_ADDRESS`, then the launcher.

  Raises:
    HostError: something is given, but not enough, or the launcher's description cannot be read.
  """
  if count == 1:
    return None
  address = address or os.environ.get('JAX_COORDINATOR_ADDRESS')
  given = {'--coordinator_address': address, '--num_processes': count, '--process_id': index}
  if address is not None and count is not None and index is not None:
    return Place(address, count, index)
  found = _launched()
  if found is None:
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
      return None
    raise HostError(f'{" and ".join(missing)} missing: no launcher (Slurm, Open MPI, TPU, Kubernetes) was found that says so')
  return dataclasses.replace(
      found,
      address=found.address if address is None else address,
      count=found.count if count is None else count,
      index=found.index if index is None else index,
  )


def _launched() -> Place | None:
  from jax._src import clusters  # private; the public way to it, jax.distributed.initialize(), ends the process where a host is missing

  for kind in clusters.ClusterEnv._cluster_types:
    if kind.opt_in_only_method or (kind.__name__ == 'K8sCluster' and 'JOB_COMPLETION_INDEX' not in os.environ):
      continue  # a container of Kubernetes need not be part of a job
    try:
      if kind.is_env_present():
        return _place_in(kind)
    except HostError:
      raise
    except Exception as error:  # metadata servers, Kubernetes' client and broken variables raise all kinds
      name, reason = kind.name or kind.__name__, ' '.join(str(error).split())[:300]
      raise HostError(f'the launcher {name!r} cannot be read: {reason}; use the flags') from error
  return None


def _place_in(kind: Any) -> Place | None:
  count = kind.get_process_count()
  if count == 1:
    return None
  address = kind.get_coordinator_address(timeout_secs=300, override_coordinator_port=os.environ.get('JAX_COORDINATOR_PORT'))
  local = kind.get_local_process_id()
  alone = local is None or not _several_on_this_machine(count)
  return Place(address, count, kind.get_process_id(), None if alone else (local,))


def _several_on_this_machine(count: int) -> bool:
  """Whether the machine's accelerators are shared out, one to a process; one process on a machine takes all of them."""
  if 'OMPI_COMM_WORLD_LOCAL_SIZE' in os.environ:
    return int(os.environ['OMPI_COMM_WORLD_LOCAL_SIZE']) > 1
  return count > int(os.environ.get('SLURM_STEP_NUM_NODES', os.environ.get('SLURM_NNODES', count)))
