"""Asks the TPU compiler, with no TPU: compiles the project's own training step ahead of time and reads its verdict on memory.

libtpu must be installed (extra `tpu-aot`); it describes a slice's devices and compiles for them on any Linux host. The arguments are
shapes with shardings, so no array is ever made. For GPUs there is no such way without a GPU.

Does not know: the planner's own model of memory (`memory.py`), which this is there to check.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chameleon_jax.config import MeshConfig, TrainConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.partitioning import batch_sharding, make_mesh
from chameleon_jax.planning.topologies import GIB, Topology
from chameleon_jax.training.optimizer import make_optimizer
from chameleon_jax.training.state import abstract_frozen, abstract_state
from chameleon_jax.training.step import make_train_step
from chameleon_jax.training.trainable import Tuning

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the compiler said.

  Attributes:
    fits: whether the program was made.
    peak: bytes of a chip at the worst moment; where it does not fit, what the compiler's message says it would use.
    limit: bytes of a chip that a program may use, None where the compiler did not say.
    seconds: of compiling.
    message: the compiler's reason, one line; empty where it fits.
  """

  fits: bool
  peak: int
  limit: int | None
  seconds: float
  message: str = ''


def available() -> bool:
  """Whether libtpu is installed."""
  return importlib.util.find_spec('libtpu') is not None


def check_available(topology: Topology) -> None:
  """Whether the compiler can be asked about a machine.

  Raises:
    ConfigError: not a TPU, or libtpu is missing.
  """
  if topology.chip.kind != 'tpu':
    raise ConfigError(f'--compile asks the TPU compiler, and {topology.name} is made of GPUs, whose compiler needs one to be there')
  if not available():
    raise ConfigError("--compile needs libtpu: pip install 'chameleon-jax[tpu-aot]'")


def topology_mesh(topology: Topology, config: MeshConfig) -> Mesh:
  """A mesh over the described, absent chips of a TPU slice.

  Raises:
    ConfigError: not a TPU, libtpu is missing, or it does not know the slice.
  """
  check_available(topology)
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # else it looks for a TPU's metadata server and waits
  from jax.experimental import topologies

  try:
    described = topologies.get_topology_desc(topology.compiler_name, platform='tpu')
  except Exception as error:  # jaxlib raises its own types
    raise ConfigError(f'libtpu does not know the slice {topology.compiler_name}: {" ".join(str(error).split())[:200]}') from error
  return make_mesh(config, list(described.devices))


def compile_train_step(config: TrainConfig, topology: Topology) -> Verdict:
  """Compiles one training step of `config` for a TPU slice.

  Raises:
    ConfigError: see `topology_mesh`; or the mesh or the batch do not fit the slice.
  """
  mesh = topology_mesh(topology, config.mesh)
  model, optimizer, tuning = Transformer(config.model), make_optimizer(config.optimizer, config.n_steps), Tuning(config.fine_tune)
  state = abstract_state(model, optimizer, mesh, tuning)
  frozen = (abstract_frozen(model, mesh, tuning),) if tuning.freezes else ()
  step = make_train_step(model, optimizer, config, mesh)
  replicated = NamedSharding(mesh, PartitionSpec())
  shape = (config.data.batch_size, config.data.seq_len)
  types = {'tokens': jnp.int32, 'targets': jnp.int32, 'loss_weights': jnp.float32, 'segment_ids': jnp.int32, 'positions': jnp.int32}
  batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for name, dtype in types.items()}
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated)
  with jax.set_mesh(mesh), _caching_off():
    return _compiled(step, state, batch, key, *frozen)


@contextlib.contextmanager
def _caching_off() -> Any:
  """The persistent cache cannot hold programs for devices that are not here."""
  before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', before)


def _compiled(function: Any, *arguments: Any) -> Verdict:
  began = time.monotonic()
  lowered = function.trace(*arguments).lower(lowering_platforms=('tpu',))
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    peak, limit, message = read_refusal(str(error))
    return Verdict(False, peak, limit, time.monotonic() - began, message)
  return Verdict(True, compiled.memory_analysis().peak_memory_in_bytes, None, time.monotonic() - began)


def read_refusal(text: str) -> tuple[int, int, str]:
  """(bytes used, bytes there are, one line) of the message with which the compiler refuses a program that does not fit.

  It has two forms, from before and after it lays out memory:

    Ran out of memory in memory space hbm. Used 40.61G of 15.75G hbm. ...
    Ran out of memory on HBM, the total memory required for HLO temporaries (16.56G) exceeds available HBM (15.75G).

  Raises:
    ConfigError: the message says something else; it is passed on.
  """
  size = r'([\d.]+)([KMGT]?)'
  found = re.search(rf'Used {size} of {size} hbm', text) or re.search(rf'temporaries \({size}\) exceeds available HBM \({size}\)', text)
  if 'RESOURCE_EXHAUSTED' not in text or found is None:
    raise ConfigError(f'the TPU compiler failed, but not for want of memory: {" ".join(text.split())[:300]}')
  used, limit = float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
  return round(used), round(limit), f'the TPU compiler: {used / GIB:.2f} GiB needed of {limit / GIB:.2f} GiB'
