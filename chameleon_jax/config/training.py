"""Mesh, optimizer, checkpoints, data and runs."""

import dataclasses
import math
from typing import Literal

from chameleon_jax.config.checks import require, require_fraction, require_positive
from chameleon_jax.config.networks import DiscriminatorConfig, TransformerConfig, VQGANConfig
from chameleon_jax.config.vocabulary import VocabularyConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1, which takes what is left."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1

  def __post_init__(self):
    sizes = (self.data, self.fsdp, self.tensor)
    require(all(size == -1 or size > 0 for size in sizes), f'mesh sizes must be positive or -1, got {sizes}')
    require(sizes.count(-1) <= 1, f'only one mesh size may be -1, got {sizes}')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW, its schedule and clipping (paper section 2.3; SFT section 3).

  `name` 'adafactor' keeps two vectors a matrix in place of its second moment, and no first one unless `momentum_dtype` is
  given (arXiv 1804.04235); `momentum_dtype` is the type of the first moment of 'adamw' (float32 where None) and 'adafactor'.
  What each keeps, in bytes: `training/optimizer.py`.
  `name` 'muon' gives hidden matrices orthogonalised momentum with the update size of AdamW (arXiv 2502.16982), so that
  `learning_rate` and `weight_decay` mean the same; everything else stays with Adam.
  `decay_rate` is k of lr(u) = peak (exp(-k u) - exp(-k)) / (1 - exp(-k)); the paper gives no constant.
  """

  name: Literal['adamw', 'muon', 'adafactor'] = 'adamw'
  momentum_dtype: Literal['float32', 'bfloat16'] | None = None
  learning_rate: float = 1e-4
  schedule: Literal['exponential', 'cosine', 'constant'] = 'exponential'
  warmup_steps: int = 4000
  decay_rate: float = math.log(100)
  end_fraction: float = 0.0  # the schedule ends at this fraction of the peak
  beta1: float = 0.9
  beta2: float = 0.95
  muon_beta: float = 0.95  # momentum of the matrices
  eps: float = 1e-5  # of the paper; 1e-8 is safer for tiny models (spec training.md 6.3)
  weight_decay: float = 0.1
  clip_norm: float | None = 1.0
  accumulate_steps: int = 1

  def __post_init__(self):
    require_positive(self, 'learning_rate', 'eps', 'decay_rate', 'accumulate_steps')
    require_fraction(self, 'end_fraction')
    require(self.momentum_dtype is None or self.name != 'muon', 'momentum_dtype is for adamw and adafactor; muon keeps float32')
    require(self.warmup_steps >= 0, f'warmup_steps must not be negative, got {self.warmup_steps}')


@dataclasses.dataclass(frozen=True)
class FineTuneConfig:
  """What a run changes of the model it starts from, and in which type the rest is kept.

  `method` 'full' trains every parameter. 'selected' trains the parameters that `trainable` names, patterns of the shell
  over paths such as 'lm_head' or 'layers*/attention/*_norm/*'; with `head_rows` (first token id, id after the last) only
  these rows of the output head, and with `restart_std` they start from a normal distribution and not from the weights.
  'lora' trains a pair of thin matrices beside each projection of `lora_targets` (arXiv 2106.09685).

  Frozen parameters have no gradient and no moments, are not in the checkpoints, and are kept in `frozen_dtype`.
  At the end a run of 'lora' writes the adapter, and unless `export` is 'apart' the model with the adapter added in as well.
  """

  method: Literal['full', 'selected', 'lora'] = 'full'
  trainable: tuple[str, ...] = ()
  head_rows: tuple[int, int] | None = None
  restart_std: float | None = None
  frozen_dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  lora_rank: int = 16
  lora_alpha: float = 32.0  # the product of the pair is scaled by alpha / rank
  lora_targets: tuple[str, ...] = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')
  export: Literal['merged', 'apart'] = 'merged'

  def __post_init__(self):
    require_positive(self, 'lora_rank', 'lora_alpha')
    selected = self.method == 'selected'
    require(selected == bool(self.trainable), "method 'selected' needs trainable, the patterns of what trains, and only it takes them")
    require(selected or self.head_rows is None, "head_rows is for method 'selected'")
    require(selected or self.restart_std is None, "restart_std is for method 'selected'")
    require(self.restart_std is None or self.restart_std > 0, f'restart_std must be positive, got {self.restart_std}')
    require(self.method == 'lora' or self.export == 'merged', "export 'apart' is for method 'lora'")
    require(self.method != 'lora' or bool(self.lora_targets), "method 'lora' needs lora_targets")
    if self.head_rows is not None:
      first, end = self.head_rows
      require(0 <= first < end, f'head_rows {self.head_rows} must be (first token id, id after the last)')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save and what to keep."""

  every_steps: int = 1000
  keep_last: int = 2
  asynchronous: bool = True

  def __post_init__(self):
    require_positive(self, 'every_steps', 'keep_last')


