"""Named sizes. Each cites its source.

The 34B's width, key/value heads and inner width are inferred (spec model.md 1.1, note 1): the gated file was
not read, but the parameter count and the public file sizes agree with them.
"""

import dataclasses

from chameleon_jax.config import TransformerConfig, VocabularyConfig, VQGANConfig


def chameleon_7b() -> TransformerConfig:
  """Chameleon-7B: pre-norm, dropout 0.1, no grouped heads (arXiv 2405.09818, Table 1)."""
  return TransformerConfig(
      vocab_size=65_536,
      d_model=4096,
      n_layers=32,
      n_heads=32,
      n_kv_heads=32,
      d_head=128,
      d_ff=11_008,
      dropout=0.1,
      dtype='bfloat16',
      remat='full',
  )


def chameleon_34b() -> TransformerConfig:
  """Chameleon-34B (released as "30b"): re-ordered norms, grouped heads, no dropout (Table 1; widths inferred)."""
  return TransformerConfig(
      vocab_size=65_536,
      d_model=8192,
      n_layers=48,
      n_heads=64,
      n_kv_heads=8,
      d_head=128,
      d_ff=22_016,
      norm_position='post',
      dtype='bfloat16',
      remat='full',
  )


def vqgan_512() -> VQGANConfig:
  """The released image tokenizer: 512 x 512 pixels to 1,024 of 8,192 codes (spec model.md 4.1)."""
  return VQGANConfig()


def released_vocabulary() -> VocabularyConfig:
  """65,536 entries with 8,192 codes (spec model.md 5.1)."""
  return VocabularyConfig()


def tiny_transformer(**overrides: object) -> TransformerConfig:
  """Two layers with grouped heads, for tests; any field can be overridden."""
  config = TransformerConfig(
      vocab_size=128, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=64, max_seq_len=128
  )
  return dataclasses.replace(config, **overrides)  # type: ignore[arg-type]


def tiny_vqgan(**overrides: object) -> VQGANConfig:
  """A 16 x 16 picture to 16 of 32 codes, for tests; any field can be overridden."""
  config = VQGANConfig(
      resolution=16,
      n_codes=32,
      d_code=8,
      z_channels=16,
      base_channels=16,
      channel_multipliers=(1, 2, 2),
      n_res_blocks=1,
      norm_groups=8,
  )
  return dataclasses.replace(config, **overrides)  # type: ignore[arg-type]


def tiny_vocabulary() -> VocabularyConfig:
  """Fits `tiny_transformer` and `tiny_vqgan`: 32 codes, 2 reserved tokens, 88 text ids."""
  return VocabularyConfig(size=128, n_codes=32, n_sentinels=0, n_reserved=2)
