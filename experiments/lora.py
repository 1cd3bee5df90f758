"""A 7B fine-tuned on one card by low-rank adapters.

Claim:     16 numbers a row and column beside every projection (40 million parameters, 0.6 % of the model) are enough to teach a pre-trained
           model the pictures and the tone of a small data set, in the memory of one card.
Source:    arXiv 2106.09685. Rank 16, alpha 32, rate 1e-4: common settings for models of this size, not from the paper of Chameleon. z-loss,
           cosine, the weight of text and pictures as in its fine-tuning (arXiv 2405.09818, section 3).
Data:      a folder of captioned pictures, image_folder:DIR (README, "Your data"); DIR is data/pictures here.
Hardware:  one card of 40 GB, by counting: 14.0 GB of frozen weights in bfloat16; 0.64 GB of adapters with gradients and two moments;
           one row of 4,096 tokens at a time, layers recomputed (32 inputs of layers, 1.1 GB; one layer at work, 1 to 2 GB) and the loss in
           16 pieces (0.4 GB). On n cards accumulate_steps is 16 / n. Nobody has run this file at full size.
Command:   chameleon train --config=experiments/lora.py --config.init_from=weights/anole --workdir=runs/lora
After:     runs/lora/model is a whole model; runs/lora/adapter the 0.16 GB that trained:
           chameleon sample --model=weights/anole --adapter=runs/lora/adapter --prompt=...
           chameleon convert --adapter=runs/lora/adapter --export_peft=peft/tuned       (for Hugging Face's peft)
"""

import dataclasses

import ml_collections

from chameleon_jax import presets
from chameleon_jax.cli.flags import editable
from chameleon_jax.config import CheckpointConfig, DataConfig, FineTuneConfig, MeshConfig, OptimizerConfig, StageConfig, TrainConfig


def get_config() -> ml_collections.ConfigDict:
  """The config of this experiment."""
  return editable(
      TrainConfig(
          model=dataclasses.replace(presets.chameleon_7b(), dropout=0.0, param_dtype='bfloat16'),
          vocabulary=presets.released_vocabulary(),
          data=DataConfig(stages=(StageConfig(1.0, (('image_folder:data/pictures', 1.0),)),), seq_len=4096, batch_size=16),
          init_from='weights/anole',
          fine_tune=FineTuneConfig(method='lora', lora_rank=16, lora_alpha=32.0),
          optimizer=OptimizerConfig(
              learning_rate=1e-4, schedule='cosine', warmup_steps=50, eps=1e-8, weight_decay=0.0, accumulate_steps=16
          ),
          loss_chunks=16,
          n_steps=1000,
          eval_every=100,
          mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
          checkpoint=CheckpointConfig(every_steps=100),
      )
  )
