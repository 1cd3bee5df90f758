"""What integers and pixel values mean in two checkpoints: id maps, code tables, text pieces, preprocessing.

A map of names to ids comes from the text tokenizer where it is a `tokenizer.json`, and from `vocabulary_map` of a config.json of
the port. `<image>` is the port's name of a reserved token (spec model.md 3.4, 5.1) and counts as that. Preprocessing counts as
declared only by a preprocessor_config.json: the release has no such file, its convention is that of its code (spec 7.1, 7.2).
"""

import collections
import json
from typing import Any

import numpy as np

from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.lazy import LazyModel
from chameleon_jax.interop.native.folder import make_vocabulary
from chameleon_jax.interop.read_back import pieces
from chameleon_jax.interop.verify.report import Finding, Row, judged, lone, not_compared
from chameleon_jax.tokens import text
from chameleon_jax.tokens.vocabulary import parse_image_token_name

# Beside those that every text tokenizer is tried with when it is loaded: words, digits, scripts.
PROBES = (*text.PROBES, 'A red apple, 3 pears.', ' two  spaces\n\ttab', 'na\u00efve \u4f60\u597d \U0001f600', 'x<y && z', "it's 2024-05-16")
_DECLARATION = 'preprocessor_config.json'
_RELEASE_SCALE, _PORT_SCALE = 2 / 255, 0.0078
_IMAGE_PREFIX = 'IMGIMG'


class _Object(dict):
  """A JSON object; `twice` is a name that stands in it more than once."""

  def __init__(self, pairs: list[tuple[str, Any]]):
    super().__init__(pairs)
    counts = collections.Counter(name for name, _ in pairs) if len(self) < len(pairs) else {}
    self.twice = next((name for name, count in counts.items() if count > 1), None)


def _parse(content: bytes, what: str) -> Any:
  try:
    return json.loads(content, object_pairs_hook=_Object)
  except ValueError as error:
    raise CheckpointError(f'{what} is not valid JSON: {error}') from error


def id_maps(model: LazyModel) -> dict[str, _Object]:
  """Name -> id of every token, by the file that says so."""
  found = {}
  to_json = getattr(model.text_tokenizer, 'to_json', None)
  if to_json is not None:
    table = _parse(to_json(), f'the text tokenizer of {model.path}')
    found['text tokenizer'] = table['model']['vocab']
  if 'config.json' in model.origin.files:
    table = _parse(model.origin.files['config.json'], f'config.json of {model.path}')
    if isinstance(table, _Object) and isinstance(table.get('vocabulary_map'), _Object):
      found['vocabulary_map'] = table['vocabulary_map']
  return found


def map_fault(ids: _Object, size: int | None, n_codes: int | None) -> str | None:
  """Why a map of names to ids is no bijection, or its image names are not the codes 0 .. n_codes-1; None where all is well.

  `size` is the number of ids that the transformer has, where there is one.
  """
  if ids.twice is not None:
    return f'the name {ids.twice!r} stands in it twice'
  owner: dict[int, str] = {}
  for name, token in ids.items():
    if type(token) is not int or token < 0:
      return f'{name!r} has the id {token!r}'
    if token in owner:
      return f'{owner[token]!r} and {name!r} have the same id {token}'
    if size is not None and token >= size:
      return f'{name!r} has the id {token}, the transformer has {size}'
    owner[token] = name
  codes = {}
  for name in (name for name in ids if name.startswith(_IMAGE_PREFIX)):
    code = parse_image_token_name(name)
    if code is None:
      return f'the image name {name!r} spells no code'
    codes[code] = name
  if n_codes is not None and codes and sorted(codes) != list(range(n_codes)):
    odd = sorted(set(codes) ^ set(range(n_codes)))[0]
    return f'code {odd} has {"no token" if odd < n_codes else f"the token {codes[odd]!r}"}, the codebook has {n_codes} entries'
  return None


