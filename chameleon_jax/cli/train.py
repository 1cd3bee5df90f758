"""Pre-train or fine-tune the transformer.

  chameleon train --config=experiments/emoji_pretrain.py --workdir=runs/pretrain
  chameleon train --config=experiments/emoji_sft.py --config.init_from=runs/pretrain/model --workdir=runs/sft

The same command after a kill goes on from the newest checkpoint in the workdir. At the end, and when the run is cut
short by --stop_after or --max_minutes, workdir/model holds the model with its tokenizers.

On several hosts the same command runs on each, with a workdir that all of them see. Under Slurm, Open MPI, on TPU VMs and TPUs of
GKE they find each other; else give --coordinator_address, --num_processes and --process_id (experiments/launch).

--profile_steps=100:105 writes a profiler's trace of these steps to the workdir; `touch WORKDIR/profile` asks a run under way for one.

SIGTERM and SIGINT (Ctrl-C) finish the step, save a checkpoint and stop within --config.checkpoint.grace_seconds: exit code 143 or 130,
or 1 where the time was too short. Notices of preemption come as SIGTERM; with Slurm ask for one by `--signal=TERM@120`.
"""

from collections.abc import Sequence

from absl import flags

from chameleon_jax.cli.flags import define_config, define_workdir, get_config, get_workdir
from chameleon_jax.cli.hosts import all_hosts, define_hosts
from chameleon_jax.config import TrainConfig


def define_flags() -> None:
  """Defines --config, --workdir, --stop_after, --max_minutes and those of `define_hosts`."""
  define_config(TrainConfig)
  define_workdir('checkpoints, metrics and the model')
  define_hosts()
  flags.DEFINE_integer('stop_after', None, 'stop after this step, with a checkpoint; run again to go on', lower_bound=1)
  flags.DEFINE_string('profile_steps', None, 'first and last step to write a profiler trace of, such as 100:105')
  flags.DEFINE_float('max_minutes', None, 'stop after this time, with a checkpoint; run again to go on', lower_bound=0)


def main(argv: Sequence[str]) -> None:
  """Runs the training.

  Raises:
    ConfigError: no workdir.
    HostError: a host of the run is missing, or differs.
  """
  del argv
  config = get_config()
  workdir = get_workdir()
  from chameleon_jax.training.loop import train
  from chameleon_jax.training.profiling import parse_steps

  stop_after, max_minutes = flags.FLAGS.stop_after, flags.FLAGS.max_minutes
  profile_steps = None if flags.FLAGS.profile_steps is None else parse_steps(flags.FLAGS.profile_steps)
  with all_hosts(config, stop_after=stop_after):
    train(config, workdir, stop_after=stop_after, max_minutes=max_minutes, profile_steps=profile_steps)
