"""Train the VQ-GAN that turns pictures into codes and back.

  chameleon train-image-tokenizer --config=experiments/emoji_image_tokenizer.py --workdir=runs/image_tokenizer

The same command after a kill goes on from the newest checkpoint in the workdir. At the end workdir/model holds the model.
"""

from collections.abc import Sequence

from absl import flags

from chameleon_jax.cli.flags import define_config, get_config
from chameleon_jax.config import ImageTokenizerTrainConfig
from chameleon_jax.errors import ConfigError


def define_flags() -> None:
  """Defines --config, --workdir and --stop_after."""
  define_config(ImageTokenizerTrainConfig)
  flags.DEFINE_string('workdir', None, 'folder for checkpoints, metrics and the model')
  flags.DEFINE_integer('stop_after', None, 'stop after this step, with a checkpoint; run again to go on')


def main(argv: Sequence[str]) -> None:
  """Runs the training.

  Raises:
    ConfigError: no workdir.
  """
  del argv
  config = get_config()
  if flags.FLAGS.workdir is None:
    raise ConfigError('--workdir is missing: name a folder for checkpoints, metrics and the model')
  from chameleon_jax.training.vqgan_loop import train_image_tokenizer

  train_image_tokenizer(config, flags.FLAGS.workdir, stop_after=flags.FLAGS.stop_after)