def code_table(model: LazyModel) -> np.ndarray | None:
  """Token of each code [n_codes], from the names where the files hold some, else from the layout; None without a vocabulary.

  Raises:
    CheckpointError: the names give no table.
  """
  for ids in id_maps(model).values():
    table = {code: token for name, token in ids.items() if (code := parse_image_token_name(name)) is not None}
    if table and sorted(table) == list(range(len(table))) and all(type(token) is int for token in table.values()):
      return np.array([table[code] for code in range(len(table))], np.int64)
  return None if model.vocabulary is None else np.asarray(make_vocabulary(model.vocabulary, model.text_tokenizer).token_of_code, np.int64)


def own_map_rows(label: str, model: LazyModel) -> tuple[list[Row], list[Finding]]:
  """Each id map of one checkpoint: is it a bijection, and are its image names the codes."""
  rows, findings = [], []
  n_codes = model.vqgan_config.n_codes if model.vqgan_config is not None else None if model.vocabulary is None else model.vocabulary.n_codes
  size = None if model.transformer_config is None else model.transformer_config.vocab_size
  maps = id_maps(model)
  for source, ids in maps.items():
    fault = map_fault(ids, size, n_codes)
    rows.append(judged(f'id map of {label}: {source}', f'{len(ids)} names', 'a bijection', fault or '', good=not fault))
    if fault:
      findings.append(Finding('id_map', f'the {source} of {label} is no bijection between names, ids and codes: {fault}'))
  if len(maps) == 2:
    (first, left), (second, right) = maps.items()
    where = _first_name(left, right, first, second)
    rows.append(judged(f'id maps of {label}', f'{len(left)} names', 'equal', where, good=not where))
  return rows, findings


def shared_map_rows(a: LazyModel, b: LazyModel, *, partial: bool = False) -> tuple[list[Row], list[Finding]]:
  """Layout, names, code table and text pieces of both checkpoints; `partial` excuses what only one of them has."""
  rows, findings = [], []
  text_row = _text_row(a, b, partial=partial)
  if a.vocabulary is None and b.vocabulary is None:
    return [not_compared('vocabulary', 'neither side holds a vocabulary'), text_row], []
  if a.vocabulary is None or b.vocabulary is None:
    where = f'only {"B" if a.vocabulary is None else "A"} holds a vocabulary'
    return [lone('vocabulary', 'vocabulary', where, partial=partial), text_row], []
  where = '' if a.vocabulary == b.vocabulary else f'A has {a.vocabulary}, B {b.vocabulary}'
  (left, *_), (right, *_) = ([*id_maps(model).values(), None] for model in (a, b))
  if left is not None and right is not None and not where:
    where = _first_name(left, right, 'A', 'B')
  compared = f'{len(left)} names' if left is not None and right is not None else 'layout'
  rows.append(judged('vocabulary', compared, 'equal', where, good=not where))
  one, two = code_table(a), code_table(b)
  assert one is not None and two is not None  # both have a layout
  where = f'A has {len(one)} codes, B {len(two)}' if len(one) != len(two) else ''
  if not where and (one != two).any():
    code = int(np.flatnonzero(one != two)[0])
    where = f'code {code} is token {one[code]} in A and {two[code]} in B'
    if (two - one == two[0] - one[0]).all():
      findings.append(Finding('code_offset', f'the image tokens of B are offset by {two[0] - one[0]} against those of A'))
  rows.append(judged('tokens of the codes', f'{len(one)} codes', 'equal', where, good=not where))
  return [*rows, text_row], findings


def _first_name(left: _Object, right: _Object, first: str, second: str) -> str:
  """The first name whose ids differ, in words; empty where the maps are equal."""
  named = [{_common_name(name, token): token for name, token in ids.items()} for ids in (left, right)]
  for name, token in named[0].items():
    if named[1].get(name) != token:
      return f'{name!r} is {token} in {first} and {named[1].get(name, "missing")} in {second}'
  extra = next((name for name in named[1] if name not in named[0]), None)
  return '' if extra is None else f'{extra!r} is missing in {first} and {named[1][extra]} in {second}'


