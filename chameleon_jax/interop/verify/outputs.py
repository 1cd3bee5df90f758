"""What two models give, compared: residual streams, logits, codes and pictures; and the limits that hold.

The limits are those the project promises for every layout against torch in float32: logits within 2e-4 of their standard
deviation, equal codes but for ties, pictures within one level of 255.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from chameleon_jax.array_types import Codes, Pictures
from chameleon_jax.interop.verify.forward import Stage
from chameleon_jax.interop.verify.report import Row, judged
from chameleon_jax.interop.verify.tensors import distance

LOGITS_LIMIT = 2e-4  # of the standard deviation
KL_LIMIT = 1e-5  # nats
ACTIVATIONS_LIMIT = 2e-4  # of (the value's own size + the root mean square of its token)
LEVELS_LIMIT = 1  # of 255
PIXELS_LIMIT = 1e-6
TIE = 1e-4


def relative_distance(reference: np.ndarray, other: np.ndarray) -> float:
  """max |a - b| / (|a| + rms of a's last axis): neither a single huge channel nor a value near zero decides alone."""
  reference, other = np.asarray(reference, np.float32), np.asarray(other, np.float32)
  size = np.abs(reference) + np.sqrt(np.mean(np.square(reference), axis=-1, keepdims=True))
  return float(np.max(distance(reference, other) / np.maximum(size, np.finfo(np.float32).tiny)))


class ActivationTrail:
  """Gathers the stages of two forward passes and finds the first that differs."""

  def __init__(self) -> None:
    self._stages: list[dict[str, Any]] = []
    self._first: tuple[bool, str] | None = None  # whether beyond the limit, and where
    self.worst = 0.0

  def add(self, reference: Stage, output: np.ndarray, parts: dict[str, np.ndarray] | None = None) -> None:
    """Compares one stage; `output` [B, T, D] and `parts` are the other model's."""
    relative = relative_distance(reference.output, output)
    largest = float(distance(np.asarray(reference.output, np.float32), np.asarray(output, np.float32)).max())
    self._stages.append({'stage': reference.name, 'max_abs': largest, 'relative': relative})
    self.worst = max(self.worst, relative)
    beyond = not relative <= ACTIVATIONS_LIMIT
    if largest > 0 and (self._first is None or (beyond and not self._first[0])):
      self._first = beyond, reference.name + self._part(reference, parts or {}, beyond)

  def row(self) -> Row:
    """The row of the table."""
    where = '' if self._first is None else self._first[1]
    largest = max((stage['max_abs'] for stage in self._stages), default=0.0)
    where = where and f'{where}; max abs {largest:.3g}'
    details = {'max_abs': largest, 'stages': self._stages}
    good = self.worst <= ACTIVATIONS_LIMIT
    return judged('activations (relative)', self.worst, ACTIVATIONS_LIMIT, where, good=good, details=details)

  @staticmethod
  def _part(reference: Stage, parts: dict[str, np.ndarray], beyond: bool) -> str:
    for name, value in reference.parts.items():
      if name in parts and relative_distance(value, parts[name]) > (ACTIVATIONS_LIMIT if beyond else 0):
        return f', first in {name}'
    return ''


def masked_columns(logits: np.ndarray) -> np.ndarray:
  """bool [V]: columns that hold -inf or the minimum of float32, bfloat16 or float16 in every row (spec model.md 3.4)."""
  values = np.asarray(logits, np.float32)
  return ((values <= -3.3e38) | (values == -65504)).all(axis=(0, 1))


def logits_rows(reference: np.ndarray, other: np.ndarray, *, image_columns: Iterable[int] | None, masked: bool) -> list[Row]:
  """Largest difference on unit scale, and the largest divergence KL(reference | other) of any position.

  Args:
    reference: [B, T, V].
    other: [B, T, V].
    image_columns: the image tokens where they are known: what is masked must be these, all of them.
    masked: whether `reference` may be masked; those columns are left out of all figures.
  """
  skipped = masked_columns(reference) if masked else np.zeros(reference.shape[-1], bool)
  rows = []
  if skipped.any() and image_columns is not None:
    expected = np.zeros(len(skipped), bool)
    expected[list(image_columns)] = True
    wrong = np.flatnonzero(expected != skipped)
    where = ''
    if len(wrong):
      where = f'column {wrong[0]} is {"masked and no image token" if skipped[wrong[0]] else "an image token and not masked"}'
    rows.append(judged('masked columns', f'{int(skipped.sum())} of {len(skipped)}', 'the image tokens', where, good=not where))
  if skipped.all():
    return [*rows, judged('logits', 'nothing to compare', LOGITS_LIMIT, 'every column is masked', good=False)]
  a = np.asarray(reference, np.float32)[..., ~skipped]
  b = np.asarray(other, np.float32)[..., ~skipped]
  with np.errstate(invalid='ignore'):
    gaps, scale = distance(a, b), float(np.std(a, dtype=np.float64))
  scale = scale if 0 < scale < np.inf else 1.0
  at = np.unravel_index(int(np.argmax(gaps)), gaps.shape)
  largest = float(gaps[at]) / scale
  column = int(np.flatnonzero(~skipped)[at[2]])
  where = f'row {at[0]}, position {at[1]}, token {column}' if largest > 0 else ''
  details = {'max_abs': float(gaps[at]), 'standard_deviation': scale, 'columns_skipped': int(skipped.sum())}
  rows.append(judged('logits (unit scale)', largest, LOGITS_LIMIT, where, good=largest <= LOGITS_LIMIT, details=details))
  divergence = _divergence(a, b)
  at = np.unravel_index(int(np.argmax(divergence)), divergence.shape)
  largest = float(divergence[at])
  where = f'row {at[0]}, position {at[1]}' if largest > 0 else ''
  return [*rows, judged('logits (KL, nats)', largest, KL_LIMIT, where, good=largest <= KL_LIMIT)]


def _divergence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """KL(softmax a | softmax b) [B, T] in float64; inf where it is not a number."""
  with np.errstate(invalid='ignore', over='ignore'):
    log_p, log_q = (x.astype(np.float64) - np.max(x, axis=-1, keepdims=True) for x in (a, b))
    log_p, log_q = (x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True)) for x in (log_p, log_q))
    total = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
  return np.maximum(np.nan_to_num(total, nan=np.inf, posinf=np.inf), 0)


