"""Turn a data set into shards of codes and text, once, for any number of trainings.

  chameleon tokenize --source=image_folder:data/birds --model=emoji --output=data/birds-tokenized
  chameleon tokenize --source='webdataset:/data/laion/*.tar' --model=weights/7b --output=/data/laion-tokenized --shards=512 --processes=8

Writes OUTPUT/train and OUTPUT/validation, which a config then reads as `array_record:OUTPUT`. Kinds of sources: jsonl, image_folder,
webdataset, tfds, text, array_record, and the names of the emoji world; experiments/README.md shows each.

The same command after a kill goes on from the finished shards, and the shards come out the same for any number of processes. Documents
that cannot be used go to rejects-*.jsonl with file, record and reason; the command stops when they pass --max_rejects.

On a cluster, with `pip install '.[beam]'`, the same work runs as an Apache Beam pipeline; give Beam's options one by one:

  chameleon tokenize ... --beam=--runner=FlinkRunner --beam=--flink_master=HOST:8081 --beam=--environment_type=LOOPBACK
  chameleon tokenize ... --beam=--runner=SparkRunner --beam=--spark_master_url=spark://HOST:7077
  chameleon tokenize ... --beam=--runner=DataflowRunner --beam=--project=P --beam=--region=R --beam=--temp_location=gs://B/tmp
"""

import functools
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from chameleon_jax.errors import ConfigError

if TYPE_CHECKING:
  from chameleon_jax.data.tokenize_run import Total
  from chameleon_jax.interop.native import ModelParts

_LINE_EVERY = {True: 0.2, False: 10.0}  # seconds, on a terminal and elsewhere
SPLITS = ('train', 'validation')


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('source', None, 'what to tokenize: KIND:ARGUMENT, or a source of the emoji world')
  flags.DEFINE_string('model', None, "folder with the tokenizers, or 'emoji'; one for each part with a comma between them")
  flags.DEFINE_string('output', None, 'folder to write; train and validation go below it')
  flags.DEFINE_list('split', list(SPLITS), 'splits to do; one without documents is left out')
  flags.DEFINE_integer('shards', 16, 'files per split, the units of work', lower_bound=1)
  flags.DEFINE_integer('processes', 1, 'workers on this host; with GPUs, one a GPU', lower_bound=1)
  flags.DEFINE_integer('threads', 2, 'threads of each worker that read and decode pictures', lower_bound=1)
  flags.DEFINE_integer('batch_size', 64, 'pictures encoded at once', lower_bound=1)
  flags.DEFINE_float('max_rejects', 0.01, 'share of all documents that may be rejected')
  flags.DEFINE_enum('preprocessing', 'meta', ['meta', 'pad', 'huggingface'], 'how pictures are made square; pad cuts nothing off')
  flags.DEFINE_integer('seed', 0, 'of what documents draw: order, caption, wording', lower_bound=0)
  flags.DEFINE_multi_string('beam', [], 'an option of Apache Beam; any makes this a Beam pipeline')


def load_model(folders: str) -> 'ModelParts':
  """Tokenizers of a folder, or of several with commas between them: each part from the first that has it."""
  from chameleon_jax.chameleon import shipped_path
  from chameleon_jax.interop.native import ModelParts
  from chameleon_jax.interop.opening import load_tokenizers

  found = [load_tokenizers(path if os.path.exists(path) else shipped_path(path) or path) for path in folders.split(',')]
  images = next((parts for parts in found if parts.vqgan_config is not None), ModelParts())
  texts = next((parts for parts in found if parts.text_tokenizer is not None), ModelParts())
  return ModelParts(vqgan_config=images.vqgan_config, vqgan_params=images.vqgan_params, text_tokenizer=texts.text_tokenizer)


def main(argv: Sequence[str]) -> int:
  """Runs the command.

  Raises:
    ConfigError: a flag is missing or wrong.
  """
  if len(argv) > 1:
    raise ConfigError(f'unexpected argument {argv[1]!r}')
  values = flags.FLAGS
  for name, what in (('source', 'KIND:ARGUMENT'), ('model', 'DIR'), ('output', 'DIR')):
    if getattr(values, name) is None:
      raise ConfigError(f'--{name}={what} is needed: {values[name].help}')
  unknown = [split for split in values.split if split not in SPLITS]
  if unknown or not values.split:
    raise ConfigError(f'--split takes train, validation or both, got {",".join(values.split)!r}')
  from chameleon_jax.data.sources.source import make_source
  from chameleon_jax.data.tokenize_folder import TokenizeJob

  sizes = {split: len(make_source(values.source, split)) for split in dict.fromkeys(values.split)}
  if not any(sizes.values()):
    raise ConfigError(f'source {values.source!r} has no documents in {" or ".join(sizes)}')
  for split, n_documents in sizes.items():
    if not n_documents:
      print(f'{split}: no documents', file=sys.stderr)
      continue
    job = TokenizeJob(
        source=values.source,
        split=split,
        output=str(pathlib.Path(values.output) / split),
        n_shards=min(values.shards, n_documents),
        batch_size=values.batch_size,
        preprocessing=values.preprocessing,
        seed=values.seed,
        max_rejects=values.max_rejects,
        threads=values.threads,
    )
    _report(job, _run(job, functools.partial(load_model, values.model)))
  return 0


def _run(job: Any, load: Any) -> dict[str, Any]:
  values = flags.FLAGS
  if values.beam:
    try:
      from chameleon_jax.data import tokenize_beam
    except ImportError as error:
      raise ConfigError(f"--beam needs Apache Beam ({error}): pip install '.[beam]'") from error
    return tokenize_beam.run(job, load, values.beam)
  from chameleon_jax.data.tokenize_run import run

  line = _ProgressLine(job.split)
  try:
    return run(job, load, processes=values.processes, on_progress=line)
  finally:
    line.end()


def _report(job: Any, table: dict[str, Any]) -> None:
  counts = table['counts']
  text = f'{counts["records"]:,} documents, {counts["pictures"]:,} pictures, {counts["text_bytes"]:,} bytes of text'
  rejected = f'; {counts["rejected"]:,} rejected, see {job.output}/rejects-*.jsonl' if counts['rejected'] else ''
  print(f'{job.output}: {text} in {len(table["shards"])} shards{rejected}')


class _ProgressLine:
  """One line on stderr, written over and over on a terminal, anew every few seconds elsewhere."""

  def __init__(self, split: str) -> None:
    self._split, self._width, self._last = split, 0, time.monotonic()
    self._terminal = sys.stderr.isatty()

  def __call__(self, total: 'Total') -> None:
    now = time.monotonic()
    if now - self._last < _LINE_EVERY[self._terminal]:
      return
    self._last = now
    rate = total.new_pictures / total.seconds if total.seconds else 0.0
    text = f'{self._split}: {total.documents:,} / {total.n_documents:,} documents, {total.pictures:,} pictures, {rate:,.1f} pictures/s'
    text += f', {total.rejected:,} rejected' if total.rejected else ''
    print(f'\r{text:<{self._width}}' if self._terminal else text, end='' if self._terminal else '\n', file=sys.stderr, flush=True)
    self._width = len(text)

  def end(self) -> None:
    """Leaves the line as it is, the cursor on the next."""
    if self._width and self._terminal:
      print(file=sys.stderr)