@dataclasses.dataclass(frozen=True)
class VQLossConfig:
  """Objective of the image tokenizer (spec training.md 2.4 to 2.6)."""

  l1_weight: float = 1.0
  l2_weight: float = 0.0
  perceptual: Literal['multiscale', 'random_features', 'lpips', 'none'] = 'multiscale'
  perceptual_weight: float = 1.0
  lpips_path: str | None = None  # VGG16 and head weights, see models/vqgan/perceptual.py
  discriminator_weight: float = 0.8
  discriminator_start: int = 10_000
  feature_matching_weight: float = 0.0
  quantizer: Literal['gradient', 'ema'] = 'gradient'
  ema_decay: float = 0.99
  ema_eps: float = 1e-5
  entropy_weight: float = 0.0
  entropy_temperature: float = 0.01
  quantize_start: int = 0  # before this step latents reach the decoder as they are; then the codebook is put on latents
  revive_every: int | None = None  # steps between re-seeding codes that fell out of use
  revive_below: float = 0.03  # a code is out of use under this many hits a step (exponential mean)

  def __post_init__(self):
    require_fraction(self, 'ema_decay')
    require(self.quantize_start >= 0, f'quantize_start must not be negative, got {self.quantize_start}')
    require((self.perceptual == 'lpips') == (self.lpips_path is not None), 'perceptual="lpips" needs lpips_path, and only it takes one')


@dataclasses.dataclass(frozen=True)
class ImageTokenizerTrainConfig:
  """`chameleon train-image-tokenizer`."""

  model: VQGANConfig = VQGANConfig()
  discriminator: DiscriminatorConfig = DiscriminatorConfig()
  loss: VQLossConfig = VQLossConfig()
  optimizer: OptimizerConfig = OptimizerConfig(
      learning_rate=5.4e-5, schedule='constant', warmup_steps=0, beta1=0.5, beta2=0.9, eps=1e-8, weight_decay=0.0, clip_norm=None
  )
  discriminator_optimizer: OptimizerConfig = OptimizerConfig(
      learning_rate=5.4e-5, schedule='constant', warmup_steps=0, beta1=0.5, beta2=0.9, eps=1e-8, weight_decay=0.0, clip_norm=None
  )
  source: str = 'emoji'
  horizontal_flip: bool = False
  max_shift: int = 0  # pixels of random translation, filled with the border
  batch_size: int = 12
  n_steps: int = 100_000
  average_decay: float | None = None  # exponential average of the weights, used for evaluation and export
  eval_every: int = 1000
  log_every: int = 20
  seed: int = 0
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  init_from: str | None = None  # a model folder whose image tokenizer is the start

  def __post_init__(self):
    require_positive(self, 'batch_size', 'n_steps', 'eval_every', 'log_every')
    for name in ('optimizer', 'discriminator_optimizer'):
      require(getattr(self, name).name == 'adamw', f'{name}.name must be adamw: muon is for matrices, not for convolutions')


