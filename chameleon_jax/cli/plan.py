"""Will it fit, how fast, and what to change: for a config and a machine, without the machine.

  chameleon plan --config=experiments/chameleon.py:7b,pretrain,v5e-256 --topology=v5e-256
  chameleon plan --size=34b --topology=v5e-64 --compile
  chameleon plan --size=7b --topology=8xh100 --config.data.batch_size=64 --json=plan.json
  chameleon plan --size=34b --topology=8xh100 --task=sample --requests=16 --cache_dtype=int8

Topologies: v5e-64, v6e-256 (TPU slices by chips), v5p-16, v4-32 (these names count TensorCores, two a chip), v5p:2x2x4 (by shape),
8xh100, 1xh200, 64xh100 (nodes of eight). Bytes of parameters, moments, gradients and caches are exact; what a step needs beside them
is a model, compared with the TPU compiler in experiments/README.md. Seconds are a roofline whose assumptions are printed and can be
set by flags. --size plans one row of 4,096 tokens a chip. --compile has the TPU compiler itself judge the training step.

The search turns the mesh, model.remat, model.sequence_parallel ("rows in pieces"), loss_chunks and optimizer.accumulate_steps; batch, rows,
model, optimizer and what config.fine_tune freezes stay. Exit code 1 when nothing fits.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import get_args

from absl import flags

from chameleon_jax import presets
from chameleon_jax.cli.flags import ConfigFlag, define_config, get_config
from chameleon_jax.config import CacheDtype, DataConfig, TrainConfig
from chameleon_jax.errors import ConfigError


def define_flags() -> None:
  """Defines the flags of the command."""
  define_config(TrainConfig)
  flags.DEFINE_enum('size', None, ['7b', '34b'], 'a published size in place of --config')
  flags.DEFINE_string('topology', None, 'the machine, such as v5e-64 or 8xh100')
  flags.DEFINE_enum('task', 'train', ['train', 'sample'], 'what to plan')
  flags.DEFINE_integer('requests', 1, 'sampling: requests under way together', lower_bound=1)
  flags.DEFINE_integer('context', None, 'sampling: tokens of a request, prompt and answer (default: model.max_seq_len)', lower_bound=1)
  flags.DEFINE_bool('guided', True, 'sampling: pictures are guided, with three streams a request')
  flags.DEFINE_enum('cache_dtype', None, list(get_args(CacheDtype)), 'sampling: type of the keys and values kept (default: as computed in)')
  flags.DEFINE_float('efficiency', None, "share of the peak that products reach (default: the chip's, see the output)", 0.0, 1.0)
  flags.DEFINE_float('link_efficiency', 0.7, 'share of the links that collectives reach', 0.0, 1.0)
  flags.DEFINE_float('hbm_efficiency', 0.7, 'sampling: share of the memory bandwidth that a decode step reaches', 0.0, 1.0)
  flags.DEFINE_float('memory_fraction', None, 'share of the memory to plan with (default: 1 on a TPU, 0.92 on a GPU)', 0.0, 1.0)
  flags.DEFINE_bool('compile', False, 'have the TPU compiler (libtpu, extra tpu-aot) judge the settings as given and the best')
  flags.DEFINE_string('json', None, 'file to write the plan to')


def main(argv: Sequence[str]) -> int:
  """Prints the plan; returns 1 where nothing fits.

  Raises:
    ConfigError: the flags contradict each other, or name a machine that is not known.
  """
  import jax

  from chameleon_jax.planning import compiler
  from chameleon_jax.planning.report import Report
  from chameleon_jax.planning.search import plan_sample, plan_train
  from chameleon_jax.planning.speed import Assumptions, Requests
  from chameleon_jax.planning.topologies import parse_topology

  values = flags.FLAGS
  if len(argv) > 1:
    raise ConfigError(f'unexpected argument {argv[1]!r}')
  if values.topology is None:
    raise ConfigError('--topology is missing: name the machine, such as v5e-64 or 8xh100')
  output = None if values.json is None else pathlib.Path(values.json)
  if output is not None and (output.is_dir() or not output.parent.is_dir()):
    raise ConfigError(f'--json={output}: {"it is a folder" if output.is_dir() else f"{output.parent} does not exist"}; name a file')
  topology = parse_topology(values.topology)
  config, name = _config(topology.n_chips)
  if values.compile and values.task == 'sample':
    raise ConfigError('--compile judges the training step; leave it out with --task=sample')
  if values.compile:
    compiler.check_available(topology)
  jax.config.update('jax_platforms', 'cpu')  # nothing runs on a device; one that is here stays free
  assumptions = Assumptions(values.efficiency, values.link_efficiency, values.hbm_efficiency)
  fraction = values.memory_fraction or (1.0 if topology.chip.kind == 'tpu' else 0.92)
  limit = topology.memory * fraction
  if values.task == 'train':
    plan = plan_train(config, topology, assumptions=assumptions, limit=limit)
    title = f'{name}: training, {config.data.batch_size:,} rows of {config.data.seq_len:,} tokens a step'
  else:
    context = min(values.context or config.model.max_seq_len, config.model.max_seq_len)
    requests = Requests(values.requests, context, values.guided, values.cache_dtype)
    plan = plan_sample(config, topology, requests, assumptions=assumptions, limit=limit)
    title = f'{name}: sampling, {requests.n:,} requests of {context:,} tokens{", pictures guided" if requests.guided else ""}'
    title += '' if requests.cache_dtype is None else f', cache in {requests.cache_dtype}'
  verdicts = {}
  if values.compile:
    for label, candidate in (('as given', plan.given), ('best', plan.best)):
      if candidate is not None and (label == 'as given' or plan.given is None or candidate.settings != plan.given.settings):
        verdicts[label] = compiler.compile_train_step(candidate.config, topology)
  report = Report(title, topology, plan, limit, assumptions.lines(topology, fraction), verdicts)
  print('\n'.join(report.lines()))
  if output is not None:
    aside = output.with_name(output.name + '.partial')
    aside.write_text(json.dumps(report.to_dict(), indent=2, allow_nan=False) + '\n', encoding='utf-8')
    aside.replace(output)
  return 0 if report.fits else 1


def _config(n_chips: int) -> tuple[TrainConfig, str]:
  """The run to plan and what to call it: of --config, or of --size with a row a chip; overrides apply to both."""
  flag = flags.FLAGS['config']
  assert isinstance(flag, ConfigFlag)
  if (flags.FLAGS.size is None) == (flag.value is None):
    raise ConfigError('give either --config=FILE, an experiment file, or --size=7b|34b')
  if flags.FLAGS.size is None:
    return get_config(), str(flag.value)
  model = {'7b': presets.chameleon_7b, '34b': presets.chameleon_34b}[flags.FLAGS.size]()
  data = DataConfig(batch_size=n_chips)
  flag.default_config = TrainConfig(model=model, vocabulary=presets.released_vocabulary(), data=data, loss_chunks=16)
  return get_config(), f'Chameleon {flags.FLAGS.size.upper()}'
