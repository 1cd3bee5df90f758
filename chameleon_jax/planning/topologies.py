"""Machines to plan for: accelerators by name, how many, and how they are joined. Numbers only, no device is asked.

    v5e-64  v6e-256     TPU slices; the number counts chips
    v5p-16  v4-32       TPU slices; here Google's names count TensorCores, two a chip: v5p-16 has 8 chips
    v5p:2x2x4           a slice by its shape in chips
    8xh100  1xh200      GPUs, eight a node; 64xh100 is eight nodes

Sources. TPU: docs.cloud.google.com/tpu/docs/v5e, /v6e, /v5p, /v4 (peak bfloat16, memory, interconnect of a chip; the "bidirectional"
figure is halved here). GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and L4, dense bfloat16. Between nodes of
A100, H100 and H200 one InfiniBand port a GPU is taken: 200 Gbit/s for A100 (DGX A100), 400 Gbit/s for the others. Memory of a
TPU is what its compiler allows a program (its own message), of a GPU what the driver shows.

Does not know: models, meshes, or how much of a rate a program reaches (`speed.py`).
"""

import dataclasses
import difflib
import math
import re

from chameleon_jax.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator. Rates are the makers' peaks.

  Attributes:
    name: short name.
    kind: 'tpu' or 'gpu'.
    memory: bytes a program may use; on a GPU all there is.
    flops: bfloat16 products and sums a second, dense.
    hbm: bytes a second of its memory.
    link: bytes a second one way over all its fast links together (ICI, NVLink).
    network: bytes a second one way to another node or slice.
    dims: dimensions of the torus of a TPU; 1 for a switch.
    per_domain: chips that the fast links join at most.
    cores: what the number in the slice's name counts of one chip.
  """

  name: str
  kind: str
  memory: int
  flops: float
  hbm: float
  link: float
  network: float
  dims: int
  per_domain: int
  cores: int = 1


CHIPS: dict[str, Chip] = {
  chip.name: chip
  for chip in (
    Chip('v4', 'tpu', round(30.75 * GIB), 275e12, 1228e9, 300e9, 3e9, dims=3, per_domain=4096, cores=2),
    Chip('v5e', 'tpu', round(15.75 * GIB), 197e12, 819e9, 200e9, 3e9, dims=2, per_domain=256),
    Chip('v5p', 'tpu', round(95.74 * GIB), 459e12, 2765e9, 600e9, 6e9, dims=3, per_domain=6144, cores=2),
    Chip('v6e', 'tpu', round(31.25 * GIB), 918e12, 1638e9, 400e9, 6e9, dims=2, per_domain=256),
    Chip('a100', 'gpu', round(79.25 * GIB), 312e12, 2039e9, 300e9, 25e9, dims=1, per_domain=8),
    Chip('h100', 'gpu', round(79.65 * GIB), 989e12, 3350e9, 450e9, 50e9, dims=1, per_domain=8),
    Chip('h200', 'gpu', round(140.4 * GIB), 989e12, 4800e9, 450e9, 50e9, dims=1, per_domain=8),
    Chip('l4', 'gpu', round(22.5 * GIB), 121e12, 300e9, 32e9, 3e9, dims=1, per_domain=8),
  )
}
_ALIASES = {'v5litepod': 'v5e', 'v5lite': 'v5e', 'trillium': 'v6e', 'a100-80gb': 'a100'}

# Chips of a slice -> its shape, as Google offers them.
_SHAPES_2D: dict[int, tuple[int, ...]] = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_SHAPES_3D: dict[int, tuple[int, ...]] = {
  4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8), 512: (8, 8, 8),
  1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many chips of one kind.

  Attributes:
    name: as the user wrote it, in lower case.
    chip: each of them.
    n_chips: how many.
    shape: of a TPU slice in chips; empty for GPUs.
  """

  name: str
  chip: Chip
  n_chips: int
  shape: tuple[int, ...] = ()

  @property
  def memory(self) -> int:
    """Bytes of one chip."""
    return self.chip.memory

  @property
  def compiler_name(self) -> str:
    """What `jax.experimental.topologies` calls a TPU slice."""
    return f'{self.chip.name}:{"x".join(map(str, self.shape))}'

  def __str__(self) -> str:
    what = f'TPU {self.chip.name}' if self.chip.kind == 'tpu' else self.chip.name.upper()
    shape = f' ({"x".join(map(str, self.shape))})' if self.shape else ''
    return f'{self.n_chips} x {what}{shape}, {self.memory / GIB:.2f} GiB each'

  def group_bandwidth(self, members: int, stride: int) -> float:
    """Bytes a second, one way, at which each chip of a group takes part in a ring or torus of its group.

    A group is `members` chips, `stride` apart in the order of devices. Inside a slice a group that is the whole slice uses all
    links of a chip, a part of it those of one dimension. Across nodes every chip of the group has its own port: a node with k
    members receives over k ports what all of them need.

    Args:
      members: chips of the group.
      stride: distance of neighbours in the order of devices.
    """
    if members == 1:
      return math.inf
    chip = self.chip
    if members * stride <= chip.per_domain:
      whole = members == self.n_chips or chip.dims == 1
      return chip.link if whole else chip.link / chip.dims
    together = max(1, chip.per_domain // stride)
    return min(chip.link, chip.network * together)


def parse_topology(text: str) -> Topology:
  """Reads a name such as `v5e-64`, `v5p:2x2x4` or `8xh100`.

  Raises:
    ConfigError: no such chip (names the nearest), or no slice of that size (names the sizes).
  """
  name = text.strip().lower()
  shaped = re.fullmatch(r'([a-z0-9]+):(\d+(?:x\d+)*)', name)
  slice_ = re.fullmatch(r'([a-z0-9]+)-(\d+)', name)
  gpus = re.fullmatch(r'(?:(\d+)x)?([a-z][a-z0-9-]*)', name)
  if shaped and (chip := _chip(shaped[1])) is not None and chip.kind == 'tpu':
    shape = tuple(int(side) for side in shaped[2].split('x'))
    if len(shape) != chip.dims or min(shape) < 1:
      raise ConfigError(f'topology {text!r}: a slice of {chip.name} has {chip.dims} sides, such as {chip.name}:{_example(chip)}')
    return Topology(name, chip, math.prod(shape), shape)
  if slice_ and (chip := _chip(slice_[1])) is not None and chip.kind == 'tpu':
    return _slice(text, name, chip, int(slice_[2]))
  if gpus and (chip := _chip(gpus[2])) is not None and chip.kind == 'gpu':
    n = int(gpus[1] or 1)
    if n < 1 or (n > chip.per_domain and n % chip.per_domain):
      raise ConfigError(f'topology {text!r}: more than {chip.per_domain} GPUs come in nodes of {chip.per_domain}')
    return Topology(f'{n}x{chip.name}', chip, n)
  known = known_names()
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
  chips = ', '.join(CHIPS)
  raise ConfigError(f'unknown topology {text!r}; the nearest known one is {near!r}. Chips: {chips}; forms: v5e-64, v5p:2x2x4, 8xh100')


def known_names() -> list[str]:
  """Slices of every size on offer, and GPUs up to 64 nodes."""
  return [name for chip in CHIPS.values() for name in _names(chip)]


def larger_topologies(topology: Topology) -> list[Topology]:
  """Machines with more of the same chip, ascending, up to 16 times as many."""
  machines = [parse_topology(name) for name in _names(topology.chip)]
  return [machine for machine in machines if topology.n_chips < machine.n_chips <= 16 * topology.n_chips]


def _names(chip: Chip) -> list[str]:
  if chip.kind == 'tpu':
    return [f'{chip.name}-{n * chip.cores}' for n in _shapes(chip)]
  return [f'{n}x{chip.name}' for n in (1, 2, 4, *(8 * 2**k for k in range(7)))]


def _chip(name: str) -> Chip | None:
  return CHIPS.get(_ALIASES.get(name, name))


def _shapes(chip: Chip) -> dict[int, tuple[int, ...]]:
  return _SHAPES_2D if chip.dims == 2 else _SHAPES_3D


def _example(chip: Chip) -> str:
  return 'x'.join(map(str, _shapes(chip)[16]))


def _slice(text: str, name: str, chip: Chip, number: int) -> Topology:
  shapes = _shapes(chip)
  n_chips, rest = divmod(number, chip.cores)
  if rest or n_chips not in shapes:
    nearest = min(shapes, key=lambda n: abs(n - number / chip.cores))
    sizes = ', '.join(f'{chip.name}-{n * chip.cores}' for n in shapes)
    raise ConfigError(f'topology {text!r}: no such slice; the nearest is {chip.name}-{nearest * chip.cores} of {sizes}')
  return Topology(name, chip, n_chips, shapes[n_chips])
