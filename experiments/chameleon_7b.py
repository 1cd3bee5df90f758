"""Chameleon-7B pre-training with the settings of the paper.

Claim:     the published recipe in one file: 2,048 rows of 4,096 tokens, 9.2 trillion tokens, AdamW (0.9, 0.95, eps 1e-5, decay 0.1),
           1e-4 after 4,000 steps of warm-up, exponential decay to 0, clipping at 1, z-loss 1e-5, dropout 0.1, QK-norm.
Source:    arXiv 2405.09818, sections 2.2 and 2.3, Tables 1 and 2. Not published, chosen here: the constant of the decay (ln 100), the
           initialisation (0.02), the mesh, and the mixture of stage 2 beyond "half the weight".
Data:      the corpora are not public. The sources named here are those of the package, in the proportions of the paper: 2.9 T tokens of
           text, 1.4 billion pairs, 0.4 T tokens of interleaved pages. Weights count documents, in billions, with 1,000 tokens for a
           text and 4,000 for a page. Add your own sources to data/sources and name them here.
Hardware:  1,024 A100 of 80 GB, 856,481 GPU hours in the paper. With fully sharded data parallelism over 256 devices, parameters,
           moments and gradients take 0.44 GB a device, and a row of 4,096 tokens is recomputed layer by layer; several hosts need
           `jax.distributed` to be set up by the launcher.
Command:   chameleon train --config=experiments/chameleon_7b.py --config.tokenizers=MODEL_FOLDER --workdir=runs/chameleon_7b
           (a folder with a 512-pixel image tokenizer of 8,192 codes and a text tokenizer of at most 49,152 pieces)
"""

import ml_collections

from chameleon_jax import presets
from chameleon_jax.cli.flags import editable
from chameleon_jax.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, StageConfig, TrainConfig

STAGE_1 = (('emoji_text', 2.9), ('emoji_pairs', 1.4), ('emoji_interleaved', 0.1))
INSTRUCTIONS = (('emoji_chat', 2.2),)
ROWS, ROW_LENGTH, TOKENS = 2048, 4096, 9.2e12


def get_config() -> ml_collections.ConfigDict:
  """The config of this experiment."""
  stage_2 = (*((name, weight / 2) for name, weight in STAGE_1), *INSTRUCTIONS)
  return editable(
      TrainConfig(
          model=presets.chameleon_7b(),
          vocabulary=presets.released_vocabulary(),
          data=DataConfig(
              stages=(StageConfig(0.8, STAGE_1), StageConfig(0.2, stage_2)),
              seq_len=ROW_LENGTH,
              batch_size=ROWS,
              packing_bins=64,
              read_threads=16,
              prefetch=4,
          ),
          optimizer=OptimizerConfig(),
          z_loss=1e-5,
          loss_chunks=16,
          n_steps=round(TOKENS / (ROWS * ROW_LENGTH)),
          eval_every=1000,
          mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
          checkpoint=CheckpointConfig(every_steps=1000),
      )
  )
