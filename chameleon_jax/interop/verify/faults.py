"""Why a tensor of B differs from A's: the known faults of converters are applied to A until one gives B.

    rounded              stored in a smaller type
    qk_not_permuted      rotary channels of q_proj, k_proj in Meta's interleaved order (spec model.md 1.5), or permuted twice
    qk_norm_not_permuted the same for the weights and biases of the q and k norms
    norms_averaged       q and k norms averaged over the model-parallel ranks (spec 1.4)
    norms_one_rank       one rank's norms kept for all heads
    shard_order          shards joined in another order (spec 2.3)
    code_offset          rows of the image tokens (or of the codebook) moved by a constant
    gate_up_swapped, norms_swapped, layer_order, other_tensor   the values of another tensor
    transposed           axes in another order
    other_order          the same values in an order that none of these explains

A is the reference; names choose only which axis is which, the values decide. Every answer was checked on the values; that of
`norms_averaged` to the precision of bfloat16, all others bit for bit. Not found: two faults in one tensor, except the
combinations of the q and k norms.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

from chameleon_jax.interop.verify.report import Finding
from chameleon_jax.interop.verify.tensors import TensorResult

_MAX_SHARDS = 16
_BFLOAT16_STEP = 2.0**-8
_Fault = tuple[str, str]  # short name, the sentence behind the names of the tensors


@dataclasses.dataclass(frozen=True)
class Shift:
  """Rows lo .. hi-1 of B are the rows of A `offset` further down; `wraps` where the range closes on itself."""

  lo: int
  hi: int
  offset: int
  wraps: bool


def interleave(array: np.ndarray, axis: int = -1) -> np.ndarray:
  """Half-split channels to Meta's pairs: [0 1 2 3] of a head -> [0 2 1 3]."""
  return _regroup(array, axis, 2)


