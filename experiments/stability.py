"""The measures that keep training stable, switched off one at a time on a small model at a high learning rate.

Claim:     none beforehand; the curves are in stability.md as they came out. In the paper QK-norm alone keeps a 7B from diverging, z-loss
           and dropout or the re-ordered norms are needed beside it at 7B and 34B.
Source:    arXiv 2405.09818, section 2.3 and figures 5 and 6; that small models at high rates show what large ones do: arXiv 2309.14322.
Variants:  the argument behind the colon: baseline (QK-norm, z-loss 1e-5, norms in front, no dropout), no_qk_norm, no_z_loss, post_norm
           (the 34B's order), dropout (0.1). Several may be joined: no_qk_norm+no_z_loss.
Size:      1.6 million parameters, 4 layers of 128, rows of 192 tokens, 16 in a batch, bfloat16 over float32 masters; no weight decay, which
           would hide a drift of the logits, and a constant rate of 0.03, 30 times what trains this size well.
Data:      emoji pairs and text with the shipped tokenizers.
Hardware:  two CPU cores with other work beside it: 170 steps of 3,072 tokens in three to six minutes a variant.
Command:   chameleon train --config=experiments/stability.py:no_qk_norm --workdir=runs/stability/no_qk_norm
Watch:     train/loss, train/attention_logit_bound (what QK-norm bounds), train/z (mean log Z, what z-loss holds), train/output_rms
           (the residual stream behind the last layer, what norm placement bounds), train/gradient_norm.
"""

import pathlib
from typing import Any

import ml_collections

from chameleon_jax.cli.flags import editable
from chameleon_jax.config import (
  CheckpointConfig,
  DataConfig,
  OptimizerConfig,
  StageConfig,
  TrainConfig,
  TransformerConfig,
  VocabularyConfig,
)

SHIPPED = pathlib.Path(__file__).resolve().parents[1] / 'chameleon_jax' / 'assets' / 'emoji_weights'
VARIANTS: dict[str, dict[str, Any]] = {
    'baseline': {},
    'no_qk_norm': {'qk_norm': False},
    'no_z_loss': {'z_loss': 0.0},
    'post_norm': {'norm_position': 'post'},
    'dropout': {'dropout': 0.1},
}


def get_config(variant: str = 'baseline') -> ml_collections.ConfigDict:
  """The config of a variant, or of several joined by '+'."""
  unknown = [name for name in variant.split('+') if name not in VARIANTS]
  if unknown:
    raise ValueError(f'no variant {unknown[0]!r}; there are {", ".join(VARIANTS)}')
  changes = {key: value for name in variant.split('+') for key, value in VARIANTS[name].items()}
  z_loss = changes.pop('z_loss', 1e-5)
  vocabulary = VocabularyConfig(size=3072, n_codes=1024, n_sentinels=0, n_reserved=8)
  model = TransformerConfig(
      vocab_size=vocabulary.size,
      d_model=128,
      n_layers=4,
      n_heads=4,
      n_kv_heads=4,
      d_head=32,
      d_ff=352,
      max_seq_len=192,
      dtype='bfloat16',
      scan_layers=False,
      **changes,
  )
  return editable(
      TrainConfig(
          model=model,
          vocabulary=vocabulary,
          data=DataConfig(stages=(StageConfig(1.0, (('emoji_pairs', 3.0), ('emoji_text', 0.2))),), seq_len=192, batch_size=16),
          tokenizers=str(SHIPPED),
          optimizer=OptimizerConfig(learning_rate=0.03, schedule='constant', warmup_steps=20, eps=1e-8, weight_decay=0.0),
          z_loss=z_loss,
          n_steps=170,
          eval_every=170,
          eval_batches=2,
          log_every=5,
          checkpoint=CheckpointConfig(every_steps=170, keep_last=1),
      )
  )
