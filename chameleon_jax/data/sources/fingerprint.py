"""What a source holds, in a few characters: saved with every checkpoint, so that a resumed run notices data that changed.

A source that knows its files says what they hold in `fingerprint()`; of others some documents are looked at.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from chameleon_jax.data.sources.source import DocumentSource
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Codes, Image, Text, Turn

_SAMPLED = 16


def fingerprint(source: DocumentSource) -> dict[str, Any]:
  """{'documents': how many, 'content': CRC-32 in hexadecimal}; the same for the same data wherever it lies.

  Cheap: no document is read where the source has a `fingerprint()` of its own, 16 spread over it otherwise.
  """
  own = getattr(source, 'fingerprint', None)
  if own is not None:
    return {'documents': len(source), 'content': f'{zlib.crc32(own().encode()):08x}'}
  crc = 0
  for index in np.linspace(0, len(source) - 1, min(len(source), _SAMPLED)).astype(int).tolist():
    try:
      turns = source.document(index, np.random.default_rng(index)).turns
    except DataError as error:  # whether a damaged record matters is for its reader to say
      turns = (Turn(str(error)),)
    for turn in turns:
      crc = zlib.crc32(turn.role.encode(), crc)
      for segment in turn.segments:
        crc = zlib.crc32(_content(segment), crc)
  return {'documents': len(source), 'content': f'{crc:08x}'}


def _content(segment: Text | Image | Codes) -> bytes:
  if isinstance(segment, Text):
    return segment.text.encode('utf-8', 'surrogatepass')
  values = segment.pixels if isinstance(segment, Image) else segment.codes
  return repr(values.shape).encode() + np.ascontiguousarray(values).tobytes()


def check_same(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> None:
  """Compares the fingerprints of a checkpoint with those of the run; a source that only one of them names is no difference.

  Raises:
    DataError: a source changed.
  """
  for name in before:
    if name not in now or before[name] == now[name]:
      continue
    then, here = before[name]['documents'], now[name]['documents']
    what = f'{then:,} documents then, {here:,} now' if then != here else f'still {here:,} documents, but with another content'
    raise DataError(
        f'source {name!r} changed since the checkpoint was saved: {what}; the run would read other documents than it was to: bring the old '
        'data back, start a new run from the weights (config.init_from), or go on all the same with config.data.changed=accept'
    )
