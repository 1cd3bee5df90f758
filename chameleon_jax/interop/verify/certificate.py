"""The parity certificate: two checkpoints of any format compared, or one with golden values (table of keys: `verify.golden`).

    configs         sizes, place of the norms, epsilons, rotary base
    tensors         sha256 of each, see `verify.tensors`
    activations     residual stream behind the embedding and behind each layer
    logits          float32, image columns included: largest difference on unit scale, divergence
    codes           of the same pictures; unequal ones pass only where two codes tie
    pictures        decoded from the same codes
    vocabulary      names, ids, code tables, text pieces
    preprocessing   reported; fails only where both checkpoints declare one and they differ

Differing hashes fail by default, however small the difference is (`tolerance`). A part that only one side has fails, unless
`partial` is given. One part is excused without being asked: the picture decoder, which no port of Hugging Face holds. The verdict
names whatever was there and not compared, so a plain pass is one of everything that either side holds. Tensors are read one at a
time; the network runs stage by stage (`verify.forward`), where memory allows. Facts behind the checks: spec model.md 1.3 to 1.6,
4.5, 7.2, 9.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from chameleon_jax.array_types import Tokens
from chameleon_jax.config import Dtype
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.lazy import TRANSFORMER_FIELDS, VQGAN_FIELDS, LazyModel, TensorSource
from chameleon_jax.interop.verify import faults as verify_faults
from chameleon_jax.interop.verify import forward as verify_forward
from chameleon_jax.interop.verify import golden as verify_golden
from chameleon_jax.interop.verify import images as verify_images
from chameleon_jax.interop.verify import tensors as verify_tensors
from chameleon_jax.interop.verify import vocabulary as verify_vocabulary
from chameleon_jax.interop.verify.golden import Golden
from chameleon_jax.interop.verify.outputs import ActivationTrail, logits_rows
from chameleon_jax.interop.verify.repairs import explain_logits
from chameleon_jax.interop.verify.report import MISSING, Finding, Report, Row, judged, lone, not_compared

Activations = Literal['auto', 'yes', 'no']
_DECODER = ('decoder/', 'post_quant_conv/')  # of no use without the decoder, so early files of the port may lack it
_ROWS, _LENGTH = 2, 32  # of the tokens that are run


def verify(
    a: LazyModel,
    b: LazyModel | None = None,
    *,
    golden: str | os.PathLike[str] | None = None,
    dtype: Dtype = 'float32',
    activations: Activations = 'auto',
    tolerance: float = 0.0,
    partial: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> Report:
  """Compares B with A, and each of them with the golden values.

  Args:
    a: the reference.
    b: what is verified; may be None where golden values are given.
    golden: .npz file.
    dtype: weights of both sides are rounded to this type before they are hashed and run; all computing is float32.
    activations: whether to run the networks; 'auto' asks whether they fit into the memory that is free.
    tolerance: largest difference of a tensor, as a share of A's largest magnitude, that passes although the hashes differ.
    partial: compare what both have, and pass over parts that only one side has.
    log: gets a line before each longer piece of work.

  Raises:
    CheckpointError: there is nothing to compare with, a file is damaged, or the golden values do not fit the model.
  """
  if b is None and golden is None:
    raise CheckpointError('there is nothing to compare with: give a second checkpoint or golden values (--golden=FILE)')
  values = None if golden is None else verify_golden.load_golden(pathlib.Path(golden))
  if values is not None:
    for model in [a] if b is None else [a, b]:
      verify_golden.check_fit(values, model)
  run = _Run(a, b, values, dtype, tolerance, partial, log)
  if b is not None:
    run.compare_configs(b)
    run.compare_tensors(b)
  run.compare_vocabularies()
  run.forward(activations)
  if not any(row.status != 'info' and row.value != MISSING for row in run.rows):
    raise CheckpointError(f'{a.path} has no part in common with {b.path if b is not None else golden}; there is nothing to compare')
  notes = [f'{label}: {note}' for label, model in run.models for note in model.notes]
  names = [f'{model.path} ({model.format})' for _, model in run.models]
  return Report(
      a=names[0],
      b=names[1] if b is not None else None,
      golden=None if golden is None else str(golden),
      dtype=dtype,
      rows=run.rows,
      findings=run.findings,
      notes=notes,
      tensors=run.hashes,
  )


class _Run:
  """Rows and findings as they come."""

  def __init__(
      self,
      a: LazyModel,
      b: LazyModel | None,
      golden: Golden | None,
      dtype: Dtype,
      tolerance: float,
      partial: bool,
      log: Callable[[str], None],
  ) -> None:
    self.a, self.b, self.golden, self.dtype, self.tolerance, self.partial, self.log = a, b, golden, dtype, tolerance, partial, log
    self.models = [('A', a)] + ([('B', b)] if b is not None else [])
    self.rows: list[Row] = []
    self.findings: list[Finding] = []
    self.hashes: dict[str, dict[str, Any]] = {}
    self._transformer_explained = False  # by its config or its tensors, so that no trial is needed

  # ------------------------------------------------------------------------------ configs and tensors

  def compare_configs(self, b: LazyModel) -> None:
    """One row for each network that both have."""
    for part, fields, one, two in (
        ('transformer', TRANSFORMER_FIELDS, self.a.transformer_config, b.transformer_config),
        ('image tokenizer', VQGAN_FIELDS, self.a.vqgan_config, b.vqgan_config),
    ):
      if one is None or two is None:
        self.rows.append(_absent(f'{part} config', part, one is None, two is None, partial=self.partial))
        continue
      differing = [name for name in fields if getattr(one, name) != getattr(two, name)]
      where = ', '.join(f'{name}: {getattr(one, name)} in A, {getattr(two, name)} in B' for name in differing)
      value = f'{len(fields) - len(differing)} of {len(fields)} equal'
      self.rows.append(judged(f'{part} config', value, 'equal', where, good=not differing))
      if 'norm_position' in differing:
        places = f'{one.norm_position!r} in A and {two.norm_position!r} in B'  # type: ignore[union-attr]
        self.findings.append(Finding('norm_position', f'the norms of a layer stand in other places, norm_position is {places}'))
        self._transformer_explained = True

  def compare_tensors(self, b: LazyModel) -> None:
    """Hashes of both networks, and what explains those that differ."""
    images = _image_tokens(self.a)
    for part, one, two in (('transformer', self.a.transformer, b.transformer), ('image tokenizer', self.a.vqgan, b.vqgan)):
      if one is None or two is None:
        continue
      self.log(f'hashing the tensors of the {part}')
      if part == 'image tokenizer':
        one, two = self._without_lone_decoder(one, two)
      faults: dict[str, tuple[str, str]] = {}

      def inspect(name: str, left: np.ndarray, right: np.ndarray) -> None:
        if fault := verify_faults.diagnose(name, left, right, images):
          faults[name] = fault  # noqa: B023

      results = verify_tensors.compare_sources(one, two, self.dtype, inspect=inspect)
      self.rows.append(verify_tensors.tensor_row(part, results, self.tolerance))
      self.hashes[part] = {result.name: {'a': result.a, 'b': result.b} for result in results}
      found = verify_faults.findings({**faults, **verify_faults.swapped(results)})
      self.findings += found
      self._transformer_explained |= bool(found) and part == 'transformer'

  def _without_lone_decoder(self, one: TensorSource, two: TensorSource) -> tuple[TensorSource, TensorSource]:
    """Leaves the decoder out where only one side has one, with a row that says so."""
    has = [any(name.startswith('decoder/') for name in source.specs) for source in (one, two)]
    if has[0] == has[1]:
      return one, two
    self.rows.append(not_compared('picture decoder', f'{"B" if has[0] else "A"} holds none', skipped='picture decoder'))
    both = set(one.specs) & set(two.specs)
    kept = [
        TensorSource({name: spec for name, spec in source.specs.items() if name in both or not name.startswith(_DECODER)}, source.read)
        for source in (one, two)
    ]
    return kept[0], kept[1]

  # ----------------------------------------------------------------------- vocabulary, preprocessing

  def compare_vocabularies(self) -> None:
    """Id maps, code tables, text pieces and preprocessing."""
    for label, model in self.models:
      self._extend(*verify_vocabulary.own_map_rows(label, model))
    if self.b is not None:
      self._extend(*verify_vocabulary.shared_map_rows(self.a, self.b, partial=self.partial))
    row, findings = verify_vocabulary.preprocessing_row(self.a, self.b)
    self._extend([row], findings)

  # -------------------------------------------------------------------------------------- networks

  def forward(self, activations: Activations) -> None:
    """Activations, logits, codes and pictures."""
    reason = self._why_not(activations)
    if reason:
      self.rows.append(not_compared('activations, logits, codes', reason, skipped='activations, logits, codes'))
      return
    if self.b is not None and _shapes(self.a.transformer) == _shapes(self.b.transformer) is not None:
      self._compare_transformers(self.b)
    elif self.b is not None and self.a.transformer is not None and self.b.transformer is not None:
      self.rows.append(not_compared('activations, logits', 'the shapes of the tensors differ', skipped='activations, logits'))
    if self.b is not None:
      self._extend(*verify_images.compare_models(self.a, self.b, self.dtype, log=self.log))
    if self.golden is None:
      return
    for label, model in self.models:
      self._golden_transformer(label, model, self.golden)
      self._extend(*verify_images.compare_golden(label, model, self.golden, self.dtype, partial=self.partial, log=self.log))
    if self.golden.ignored:
      keys = ', '.join(self.golden.ignored)
      self.rows.append(not_compared('golden values', f'unknown keys: {keys}', skipped=f'unknown golden values ({keys})'))

  def _why_not(self, activations: Activations) -> str:
    if activations == 'no':
      return 'switched off (--activations=no)'
    tokens = self.golden.get('tokens') if self.golden is not None else None
    n_tokens = _ROWS * _LENGTH if tokens is None else tokens.size
    needed, free = max(verify_forward.bytes_needed(model, n_tokens) for _, model in self.models), verify_forward.memory_available()
    if activations == 'yes' or free is None or needed <= free:
      return ''
    return f'running the model needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free (--activations=yes runs it all the same)'

  def _compare_transformers(self, b: LazyModel) -> None:
    self.log('running both transformers')
    tokens = _test_tokens(self.a)
    trail = ActivationTrail()
    for left, right in zip(verify_forward.run_stages(self.a, tokens, self.dtype), verify_forward.run_stages(b, tokens, self.dtype)):
      if left.name != 'lm_head':
        trail.add(left, right.output, dict(right.parts))
        continue
      rows = logits_rows(left.output, right.output, image_columns=None, masked=False)
      self.rows += [trail.row(), *rows]
      if not self._transformer_explained and any(row.status == 'fail' for row in rows):
        images = _image_tokens(b)
        self.findings += explain_logits(b, 'B', tokens, self.dtype, target=left.output, image_tokens=images)

  def _golden_transformer(self, label: str, model: LazyModel, golden: Golden) -> None:
    tokens, target = golden.get('tokens'), golden.get('logits')
    if tokens is None or (target is None and not any(name.startswith('hidden_') for name in golden.values)):
      return
    if model.transformer is None:
      where = f'{label} holds no transformer, the golden values are of one'
      self.rows.append(lone(f'{label}, golden: transformer', 'transformer', where, partial=self.partial))
      return
    self.log(f'running the transformer of {label} on the golden tokens')
    trail, found = ActivationTrail(), False
    logits = None
    for stage in verify_forward.run_stages(model, tokens, self.dtype):
      logits = stage.output
      key = 'hidden_0' if stage.name == 'embedding' else f'hidden_{int(stage.name[7:]) + 1}' if stage.name.startswith('layers_') else ''
      if (hidden := golden.get(key)) is not None:
        trail.add(verify_forward.Stage(stage.name, np.asarray(hidden, np.float32)), stage.output)
        found = True
    rows = [trail.row()] if found else []
    if target is not None and logits is not None:
      images = _image_tokens(model)
      columns = None if images is None else range(*images)
      rows += logits_rows(target, logits, image_columns=columns, masked=True)
      if any(row.status == 'fail' for row in rows):
        self.findings += explain_logits(model, label, tokens, self.dtype, target=target, image_tokens=images)
    self.rows += [dataclasses.replace(row, name=f'{label}, golden: {row.name}') for row in rows]

  def _extend(self, rows: list[Row], findings: list[Finding]) -> None:
    self.rows += rows
    self.findings += [finding for finding in findings if finding not in self.findings]


def _absent(name: str, part: str, a_lacks: bool, b_lacks: bool, *, partial: bool) -> Row:
  a_part = f'{"an" if part[0] in "aeiou" else "a"} {part}'
  if a_lacks and b_lacks:
    return not_compared(name, f'neither side holds {a_part}')
  return lone(name, part, f'only {"B" if a_lacks else "A"} holds {a_part}', partial=partial)


def _shapes(source: TensorSource | None) -> dict[str, tuple[int, ...]] | None:
  return None if source is None else {name: tuple(spec.shape) for name, spec in source.specs.items()}


def _test_tokens(model: LazyModel) -> Tokens:
  """Ids [2, 32] from the whole vocabulary, image tokens included; always the same."""
  assert model.transformer_config is not None
  config = model.transformer_config
  return np.random.default_rng(0).integers(0, config.vocab_size, (_ROWS, min(_LENGTH, config.max_seq_len)), dtype=np.int32)


def _image_tokens(model: LazyModel) -> tuple[int, int] | None:
  """First image token and the one behind the last; None where they are unknown or no single range."""
  table = verify_vocabulary.code_table(model)
  if table is None or int(table.max()) - int(table.min()) + 1 != len(table):
    return None
  return int(table.min()), int(table.max()) + 1