def _common_name(name: str, token: Any) -> str:
  return f'<reserved{token - 4:05d}>' if name == '<image>' and type(token) is int else name


def _text_row(a: LazyModel, b: LazyModel, *, partial: bool) -> Row:
  if a.text_tokenizer is None and b.text_tokenizer is None:
    return not_compared('text tokenizer', 'neither side holds a text tokenizer')
  if a.text_tokenizer is None or b.text_tokenizer is None:
    where = f'only {"B" if a.text_tokenizer is None else "A"} holds a text tokenizer'
    return lone('text tokenizer', 'text tokenizer', where, partial=partial)
  where = ''
  if a.text_tokenizer.n_pieces != b.text_tokenizer.n_pieces:
    where = f'{a.text_tokenizer.n_pieces} pieces in A, {b.text_tokenizer.n_pieces} in B'
  for probe in PROBES:
    if not where and pieces(a.text_tokenizer, probe) != pieces(b.text_tokenizer, probe):
      where = f'{probe!r} has other pieces'
  return judged('text tokenizer', f'{len(PROBES)} texts', 'equal pieces', where, good=not where)


# --------------------------------------------------------------------------------------- preprocessing


def declared_preprocessing(model: LazyModel) -> dict[str, Any] | None:
  """What the checkpoint's own preprocessor_config.json asks for; None without that file.

  `scale` and `offset` give the encoder's input: pixel value * scale + offset.
  """
  content = model.origin.files.get(_DECLARATION)
  if content is None:
    return None
  what = f'{_DECLARATION} of {model.path}'
  table = _parse(content, what)
  try:
    normalises = table.get('do_normalize', True)
    mean, std = (np.mean(table.get(key, 1.0)) if normalises else plain for key, plain in (('image_mean', 0.0), ('image_std', 1.0)))
    rescale = table.get('rescale_factor', 1 / 255) if table.get('do_rescale', True) else 1.0
    found = {'scale': round(float(rescale / std), 6), 'offset': round(float(-mean / std), 6)}
  except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
    raise CheckpointError(f'{what} is not understood: {error}') from error
  return found | {key: table[key] for key in ('size', 'crop_size', 'resample') if key in table}


def convention(declared: dict[str, Any] | None) -> str:
  """A name for the scaling of pixel values."""
  if declared is None:
    return 'not declared'
  for name, scale in (('meta', _RELEASE_SCALE), ('huggingface', _PORT_SCALE)):
    if abs(declared['scale'] - scale) < 2e-6 and abs(declared['offset'] + 1) < 1e-6:
      return name
  return f'value * {declared["scale"]:g} {declared["offset"]:+g}'


def preprocessing_row(a: LazyModel, b: LazyModel | None) -> tuple[Row, list[Finding]]:
  """Which convention each declares; fails only where both declare one and they differ."""
  first = declared_preprocessing(a)
  if b is None:
    return Row('preprocessing', convention(first), None, 'info'), []
  second = declared_preprocessing(b)
  value = f'A {convention(first)}, B {convention(second)}'
  if first is None or second is None:
    skipped = '' if first is second else 'preprocessing'
    return Row('preprocessing', value, None, 'info', 'judged only where both declare one', skipped=skipped), []
  differing = [key for key in {**first, **second} if first.get(key) != second.get(key)]
  if not differing:
    return judged('preprocessing', value, 'equal', good=True), []
  where = f'{differing[0]}: {first.get(differing[0])} in A, {second.get(differing[0])} in B'
  findings = []
  if 'scale' in differing and 'huggingface' in (convention(first), convention(second)):
    side = 'A' if convention(first) == 'huggingface' else 'B'
    findings.append(Finding('rescale', f'{side} scales pixel values by 0.0078 as the port does, the other does not: codes will differ'))
  return judged('preprocessing', value, 'equal', where, good=False), findings
