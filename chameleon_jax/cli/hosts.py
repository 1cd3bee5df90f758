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
  import jax

  from chameleon_jax import hosts

  place = hosts.find_place(flags.FLAGS.coordinator_address, flags.FLAGS.num_processes, flags.FLAGS.process_id)
  if place is None:
    yield
    return
  hosts.start(place, hosts.run_facts(config, **values), timeout=flags.FLAGS.host_timeout)
  try:
    yield
  except Exception as error:
    absent = hosts.leave()
    if absent is None:  # all of them failed, probably with the same line
      raise
    line = ' '.join(str(error).split())[:300]
    if isinstance(error, jax.errors.JaxRuntimeError):  # what the devices say when a host is gone
      line = f'{absent}; this host stopped ({line}); give the same command again on all hosts, the run goes on from its last checkpoint'
    elif not isinstance(error, ChameleonError):
      traceback.print_exc()
    print(f'chameleon: process {place.index}: {line}', file=sys.stderr, flush=True)
    os._exit(1)
