"""What the shards of a model will hold, settled before anything is written: their number, names, and what the format cannot hold.

Meta keeps one q/k norm per model-parallel rank, ours is per head, so the heads of a rank must agree (spec model.md 1.4, 2.4):

    4 heads, norms A A B B      1 shard: no    2 shards: A | B    4 shards: A | A | B | B

A model that came from Meta goes back into the same shards under the same names, fused tensors and unknown extras included.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from chameleon_jax.config import TransformerConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.dtypes import DTYPES
from chameleon_jax.interop.files.shards import parse_json
from chameleon_jax.interop.lazy import LazyModel, TensorSource, TensorSpec
from chameleon_jax.interop.mapping import META_RULES, Rule, rules_for
from chameleon_jax.interop.meta.files import tree_from
from chameleon_jax.interop.meta.params import QK_NORM_EPS
from chameleon_jax.interop.meta.shards import FUSED, FUSED_NAME, same_bits

TREE = 'consolidated.tree.json'  # rank file without its ending -> its tree, see `files`
ROPE = 'rope.freqs'


@dataclass(frozen=True)
class Extra:
  """A tensor that is no part of the model."""

  spec: TensorSpec
  read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class TransformerPlan:
  """The rank files.

  Attributes:
    config: the network.
    labels: names of the files without ending, one a rank.
    rules: every tensor of the network.
    kinds: our name -> type to store it in.
    fused: Meta's separate name -> the fused tensor it goes into.
    trees: what each file holds, as `PthWriter` takes it.
    extras: of each rank, by name.
  """

  config: TransformerConfig
  labels: tuple[str, ...]
  rules: tuple[Rule, ...]
  kinds: Mapping[str, np.dtype]
  fused: Mapping[str, str]
  trees: tuple[dict[str, Any], ...]
  extras: tuple[Mapping[str, Extra], ...]


def plan_transformer(model: LazyModel, n_shards: int | None, dtype: str | None) -> TransformerPlan | None:
  """The rank files of a model, None without a transformer. Reads its q/k norms.

  Raises:
    CheckpointError: the format cannot hold it, or not in that many shards.
  """
  config, source = model.transformer_config, model.transformer
  where = f"{model.path} cannot be written in Meta's format"
  if dtype is not None and dtype not in DTYPES:
    raise CheckpointError(f'{where}: the type must be one of {", ".join(DTYPES)}, got {dtype!r}')
  if config is None or source is None:
    return None
  if config.qk_norm_eps != QK_NORM_EPS:
    raise CheckpointError(f'{where}: qk_norm_eps is {config.qk_norm_eps}, and the format fixes it at {QK_NORM_EPS}')
  if config.n_heads * config.d_head != config.d_model:
    heads = f'{config.n_heads} heads of {config.d_head} channels'
    raise CheckpointError(f'{where}: {heads} are not d_model {config.d_model}, and the format splits the width among the heads')
  rules = rules_for(META_RULES, config)
  from_meta = model.origin.format == 'meta'
  wanted = n_shards if n_shards is not None else model.origin.n_shards if from_meta else None
  n = _choose(source, config, rules, wanted, where)
  kinds = {rule.ours: source.specs[rule.ours].dtype if dtype is None else DTYPES[dtype] for rule in rules}
  stored = _origin_trees(model) if from_meta else {}
  same = from_meta and n == model.origin.n_shards
  labels = tuple(stored) if same and stored else _labels(n)
  extras = _extras(model, labels, config, same=same, where=where)
  names = {rule.theirs: rule for rule in rules}
  fused = _fused(next(iter(stored.values())) if stored else None, names)
  trees = []
  for label, more in zip(labels, extras):
    base = stored.get(label) if same else next(iter(stored.values()), None)
    specs = _specs(rules, kinds, fused, config, n, where) | {name: extra.spec for name, extra in more.items()}
    tree = {} if base is None else tree_from(base, functools.partial(declared, specs, where), TREE)
    if not isinstance(tree, dict):
      raise CheckpointError(f'{where}: {TREE} of its origin is no tree of a checkpoint; convert it again')
    trees.append(tree | {name: spec for name, spec in specs.items() if name not in tree})
  return TransformerPlan(config, labels, tuple(rules), kinds, fused, tuple(trees), tuple(extras))


def _choose(source: TensorSource, config: TransformerConfig, rules: list[Rule], wanted: int | None, where: str) -> int:
  """The number of shards: as wanted, or the smallest that holds the norms."""
  reasons: dict[int, str] = {}
  for n in range(1, config.n_kv_heads + 1):
    if (reason := _indivisible(config, n)) is not None:
      reasons[n] = reason
  for rule in rules:
    if rule.axis != 'rank':
      continue
    norm = source.read(rule.ours)
    for n in range(1, config.n_kv_heads + 1):
      if n not in reasons and (heads := _unlike(norm, n)) is not None:
        a, b = heads
        reasons[n] = f'{rule.theirs} would have to be the same for heads {a} and {b}, which share one of {n} ranks, and differs'
  possible = [n for n in range(1, config.n_kv_heads + 1) if n not in reasons]
  able = f'it can be held in {", ".join(map(str, possible))}' if possible else 'no number of shards can hold it'
  if wanted is None:
    if not possible:
      raise CheckpointError(f'{where}: {reasons[config.n_kv_heads]}; {able}')
    return possible[0]
  if wanted not in possible:
    reason = reasons.get(wanted) or _indivisible(config, wanted)
    raise CheckpointError(f'{where} with n_shards {wanted}: {reason}; {able}')
  return wanted


def _indivisible(config: TransformerConfig, n: int) -> str | None:
  if n < 1:
    return 'there must be at least one shard'
  counts = {'key/value heads': config.n_kv_heads, 'vocabulary entries': config.vocab_size}
  counts |= {'channels of the width': config.d_model, 'channels of the inner width': config.d_ff}
  return next((f'{count} {what} do not split over {n} shards' for what, count in counts.items() if count % n), None)


def _unlike(norm: np.ndarray, n: int) -> tuple[int, int] | None:
  """Two heads of one rank whose norms [heads, H] differ, bit by bit."""
  a_rank = len(norm) // n
  for head, row in enumerate(norm):
    first = head - head % a_rank
    if not same_bits(row, norm[first]):
      return first, head
  return None


def _labels(n: int) -> tuple[str, ...]:
  return ('consolidated',) if n == 1 else tuple(f'consolidated.{rank:02d}' for rank in range(n))


def _origin_trees(model: LazyModel) -> dict[str, Any]:
  if TREE not in model.origin.files:
    return {}
  trees = parse_json(model.origin.files[TREE], f'{model.path}: {TREE}')
  n = model.origin.n_shards
  if tuple(trees) != _labels(n) and not (n == 1 and tuple(trees) == ('consolidated.00',)):
    raise CheckpointError(f'{model.path}: {TREE} of its origin is not of {n} shards; convert it again')
  return trees


def _names(tree: Any) -> list[str]:
  """Every tensor of a stored tree."""
  found: list[str] = []
  nothing = TensorSpec((), np.dtype('f4'))
  tree_from(tree, lambda name: found.append(name) or nothing, TREE)  # type: ignore[func-returns-value]
  return found


def _fused(tree: Any, names: Mapping[str, Rule]) -> dict[str, str]:
  """Separate name -> fused one, for those that the origin fused."""
  fused: dict[str, str] = {}
  for name in [] if tree is None else _names(tree):
    if match := FUSED_NAME.fullmatch(name):
      fused |= {match[1] + part: name for part in FUSED[match[2]] if match[1] + part in names}
  return fused


def _specs(
    rules: list[Rule], kinds: Mapping[str, np.dtype], fused: Mapping[str, str], config: TransformerConfig, n: int, where: str
) -> dict[str, TensorSpec]:
  """What one rank stores, in reading order."""
  specs: dict[str, TensorSpec] = {}
  for rule in rules:
    shape, kind = list(rule.shape(config)), kinds[rule.ours]
    if isinstance(rule.axis, int):
      shape[rule.axis] //= n
    name = fused.get(rule.theirs, rule.theirs)
    if name in specs:
      if specs[name].dtype != kind:
        raise CheckpointError(f'{where}: {name} joins tensors of type {specs[name].dtype} and {kind}; give one type to store all in')
      shape[0] += specs[name].shape[0]
    specs[name] = TensorSpec(tuple(shape), kind)
  return specs


def declared(specs: Mapping[str, TensorSpec], where: str, name: str) -> TensorSpec:
  """What a tensor that an origin's tree names is now."""
  if name not in specs:
    raise CheckpointError(f'{where}: its origin had a tensor {name[:80]!r}, which is not there any more; convert it again')
  return specs[name]


