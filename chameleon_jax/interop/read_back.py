"""Compares a checkpoint just written with what it was written from, bit by bit: the last step of a conversion.

`verify` compares any two checkpoints and runs them; this only asks whether writing lost something.
"""

import math
import pathlib

import numpy as np

from chameleon_jax.errors import CheckpointError, DataError
from chameleon_jax.interop.dtypes import cast
from chameleon_jax.interop.lazy import NO_TENSORS, TRANSFORMER_FIELDS, VQGAN_FIELDS, LazyModel
from chameleon_jax.tokens.text import PROBES, TextTokenizer

_BLOCK = 1 << 22  # values compared at a time
_FIELDS = {
    'transformer_config': (*TRANSFORMER_FIELDS, 'max_seq_len'),
    'vqgan_config': VQGAN_FIELDS,
    'vocabulary': ('size', 'n_codes', 'n_sentinels', 'n_reserved'),
}


def compare(model: LazyModel, written: LazyModel, dtype: str | None, target: pathlib.Path) -> None:
  """Compares what was written with what it was written from.

  Raises:
    CheckpointError: names the first thing that differs.
  """
  for part, kept in (('transformer', dtype), ('vqgan', None)):
    ours, theirs = getattr(model, part) or NO_TENSORS, getattr(written, part) or NO_TENSORS
    for name in sorted(ours.specs.keys() | theirs.specs.keys()):
      left_out = name.startswith('decoder/') and written.format == 'huggingface' and name not in theirs.specs
      if not left_out and (name not in ours.specs or name not in theirs.specs):
        raise CheckpointError(f'{target}: the {part} differs from the source in {name}; nothing was kept, please report this')
    for name in ours.specs:
      if name in theirs.specs and not _same(cast(ours.read(name), kept), theirs.read(name)):
        raise CheckpointError(f'{target}: tensor {name} reads back differently; nothing was kept, see whether the disk is sound')
  for part, fields in _FIELDS.items():
    config, stored = getattr(model, part), getattr(written, part)
    for field in fields if config is not None and stored is not None else ():
      if getattr(config, field) != getattr(stored, field):
        what = f'{field} {getattr(config, field)!r} reads back as {getattr(stored, field)!r}'
        raise CheckpointError(f'{target}: {what}; nothing was kept, please report this')
  text, copy = model.text_tokenizer, written.text_tokenizer
  if (text is None) != (copy is None) or (text and copy and any(pieces(text, probe) != pieces(copy, probe) for probe in PROBES)):
    raise CheckpointError(f'{target}: the text tokenizer reads back differently; nothing was kept, please report this')


def pieces(text: TextTokenizer, probe: str) -> list[int] | None:
  """The pieces of a text, None where the tokenizer has none for one of its bytes."""
  try:
    return list(text.encode(probe))
  except DataError:
    return None


def _same(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether b is a, bit by bit, or a in a wider type; compared block by block."""
  if a.shape != b.shape or a.dtype.itemsize > b.dtype.itemsize or (a.dtype != b.dtype and a.dtype.itemsize == b.dtype.itemsize):
    return False
  a = a.astype(b.dtype, copy=False)
  rows = max(1, _BLOCK // max(1, math.prod(a.shape[1:])))
  a, b = (np.atleast_1d(x.view(f'u{x.itemsize}')) for x in (a, b))
  return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))
