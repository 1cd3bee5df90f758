"""The two networks and the discriminator: sizes and kinds."""

import dataclasses
from typing import Literal

from chameleon_jax.config.checks import require, require_fraction, require_positive

Dtype = Literal['float32', 'bfloat16']
Quantization = Literal['int8']
AttentionImplementation = Literal['auto', 'plain', 'blockwise', 'cudnn', 'pallas']
CacheDtype = Literal['float32', 'bfloat16', 'int8']


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The mixed-modal decoder (paper section 2.3).

  `norm_position='pre'` is the 7B block, `'post'` the re-ordered (Swin) block of the 34B.
  `dtype` is the compute type, `param_dtype` the type of the master weights. `attention_implementation` says what computes
  attention inside rows: 'auto' chooses, and what cannot run is refused, never replaced (`attention.choose`).
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
  attention_implementation: AttentionImplementation = 'auto'
  sequence_parallel: bool = False  # between the blocks, rows are split along their length over mesh.tensor (arXiv 2205.05198)

  def __post_init__(self):
    require_positive(self, 'vocab_size', 'd_model', 'n_layers', 'n_heads', 'n_kv_heads', 'd_head', 'd_ff', 'max_seq_len')
    require_fraction(self, 'dropout')
    require(self.n_heads % self.n_kv_heads == 0, f'n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}')
    require(self.d_head % 2 == 0, f'd_head {self.d_head} must be even: rotary embeddings turn channel pairs')


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
    require_positive(self, 'resolution', 'n_codes', 'd_code', 'z_channels', 'base_channels', 'n_res_blocks', 'patch_size', 'norm_groups')
    require_fraction(self, 'dropout')
    require(len(self.channel_multipliers) > 0, 'channel_multipliers is empty')
    require(
        self.resolution % self.downsampling == 0,
        f'resolution {self.resolution} is not a multiple of the downsampling factor {self.downsampling}',
    )
    for multiplier in self.channel_multipliers:
      channels = multiplier * self.base_channels
      require(channels % self.norm_groups == 0, f'{channels} channels do not split into {self.norm_groups} groups (norm_groups)')

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
    require_positive(self, 'base_channels', 'n_layers')
