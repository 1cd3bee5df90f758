"""An opened checkpoint of any format: tensors under our own names, read one at a time.

Readers (`meta`, `huggingface`, `native.folder`) make a `LazyModel`, writers take one, so that every format converts to every other
without a tensor more in memory than the one under way.

Names are paths of the parameter tree with unrolled layers, joined by '/':

    embedding   layers_0/attention/q_proj   layers_0/attention/q_norm/weight   final_norm/weight   lm_head
    encoder/conv_in/kernel   encoder/down_0/block_0/conv1/kernel   quantize/embedding   quant_conv/bias

Shapes, axis order and the half-split rotary convention are those of the parameter tree (`models/transformer/model.py`).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from chameleon_jax.config import TransformerConfig, VocabularyConfig, VQGANConfig
from chameleon_jax.tokens.text import TextTokenizer

Format = Literal['orbax', 'meta', 'huggingface']
# The fields of a config that make a network the one it is; others say how it is run or was trained, or how long a row may be.
TRANSFORMER_FIELDS = (
    *('vocab_size', 'd_model', 'n_layers', 'n_heads', 'n_kv_heads', 'd_head', 'd_ff'),
    *('norm_position', 'norm_eps', 'qk_norm', 'qk_norm_eps', 'rope_theta'),
)
VQGAN_FIELDS = (
    *('resolution', 'n_codes', 'd_code', 'z_channels', 'base_channels', 'channel_multipliers', 'n_res_blocks'),
    *('patch_size', 'norm_groups'),
)
# Notes on a part that is missing, which `opening` takes back where another folder gives the part.
NO_IMAGE_TOKENIZER = 'the checkpoint has no image tokenizer: it reads and draws no pictures unless one is added'
NO_DECODER = 'the image tokenizer has no decoder: pictures can be read, not drawn'
NO_TEXT = 'the checkpoint has no tokenizer.json: text cannot become tokens unless one is added'


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """Shape and type of a stored tensor."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Bytes of the values."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorSource:
  """The tensors of one part.

  Attributes:
    specs: name -> shape and type, in the order they are best read.
    read: the values of a name, a fresh or read-only array [shape] of the spec's type; raises CheckpointError where the
      file is damaged.
  """

  specs: Mapping[str, TensorSpec]
  read: Callable[[str], np.ndarray]


def _absent(name: str) -> np.ndarray:
  raise KeyError(name)


NO_TENSORS = TensorSource({}, _absent)


@dataclasses.dataclass(frozen=True)
class Origin:
  """What a foreign checkpoint holds beside the model, kept so that converting back gives the same files.

  Attributes:
    format: where the weights came from.
    n_shards: model-parallel shards of a Meta checkpoint; 1 elsewhere.
    files: small text files by their name (`params.json`, `config.json`, `vqgan.yaml`, ...).
    extras: tensors without a place in our tree, by file and name (`consolidated.00/rope.freqs`, `vqgan.ckpt/loss.logvar`).
  """

  format: Format = 'orbax'
  n_shards: int = 1
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
  extras: TensorSource = dataclasses.field(default_factory=lambda: NO_TENSORS)


@dataclasses.dataclass(frozen=True)
class LazyModel:
  """An open checkpoint; close it, or use it in a `with`. A part that the files lack is None.

  `vqgan` may lack every name under `decoder/` (the Hugging Face port ships none). `notes` are sentences for the user:
  what was seen that matters, e.g. that image output of these weights is suppressed.
  """

  path: str
  format: Format
  transformer_config: TransformerConfig | None = None
  transformer: TensorSource | None = None
  vqgan_config: VQGANConfig | None = None
  vqgan: TensorSource | None = None
  vocabulary: VocabularyConfig | None = None
  text_tokenizer: TextTokenizer | None = None
  origin: Origin = Origin()
  notes: tuple[str, ...] = ()
  resources: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack, repr=False, compare=False)

  def close(self) -> None:
    """Closes the files."""
    self.resources.close()

  def __enter__(self) -> 'LazyModel':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
