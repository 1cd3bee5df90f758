"""Anole's recipe: a Chameleon that writes pictures, by training nothing but the image rows of the output head.

Claim:     the released 7B was published with its image output suppressed; drawing 8,192 of the head's 65,536 rows anew and training
           them alone (33.6 million parameters) on a few thousand pictures switches it on.
Source:    arXiv 2407.06135 and GAIR-NLP/anole: rows 4 to 8195 start from a normal distribution of standard deviation sqrt(2 / 4096),
           AdamW at 1e-3, image tokens carry the loss, three epochs of 5,859 pictures, eight sequences a step, 30 minutes on eight A100.
           Not published, chosen here: betas, weight decay and schedule; a caption before each picture, of which Anole had none.
Data:      a folder of captioned pictures, image_folder:DIR (README, "Your data"); DIR is data/pictures here.
Hardware:  one card of 40 GB: 14.0 GB of frozen weights in bfloat16, 0.54 GB of the rows with their gradient and moments, the head once
           more in float32 with its gradient (2.1 GB), and the activations of 8,192 tokens with loss in 16 pieces. Nothing below the head is
           differentiated, so a step is a forward pass and the head. These are counts, not a run: nobody has run this file at full size.
Command:   chameleon train --config=experiments/anole.py --config.init_from=weights/7b --workdir=runs/anole
           (weights of Meta's release or Hugging Face's port, as they are or converted)
After:     chameleon sample --model=runs/anole/model --prompt='A red apple on a table.' --output=pictures
"""

import dataclasses

import ml_collections

from chameleon_jax import presets
from chameleon_jax.cli.flags import editable
from chameleon_jax.config import CheckpointConfig, DataConfig, FineTuneConfig, MeshConfig, OptimizerConfig, StageConfig, TrainConfig

PICTURES, EPOCHS, BATCH = 5859, 3, 8


def get_config() -> ml_collections.ConfigDict:
  """The config of this experiment."""
  vocabulary = presets.released_vocabulary()
  model = dataclasses.replace(presets.chameleon_7b(), dropout=0.0, param_dtype='bfloat16')
  return editable(
      TrainConfig(
          model=model,
          vocabulary=vocabulary,
          # One picture of 1,024 codes and its caption a row.
          data=DataConfig(stages=(StageConfig(1.0, (('image_folder:data/pictures', 1.0),)),), seq_len=1152, batch_size=BATCH),
          init_from='weights/7b',
          fine_tune=FineTuneConfig(
              method='selected',
              trainable=('lm_head',),
              head_rows=(4, 4 + vocabulary.n_codes),
              restart_std=(2 / model.d_model) ** 0.5,
          ),
          optimizer=OptimizerConfig(learning_rate=1e-3, schedule='constant', warmup_steps=0, beta2=0.999, eps=1e-8, weight_decay=0.0),
          z_loss=0.0,
          text_loss_weight=0.0,
          loss_chunks=16,
          n_steps=round(EPOCHS * PICTURES / BATCH),
          eval_every=500,
          mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
          checkpoint=CheckpointConfig(every_steps=500),
      )
  )
