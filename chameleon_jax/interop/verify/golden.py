"""Golden values: what another implementation made of a checkpoint, as an .npz file.

| key | content |
|---|---|
| `tokens` | int [B, T] |
| `logits` | float [B, T, V] of `tokens`; image columns raw, or -inf / a type's minimum as the port masks them (spec model.md 3.4) |
| `hidden_0` .. `hidden_L` | float [B, T, D], the residual stream behind the embedding and behind each layer, before the final norm |
| `pictures` | uint8 [P, H, W, 3] of the model's size |
| `pixels` | float [P, H, W, 3], what the encoder of the other implementation was given for `pictures` |
| `codes`, `codes_huggingface` | int [P, n] or [P, h, w] of `pictures`, scaled as the release does and as the port does (spec 7.2) |
| `decoded` | uint8 [P, H, W, 3] from `codes` |

Every key may be missing; others are named in the report and not compared.
"""

import dataclasses
import pathlib
import re
import zipfile
import zlib

import numpy as np

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.lazy import LazyModel

# Rank and kind of number ('i': integers, 'f': floating, 'u': uint8) of each key.
_FORMS = {
    'tokens': ((2,), 'i'),
    'logits': ((3,), 'f'),
    'hidden': ((3,), 'f'),
    'pictures': ((4,), 'u'),
    'pixels': ((4,), 'f'),
    'codes': ((2, 3), 'i'),
    'codes_huggingface': ((2, 3), 'i'),
    'decoded': ((4,), 'u'),
}
# What numpy and zipfile are known to raise on foreign or damaged files.
_DAMAGED = (ValueError, LookupError, EOFError, TypeError, SyntaxError, MemoryError, zipfile.BadZipFile, zlib.error, RuntimeError)
_NEEDS = {'logits': 'tokens', 'hidden': 'tokens', 'pixels': 'pictures', 'codes_huggingface': 'pictures', 'decoded': 'codes'}


@dataclasses.dataclass(frozen=True)
class Golden:
  """A checked file: `values` by key, codes flat [P, n]; `ignored` are the keys that this program does not know."""

  path: str
  values: dict[str, np.ndarray]
  ignored: tuple[str, ...]

  def get(self, key: str) -> np.ndarray | None:
    """The values of a key, None where the file has none."""
    return self.values.get(key)


def load_golden(path: pathlib.Path) -> Golden:
  """Reads the file; nothing in it is executed.

  Raises:
    CheckpointError: missing, no .npz, damaged, of wrong shapes or types, or without anything to compare.
  """
  try:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
      raise CheckpointError(f'golden values {path} are a single array; an .npz file with named arrays is needed')
    with archive:
      known = [name for name in archive.files if _kind(name) is not None]
      values = {name: archive[name] for name in known}
      ignored = tuple(name for name in archive.files if name not in known)
  except CheckpointError:
    raise
  except OSError as error:
    raise CheckpointError(f'golden values {path} cannot be read: {error.strerror or error}') from error
  except _DAMAGED as error:
    what = ' '.join(str(error).split())[:100]
    raise CheckpointError(f'golden values {path} are no sound .npz file ({what}); make them again') from error
  for name, array in values.items():
    _check_form(path, name, array)
  for name in values:
    needed = _NEEDS.get(_kind(name) or '')
    if needed is not None and needed not in values:
      raise CheckpointError(f'golden values {path} hold {name!r} without the {needed!r} that it comes from')
  for name in ('codes', 'codes_huggingface'):
    if name in values:
      values[name] = values[name].reshape(len(values[name]), -1)
  if not set(values) - {'tokens', 'pictures'}:
    raise CheckpointError(f'golden values {path} hold nothing to compare: neither logits, hidden_0 .., codes, pixels nor decoded pictures')
  return Golden(str(path), values, ignored)


def check_fit(golden: Golden, model: LazyModel) -> None:
  """Raises CheckpointError where the sizes of the values are not those of the model, or a token or code is outside its range."""
  config, vqgan = model.transformer_config, model.vqgan_config
  expected: dict[str, tuple[int, ...]] = {}
  tokens, pictures = golden.get('tokens'), golden.get('pictures')
  if config is not None and tokens is not None:
    expected['logits'] = (*tokens.shape, config.vocab_size)
    expected |= {name: (*tokens.shape, config.d_model) for name in golden.values if _kind(name) == 'hidden'}
    _check_range(golden, 'tokens', config.vocab_size)
    last = max((int(name.removeprefix('hidden_')) for name in golden.values if _kind(name) == 'hidden'), default=0)
    if last > config.n_layers:
      raise CheckpointError(f'golden values {golden.path}: hidden_{last} is behind the last layer, {model.path} has {config.n_layers}')
    if tokens.shape[1] > config.max_seq_len:
      raise CheckpointError(f'golden values {golden.path}: rows of {tokens.shape[1]} tokens, {model.path} takes {config.max_seq_len}')
  if vqgan is not None:
    codes = golden.get('codes')
    n = len(pictures) if pictures is not None else len(codes) if codes is not None else 0
    picture = (n, vqgan.resolution, vqgan.resolution, 3)
    expected |= {'pictures': picture, 'pixels': picture, 'decoded': picture}
    expected |= dict.fromkeys(('codes', 'codes_huggingface'), (n, vqgan.n_image_tokens))
    _check_range(golden, 'codes', vqgan.n_codes)
    _check_range(golden, 'codes_huggingface', vqgan.n_codes)
  for name, shape in expected.items():
    array = golden.get(name)
    if array is not None and array.shape != shape:
      raise CheckpointError(f'golden values {golden.path}: {name} has shape {list(array.shape)}, {model.path} asks for {list(shape)}')


def _check_range(golden: Golden, name: str, size: int) -> None:
  array = golden.get(name)
  if array is not None and (array.min() < 0 or array.max() >= size):
    raise CheckpointError(f'golden values {golden.path}: {name} run from {array.min()} to {array.max()}, the model knows 0 to {size - 1}')


def _kind(name: str) -> str | None:
  if re.fullmatch(r'hidden_(0|[1-9][0-9]{0,5})', name):
    return 'hidden'
  return name if name in _FORMS and name != 'hidden' else None


def _check_form(path: pathlib.Path, name: str, array: np.ndarray) -> None:
  ranks, kind = _FORMS[_kind(name) or name]
  numbers = {'i': np.issubdtype(array.dtype, np.integer), 'f': np.issubdtype(array.dtype, np.floating), 'u': array.dtype == np.uint8}
  if array.ndim not in ranks or not numbers[kind] or array.size == 0:
    wanted = {'i': 'integers', 'f': 'floating numbers', 'u': 'uint8'}[kind]
    got = f'{array.dtype} {list(array.shape)}'
    raise CheckpointError(f'golden values {path}: {name} must be {wanted} of {" or ".join(map(str, ranks))} axes and not empty, got {got}')
