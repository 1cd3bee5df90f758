"""Copies a model folder, storing its parameters in another float type: how weights are made ready to ship.

    python tools/store_model.py --model=runs/emoji/sft/model --output=chameleon_jax/assets/emoji_weights --dtype=float16

A float16 copy is half the size. An image tokenizer should be stored so before a transformer is trained on its codes:
rounding its weights later would change some of them.
"""

from collections.abc import Sequence

from absl import app, flags

from chameleon_jax.interop.native import load_model, save_model

FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  save_model(FLAGS.output, load_model(FLAGS.model), dtype=FLAGS.dtype)
  print(f'wrote {FLAGS.output}')


if __name__ == '__main__':
  flags.DEFINE_string('model', None, 'Model folder to read.', required=True)
  flags.DEFINE_string('output', None, 'Model folder to write.', required=True)
  flags.DEFINE_enum('dtype', 'float16', ['float16', 'bfloat16', 'float32'], 'Type of the stored parameters.')
  app.run(main)
