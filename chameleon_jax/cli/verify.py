"""Compares two checkpoints of any format, or one with golden values: the parity certificate.

    chameleon verify models/7b models/7b-hf
    chameleon verify runs/sft/model exported --output=report.json
    chameleon verify models/7b --tokenizer_a=tokenizer --golden=golden.npz

A is the reference. Tensors are hashed one at a time in our layout, float32; then both networks run: activations of
each layer, logits, codes of pictures, decoded pictures; then vocabularies and preprocessing. One differing bit fails
(--tolerance, --dtype=bfloat16). The table tells where a failure starts, and the fault that it looks like. A part that only
one of them has fails as well, unless --partial is given; the picture decoder, which the port never has, does not. The verdict
names what was not compared. Exit code 1 when a check fails. The keys of a golden file: chameleon_jax/interop/verify/golden.py.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from chameleon_jax.chameleon import shipped_path
from chameleon_jax.errors import CheckpointError, ConfigError
from chameleon_jax.interop.convert import open_checkpoint
from chameleon_jax.interop.lazy import LazyModel
from chameleon_jax.interop.verify import verify


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('golden', None, '.npz file of golden values to compare with')
  flags.DEFINE_string('output', None, 'file to write the certificate to, as JSON')
  flags.DEFINE_string('tokenizer_a', None, 'tokenizer folder of A, where it is neither in A nor beside it')
  flags.DEFINE_string('tokenizer_b', None, 'tokenizer folder of B')
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'type that the weights of both are rounded to before they are compared')
  flags.DEFINE_enum('activations', 'auto', ['auto', 'yes', 'no'], 'run the networks; auto: where memory allows')
  flags.DEFINE_float('tolerance', 0.0, "difference of a tensor, as a share of A's largest value, that still passes", lower_bound=0.0)
  flags.DEFINE_bool('partial', False, 'compare what both have; parts that only one has do not fail, and the verdict names them')


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns 1 where a check failed."""
  values = flags.FLAGS
  paths = list(argv[1:])
  if not paths:
    raise ConfigError('name the checkpoints: chameleon verify A B, or chameleon verify A --golden=FILE')
  if len(paths) > 2:
    raise ConfigError(f'unexpected argument {paths[2]!r}; verify compares two checkpoints')
  if len(paths) == 1 and values.golden is None:
    raise ConfigError(f'there is nothing to compare {paths[0]} with: name a second checkpoint, or --golden=FILE')
  if len(paths) == 1 and values.tokenizer_b is not None:
    raise ConfigError('--tokenizer_b is of a second checkpoint, and there is only one')
  output = None if values.output is None else pathlib.Path(values.output)
  if output is not None and output.is_dir():
    raise ConfigError(f'--output={output} is a folder; name a file')
  if output is not None:
    output.parent.mkdir(parents=True, exist_ok=True)
  with _open(paths[0], values.tokenizer_a) as a:
    names = ('golden', 'dtype', 'activations', 'tolerance', 'partial')
    options = {name: getattr(values, name) for name in names}
    if len(paths) == 1:
      report = verify(a, log=_log, **options)
    else:
      with _open(paths[1], values.tokenizer_b) as b:
        report = verify(a, b, log=_log, **options)
  print(report.format())
  if output is not None:
    output.write_text(json.dumps(report.to_dict(), indent=2, allow_nan=False) + '\n', encoding='utf-8')
  return 0 if report.passed else 1


def _open(path: str, tokenizer: str | None) -> LazyModel:
  folder = pathlib.Path(path)
  if not folder.exists():
    folder = shipped_path(path) or folder
  try:
    return open_checkpoint(folder, tokenizer=None if tokenizer is None else pathlib.Path(tokenizer))
  except CheckpointError as error:
    raise CheckpointError(str(error) if path in str(error) else f'{path}: {error}') from error


def _log(line: str) -> None:
  print(line, file=sys.stderr)
