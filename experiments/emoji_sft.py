"""Supervised fine-tuning on the emoji world: describe, draw, edit, answer.

Claim:     after pre-training, a short run on conversations makes the model follow them; only answers carry loss.
Source:    arXiv 2405.09818, section 3.1: cosine schedule, weight decay 0.1, z-loss as before, as many conversations in a
           row as fit, a separator (end_turn) between prompt and answer, modalities balanced, dropout 0.05. Departures: Muon, peak
           rate 1.5e-3 (1e-5 is for 7B), eps 1e-8, and a few plain documents stay in the mixture, so that the model still continues
           text and pages.
           Also ours: noise on the image tokens of the input, so that pictures are told by the words and not by their own first
           codes (after pre-training alone 10 % of training pictures were drawn right at a loss of 0.2 nats per code), and text
           targets that weigh 4, since a name is a few tokens and a picture 64.
Data:      weights count documents; emoji_chat holds all tasks, the others are single tasks.
Size:      that of emoji_pretrain.py.
Hardware:  two CPU cores as for pre-training, 34 minutes.
Watch:     validation/emoji_describe/loss_text, validation/emoji_draw/loss_image, validation/emoji_edit/loss_image: 0.16, 1.65 and 1.78 at
           the end; validation/loss_image 1.97 at 300, 1.71 at 600, 1.53 at 900, 1.43 at 1,500.
Command:   chameleon train --config=experiments/emoji_sft.py --workdir=runs/emoji/sft
Before:    emoji_pretrain.py, whose model folder is the start and holds the tokenizers.
After:     chameleon evaluate --suite=emoji --model=runs/emoji/sft/model
"""

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

CONVERSATIONS = (('emoji_chat', 0.8), ('emoji_describe', 1.2), ('emoji_draw', 2.0), ('emoji_edit', 1.5))
DOCUMENTS = (('emoji_text', 0.04), ('emoji_interleaved', 0.1))


def get_config() -> ml_collections.ConfigDict:
  """The config of this experiment."""
  vocabulary = VocabularyConfig(size=3072, n_codes=1024, n_sentinels=0, n_reserved=8)
  return editable(
      TrainConfig(
          model=TransformerConfig(
              vocab_size=vocabulary.size,
              d_model=256,
              n_layers=6,
              n_heads=4,
              n_kv_heads=4,
              d_head=64,
              d_ff=704,
              max_seq_len=512,
              dropout=0.05,
              dtype='bfloat16',
              scan_layers=False,
          ),
          vocabulary=vocabulary,
          data=DataConfig(
              stages=(StageConfig(1.0, (*CONVERSATIONS, *DOCUMENTS)),),
              seq_len=384,
              batch_size=16,
              packing_bins=16,
              shuffle_seed=1,
              image_noise=0.6,
          ),
          init_from='runs/emoji/pretrain/model',
          optimizer=OptimizerConfig(name='muon', learning_rate=1.5e-3, schedule='cosine', warmup_steps=50, eps=1e-8),
          text_loss_weight=4.0,
          n_steps=1500,
          eval_every=300,
          log_every=20,
          seed=1,
          checkpoint=CheckpointConfig(every_steps=200),
      )
  )
