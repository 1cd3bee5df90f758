"""Shows what a step of a training run saw: one packed row as an HTML page.

    chameleon peek --workdir=runs/emoji/pretrain --step=120 --row=3 --output=page.html

The row is built again from the config, the data and the saved positions of the run: pictures as the network read them (with
the noise of config.data.image_noise, if any) and as it had to predict them, every document with its source and index, tokens shaded by
their weight in the loss, and ids, targets and positions on hover. The run may be under way; nothing in its folder is changed.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from chameleon_jax.cli.flags import define_workdir, frozen, get_workdir
from chameleon_jax.config import TrainConfig
from chameleon_jax.errors import ConfigError


def define_flags() -> None:
  """Defines the flags of the command."""
  define_workdir('the run to look into, that of `chameleon train`')
  flags.DEFINE_integer('step', None, 'which step, from 1 on', lower_bound=1)
  flags.DEFINE_integer('row', 0, 'which row of its batch, from 0 on', lower_bound=0)
  flags.DEFINE_string('output', 'page.html', 'page to write')


def main(argv: Sequence[str]) -> None:
  """Writes the page.

  Raises:
    ConfigError: a flag is missing or out of range.
    CheckpointError: the folder holds no run, or its tokenizers are gone.
  """
  if len(argv) > 1:
    raise ConfigError(f'unexpected argument {argv[1]!r}')
  values = flags.FLAGS
  workdir = get_workdir()
  if values.step is None:
    raise ConfigError('--step is missing: name the step whose batch you want to see, from 1 on')
  from chameleon_jax.sampling.page import write_html
  from chameleon_jax.training import replay
  from chameleon_jax.training.row_page import row_html

  config = frozen(replay.saved_config(workdir, values.step), TrainConfig)
  if values.row >= config.data.batch_size:
    raise ConfigError(f'--row={values.row}: the batches of this run have rows 0 to {config.data.batch_size - 1}')
  seen = replay.rebuild(workdir, config, values.step, say=lambda line: print(line, file=sys.stderr))
  path = write_html(pathlib.Path(values.output), row_html(seen, values.row, workdir=workdir))
  print(path)