def is_tie(z: np.ndarray, codebook: np.ndarray, nearest: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Whether `other` is as near as `nearest`: bool [n] of latents z [n, Z] and codes [n].

  The squared distances may differ by 1e-4, and by no more than moving z by 1e-4 of its length would change: a codebook of tiny
  entries does not excuse everything.
  """
  z, codebook = z.astype(np.float64), codebook.astype(np.float64)
  known = (other >= 0) & (other < len(codebook))
  first, second = codebook[nearest], codebook[np.where(known, other, 0)]
  gap = np.abs(np.square(z - second).sum(-1) - np.square(z - first).sum(-1))
  reach = 2 * np.linalg.norm(z, axis=-1) * np.linalg.norm(first - second, axis=-1)
  return known & (gap <= TIE * np.minimum(1.0, reach))


def codes_row(name: str, codes: Codes, other: Codes, z: np.ndarray, codebook: np.ndarray) -> Row:
  """Share of equal codes [P, n]; what differs passes only where it ties on the latents z [P, n, Z] of the first model."""
  codes, other = np.asarray(codes), np.asarray(other)
  differ = codes != other
  excused = np.zeros_like(differ)
  excused[differ] = is_tie(z[differ], codebook, codes[differ], other[differ])
  wrong = np.argwhere(differ & ~excused)
  details = {'codes': int(codes.size), 'differ': int(differ.sum()), 'ties': int(excused.sum())}
  where = ''
  if len(wrong):
    picture, position = (int(i) for i in wrong[0])
    where = f'picture {picture}, position {position}: {codes[picture, position]} and {other[picture, position]}; '
  if differ.any():
    where += f'{int(excused.sum())} of {int(differ.sum())} differing codes tie'
  return judged(name, f'{1 - differ.mean():.2%} equal', 'equal but for ties', where, good=not len(wrong), details=details)


def constant_offset(codes: Codes, other: Codes, n_codes: int) -> int | None:
  """The constant that turns `codes` into `other`, with or without closing on the codebook; None where 9 in 10 do not agree on one."""
  for difference, bound in ((np.asarray(other) - codes, n_codes), ((np.asarray(other) - codes) % n_codes, n_codes)):
    values, counts = np.unique(difference, return_counts=True)
    best = int(np.argmax(counts))
    if counts[best] >= 0.9 * difference.size and values[best] != 0:
      return int(values[best]) if abs(values[best]) <= bound // 2 else int(values[best]) - bound * int(np.sign(values[best]))
  return None


def pictures_row(name: str, pictures: Pictures, other: Pictures) -> Row:
  """Largest difference in levels of 255 of pictures [P, H, W, 3]."""
  gaps = np.abs(pictures.astype(np.int16) - other.astype(np.int16))
  at = tuple(int(i) for i in np.unravel_index(int(np.argmax(gaps)), gaps.shape))
  largest = int(gaps[at])
  where = f'picture {at[0]}, row {at[1]}, column {at[2]}, channel {at[3]}' if largest else ''
  details = {'values': int(gaps.size), 'differ': int((gaps > 0).sum())}
  return judged(name, largest, LEVELS_LIMIT, where, good=largest <= LEVELS_LIMIT, details=details)