def deinterleave(array: np.ndarray, axis: int = -1) -> np.ndarray:
  """Meta's pairs to half-split channels, the inverse: [0 2 1 3] -> [0 1 2 3]."""
  return _regroup(array, axis, array.shape[axis] // 2)


def _regroup(array: np.ndarray, axis: int, rows: int) -> np.ndarray:
  last = np.moveaxis(array, axis, -1)
  turned = np.swapaxes(last.reshape(*last.shape[:-1], rows, -1), -1, -2).reshape(last.shape)
  return np.moveaxis(turned, -1, axis)


def diagnose(name: str, a: np.ndarray, b: np.ndarray, image_tokens: tuple[int, int] | None) -> _Fault | None:
  """The fault that turns `a` into `b`, two different float32 arrays of one shape; None where none of the known ones does.

  `image_tokens` are the first image token and the one behind the last, where the vocabulary is known.
  """
  if rounded := _rounded(a, b):
    return rounded
  leaf = '/'.join(name.split('/')[-2:])
  if leaf.startswith(('q_norm/', 'k_norm/')) and (found := _norms(a, b)):
    return found
  rows = _row_axis(name)
  shift = None if rows is None else find_shift(a, b, rows)
  first, end = image_tokens or (0, 0)
  if shift is not None and (name == 'quantize/embedding' or first <= shift.lo < shift.hi <= end):
    return 'code_offset', _shift_text(shift, 'codes' if name == 'quantize/embedding' else 'image tokens')
  if int(_fingerprints(a, 0).sum()) == int(_fingerprints(b, 0).sum()) and (found := _rearranged(name, a, b)):
    return found
  return None if shift is None else ('code_offset', _shift_text(shift, 'tokens'))


def _rounded(a: np.ndarray, b: np.ndarray) -> _Fault | None:
  for kind in (ml_dtypes.bfloat16, np.float16):
    with np.errstate(over='ignore'):
      name = np.dtype(kind).name
      if np.array_equal(a.astype(kind).astype(np.float32), b):
        return 'rounded', f'A rounded to {name} (compare in the smaller type: --dtype=bfloat16)'
      if np.array_equal(b.astype(kind).astype(np.float32), a):
        return 'rounded', f'what A holds rounded to {name} (compare in the smaller type: --dtype=bfloat16)'
  return None


def _norms(a: np.ndarray, b: np.ndarray) -> _Fault | None:
  """Faults of a norm [heads, H]: averaged over groups of heads, the first of a group kept, either with or without the permutation."""
  heads = len(a)
  for order, turned in (('', a), (', and their channels are in the interleaved order', interleave(a))):
    if order and np.array_equal(turned, b):
      return 'qk_norm_not_permuted', 'channels in the interleaved order: the rotary permutation is missing from the q and k norms'
    for groups in (n for n in range(1, heads) if heads % n == 0):
      members = turned.reshape(groups, heads // groups, -1)
      for member in range(members.shape[1]):
        if np.array_equal(np.repeat(members[:, member], heads // groups, axis=0), b):
          kept = f'head {member}' if groups == 1 else f'one head in {heads // groups}'
          return 'norms_one_rank', f'all heads have the values of {kept} of A: the norms of one rank were kept for the others{order}'
      mean = np.repeat(members.mean(axis=1, dtype=np.float64), heads // groups, axis=0)
      near = _BFLOAT16_STEP * np.abs(turned).max()
      if np.abs(mean - b).max() <= near and np.abs(mean - turned).max() > 4 * near:
        return 'norms_averaged', f'the mean of A over {heads // groups} heads: the norms of the ranks were averaged{order}'
  if np.array_equal(deinterleave(a), b):
    return 'qk_norm_not_permuted', 'channels permuted once more than in A: A lacks the rotary permutation of the norms, or B has it twice'
  return None


def _rearranged(name: str, a: np.ndarray, b: np.ndarray) -> _Fault | None:
  """Faults that move values and change none."""
  if '/attention/' in name and a.ndim == 3:
    axis, rotated = (1 if name.endswith('o_proj') else 2), name.endswith(('q_proj', 'k_proj'))
    for turned, text in (
        (interleave(a, axis), 'channels of each head in the interleaved order: the rotary permutation is missing'),
        (deinterleave(a, axis), 'channels permuted once more than in A: A lacks the rotary permutation, or B has it twice'),
    ):
      if np.array_equal(turned, b):
        return 'qk_not_permuted', text if rotated else 'channels under the rotary permutation, which belongs to queries and keys alone'
  for axis, order in _block_orders(a, b):
    return 'shard_order', f'shards joined in the order {", ".join(map(str, order))} along axis {axis}'
  for axes in itertools.permutations(range(a.ndim)):
    turned = a.transpose(axes)
    if axes != tuple(range(a.ndim)) and turned.shape == b.shape and np.array_equal(turned, b):
      return 'transposed', f'axes in the order {", ".join(map(str, axes))}'
  if _row_axis(name) is not None and (shift := find_shift(a, b, _row_axis(name) or 0)):
    return 'code_offset', _shift_text(shift, 'tokens')
  return 'other_order', 'the same values in another order that no known fault explains'


def _block_orders(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[int, list[int]]]:
  for axis in range(a.ndim):
    prints = _fingerprints(a, axis), _fingerprints(b, axis)
    for n in (n for n in range(2, _MAX_SHARDS + 1) if a.shape[axis] % n == 0):
      theirs, ours = (p.reshape(n, -1).sum(axis=1).tolist() for p in prints)
      if sorted(theirs) != sorted(ours):
        continue
      places = collections.defaultdict(list)
      for place, value in reversed(list(enumerate(theirs))):
        places[value].append(place)
      order = [places[value].pop() for value in ours]
      pieces = np.split(a, n, axis=axis)
      if order != sorted(order) and np.array_equal(np.concatenate([pieces[i] for i in order], axis=axis), b):
        yield axis, order


def _row_axis(name: str) -> int | None:
  """The axis of tokens or codes."""
  return {'embedding': 0, 'lm_head': 1, 'quantize/embedding': 0}.get(name)


def find_shift(a: np.ndarray, b: np.ndarray, axis: int) -> Shift | None:
  """The constant by which the differing rows along `axis` have moved, checked on the values; None where there is none.

  Rows 2 to 5 of six moved by one, closed on themselves:

    a   0 1 2 3 4 5
    b   0 1 5 2 3 4     Shift(2, 6, -1, wraps=True)
  """
  left, right = _fingerprints(a, axis), _fingerprints(b, axis)
  differing = np.flatnonzero(left != right)
  if not len(differing):
    return None
  lo, hi = int(differing[0]), int(differing[-1]) + 1
  n = hi - lo
  place = {value: index for index, value in enumerate(left.tolist())}
  offsets = collections.Counter((place[value] - i) % n for i, value in zip(differing.tolist(), right[differing].tolist()) if value in place)
  best: tuple[int, Shift, np.ndarray, np.ndarray] | None = None
  for offset in {signed for common, _ in offsets.most_common(2) for signed in (common, common - n)}:
    rows = np.arange(lo, hi)
    for wraps, source in ((True, lo + (rows - lo + offset) % n), (False, rows + offset)):
      inside = (source >= 0) & (source < len(left))
      target, origin = rows[inside], source[inside]
      hit = right[target] == left[origin]
      rank = (int(hit.sum()), wraps, -abs(offset))
      if best is None or rank > (best[0], best[1].wraps, -abs(best[1].offset)):
        best = rank[0], Shift(lo, hi, offset, wraps), target[hit], origin[hit]
  if best is None or best[0] < max(2, n - abs(best[1].offset), n / 2):
    return None
  _, shift, target, origin = best
  return shift if np.array_equal(np.take(b, target, axis=axis), np.take(a, origin, axis=axis)) else None


def _shift_text(shift: Shift, what: str) -> str:
  return f'row i holds row i{shift.offset:+d} of A in rows {shift.lo} to {shift.hi - 1}: the {what} are offset by {-shift.offset}'


def _fingerprints(array: np.ndarray, axis: int) -> np.ndarray:
  """uint64 per index of `axis`: the sum over its values' bits, the same in any order of them."""
  bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
  return bits.sum(axis=tuple(i for i in range(array.ndim) if i != axis), dtype=np.uint64)


# ------------------------------------------------------------------------------------ across tensors


def swapped(results: Sequence[TensorResult]) -> dict[str, _Fault]:
  """By name, the tensors of B that hold the values of another tensor of A."""
  owner: dict[str | None, str] = {result.a: result.name for result in results if result.a is not None}
  found: dict[str, _Fault] = {}
  for result in results:
    other = owner.get(result.b) if result.b != result.a and not result.constant else None
    if other is not None:
      found[result.name] = _swap_text(result.name, other)
  return found


def _swap_text(name: str, other: str) -> _Fault:
  (layer, _, leaf), (other_layer, _, other_leaf) = name.partition('/'), other.partition('/')
  pair = {leaf, other_leaf}
  if layer == other_layer and pair == {'feed_forward/gate_proj', 'feed_forward/up_proj'}:
    return 'gate_up_swapped', 'gate_proj and up_proj of the feed-forward are swapped'
  if layer == other_layer and pair == {'attention_norm/weight', 'ffn_norm/weight'}:
    return 'norms_swapped', 'attention_norm and ffn_norm are swapped'
  if leaf == other_leaf and layer.startswith('layers_') and other_layer.startswith('layers_'):
    return 'layer_order', f'the values of {other_layer}: layers are in another order'
  return 'other_tensor', f'the values of {other}'


def findings(faults: dict[str, _Fault]) -> list[Finding]:
  """One sentence for each fault, the tensors that show it gathered."""
  groups: dict[_Fault, list[str]] = collections.defaultdict(list)
  for name, fault in faults.items():
    groups[fault].append(name)
  return [Finding(fault, f'{_names(names)} of B: {text}') for (fault, text), names in groups.items()]


def _names(names: list[str]) -> str:
  kinds = {name.split('/', 1)[-1] if name.startswith('layers_') else name: None for name in names}
  layers = sorted({int(name.split('/')[0].removeprefix('layers_')) for name in names if name.startswith('layers_')})
  shown = ', '.join(list(kinds)[:4]) + (f' and {len(kinds) - 4} more' if len(kinds) > 4 else '')
  if not layers:
    return shown
  return f'{shown} (layer {layers[0]})' if len(layers) == 1 else f'{shown} ({len(layers)} layers from {layers[0]} to {layers[-1]})'


