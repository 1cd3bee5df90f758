"""Twenty steps of a small network on eight devices: in one process, or in two with four each, the losses are the same.

Claim:     the mesh decides where arrays lie, and the number of hosts nothing: relative difference of the losses under 1e-5.
Source:    Python's documentation, read by the shipped text tokenizer. Rows of 32 tokens, shorter than almost every document.
Hardware:  two CPU cores; half a minute with the compilations.
Command:   experiments/launch/two_processes.md has them all, as a reader types them and as the tests run them.
"""

import ml_collections

from chameleon_jax.cli.flags import editable
from chameleon_jax.config import (
  CheckpointConfig,
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  StageConfig,
  TrainConfig,
  TransformerConfig,
  VocabularyConfig,
)


def get_config() -> ml_collections.ConfigDict:
  """The config of this experiment."""
  vocabulary = VocabularyConfig(size=3072, n_codes=1024, n_sentinels=0, n_reserved=8)
  return editable(
      TrainConfig(
          model=TransformerConfig(
              vocab_size=vocabulary.size,
              d_model=32,
              n_layers=1,
              n_heads=4,
              n_kv_heads=2,
              d_head=8,
              d_ff=64,
              max_seq_len=32,
          ),
          vocabulary=vocabulary,
          data=DataConfig(stages=(StageConfig(1.0, (('emoji_text', 1.0),)),), seq_len=32, batch_size=16),
          tokenizers='chameleon_jax/assets/emoji_weights',
          optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
          n_steps=20,
          log_every=1,
          eval_every=20,
          eval_batches=1,
          mesh=MeshConfig(data=2, fsdp=2, tensor=2),
          checkpoint=CheckpointConfig(every_steps=10),
      )
  )
