"""The roll call over the loopback, each process a thread: all come, one is missing, one differs, strangers knock."""

import concurrent.futures
import socket

import pytest

from chameleon_jax.errors import HostError
from chameleon_jax.hosts.cluster import Place
from chameleon_jax.hosts.roll_call import call_roll, process_names

FACTS = {'config.seed': '0', 'code': '"abc"'}


@pytest.fixture
def address():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return f'127.0.0.1:{server.getsockname()[1]}'


def _together(address, count, reports, *, timeout=10.0):
  """Outcome of each (process, facts): the machines, or the line of the error."""

  def one(process, facts):
    try:
      return call_roll(Place(address, count, process), facts, timeout=timeout)
    except HostError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(len(reports)) as pool:
    return [job.result(timeout=60) for job in [pool.submit(one, *report) for report in reports]]


def test_all_come(address):
  machines = [socket.gethostname()] * 4
  assert _together(address, 4, [(process, FACTS) for process in (3, 1, 0, 2)]) == [machines] * 4


def test_everybody_hears_who_is_missing(address):
  first, second = _together(address, 4, [(0, FACTS), (2, FACTS)], timeout=0.6)
  assert first == second
  machine = socket.gethostname()
  expected = f'process 1 and process 3 of 4 did not come to {address} within 0.6 s (here: process 0 ({machine}) and process 2 ({machine}))'
  assert first.startswith(expected)


def test_a_missing_coordinator_is_named(address):
  (line,) = _together(address, 2, [(1, FACTS)], timeout=0.4)
  assert line.startswith('process 0 did not answer process 1 (') and address in line and 'Connection refused' in line


def test_everybody_hears_who_differs(address):
  lines = _together(address, 3, [(0, FACTS), (1, FACTS), (2, {**FACTS, 'config.seed': '5'})])
  assert len(set(lines)) == 1
  assert 'process 2 (' in lines[0] and 'config.seed is 5 there and 0 here' in lines[0]


def test_the_number_of_processes_must_agree(address):
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    jobs = [pool.submit(call_roll, Place(address, count, process), FACTS, timeout=5) for process, count in ((0, 2), (1, 3))]
    for job in jobs:
      with pytest.raises(HostError, match='--num_processes is 3 there and 2 here'):
        job.result(timeout=60)


def test_two_with_one_number(address):
  lines = _together(address, 3, [(0, FACTS), (1, FACTS), (1, FACTS)], timeout=3)
  assert all('both call themselves process 1; give each its own --process_id' in line for line in lines)


def test_strangers_are_passed_over(address):
  host, port = address.split(':')

  def knock():
    for text in (b'GET / HTTP/1.1\r\n\r\n', b'{"greeting": "other"}\n', b'[1]\n', b''):
      while True:
        try:
          with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(text)
            break
        except ConnectionRefusedError:
          continue

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    zero = pool.submit(call_roll, Place(address, 2, 0), FACTS, timeout=30)
    pool.submit(knock).result(timeout=30)
    one = pool.submit(call_roll, Place(address, 2, 1), FACTS, timeout=30)
    assert zero.result(timeout=60) == one.result(timeout=60)


def test_a_port_that_is_taken(address):
  host, port = address.split(':')
  with socket.create_server((host, int(port))), pytest.raises(HostError, match=f'cannot listen at port {port}: .*choose another'):
    call_roll(Place(address, 2, 0), FACTS, timeout=1)


def test_many_processes_in_words():
  assert process_names([1], {}) == 'process 1'
  assert process_names([1, 3], {1: 'b'}) == 'process 1 (b) and process 3'
  assert process_names(range(12), {}).endswith('process 7 and 4 more')
