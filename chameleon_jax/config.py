"""Every setting of the project as frozen dataclasses.

A config is a value: hashable, comparable, safe to close over in `jax.jit`. `__post_init__` only raises;
what can be computed from fields is a property. The editable form that command-line flags change lives in
`cli/flags.py`. Names and defaults follow arXiv 2405.09818 (section 2 and Table 1) and the released
checkpoints; where a default departs from them the field says so.
"""

import dataclasses
import math
from typing import Literal

Dtype = Literal['float32', 'bfloat16']


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def _require_positive(config: object, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    _require(value > 0, f'{type(config).__name__}.{name} must be positive, got {value}')


def _require_fraction(config: object, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    _require(0 <= value <= 1, f'{type(config).__name__}.{name} must lie in [0, 1], got {value}')


# --------------------------------------------------------------------------------------------- networks


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The mixed-modal decoder (paper section 2.3).

  `norm_position='pre'` is the 7B block, `'post'` the re-ordered (Swin) block of the 34B.
  `dtype` is the compute type, `param_dtype` the type of the master weights.
  """

  vocab_size: int
  d_model: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  d_head: int
  d_ff: int
  max_seq_len: int = 4096
  norm_position: Literal['pre', 'post'] = 'pre'
  norm_eps: float = 1e-5
  qk_norm: bool = True
  qk_norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  dropout: float = 0.0
  init_std: float = 0.02  # not published for Chameleon
  dtype: Dtype = 'float32'
  param_dtype: Dtype = 'float32'
  scan_layers: bool = True
  remat: Literal['none', 'dots', 'full'] = 'none'

  def __post_init__(self):
    _require_positive(self, 'vocab_size', 'd_model', 'n_layers', 'n_heads', 'n_kv_heads', 'd_head', 'd_ff', 'max_seq_len')
    _require_fraction(self, 'dropout')
    _require(self.n_heads % self.n_kv_heads == 0, f'n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}')
    _require(self.d_head % 2 == 0, f'd_head {self.d_head} must be even: rotary embeddings turn channel pairs')


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
  """The image tokenizer's network (spec model.md section 4).

  `patch_size` folds p x p pixels into channels before the first convolution and unfolds them after the
  last one; 1 is the released architecture. `norm_groups` is 32 in the release.
  """

  resolution: int = 512
  n_codes: int = 8192
  d_code: int = 256
  z_channels: int = 256
  base_channels: int = 128
  channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
  n_res_blocks: int = 2
  patch_size: int = 1
  norm_groups: int = 32
  dropout: float = 0.0
  commitment_weight: float = 1.0  # release ("legacy" order): 1.0 on the encoder, 0.25 on the codebook
  codebook_weight: float = 0.25
  dtype: Dtype = 'float32'

  def __post_init__(self):
    _require_positive(self, 'resolution', 'n_codes', 'd_code', 'z_channels', 'base_channels', 'n_res_blocks', 'patch_size', 'norm_groups')
    _require_fraction(self, 'dropout')
    _require(len(self.channel_multipliers) > 0, 'channel_multipliers is empty')
    _require(
        self.resolution % self.downsampling == 0,
        f'resolution {self.resolution} is not a multiple of the downsampling factor {self.downsampling}',
    )
    for multiplier in self.channel_multipliers:
      channels = multiplier * self.base_channels
      _require(channels % self.norm_groups == 0, f'{channels} channels do not split into {self.norm_groups} groups (norm_groups)')

  @property
  def downsampling(self) -> int:
    """Pixels per code along one side."""
    return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

  @property
  def grid(self) -> int:
    """Codes along one side."""
    return self.resolution // self.downsampling

  @property
  def n_image_tokens(self) -> int:
    """Codes of one picture."""
    return self.grid**2


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
  """PatchGAN discriminator (spec training.md 2.4)."""

  base_channels: int = 64
  n_layers: int = 3

  def __post_init__(self):
    _require_positive(self, 'base_channels', 'n_layers')


# ------------------------------------------------------------------------------------------- vocabulary


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
  """Layout of the token space (spec model.md 5.1).

  0 begin_sequence, 1 pad, 2 end_sequence, 3 unknown, codes from 4, end_image, begin_image,
  `n_sentinels` sentinels, `n_reserved` reserved tokens of which the first is end_turn, then text up to `size`.
  The split of the release between reserved and text tokens is not established; 7,676 reserved tokens here.
  """

  size: int = 65_536
  n_codes: int = 8192
  n_sentinels: int = 512
  n_reserved: int = 7676

  def __post_init__(self):
    _require_positive(self, 'size', 'n_codes', 'n_reserved')
    _require(self.n_sentinels >= 0, f'n_sentinels must not be negative, got {self.n_sentinels}')
    _require(self.n_text > 0, f'vocabulary of {self.size} leaves no room for text: {self.text_start} ids are taken by codes and specials')

  @property
  def text_start(self) -> int:
    """First text id."""
    return 4 + self.n_codes + 2 + self.n_sentinels + self.n_reserved

  @property
  def n_text(self) -> int:
    """Number of text ids."""
    return self.size - self.text_start


# --------------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1, which takes what is left."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1

  def __post_init__(self):
    sizes = (self.data, self.fsdp, self.tensor)
    _require(all(size == -1 or size > 0 for size in sizes), f'mesh sizes must be positive or -1, got {sizes}')
    _require(sizes.count(-1) <= 1, f'only one mesh size may be -1, got {sizes}')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW, its schedule and clipping (paper section 2.3; SFT section 3).

  `name` 'muon' gives hidden matrices orthogonalised momentum with the update size of AdamW (arXiv 2502.16982), so that
  `learning_rate` and `weight_decay` mean the same; everything else stays with Adam.
  `decay_rate` is k of lr(u) = peak (exp(-k u) - exp(-k)) / (1 - exp(-k)); the paper gives no constant.
  """

  name: Literal['adamw', 'muon'] = 'adamw'
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
    _require_positive(self, 'learning_rate', 'eps', 'decay_rate', 'accumulate_steps')
    _require_fraction(self, 'end_fraction')
    _require(self.warmup_steps >= 0, f'warmup_steps must not be negative, got {self.warmup_steps}')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save and what to keep."""

  every_steps: int = 1000
  keep_last: int = 2
  asynchronous: bool = True

  def __post_init__(self):
    _require_positive(self, 'every_steps', 'keep_last')


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
    _require_fraction(self, 'ema_decay')
    _require(self.quantize_start >= 0, f'quantize_start must not be negative, got {self.quantize_start}')
    _require((self.perceptual == 'lpips') == (self.lpips_path is not None), 'perceptual="lpips" needs lpips_path, and only it takes one')


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
    _require_positive(self, 'batch_size', 'n_steps', 'eval_every', 'log_every')
    for name in ('optimizer', 'discriminator_optimizer'):
      _require(getattr(self, name).name == 'adamw', f'{name}.name must be adamw: muon is for matrices, not for convolutions')


@dataclasses.dataclass(frozen=True)
class TextTokenizerTrainConfig:
  """`chameleon train-text-tokenizer`: sentencepiece BPE with byte fallback (paper section 2.1)."""

  vocabulary: VocabularyConfig = VocabularyConfig()
  sources: tuple[tuple[str, int], ...] = (('emoji_text', 1), ('emoji_chat', 1))  # source of documents, how often it is read
  character_coverage: float = 0.9995
  max_sentences: int = 10_000_000
  seed: int = 0

  def __post_init__(self):
    _require_fraction(self, 'character_coverage')
    _require_positive(self, 'max_sentences')
    _require(len(self.sources) > 0, 'a text tokenizer needs at least one source')
    _require(all(times > 0 for _, times in self.sources), f'each source must be read at least once, got {self.sources}')


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """One stage of the data mixture: source name -> weight, used for `fraction` of all steps.

  Weights are relative. The paper's stage 2 halves the weights of stage 1 and adds better data.
  """

  fraction: float
  weights: tuple[tuple[str, float], ...]

  def __post_init__(self):
    _require_fraction(self, 'fraction')
    _require(len(self.weights) > 0, 'a stage needs at least one source')
    _require(all(weight > 0 for _, weight in self.weights), f'mixture weights must be positive, got {self.weights}')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Mixture, packing and reading.

  `image_noise` u: in every document a share drawn from [0, u] of the image tokens that carry loss is replaced by random
  ones in the input, never in the targets. 0, as in the paper, for large data; where pictures recur often, it keeps the
  network from telling a picture by its first codes instead of by the words before it. `prompt_image_noise` is the same
  for image tokens without loss: pictures a prompt gives, which the network must read as they are.
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

  def __post_init__(self):
    _require_positive(self, 'seq_len', 'batch_size', 'packing_bins')
    _require_fraction(self, 'image_noise')
    _require_fraction(self, 'prompt_image_noise')
    if self.stages:
      total = sum(stage.fraction for stage in self.stages)
      _require(abs(total - 1) < 1e-6, f'the fractions of the stages sum to {total}, not 1')


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
    _require_positive(self, 'n_steps', 'eval_every', 'log_every', 'loss_chunks')
    _require(
        self.model.vocab_size == self.vocabulary.size,
        f'model.vocab_size {self.model.vocab_size} and vocabulary.size {self.vocabulary.size} differ',
    )
    _require(
        self.data.seq_len <= self.model.max_seq_len,
        f'data.seq_len {self.data.seq_len} is longer than model.max_seq_len {self.model.max_seq_len}',
    )


# --------------------------------------------------------------------------------------------- sampling


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
  """How tokens are drawn. Defaults are those of the release (spec model.md 8.1).

  `modalities`: 'text' writes text only, 'image' one picture only, 'mixed' both in any order.
  `guidance_text` and `guidance_image` are s_text and s_image of
  `u + s_image (i - u) + s_text (f - i)`; both 1.0 switches guidance off.
  `stop_at_end_turn`: end_turn may be drawn in text and ends the row (the release cannot draw it).
  """

  modalities: Literal['text', 'image', 'mixed'] = 'mixed'
  max_new_tokens: int = 4096
  greedy: bool = False
  temperature: float = 0.7
  top_p: float = 0.9
  repetition_penalty: float = 1.2
  image_greedy: bool = False
  image_temperature: float = 0.7
  image_top_p: float = 0.9
  guidance_text: float = 3.0
  guidance_image: float = 1.2
  stop_at_end_turn: bool = True
  max_images: int | None = None
  seed: int = 0

  def __post_init__(self):
    _require_positive(self, 'max_new_tokens', 'temperature', 'image_temperature', 'repetition_penalty')
    for name in ('top_p', 'image_top_p'):
      value = getattr(self, name)
      _require(0 < value <= 1, f'{name} must lie in (0, 1], got {value}')

  @property
  def guided(self) -> bool:
    """Whether pictures need the two extra streams."""
    return self.guidance_text != 1.0 or self.guidance_image != 1.0
