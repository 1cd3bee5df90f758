"""Two sets of tensors compared one tensor at a time: hashes, and how far apart those are whose hashes differ.

A hash is sha256 over the values in our tree's layout, row-major, as little-endian float32. Widening bfloat16 or float16 is
exact, so a tensor and its copy in a wider type have one hash; float64 is rounded. Comparing 'in bfloat16' rounds both sides
first: for a folder that was stored smaller than its source. The sign of a zero counts, as every bit does.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from chameleon_jax.config import Dtype
from chameleon_jax.interop.lazy import TensorSource
from chameleon_jax.interop.verify.report import Row, judged

_CHUNK = 1 << 22  # values


@dataclasses.dataclass(frozen=True)
class TensorResult:
  """One name on both sides.

  Attributes:
    a, b: the hashes, None where that side has no such tensor.
    max_abs: the largest difference; inf where the shapes differ, a side lacks the tensor, or it is not finite.
    at: index of the largest difference.
    scale: largest magnitude in A.
    constant: whether B's values are all the same, so that its hash tells nothing.
    remark: why the values were not compared.
  """

  name: str
  a: str | None
  b: str | None
  max_abs: float = 0.0
  at: tuple[int, ...] = ()
  scale: float = 0.0
  constant: bool = False
  remark: str = ''

  def passes(self, tolerance: float) -> bool:
    """Whether the values are bitwise equal or, with a tolerance above 0, off by at most that share of A's largest magnitude."""
    return (self.a == self.b) or (tolerance > 0 and self.max_abs <= tolerance * self.scale)


def normalised(array: np.ndarray, dtype: Dtype) -> np.ndarray:
  """float32 values, rounded to `dtype` first; a copy only where the type asks for one."""
  with np.errstate(over='ignore', invalid='ignore'):
    if dtype == 'bfloat16':
      array = np.asarray(array).astype(ml_dtypes.bfloat16)
    return np.asarray(array).astype('<f4', copy=False)


def sha256(array: np.ndarray, dtype: Dtype) -> str:
  """Hash of the values, see the head of this file."""
  digest = hashlib.sha256()
  for chunk in _chunks(array, dtype):
    digest.update(chunk.data)
  return digest.hexdigest()


def compare_tensor(name: str, left: np.ndarray, right: np.ndarray, dtype: Dtype) -> TensorResult:
  """Hashes both tensors and measures their difference, a few million values at a time."""
  if left.shape != right.shape:
    remark = f'{name} has shape {list(left.shape)} in A and {list(right.shape)} in B'
    return TensorResult(name, sha256(left, dtype), sha256(right, dtype), max_abs=float('inf'), remark=remark)
  digests = hashlib.sha256(), hashlib.sha256()
  largest, at, start, scale = 0.0, 0, 0, 0.0
  low, high = np.float32('inf'), np.float32('-inf')
  for a, b in zip(_chunks(left, dtype), _chunks(right, dtype)):
    digests[0].update(a.data)
    digests[1].update(b.data)
    difference = distance(a, b)
    place = int(np.argmax(difference))
    if difference[place] > largest:
      largest, at = float(difference[place]), start + place
    scale = max(scale, float(np.max(np.abs(a))))
    low, high = min(low, b.min()), max(high, b.max())
    start += len(a)
  index = tuple(int(i) for i in np.unravel_index(at, left.shape)) if largest else ()
  hashes = digests[0].hexdigest(), digests[1].hexdigest()
  return TensorResult(name, *hashes, max_abs=largest, at=index, scale=scale, constant=bool(low == high))


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """|a - b| of float32 arrays; 0 where the bits are equal, inf where either is not finite and they are not."""
  with np.errstate(invalid='ignore', over='ignore'):
    return np.where(a.view(np.uint32) == b.view(np.uint32), np.float32(0), np.nan_to_num(np.abs(a - b), nan=np.inf, posinf=np.inf))


def compare_sources(
    a: TensorSource, b: TensorSource, dtype: Dtype, *, inspect: Callable[[str, np.ndarray, np.ndarray], None]
) -> list[TensorResult]:
  """Every name of either side in A's order, one tensor of each in memory; `inspect` sees those of equal shape that differ."""
  results = []
  for name in [*a.specs, *(name for name in b.specs if name not in a.specs)]:
    if name not in b.specs or name not in a.specs:
      one, two = (sha256(source.read(name), dtype) if name in source.specs else None for source in (a, b))
      results.append(TensorResult(name, one, two, max_abs=float('inf'), remark=f'{"A" if one is None else "B"} lacks {name}'))
      continue
    left, right = a.read(name), b.read(name)
    result = compare_tensor(name, left, right, dtype)
    if result.a != result.b and left.shape == right.shape:
      inspect(name, normalised(left, dtype), normalised(right, dtype))
    results.append(result)
    del left, right
  return results


def tensor_row(part: str, results: list[TensorResult], tolerance: float) -> Row:
  """The row of one part: how many hashes are equal, the first that is not, the worst difference."""
  differing = [result for result in results if result.a != result.b]
  failing = [result for result in differing if not result.passes(tolerance)]
  where = ''
  details: dict[str, Any] = {'equal': len(results) - len(differing), 'differ': len(differing), 'beyond_tolerance': len(failing)}
  if differing:
    first, worst = (failing or differing)[0], max(differing, key=lambda result: result.max_abs)
    place = f' at {list(worst.at)}' if worst.at else ''
    where = f'{first.remark or first.name}; worst {worst.name}, max abs {worst.max_abs:.3g}{place}'
    details |= {'first': first.name, 'worst': worst.name, 'max_abs': worst.max_abs, 'names': [result.name for result in differing]}
  limit = '0 differ' if tolerance == 0 else f'0 off by more than {tolerance:.3g} of the largest value'
  value = f'{len(results) - len(differing)} equal, {len(differing)} differ'
  return judged(f'{part} tensors', value, limit, where, good=not failing, details=details)


def _chunks(array: np.ndarray, dtype: Dtype) -> Iterator[np.ndarray]:
  flat = np.asarray(array).reshape(-1)
  for start in range(0, flat.size, _CHUNK):
    yield np.ascontiguousarray(normalised(flat[start : start + _CHUNK], dtype))
