"""Measures a model and prints the table of figures, as Markdown.

    chameleon evaluate --suite=emoji --model=emoji
    chameleon evaluate --suite=emoji --model=runs/sft/model --tasks=describe,draw --full --output=figures.json

Answers are sampled greedily; --config.FIELD=VALUE changes the sampling (the fields are listed below). A model folder
without a transformer gets the figures of its image tokenizer. How each figure is made: chameleon_jax/evals/emoji.py.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import get_args

from absl import flags

from chameleon_jax.chameleon import Chameleon
from chameleon_jax.cli import flags as config_flags
from chameleon_jax.config import CacheDtype, Quantization, SamplingOptions
from chameleon_jax.errors import CheckpointError, ConfigError
from chameleon_jax.evals import emoji


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.define_config(SamplingOptions, default=emoji.GREEDY)
  flags.DEFINE_enum('suite', 'emoji', sorted(SUITES), 'what to measure')
  flags.DEFINE_string('model', 'emoji', "model folder, or 'emoji' for the weights shipped with the package")
  flags.DEFINE_string('adapter', None, 'folder of a LoRA adapter to add to the weights')
  flags.DEFINE_enum('quantization', None, list(get_args(Quantization)), 'keep the weights of the transformer in int8')
  flags.DEFINE_enum('cache_dtype', None, list(get_args(CacheDtype)), 'type of the keys and values kept (default: as computed in)')
  flags.DEFINE_list('tasks', None, 'some of reconstruction, describe, draw, edit, text (default: all that the model has the parts for)')
  flags.DEFINE_integer('n_train', 500, 'size of the fixed sample of training pictures', lower_bound=1)
  flags.DEFINE_integer('n_validation', None, 'size of a fixed sample of held-out pictures (default: all)', lower_bound=1)
  flags.DEFINE_integer('n_edits', 500, 'size of the fixed sample of edits that end in a held-out picture', lower_bound=1)
  flags.DEFINE_bool('full', False, 'no samples: every training picture, every edit')
  flags.DEFINE_bool('json', False, 'print JSON instead of the table')
  flags.DEFINE_string('output', None, 'file to write the JSON to')


def main(argv: Sequence[str]) -> int:
  """Runs the command."""
  if len(argv) > 1:
    raise ConfigError(f'unexpected argument {argv[1]!r}')
  values = flags.FLAGS
  options = config_flags.get_config()
  started = time.monotonic()
  model = Chameleon.load(values.model, adapter=values.adapter, quantization=values.quantization, cache_dtype=values.cache_dtype)
  figures = SUITES[values.suite](model, options, lambda line: print(f'{time.monotonic() - started:6.0f} s  {line}', file=sys.stderr))
  report = {
      'suite': values.suite,
      'model': values.model,
      'quantization': values.quantization,
      'cache_dtype': values.cache_dtype,
      'sampling': dataclasses.asdict(options),
      'seconds': round(time.monotonic() - started, 1),
      'figures': [dataclasses.asdict(figure) | {'reached': figure.reached} for figure in figures],
  }
  text = json.dumps(report, indent=2)
  if values.output is not None:
    path = pathlib.Path(values.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + '\n', encoding='utf-8')
  print(text if values.json else emoji.format_table(figures))
  return 0


def _emoji(model: Chameleon, options: SamplingOptions, log: Callable[[str], None]) -> list[emoji.Figure]:
  values = flags.FLAGS
  parts = model.parts
  if parts.vqgan_config is None:
    raise CheckpointError(f'{model.name} holds no image tokenizer; the emoji suite needs one')
  whole = parts.transformer_config is not None and parts.text_tokenizer is not None and parts.vocabulary is not None
  possible = emoji.TASKS if whole else ('reconstruction',)
  tasks = possible if values.tasks is None else values.tasks
  for task in tasks:
    if task not in emoji.TASKS:
      raise ConfigError(f'unknown task {task!r} in --tasks; known are {", ".join(emoji.TASKS)}')
    if task not in possible:
      raise CheckpointError(f'{model.name} lacks the transformer or a tokenizer; --tasks={task} needs them')
  evaluation = emoji.EmojiEvaluation(
      model,
      options=options,
      n_train=None if values.full else values.n_train,
      n_validation=None if values.full else values.n_validation,
      n_edits=None if values.full else values.n_edits,
      log=log,
  )
  return evaluation.run(tasks)


SUITES: dict[str, Callable[[Chameleon, SamplingOptions, Callable[[str], None]], list[emoji.Figure]]] = {'emoji': _emoji}
