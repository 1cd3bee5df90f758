"""Before jax joins the hosts: process 0 waits for all others, compares what they say, and tells everyone the verdict.

    process 1 .. n-1                           process 0
      {"process": 1, "machine": .., facts}  ->    until all came, or the time is up
                                            <-    {"verdict": null}, or one line on who is missing or differs

One line of JSON each way over TCP, at the address where jax's coordinator will listen a moment later, so no second port has to
be open. Jax has a roll call of its own, but where a host does not come it ends the process (a failed check, with a stack trace)
and names nobody.

Knows neither jax nor what the facts mean.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from chameleon_jax.errors import HostError
from chameleon_jax.hosts.cluster import Place
from chameleon_jax.hosts.facts import difference

_GREETING = 'chameleon_jax roll call 1'
_MOST_BYTES = 1 << 22
_READ_SECONDS = 10.0  # for the line of one visitor; they send it at once
_MOST_NAMED = 8


def call_roll(place: Place, facts: Mapping[str, str], *, timeout: float) -> list[str]:
  """Returns once all processes are there and agree: the machine of each.

  Args:
    place: this process.
    facts: what must be the same everywhere, see `facts.run_facts`.
    timeout: seconds for all to come.

  Raises:
    HostError: one line, the same on every process that came: which ones did not, or which one differs in what.
  """
  facts = {**facts, '--num_processes': str(place.count)}
  mine = {'greeting': _GREETING, 'process': place.index, 'machine': socket.gethostname(), 'facts': facts}
  answer = _receive(place, mine, timeout) if place.index == 0 else _report(place, mine, timeout)
  if answer['verdict'] is not None:
    raise HostError(answer['verdict'])
  return answer['machines']


def process_names(processes: Iterable[int], machines: Mapping[int, str]) -> str:
  """Processes in words.

  Example:
    process_names([1, 3], {1: 'b'}) == 'process 1 (b) and process 3'
  """
  named = [f'process {process}' + (f' ({machines[process]})' if process in machines else '') for process in processes]
  if len(named) > _MOST_NAMED:
    named = [*named[:_MOST_NAMED], f'{len(named) - _MOST_NAMED} more']
  return ' and '.join([', '.join(named[:-1]), named[-1]] if len(named) > 1 else named)


def _receive(place: Place, mine: dict[str, Any], timeout: float) -> dict[str, Any]:
  """Process 0."""
  deadline = time.monotonic() + timeout
  came: dict[int, dict[str, Any]] = {0: mine}
  visitors: list[socket.socket] = []
  twice: str | None = None
  with contextlib.ExitStack() as stack:
    listener = stack.enter_context(_listener(place))
    while len(came) < place.count and twice is None and time.monotonic() < deadline:
      listener.settimeout(max(0.01, deadline - time.monotonic()))
      try:
        visitor = stack.enter_context(listener.accept()[0])
      except TimeoutError:
        break
      report = _read_line(visitor, time.monotonic() + _READ_SECONDS)
      if report is None or report.get('greeting') != _GREETING:
        continue  # somebody else, such as a scanner of ports
      process = int(report['process'])
      if process in came:
        twice = f'{came[process]["machine"]} and {report["machine"]} both call themselves process {process}; give each its own --process_id'
      came.setdefault(process, report)
      visitors.append(visitor)
    machines = {process: report['machine'] for process, report in came.items()}
    verdict = twice or _missing(place, machines, timeout) or _difference(came, machines)
    answer = {'verdict': verdict, 'machines': [machines.get(process, '') for process in range(place.count)]}
    for visitor in visitors:
      with contextlib.suppress(OSError):  # it went away; jax's own waiting will tell
        visitor.sendall(json.dumps(answer).encode() + b'\n')
  return answer


def _missing(place: Place, machines: Mapping[int, str], timeout: float) -> str | None:
  missing = [process for process in range(place.count) if process not in machines]
  if not missing:
    return None
  return (
      f'{process_names(missing, {})} of {place.count} did not come to {place.address} within {timeout:g} s '
      f'(here: {process_names(sorted(machines), machines)}); look at the logs there, or raise --host_timeout'
  )


def _difference(came: Mapping[int, Mapping[str, Any]], machines: Mapping[int, str]) -> str | None:
  names = {process: process_names([process], machines) for process in came}
  return difference({process: report['facts'] for process, report in came.items()}, names)


def _report(place: Place, mine: dict[str, Any], timeout: float) -> dict[str, Any]:
  """Every other process: says that it is here, and hears the verdict."""
  deadline = time.monotonic() + timeout
  host, _, port = place.address.rpartition(':')
  problem = 'nothing listens there'
  while time.monotonic() < deadline:
    try:
      with socket.create_connection((host.strip('[]'), int(port)), timeout=max(0.1, deadline - time.monotonic())) as connection:
        connection.sendall(json.dumps(mine).encode() + b'\n')
        # Process 0 may have come later than this one, and then waits for the others a while longer.
        answer = _read_line(connection, time.monotonic() + timeout + _READ_SECONDS)
        if answer is not None and 'verdict' in answer:
          return answer
        problem = 'what listens there is not process 0 of this run, or it went away'
    except OSError as error:
      problem = str(error.strerror or error)
    time.sleep(0.2)
  raise HostError(
      f'process 0 did not answer process {place.index} ({mine["machine"]}) at {place.address} within {timeout:g} s ({problem}); '
      'look at its log, check --coordinator_address, or raise --host_timeout'
  )


def _listener(place: Place) -> socket.socket:
  host, _, port = place.address.rpartition(':')
  loopback = host in ('localhost', '127.0.0.1')
  try:
    if loopback or not socket.has_dualstack_ipv6():
      return socket.create_server(('127.0.0.1' if loopback else '', int(port)), backlog=1024)
    return socket.create_server(('', int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
  except OSError as error:
    reason = error.strerror or error
    raise HostError(f'process 0 cannot listen at port {port}: {reason}; choose another in --coordinator_address') from error


def _read_line(connection: socket.socket, deadline: float) -> dict[str, Any] | None:
  """One JSON object that ends with a line feed; None where it does not come, or is something else."""
  text = b''
  try:
    while not text.endswith(b'\n'):
      connection.settimeout(max(0.01, deadline - time.monotonic()))
      piece = connection.recv(1 << 16)
      text += piece
      if not piece or len(text) > _MOST_BYTES or time.monotonic() > deadline:
        return None
    values = json.loads(text)
  except (OSError, ValueError):
    return None
  return values if isinstance(values, dict) else None
