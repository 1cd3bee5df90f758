"""Converts weights between our form, Meta's and Hugging Face's: the function behind `chameleon convert`, for a bare checkout.

    python tools/convert_checkpoint.py --source=models/7b --target=weights/7b --target_format=orbax

`chameleon convert --help` says more, and shows how far it is.
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from chameleon_jax.errors import ChameleonError
from chameleon_jax.interop.convert import FORMATS, convert

FLAGS = flags.FLAGS
_OPTIONS = ('tokenizer', 'n_shards', 'dtype', 'decoder', 'overwrite', 'verify', 'verify_checklist')


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  options: dict[str, Any] = {name: FLAGS[name].value for name in _OPTIONS}
  try:
    report = convert(FLAGS.source, FLAGS.target, FLAGS.target_format, **options)
  except ChameleonError as error:
    sys.exit(f'convert_checkpoint: {error}')
  print('\n'.join(report.lines()))


if __name__ == '__main__':
  flags.DEFINE_string('source', None, 'Folder with the weights to read.', required=True)
  flags.DEFINE_string('target', None, 'Folder to make.', required=True)
  flags.DEFINE_enum('target_format', None, list(FORMATS), 'Form to write; orbax is ours.', required=True)
  flags.DEFINE_string('tokenizer', None, 'Folder with text_tokenizer.json and vqgan.ckpt.')
  flags.DEFINE_integer('n_shards', None, 'Shards of a Meta target.', lower_bound=1)
  flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16', 'float16'], 'Type to store the transformer in.')
  flags.DEFINE_bool('decoder', None, 'Keep the picture decoder in a Hugging Face target.')
  flags.DEFINE_bool('overwrite', False, 'Replace the checkpoint at --target.')
  flags.DEFINE_bool('verify', True, 'Read the target back and compare.')
  flags.DEFINE_bool('verify_checklist', False, 'Compare every file of a Meta source with its checklist.chk first.')
  app.run(main)
