"""Train the VQ-GAN that turns pictures into codes and back.

  chameleon train-image-tokenizer --config=experiments/emoji_image_tokenizer.py --workdir=runs/image_tokenizer

The same command after a kill goes on from the newest checkpoint in the workdir. At the end workdir/model holds the model.
Many hosts: as `chameleon train`.
"""

from collections.abc import Sequence

from absl import flags

from chameleon_jax.cli.flags import define_config, define_workdir, get_config, get_workdir
from chameleon_jax.cli.hosts import all_hosts, define_hosts
from chameleon_jax.config import ImageTokenizerTrainConfig


def define_flags() -> None:
  """Defines --config, --workdir, --stop_after and those of `define_hosts`."""
  define_config(ImageTokenizerTrainConfig)
  define_workdir('checkpoints, metrics and the model')
  define_hosts()
  flags.DEFINE_integer('stop_after', None, 'stop after this step, with a checkpoint; run again to go on')


def main(argv: Sequence[str]) -> None:
  """Runs the training.

  Raises:
    ConfigError: no workdir.
    HostError: a host of the run is missing, or differs.
  """
  del argv
  config = get_config()
  workdir = get_workdir()
  from chameleon_jax.training.vqgan_loop import train_image_tokenizer

  with all_hosts(config, stop_after=flags.FLAGS.stop_after):
    train_image_tokenizer(config, workdir, stop_after=flags.FLAGS.stop_after)
