"""The same job as an Apache Beam pipeline: shards spread over a cluster by Flink, Spark or Dataflow. Needs the extra `beam`.

    Create(shard numbers) -> Reshuffle -> make the shard -> collect the reports -> tokenized.json

Sources, model folder and output must lie where every worker finds them under the same path (NFS, Lustre, a mounted bucket). A shard that
Beam does twice comes out the same and is renamed over itself. What a worker needs is loaded once for each of its processes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from chameleon_jax.data.tokenize import Tokenization
from chameleon_jax.data.tokenize_folder import Report, TokenizeJob, complete, write_table
from chameleon_jax.data.tokenize_run import LoadTokenizers
from chameleon_jax.errors import ConfigError


class MakeShard(beam.DoFn):
  """Shard number -> its report."""

  def __init__(self, job: TokenizeJob, load: LoadTokenizers):
    super().__init__()
    self._job, self._load = job, load
    self._work: Tokenization | None = None

  def setup(self) -> None:
    """Opens the source and loads the tokenizers; Beam calls it once a process."""
    self._work = Tokenization(self._job, self._load())

  def process(self, number: int) -> Iterator[Report]:
    """Makes one shard."""
    assert self._work is not None
    yield self._work.shard(number)


class WriteTable(beam.DoFn):
  """All reports -> the table."""

  def __init__(self, job: TokenizeJob):
    super().__init__()
    self._job = job

  def process(self, reports: Sequence[Report]) -> Iterator[dict[str, Any]]:
    """Ends the job."""
    yield write_table(self._job, reports)


def tokenize_shards(pipeline: beam.Pipeline, job: TokenizeJob, load: LoadTokenizers) -> Any:
  """Adds the job to a pipeline; gives the collection that holds its table."""
  numbers = pipeline | 'shard numbers' >> beam.Create(range(job.n_shards)) | 'spread' >> beam.Reshuffle()
  reports = numbers | 'make shards' >> beam.ParDo(MakeShard(job, load))
  return reports | 'collect' >> beam.combiners.ToList() | 'write the table' >> beam.ParDo(WriteTable(job))


def run(job: TokenizeJob, load: LoadTokenizers, options: Sequence[str]) -> dict[str, Any]:
  """Runs the job on the runner that the options name, and waits for it.

  Args:
    job: what to do.
    load: loads the tokenizers; picklable.
    options: Beam's, such as `--runner=FlinkRunner`.

  Returns:
    `tokenized.json`.

  Raises:
    ConfigError: the pipeline ended without a table. Errors of the work come as the runner reports them.
  """
  done = complete(job)
  if done is not None:
    return done
  with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
    tokenize_shards(pipeline, job, load)
  done = complete(job)
  if done is None:
    raise ConfigError(f'the pipeline left no table in {job.output}: is it the same folder on every worker?')
  return done
