"""Train the sentencepiece BPE text tokenizer.

  chameleon train-text-tokenizer --config=experiments/emoji_text_tokenizer.py --workdir=runs/text_tokenizer

Writes workdir/model with the vocabulary and the text tokenizer, workdir/config.json with the resolved config, and prints how
many bytes of held-out text go into one piece. It takes seconds, so there are no checkpoints: the same command starts anew.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from chameleon_jax.cli.flags import define_config, define_workdir, get_config, get_workdir
from chameleon_jax.config import TextTokenizerTrainConfig


def define_flags() -> None:
  """Defines --config and --workdir."""
  define_config(TextTokenizerTrainConfig)
  define_workdir('the model')


def run(config: TextTokenizerTrainConfig, workdir: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
  """Trains, writes `workdir/model` and `workdir/config.json`, and returns what `measure` finds on held-out text.

  Raises:
    ChameleonError: a source is at fault, its text is too little for the vocabulary, or writing failed.
  """
  # Here and not above: they load jax and orbax, which --help should not wait for.
  from chameleon_jax.interop.native import ModelParts, save_model
  from chameleon_jax.training.text_tokenizer import measure, train_from_sources

  workdir = pathlib.Path(workdir)
  names = ', '.join(f'{name} x {times}' for name, times in config.sources)
  print(f'training {config.vocabulary.n_text} text pieces on {names}', file=sys.stderr, flush=True)
  text_tokenizer = train_from_sources(config)
  table = measure(text_tokenizer, config)
  workdir.mkdir(parents=True, exist_ok=True)
  save_model(workdir / 'model', ModelParts(vocabulary=config.vocabulary, text_tokenizer=text_tokenizer))
  aside = workdir / f'config.json.{os.getpid()}.part'
  try:
    aside.write_text(json.dumps(dataclasses.asdict(config), indent=2) + '\n')
    os.replace(aside, workdir / 'config.json')
  finally:
    aside.unlink(missing_ok=True)
  return table


def main(argv: Sequence[str]) -> None:
  """Runs the training and prints the table of `measure`.

  Raises:
    ConfigError: no workdir.
  """
  del argv
  config = get_config()
  workdir = get_workdir()
  table = run(config, workdir)
  print(f'{"held-out text of":<20} bytes per piece   pieces per text   raw bytes')
  for name, row in table.items():
    print(f'{name:<20} {row["bytes_per_piece"]:>15.2f} {row["pieces_per_text"]:>17.1f} {row["byte_share"]:>11.1%}')
  print(f'wrote {pathlib.Path(workdir) / "model"}')
