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
from typing import TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.array_types import Codes, Logits, Pictures, Tokens
from chameleon_jax.config import SamplingOptions
from chameleon_jax.data.encode import Encoder, make_encoder
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.native import ModelParts, load_model
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.models.vqgan import model as vqgan
from chameleon_jax.sampling.engine import Sampler
from chameleon_jax.tokens import document as documents
from chameleon_jax.tokens import images
from chameleon_jax.tokens.render import render_prompt, unrender
from chameleon_jax.tokens.vocabulary import Vocabulary

_T = TypeVar('_T')
_SHIPPED = {'emoji': 'emoji_weights'}


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
  def _logits(self):
    network = Transformer(self._need(self.parts.transformer_config, 'transformer'))
    return jax.jit(lambda params, tokens: network.apply({'params': params}, tokens)[0])

  def logits(self, tokens: Tokens) -> Logits:
    """Raw next-token logits, image columns included: int [B, T] -> float32 [B, T, V]."""
    apply = self._logits
    return apply(self.parts.transformer_params, jnp.asarray(tokens, jnp.int32))

  def encode_images(self, pictures: Pictures) -> Codes:
    """Pictures uint8 [B, H, W, 3] -> codes int32 [B, n], row-major. Other sizes than the model's are resized and cropped."""
    return self._encode_list(list(pictures))

  def decode_codes(self, codes: Codes) -> Pictures:
    """Codes int32 [B, n] -> pictures uint8 [B, H, W, 3], cut off to whole steps as in the release (spec model.md 7.3).

    Raises:
      ImageError: a row has another number of codes than a picture, or a code is out of range.
    """
    config = self._need(self.parts.vqgan_config, 'image tokenizer')
    return images.to_uint8(vqgan.decode_pixels(config, self.parts.vqgan_params, np.asarray(codes)))

  @functools.cached_property
  def _encode_list(self) -> Encoder:
    return make_encoder(self._need(self.parts.vqgan_config, 'image tokenizer'), self.parts.vqgan_params)

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
    return self.decode_documents([unrender(row, self.vocabulary, text) for row in rows])

  def decode_documents(self, given: Sequence[documents.Document]) -> list[documents.Document]:
    """Replaces every complete `Codes` segment by its picture; all pictures are decoded together."""
    n = self.n_image_tokens

    def complete(segment: documents.Segment) -> TypeGuard[documents.Codes]:
      return isinstance(segment, documents.Codes) and len(segment.codes) == n

    found = [segment.codes for document in given for segment in document.segments if complete(segment)]
    pictures = iter(self.decode_codes(np.stack(found)) if found else ())

    def decoded(turn: documents.Turn) -> documents.Turn:
      segments = (documents.Image(next(pictures)) if complete(segment) else segment for segment in turn.segments)
      return documents.Turn(tuple(segments), role=turn.role)

    return [documents.Document(tuple(decoded(turn) for turn in document.turns)) for document in given]
