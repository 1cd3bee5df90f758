"""One object for a whole model: text and pictures in, text and pictures out.

    model = Chameleon.load('emoji')
    answer, = model.generate([Document.chat('Draw a red apple.')], SamplingOptions(max_new_tokens=128))
    answer.pictures[0].pixels              # uint8 [H, W, 3]

A folder that lacks a part loads too; only the call that needs the part fails, with a line that names it.
"""

import functools
import importlib.resources
import os
import pathlib
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.array_types import Codes, Logits, Pictures, Tokens
from chameleon_jax.config import SamplingOptions
from chameleon_jax.errors import CheckpointError, PromptError
from chameleon_jax.interop.native import ModelParts, load_model
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.models.vqgan.model import VQGAN
from chameleon_jax.sampling.engine import Sampler
from chameleon_jax.tokens import document as documents
from chameleon_jax.tokens import images
from chameleon_jax.tokens.render import render_prompt, unrender
from chameleon_jax.tokens.vocabulary import Vocabulary

_T = TypeVar('_T')
_SHIPPED = {'emoji': 'emoji_weights'}
_ENCODE_BATCH = 64


def shipped_path(name: str) -> pathlib.Path | None:
  """Folder of the weights shipped under `name`, or None where there are none."""
  if name not in _SHIPPED:
    return None
  folder = pathlib.Path(str(importlib.resources.files('chameleon_jax'))) / 'assets' / _SHIPPED[name]
  return folder if folder.is_dir() else None


