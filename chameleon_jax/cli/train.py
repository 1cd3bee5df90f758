"""Pre-train or fine-tune the transformer.

  chameleon train --config=experiments/emoji_pretrain.py --workdir=runs/pretrain
  chameleon train --config=experiments/emoji_sft.py --config.init_from=runs/pretrain/model --workdir=runs/sft

The same command after a kill goes on from the newest checkpoint in the workdir. At the end, and when the run is cut
short by --stop_after or --max_minutes, workdir/model holds the model with its tokenizers.

SIGTERM and SIGINT (Ctrl-C) finish the step, save a checkpoint and stop within --config.checkpoint.grace_seconds: exit code 143 or 130,
or 1 where the time was too short. Notices of preemption come as SIGTERM; with Slurm ask for one by `--signal=TERM@120`.
"""

from collections.abc import Sequence

from absl import flags

from chameleon_jax.cli.flags import define_config, define_workdir, get_config, get_workdir
from chameleon_jax.config import TrainConfig


def define_flags() -> None:
  """Defines --config, --workdir, --stop_after and --max_minutes."""
  define_config(TrainConfig)
  define_workdir('checkpoints, metrics and the model')
  flags.DEFINE_integer('stop_after', None, 'stop after this step, with a checkpoint; run again to go on', lower_bound=1)
  flags.DEFINE_float('max_minutes', None, 'stop after this time, with a checkpoint; run again to go on', lower_bound=0)


def main(argv: Sequence[str]) -> None:
  """Runs the training.

  Raises:
    ConfigError: no workdir.
  """
  del argv
  config = get_config()
  workdir = get_workdir()
  from chameleon_jax.training.loop import train

  train(config, workdir, stop_after=flags.FLAGS.stop_after, max_minutes=flags.FLAGS.max_minutes)
