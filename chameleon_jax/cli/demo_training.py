"""All three parts trained small, one after the other: what `chameleon demo --from_scratch` runs.

The sizes and step counts fit 25 minutes on two CPU cores (22 min 16 s, seen with other work beside it on an AMD Zen 4), and the
result shows it. The runs behind the shipped weights are in experiments/. This file only holds settings and calls
the same loops as the training commands, so an interrupted run goes on where it was.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable

from chameleon_jax.config import (
    CheckpointConfig,
    DataConfig,
    ImageTokenizerTrainConfig,
    OptimizerConfig,
    StageConfig,
    TextTokenizerTrainConfig,
    TrainConfig,
    TransformerConfig,
    VocabularyConfig,
    VQGANConfig,
    VQLossConfig,
)


@dataclasses.dataclass(frozen=True)
class FromScratch:
  """The three runs; `transformer_minutes` cuts the last one short on slow machines (with a model, all the same)."""

  image_tokenizer: ImageTokenizerTrainConfig
  text_tokenizer: TextTokenizerTrainConfig
  transformer: TrainConfig
  transformer_minutes: float | None = None


def small_run() -> FromScratch:
  """Sizes for two CPU cores: 64 tokens a picture, 512 codes, a transformer of about 3 million parameters."""
  vocabulary = VocabularyConfig(size=2048, n_codes=512, n_sentinels=0, n_reserved=8)
  image_tokenizer = ImageTokenizerTrainConfig(
      model=VQGANConfig(
          resolution=64,
          n_codes=vocabulary.n_codes,
          d_code=32,
          z_channels=64,
          base_channels=96,
          channel_multipliers=(1,),
          n_res_blocks=1,
          patch_size=8,
          norm_groups=16,
          commitment_weight=0.25,
      ),
      loss=VQLossConfig(
          l1_weight=0.0,
          l2_weight=1.0,
          perceptual='none',
          discriminator_weight=0.0,
          quantizer='ema',
          quantize_start=100,
          revive_every=25,
          revive_below=0.1,
      ),
      optimizer=OptimizerConfig(
          learning_rate=1e-3, schedule='cosine', warmup_steps=50, beta2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0
      ),
      batch_size=16,
      n_steps=4000,
      average_decay=0.998,
      eval_every=2000,
      log_every=100,
      checkpoint=CheckpointConfig(every_steps=1000, keep_last=1),
  )
  text_tokenizer = TextTokenizerTrainConfig(
      vocabulary=vocabulary, sources=(('emoji_text', 1), ('emoji_pairs', 4), ('emoji_chat', 1)), character_coverage=1.0
  )
  pretraining = (('emoji_text', 0.3), ('emoji_pairs', 2.0), ('emoji_interleaved', 0.7))
  transformer = TrainConfig(
      model=TransformerConfig(
          vocab_size=vocabulary.size,
          d_model=192,
          n_layers=6,
          n_heads=4,
          n_kv_heads=2,
          d_head=48,
          d_ff=512,
          max_seq_len=384,
          dtype='bfloat16',  # half the time of float32 on CPUs with AMX
      ),
      vocabulary=vocabulary,
      data=DataConfig(
          # The second stage halves the weights of the first and adds instructions (paper section 2.2).
          stages=(
              StageConfig(fraction=0.5, weights=pretraining),
              StageConfig(fraction=0.5, weights=(*((name, weight / 2) for name, weight in pretraining), ('emoji_chat', 4.5))),
          ),
          seq_len=384,
          batch_size=8,
      ),
      optimizer=OptimizerConfig(learning_rate=2e-3, schedule='cosine', warmup_steps=50, eps=1e-8, weight_decay=0.05),
      n_steps=900,
      eval_every=300,
      eval_batches=2,
      log_every=25,
      checkpoint=CheckpointConfig(every_steps=250, keep_last=1),
  )
  return FromScratch(image_tokenizer, text_tokenizer, transformer, transformer_minutes=12)


def train_from_scratch(runs: FromScratch, workdir: str | os.PathLike[str], *, log: Callable[[str], None]) -> pathlib.Path:
  """Trains what is not trained yet in `workdir`; returns the model folder with all three parts.

  Raises:
    ChameleonError: as the loops of the three parts.
  """
  from chameleon_jax.interop.native import ModelParts, load_model, save_model
  from chameleon_jax.training.loop import train
  from chameleon_jax.training.text_tokenizer import train_from_sources
  from chameleon_jax.training.vqgan_loop import train_image_tokenizer

  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  image_folder, text_folder = workdir / 'image_tokenizer' / 'model', workdir / 'text_tokenizer' / 'model'
  if not image_folder.exists():
    log('1 of 3: image tokenizer')
    train_image_tokenizer(runs.image_tokenizer, workdir / 'image_tokenizer')
  if not text_folder.exists():
    log('2 of 3: text tokenizer')
    text_folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_from_sources(runs.text_tokenizer)
    save_model(text_folder, ModelParts(vocabulary=runs.text_tokenizer.vocabulary, text_tokenizer=tokenizer))
  log('3 of 3: transformer')
  images, text = load_model(image_folder), load_model(text_folder)
  tokenizers = dataclasses.replace(images, vocabulary=text.vocabulary, text_tokenizer=text.text_tokenizer)
  folder = workdir / 'transformer'
  if not (folder / 'model').exists():
    train(runs.transformer, folder, tokenizers=tokenizers, max_minutes=runs.transformer_minutes)
  return folder / 'model'
