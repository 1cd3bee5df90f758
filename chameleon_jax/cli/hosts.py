"""Flags of the commands that run on many hosts, and the frame around such a run."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from absl import flags

from chameleon_jax.errors import ChameleonError


def define_hosts() -> None:
  """Defines --coordinator_address, --num_processes, --process_id and --host_timeout."""
  flags.DEFINE_string('coordinator_address', None, 'HOST:PORT of process 0, for a run on several hosts; found by itself under a launcher')
  flags.DEFINE_integer('num_processes', None, 'processes of the run; 1 looks for no others', lower_bound=1)
  flags.DEFINE_integer('process_id', None, 'number of this process, from 0', lower_bound=0)
  flags.DEFINE_float('host_timeout', 300, 'seconds to wait for the other hosts at the start', lower_bound=0)


@contextlib.contextmanager
def all_hosts(config: Any, **values: Any) -> Iterator[None]:
  """Joins the hosts of a run, if there are others, for the time of the block; every field of `config` and every one of `values` must agree.

  Raises:
    HostError: a host is missing, or differs in config or code.
  """
  from chameleon_jax import hosts  # loads jax

  place = hosts.find_place(flags.FLAGS.coordinator_address, flags.FLAGS.num_processes, flags.FLAGS.process_id)
  if place is None:
    yield
    return
  hosts.start(place, hosts.run_facts(config, **values), timeout=flags.FLAGS.host_timeout)
  try:
    yield
  except Exception as error:
    if hosts.leave():  # all of them failed, probably with the same line
      raise
    if isinstance(error, ChameleonError):
      print(f'chameleon: process {place.index}: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
    else:
      traceback.print_exc()
    os._exit(1)