@dataclasses.dataclass(frozen=True)
class TextTokenizerTrainConfig:
  """`chameleon train-text-tokenizer`: sentencepiece BPE with byte fallback (paper section 2.1)."""

  vocabulary: VocabularyConfig = VocabularyConfig()
  sources: tuple[tuple[str, int], ...] = (('emoji_text', 1), ('emoji_chat', 1))  # source of documents, how often it is read
  character_coverage: float = 0.9995
  max_sentences: int = 10_000_000
  seed: int = 0

  def __post_init__(self):
    require_fraction(self, 'character_coverage')
    require_positive(self, 'max_sentences')
    require(len(self.sources) > 0, 'a text tokenizer needs at least one source')
    require(all(times > 0 for _, times in self.sources), f'each source must be read at least once, got {self.sources}')


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """One stage of the data mixture: source name -> weight, used for `fraction` of all steps.

  Weights are relative. The paper's stage 2 halves the weights of stage 1 and adds better data.
  """

  fraction: float
  weights: tuple[tuple[str, float], ...]

  def __post_init__(self):
    require_fraction(self, 'fraction')
    require(len(self.weights) > 0, 'a stage needs at least one source')
    require(all(weight > 0 for _, weight in self.weights), f'mixture weights must be positive, got {self.weights}')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Mixture, packing and reading.

  `image_noise` u: in every document a share drawn from [0, u] of the image tokens that carry loss is replaced by random
  ones in the input, never in the targets. 0, as in the paper, for large data; where pictures recur often, it keeps the
  network from telling a picture by its first codes instead of by the words before it. `prompt_image_noise` is the same
  for image tokens without loss: pictures a prompt gives, which the network must read as they are.
  `changed`: what a resumed run does when a source no longer holds what it held.
  """

  stages: tuple[StageConfig, ...] = ()
  seq_len: int = 4096
  batch_size: int = 2048
  packing_bins: int = 8
  shuffle_seed: int = 0
  image_noise: float = 0.0
  prompt_image_noise: float = 0.0
  read_threads: int = 0  # 16 reader threads are slower than none on small hosts
  prefetch: int = 2
  changed: Literal['stop', 'accept'] = 'stop'

  def __post_init__(self):
    require_positive(self, 'seq_len', 'batch_size', 'packing_bins')
    require_fraction(self, 'image_noise')
    require_fraction(self, 'prompt_image_noise')
    if self.stages:
      total = sum(stage.fraction for stage in self.stages)
      require(abs(total - 1) < 1e-6, f'the fractions of the stages sum to {total}, not 1')


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """`chameleon train`: pre-training and supervised fine-tuning.

  `tokenizers` is a model folder with the image and text tokenizer (or one for each, a comma between them);
  `init_from` is one with a transformer to start from (None trains from scratch).
  """

  model: TransformerConfig
  vocabulary: VocabularyConfig
  data: DataConfig
  tokenizers: str | None = None
  init_from: str | None = None
  fine_tune: FineTuneConfig = FineTuneConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  z_loss: float = 1e-5
  text_loss_weight: float = 1.0
  image_loss_weight: float = 1.0
  loss_chunks: int = 1  # the vocabulary projection runs in this many pieces of the row
  n_steps: int = 100_000
  eval_every: int = 1000
  eval_batches: int = 4
  log_every: int = 10
  seed: int = 0
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()

  def __post_init__(self):
    require_positive(self, 'n_steps', 'eval_every', 'log_every', 'loss_chunks')
    require(
        self.model.vocab_size == self.vocabulary.size,
        f'model.vocab_size {self.model.vocab_size} and vocabulary.size {self.vocabulary.size} differ',
    )
    rows = self.fine_tune.head_rows
    fits = rows is None or rows[1] <= self.vocabulary.size
    require(fits, f'fine_tune.head_rows {rows} do not fit vocabulary.size {self.vocabulary.size}')
    require(
        self.data.seq_len <= self.model.max_seq_len,
        f'data.seq_len {self.data.seq_len} is longer than model.max_seq_len {self.model.max_seq_len}',
    )
