"""Meeting points inside a run, with a time-out and the names of those who did not come; an error of one host becomes that of all.

Uses the key-value store of jax's coordinator, whose Python interface is private: this is the one file that touches it. Nothing
here runs on the devices. In a run of one process every function returns at once.
"""

import collections
import json
import time
from typing import Any

import jax
from jax._src import distributed

from chameleon_jax.errors import HostError
from chameleon_jax.hosts.roll_call import process_names

MEETING_SECONDS = 1800.0  # the slowest thing between two meetings is writing a model folder
_POLL_SECONDS = 0.1

_machines: dict[int, str] = {}
_meetings: collections.Counter[str] = collections.Counter()  # how often a name was used; the same on all hosts


def remember_machines(machines: list[str]) -> None:
  """Names of the machines by process, for messages."""
  _machines.update(enumerate(machines))


def is_first() -> bool:
  """Whether this process is the one that writes what is written once. Starts no backend."""
  return distributed.global_state.process_id == 0


def meet(name: str, *, error: Exception | None = None, timeout: float = MEETING_SECONDS) -> None:
  """Returns when all hosts have called it as often as this one.

  Args:
    name: what the meeting is about, for the message.
    error: what went wrong on this host; it is raised here again, and as a `HostError` on every other host.
    timeout: seconds from the moment that process 0, or this process, is there.

  Raises:
    HostError: a host did not come, or failed.
  """
  client = distributed.global_state.client
  if client is None:
    if error is not None:
      raise error
    return
  _meetings[name] += 1
  key = f'chameleon_jax/{name}/{_meetings[name]}'
  mine = distributed.global_state.process_id
  client.key_value_set(f'{key}/from/{mine}', '' if error is None else ' '.join(str(error).split()))
  verdict = _judged(client, key, name, timeout) if mine == 0 else _heard(client, key, name, timeout)
  if error is not None:
    raise error
  if verdict is not None:
    raise HostError(verdict)


def leave(*, timeout: float = 10.0) -> str | None:
  """Ends this host's part in jax's run after an error.

  Returns:
    None where all hosts leave, else who does not: they wait for this one, or are gone. Then the only way out is the end of the
    process without jax's own good-bye, which would wait for them as well.
  """
  if distributed.global_state.client is None:
    return None
  try:
    meet('leaving', timeout=timeout)
    jax.distributed.shutdown()
  except HostError as error:
    return str(error)
  except Exception:  # the coordinator is gone: XlaRuntimeError and the like
    return f'{process_names([0], _machines)} is gone'
  return None


def _came(client: Any, key: str) -> dict[int, str]:
  return {int(path.rsplit('/', 1)[-1]): text for path, text in client.key_value_dir_get(f'{key}/from/')}


def _judged(client: Any, key: str, name: str, timeout: float) -> str | None:
  """Process 0: waits for all and tells them."""
  deadline, everyone = time.monotonic() + timeout, range(distributed.global_state.num_processes)
  while len(came := _came(client, key)) < len(everyone) and time.monotonic() < deadline:
    time.sleep(_POLL_SECONDS)
  failed = {process: text for process, text in came.items() if text}
  missing = [process for process in everyone if process not in came]
  verdict = None
  if failed:
    first = min(failed)
    verdict = f'{process_names([first], _machines)} failed at {name!r}: {failed[first]}'
  elif missing:
    verdict = f'{process_names(missing, _machines)} did not come to {name!r} within {timeout:g} s; look at the logs there'
  client.key_value_set(f'{key}/verdict', json.dumps(verdict))
  return verdict


def _heard(client: Any, key: str, name: str, timeout: float) -> str | None:
  """Every other process: hears from process 0, which may still be waiting for others when this one's time is up."""
  waited_for_first = 0 in _came(client, key)
  while True:
    try:
      return json.loads(client.blocking_key_value_get(f'{key}/verdict', int(1000 * timeout) + 1000))
    except jax.errors.JaxRuntimeError:  # DEADLINE_EXCEEDED
      if waited_for_first or 0 not in _came(client, key):
        return f'{process_names([0], _machines)} did not come to {name!r} within {timeout:g} s; look at the log there'
      waited_for_first = True
