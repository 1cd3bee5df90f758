"""Pre-training on the emoji world: text, picture-text pairs and interleaved documents, then instructions mixed in.

Claim:     two stages as in the paper teach one small transformer to read, name and draw about 3,800 emoji.
Source:    arXiv 2405.09818, sections 2.2 (stage 2 is the last 20 % and halves the weights of stage 1) and 2.3 (QK-norm, z-loss, dropout).
           Departures for a model and a time this small: Muon (arXiv 2502.16982) in place of AdamW, peak rate 2e-3 with a cosine,
           eps 1e-8 (Wortsman et al., arXiv 2309.14322), dropout 0.05, batches of 6,144 tokens.
Data:      weights count documents. Needs the tokenizers of emoji_image_tokenizer.py and emoji_text_tokenizer.py.
Size:      6.4 million parameters, 64 tokens a picture, 3,072 token ids. Layers are unrolled: on two CPU cores a gradient took
           1.05 s in place of 1.25 s with scanned layers.
Hardware:  two CPU cores with AMX: 4,100 to 4,700 tokens a second, so 900 steps take 21 minutes (AVX-512 alone: 2,100 to 2,600).
           GLIBC_TUNABLES=glibc.malloc.hugetlb=1 saves a sixth of the CPU time on Linux; JAX_DEFAULT_PRNG_IMPL=unsafe_rbg was
           set too, for dropout.
Watch:     loss_image under ln 1024 = 6.93 after about 30 steps, 4.2 at 100, 2.8 at 220, 1.7 at 340; in an earlier run with AdamW
           and slightly more text it was 2.9 at 250. validation/emoji_pairs/loss_image is about held-out combinations and stops earlier.
Command:   chameleon train --config=experiments/emoji_pretrain.py --workdir=runs/emoji/pretrain
Next:      emoji_sft.py. What the shipped weights were trained with is in the model card, assets/emoji_model_card.md.
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

STAGE_1 = (('emoji_text', 0.12), ('emoji_pairs', 3.0), ('emoji_interleaved', 0.3))
INSTRUCTIONS = (('emoji_chat', 1.71),)


def get_config() -> ml_collections.ConfigDict:
  """The config of this experiment."""
  vocabulary = VocabularyConfig(size=3072, n_codes=1024, n_sentinels=0, n_reserved=8)
  stage_2 = (*((name, weight / 2) for name, weight in STAGE_1), *INSTRUCTIONS)
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
          data=DataConfig(stages=(StageConfig(0.8, STAGE_1), StageConfig(0.2, stage_2)), seq_len=384, batch_size=16, packing_bins=16),
          tokenizers='runs/emoji/image_tokenizer/model,runs/emoji/text_tokenizer/model',
          optimizer=OptimizerConfig(name='muon', learning_rate=2e-3, schedule='cosine', warmup_steps=60, end_fraction=0.05, eps=1e-8),
          n_steps=900,
          eval_every=200,
          log_every=20,
          checkpoint=CheckpointConfig(every_steps=200),
      )
  )
