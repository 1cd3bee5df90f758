"""What this machine can do at most: products and memory, measured in the run whose figures are compared with them.

The ceiling of a type is the best rate of any library that is here (jax, torch, numpy), each at a size where it does well. A rate that no
library reaches may still be possible: a share of these ceilings says how much better a program could be made with what there is.
Knows no model.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_protocol import importable


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """Rates of this machine.

  Attributes:
    flops: type of the operands -> products and sums a second of a large matrix product, best of all libraries.
    read: bytes a second read.
    copy: bytes a second read and written by a copy, both counted.
    details: every rate behind them, by library.
  """

  flops: dict[str, float]
  read: float
  copy: float
  details: dict[str, float]

  def line(self) -> str:
    """One sentence for the page."""
    rates = ', '.join(f'{name} {rate / 1e9:,.0f} GFLOP/s' for name, rate in self.flops.items())
    return f'Ceilings in the same run: matrix product {rates}; memory read {self.read / 1e9:.1f} GB/s, copy {self.copy / 1e9:.1f} GB/s.'


def _best(run: Callable[[], object], turns: int) -> float:
  """Least seconds of a run, the first one aside."""
  run()
  times = []
  for _ in range(turns):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return min(times)


def measure(*, shape: tuple[int, int, int] = (1024, 2048, 2048), n_bytes: int = 1 << 28, turns: int = 8, torch: bool = True) -> Ceilings:
  """Measures the ceilings.

  Args:
    shape: (m, k, n) of the product [m, k] [k, n].
    n_bytes: of the array that is read and copied; well above the caches.
    turns: runs of each; the best counts.
    torch: whether torch takes part, where it is installed.
  """
  found = _jax_products(shape, turns) | _jax_memory(n_bytes, turns)
  if jax.default_backend() == 'cpu':
    found |= _numpy_memory(n_bytes, turns)
    if torch and importable('torch'):
      found |= _torch_rates(shape, n_bytes, turns)
  flops = {kind: max(rate for name, rate in found.items() if name.startswith(f'product {kind}')) for kind in ('float32', 'bfloat16')}
  read, copy = (max(rate for name, rate in found.items() if name.startswith(kind)) for kind in ('read', 'copy'))
  return Ceilings(flops, read, copy, found)


def _jax_products(shape: tuple[int, int, int], turns: int) -> dict[str, float]:
  m, k, n = shape
  found = {}
  for kind in ('float32', 'bfloat16'):
    a, b = (jnp.ones(side, kind) for side in ((m, k), (k, n)))
    product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32))
    seconds = _best(lambda: product(a, b).block_until_ready(), turns)  # noqa: B023
    found[f'product {kind}, jax'] = 2 * m * k * n / seconds
  return found


def _jax_memory(n_bytes: int, turns: int) -> dict[str, float]:
  x = jnp.ones(n_bytes // 4, jnp.float32)
  copied = jax.jit(lambda x: x + 1)
  read = _best(lambda: jnp.max(x).block_until_ready(), turns)
  copy = _best(lambda: copied(x).block_until_ready(), turns)
  rows = x.reshape(-1, 4096)
  row = jnp.ones((1, rows.shape[0]), jnp.float32)
  vector = jax.jit(jnp.matmul)
  product = _best(lambda: vector(row, rows).block_until_ready(), turns)
  return {'read, jax': n_bytes / read, 'read by a product of one row, jax': n_bytes / product, 'copy, jax': 2 * n_bytes / copy}


def _numpy_memory(n_bytes: int, turns: int) -> dict[str, float]:
  x = np.ones(n_bytes // 4, np.float32)
  y = np.empty_like(x)
  seconds = _best(lambda: np.copyto(y, x), turns)
  return {'copy, numpy (one core)': 2 * n_bytes / seconds}


def _torch_rates(shape: tuple[int, int, int], n_bytes: int, turns: int) -> dict[str, float]:
  import torch

  m, k, n = shape
  found: dict[str, float] = {}
  with torch.inference_mode():
    for kind in ('float32', 'bfloat16'):
      dtype: Any = getattr(torch, kind)
      a, b = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
      found[f'product {kind}, torch'] = 2 * m * k * n / _best(lambda: torch.nn.functional.linear(a, b), turns)  # noqa: B023
    x = torch.ones(n_bytes // 4)
    y = torch.empty_like(x)
    found['read, torch'] = n_bytes / _best(x.max, turns)
    found['copy, torch'] = 2 * n_bytes / _best(lambda: y.copy_(x), turns)
    rows, vector = x.view(-1, 4096), torch.ones(1, 4096)
    found['read by a product of one row, torch'] = n_bytes / _best(lambda: torch.nn.functional.linear(vector, rows), turns)
  return found
