"""Several hosts in one run: who is there, whether all mean the same run, and waiting for each other with a time-out.

A run on many hosts is the same program on each of them; jax joins their devices into one mesh. What is added here is what jax leaves
open: a host that does not come is named, hosts that disagree are told apart before any of them starts, nobody waits for ever.
"""

from chameleon_jax.hosts.cluster import Place, find_place
from chameleon_jax.hosts.facts import code_hash, run_facts
from chameleon_jax.hosts.meeting import is_first, leave, meet
from chameleon_jax.hosts.start import start

__all__ = ['Place', 'code_hash', 'find_place', 'is_first', 'leave', 'meet', 'run_facts', 'start']
