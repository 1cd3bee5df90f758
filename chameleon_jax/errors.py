"""Errors a user can mend. Each carries one line: what is wrong, where, and what to do.

The command line prints that line and exits with 1; library callers may catch `ChameleonError`.
"""


class ChameleonError(ValueError):
  """Base of every error that input, files or settings can cause."""


class ConfigError(ChameleonError):
  """A setting is unknown, of the wrong type, or contradicts another."""


class CheckpointError(ChameleonError):
  """A checkpoint or model folder is missing, foreign, damaged, or does not fit."""


class DataError(ChameleonError):
  """A record, document or source cannot be used."""


class ImageError(DataError):
  """A picture cannot be decoded, or its size is out of bounds."""


class PromptError(ChameleonError):
  """A prompt cannot be sampled from: too long, empty, or of the wrong form."""
