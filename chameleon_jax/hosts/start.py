"""Joins the processes of a run. To be called before anything touches a device."""

from collections.abc import Mapping

import jax

from chameleon_jax.hosts.cluster import Place
from chameleon_jax.hosts.meeting import remember_machines
from chameleon_jax.hosts.roll_call import call_roll


def start(place: Place, facts: Mapping[str, str], *, timeout: float) -> None:
  """Calls the roll, compares the facts, then starts jax on all hosts.

  Args:
    place: this process, from `find_place`.
    facts: what must be the same on all hosts, from `run_facts`.
    timeout: seconds for all hosts to come.

  Raises:
    HostError: a host is missing, or differs; every host that came says the same line.
  """
  machines = call_roll(place, facts, timeout=timeout)
  # Else jax's preemption service takes SIGTERM for itself, and neither the default nor a handler of ours sees it.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
      place.address,
      num_processes=place.count,
      process_id=place.index,
      local_device_ids=None if place.local_devices is None else list(place.local_devices),
      cluster_detection_method='deactivate',  # `place` is its result; detecting again would hide all but one device of a Slurm task
      initialization_timeout=max(60, round(timeout)),
  )
  remember_machines(machines)