class Chameleon:
  """A transformer with its tokenizers; any part may be missing."""

  def __init__(self, parts: ModelParts, *, name: str = 'model'):
    self.parts = parts
    self.name = name

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> 'Chameleon':
    """Opens a model folder, or the shipped weights by their name ('emoji').

    Raises:
      CheckpointError: the folder is missing, foreign or damaged.
    """
    folder = pathlib.Path(path)
    if not folder.exists():
      folder = shipped_path(str(path)) or folder
    return cls(load_model(folder), name=str(path))

  def _need(self, part: _T | None, what: str) -> _T:
    if part is None:
      raise CheckpointError(f'{self.name} holds no {what}; this call needs one')
    return part

  @functools.cached_property
  def vocabulary(self) -> Vocabulary:
    """What each token id means."""
    return Vocabulary(self._need(self.parts.vocabulary, 'vocabulary'))

  @functools.cached_property
  def _sampler(self) -> Sampler:
    config = self._need(self.parts.transformer_config, 'transformer')
    return Sampler(config, self.parts.transformer_params, self.vocabulary, n_image_tokens=self.n_image_tokens)

  @property
  def n_image_tokens(self) -> int:
    """Codes of one picture."""
    return self._need(self.parts.vqgan_config, 'image tokenizer').n_image_tokens

  @functools.cached_property
  def _encode(self):
    network = VQGAN(self._need(self.parts.vqgan_config, 'image tokenizer'))
    return jax.jit(lambda params, pixels: network.apply({'params': params}, pixels, method='encode')[0])

  @functools.cached_property
  def _decode(self):
    network = VQGAN(self._need(self.parts.vqgan_config, 'image tokenizer'))
    return jax.jit(lambda params, codes: network.apply({'params': params}, codes, method='decode'))

  @functools.cached_property
  def _logits(self):
    network = Transformer(self._need(self.parts.transformer_config, 'transformer'))
    return jax.jit(lambda params, tokens: network.apply({'params': params}, tokens)[0])

  def logits(self, tokens: Tokens) -> Logits:
    """Raw next-token logits, image columns included: int [B, T] -> float32 [B, T, V]."""
    apply = self._logits
    return apply(self.parts.transformer_params, jnp.asarray(tokens, jnp.int32))

  def encode_images(self, pictures: Pictures) -> Codes:
    """Pictures uint8 [B, H, W, 3] -> codes int32 [B, n], row-major. Other sizes than the model's are resized and cropped."""
    config = self._need(self.parts.vqgan_config, 'image tokenizer')
    if pictures.shape[1:3] != (config.resolution, config.resolution):
      pictures = np.stack([images.preprocess(picture, config.resolution) for picture in pictures])
    found = []
    for start in range(0, len(pictures), _ENCODE_BATCH):
      chunk = pictures[start : start + _ENCODE_BATCH]
      padded = _pad_rows(chunk, _bucket(len(chunk)))
      codes = self._encode(self.parts.vqgan_params, images.to_float(padded))
      found.append(np.asarray(codes).reshape(len(padded), -1)[: len(chunk)])
    return np.concatenate(found).astype(np.int32)

  def decode_codes(self, codes: Codes) -> Pictures:
    """Codes int32 [B, n] -> pictures uint8 [B, H, W, 3]. Codes missing at a row's end must be filled by the caller."""
    config = self._need(self.parts.vqgan_config, 'image tokenizer')
    if codes.shape[1] != config.n_image_tokens:
      raise PromptError(f'a picture of {self.name} has {config.n_image_tokens} codes, got {codes.shape[1]}')
    found = []
    for start in range(0, len(codes), _ENCODE_BATCH):
      chunk = np.asarray(codes[start : start + _ENCODE_BATCH], np.int32)
      padded = _pad_rows(chunk, _bucket(len(chunk)))
      pixels = self._decode(self.parts.vqgan_params, padded.reshape(-1, config.grid, config.grid))
      found.append(np.asarray(images.to_uint8(np.asarray(pixels)))[: len(chunk)])
    return np.concatenate(found)

  def _encode_list(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
    size = self._need(self.parts.vqgan_config, 'image tokenizer').resolution
    return np.asarray(self.encode_images(np.stack([images.preprocess(picture, size) for picture in pictures])))

  def prompt_tokens(self, document: documents.Document) -> np.ndarray:
    """The tokens that the model continues for this document: int32 [T]."""
    text = self._need(self.parts.text_tokenizer, 'text tokenizer')
    return render_prompt(document, self.vocabulary, text, encode_images=self._encode_list)

  def generate_tokens(self, prompts: Sequence[Sequence[int] | np.ndarray], options: SamplingOptions) -> list[np.ndarray]:
    """Continues token lists; returns the new tokens of each, the stop token included where one was drawn."""
    return self._sampler.generate_tokens([np.asarray(prompt, np.int32) for prompt in prompts], options)

  def generate(self, prompts: Sequence[documents.Document], options: SamplingOptions = SamplingOptions()) -> list[documents.Document]:
    """Continues documents; returns what was written, its pictures decoded.

    A picture cut off by the length limit comes back as `Codes`.
    """
    if not prompts:
      return []
    text = self._need(self.parts.text_tokenizer, 'text tokenizer')
    rows = self.generate_tokens([self.prompt_tokens(prompt) for prompt in prompts], options)
    return [self.decode_document(unrender(row, self.vocabulary, text)) for row in rows]

  def decode_document(self, document: documents.Document) -> documents.Document:
    """Replaces every complete `Codes` segment by its picture."""
    n = self.n_image_tokens

    def decoded(segment: documents.Segment) -> documents.Segment:
      if isinstance(segment, documents.Codes) and len(segment.codes) == n:
        return documents.Image(self.decode_codes(np.asarray(segment.codes)[None])[0])
      return segment

    turns = (documents.Turn(tuple(decoded(segment) for segment in turn.segments), role=turn.role) for turn in document.turns)
    return documents.Document(tuple(turns))


def _bucket(n: int) -> int:
  """Smallest power of two that holds n rows: bounds the number of compiled programs."""
  return 1 << (n - 1).bit_length()


def _pad_rows(rows: np.ndarray, n: int) -> np.ndarray:
  return np.concatenate([rows, np.repeat(rows[:1], n - len(rows), axis=0)])