def _extras(model: LazyModel, labels: tuple[str, ...], config: TransformerConfig, *, same: bool, where: str) -> list[dict[str, Extra]]:
  """Of each rank: those of the origin, and rope.freqs, without which Meta's loader refuses a file (spec model.md 2.2).

  Its content is unused there; shape and type in the released files are not established, so where the origin has none it is
  theta^(-2i/H), i < H/2, in float32. Into another number of shards no other extra can go: how to split it is not known.
  """
  source = model.origin.extras
  per_rank: list[dict[str, Extra]] = [{} for _ in labels]
  seen: dict[str, Extra] = {}
  plain = _plain_keys(model)
  for name in source.specs if model.origin.format == 'meta' else ():
    label, _, rest = name.partition('/')
    if not label.startswith('consolidated'):
      continue
    extra = Extra(source.specs[name], functools.partial(source.read, name))
    if same:
      if label in labels:
        per_rank[labels.index(label)][rest] = extra
      continue
    if rest != ROPE or (ROPE in seen and not _equal(seen[ROPE], extra)):
      reason = 'differs between the shards of its origin' if rest == ROPE else 'is unknown here'
      raise CheckpointError(f'{where} with n_shards {len(labels)}: tensor {rest[:80]!r} {reason}; keep n_shards {model.origin.n_shards}')
    seen[ROPE] = extra
  made = Extra(TensorSpec((config.d_head // 2,), np.dtype('<f4')), lambda: _frequencies(config))
  for label, extras in zip(labels, per_rank):
    if ROPE not in extras and ROPE not in plain.get(label if same else next(iter(plain), ''), ()):
      extras[ROPE] = seen.get(ROPE, made)
  return per_rank


def _plain_keys(model: LazyModel) -> dict[str, set[Any]]:
  """Label -> the keys under which the origin's rank files hold something else than a tensor."""
  if model.origin.format != 'meta':
    return {}
  mark = TensorSpec((), np.dtype('f4'))
  trees = {label: tree_from(node, lambda name: mark, TREE) for label, node in _origin_trees(model).items()}
  return {label: {key for key, value in tree.items() if value is not mark} for label, tree in trees.items() if isinstance(tree, dict)}


def _equal(a: Extra, b: Extra) -> bool:
  return a.spec == b.spec and same_bits(a.read(), b.read())


def _frequencies(config: TransformerConfig) -> np.ndarray:
  exponents = np.arange(0, config.d_head, 2, dtype=np.float64) / config.d_head
  return (config.rope_theta**-exponents).astype('<f4')
