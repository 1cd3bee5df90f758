"""Every setting of the project as frozen dataclasses.

A config is a value: hashable, comparable, safe to close over in `jax.jit`. `__post_init__` only raises;
what can be computed from fields is a property. The editable form that command-line flags change lives in
`cli/flags.py`. Names and defaults follow arXiv 2405.09818 (section 2 and Table 1) and the released
checkpoints; where a default departs from them the field says so.
"""

from chameleon_jax.config.networks import (
  AttentionImplementation,
  CacheDtype,
  DiscriminatorConfig,
  Dtype,
  Quantization,
  TransformerConfig,
  VQGANConfig,
)
from chameleon_jax.config.sampling import SamplingOptions
from chameleon_jax.config.training import (
  CheckpointConfig,
  DataConfig,
  FineTuneConfig,
  ImageTokenizerTrainConfig,
  MeshConfig,
  OptimizerConfig,
  SamplesConfig,
  SpikeConfig,
  StageConfig,
  TextTokenizerTrainConfig,
  TrainConfig,
  VQLossConfig,
)
from chameleon_jax.config.vocabulary import VocabularyConfig

__all__ = [
  'AttentionImplementation',
  'CacheDtype',
  'CheckpointConfig',
  'DataConfig',
  'DiscriminatorConfig',
  'Dtype',
  'FineTuneConfig',
  'ImageTokenizerTrainConfig',
  'MeshConfig',
  'OptimizerConfig',
  'Quantization',
  'SamplesConfig',
  'SamplingOptions',
  'SpikeConfig',
  'StageConfig',
  'TextTokenizerTrainConfig',
  'TrainConfig',
  'TransformerConfig',
  'VQGANConfig',
  'VQLossConfig',
  'VocabularyConfig',
]
