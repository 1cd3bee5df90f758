"""Errors a user can mend. Each carries one line: what is wrong, where, and what to do.

The command line prints that line and exits with 1; library callers may catch `ChameleonError`.
"""

from typing import Any


class ChameleonError(ValueError):
  """Base of every error that input, files or settings can cause. The command line exits with `exit_code`."""

  exit_code = 1


class ConfigError(ChameleonError):
  """A setting is unknown, of the wrong type, or contradicts another."""


class CheckpointError(ChameleonError):
  """A checkpoint or model folder is missing, foreign, damaged, or does not fit."""


class DataError(ChameleonError):
  """A record, document or source cannot be used."""


class ImageError(DataError):
  """A picture cannot be decoded, or its size is out of bounds."""


class HostError(ChameleonError):
  """Hosts of one run are missing, or do not agree on what to run."""


class PromptError(ChameleonError):
  """A prompt cannot be sampled from: too long, empty, or of the wrong form."""


class SamplingError(ChameleonError):
  """Requests of a batch failed while they were sampled; the others went on to their end.

  Attributes:
    failures: place of each failed request in the batch -> one line.
    results: what every request wrote, in the order of the batch; of a failed one, what it wrote before.
  """

  def __init__(self, failures: dict[int, str], results: list[Any]):
    first = min(failures)
    more = f' (and {len(failures) - 1} more)' if len(failures) > 1 else ''
    super().__init__(f'prompt {first}: {failures[first]}{more}')
    self.failures = failures
    self.results = results
