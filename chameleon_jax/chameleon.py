"""One object for a whole model, whoever made the weights: text and pictures in, text and pictures out.

    model = chameleon_jax.load('emoji')                      # or a folder of ours, of Meta's release, of Hugging Face's port
    answer, = model.generate([Document.chat('Draw a red apple.')], SamplingOptions(max_new_tokens=128))
    answer.pictures[0].pixels                                # uint8 [H, W, 3]

    mesh = partitioning.make_mesh(MeshConfig(tensor=4))      # weights of 34B parameters on four devices
    model = chameleon_jax.load('models/30b', mesh=mesh)

A folder that lacks a part loads too; only the call that needs the part fails, with a line that names it.
"""

import functools
import importlib.resources
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from chameleon_jax.array_types import Codes, Logits, Pictures, Tokens
from chameleon_jax.config import Dtype, SamplingOptions, TransformerConfig
from chameleon_jax.data.encode import Encoder, make_encoder
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.native import ModelParts, make_vocabulary
from chameleon_jax.interop.opening import load_parts, open_checkpoint
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
  """A transformer with its tokenizers; any part may be missing.

  Attributes:
    parts: the parts, the transformer's layers one array each.
    name: what messages call it.
    notes: sentences on the weights that a user should know, such as that their image output is suppressed.
  """

  def __init__(self, parts: ModelParts, *, name: str = 'model', notes: Sequence[str] = ()):
    self.parts = parts
    self.name = name
    self.notes = tuple(notes)

  @classmethod
  def load(
      cls,
      path: str | os.PathLike[str],
      *,
      tokenizer: str | os.PathLike[str] | None = None,
      dtype: Dtype | None = None,
      mesh: Mesh | None = None,
  ) -> 'Chameleon':
    """Opens a checkpoint of any format, or the shipped weights by their name ('emoji').

    The weights go to the devices one tensor at a time. What there is to know about them is warned of, and kept in `notes`.

    Args:
      path: the folder with the weights; its format is detected.
      tokenizer: folder of text_tokenizer.json and vqgan.ckpt, where they are not found by themselves, see `open_checkpoint`.
      dtype: of the transformer's parameters and computation; by default that of the stored weights, or of a model folder's config.
      mesh: devices to spread the weights over; None means the default device.

    Raises:
      CheckpointError: the folder is missing, foreign or damaged.
    """
    folder = pathlib.Path(path)
    if not folder.exists():
      folder = shipped_path(str(path)) or folder
    with open_checkpoint(folder, tokenizer=tokenizer) as model:
      parts = load_parts(model, dtype=dtype, mesh=mesh)
    for note in model.notes:
      warnings.warn(f'{path}: {note}', stacklevel=2)
    return cls(parts, name=str(path), notes=model.notes)

  def _need(self, part: _T | None, what: str) -> _T:
    if part is None:
      raise CheckpointError(f'{self.name} holds no {what}; this call needs one')
    return part

  @property
  def config(self) -> TransformerConfig:
    """Sizes and kind of the transformer."""
    return self._need(self.parts.transformer_config, 'transformer')

  @functools.cached_property
  def vocabulary(self) -> Vocabulary:
    """What each token id means."""
    return make_vocabulary(self._need(self.parts.vocabulary, 'vocabulary'), self.parts.text_tokenizer)

  @functools.cached_property
  def _sampler(self) -> Sampler:
    # Without an image tokenizer only text is written (see generate_tokens), and any number will do.
    n_image_tokens = 1 if self.parts.vqgan_config is None else self.n_image_tokens
    return Sampler(self.config, self.parts.transformer_params, self.vocabulary, n_image_tokens=n_image_tokens)

  @property
  def n_image_tokens(self) -> int:
    """Codes of one picture."""
    return self._need(self.parts.vqgan_config, 'image tokenizer').n_image_tokens

  @functools.cached_property
  def _logits(self):
    network = Transformer(self.config)
    return jax.jit(lambda params, tokens: network.apply({'params': params}, tokens)[0])

  def logits(self, tokens: Tokens) -> Logits:
    """Raw next-token logits, image columns included: int [B, T] -> float32 [B, T, V]."""
    apply = self._logits
    return apply(self.parts.transformer_params, jnp.asarray(tokens, jnp.int32))

  def encode_images(self, pictures: Pictures, *, convention: images.Convention = 'meta') -> Codes:
    """Pictures uint8 [B, H, W, 3] of any size -> codes int32 [B, n], row-major.

    Args:
      pictures: resized and cropped to the image tokenizer's side where they are of another size.
      convention: how: as in Meta's release, which the released weights were trained with, or as in Hugging Face's port, whose
        scaling and rounding differ so that other codes come out (spec model.md 7.2).
    """
    if convention == 'meta':
      return self._encode_list(list(pictures))
    config = self._need(self.parts.vqgan_config, 'image tokenizer')
    fitted = [images.preprocess(picture, config.resolution, convention=convention) for picture in pictures]
    codes = [self._encode_pixels(self.parts.vqgan_params, images.to_float(picture, convention=convention)[None]) for picture in fitted]
    return np.concatenate([np.zeros((0, config.n_image_tokens), np.int32), *map(np.asarray, codes)])

  @functools.cached_property
  def _encode_pixels(self) -> Callable[[Any, Any], Any]:
    """Pixels in [-1, 1] [B, H, W, 3] -> codes [B, n]."""
    config = self._need(self.parts.vqgan_config, 'image tokenizer')
    network = vqgan.VQGAN(config)

    def encode(params: Any, pixels: Any) -> Any:
      codes: Any = network.apply({'params': params}, pixels, method='encode')
      return codes[0].reshape(len(pixels), -1)

    return jax.jit(encode)

  def decode_codes(self, codes: Codes) -> Pictures:
    """Codes int32 [B, n] -> pictures uint8 [B, H, W, 3], cut off to whole steps as in the release (spec model.md 7.3).

    Raises:
      ImageError: a row has another number of codes than a picture, or a code is out of range.
      CheckpointError: the weights hold no picture decoder.
    """
    config = self._need(self.parts.vqgan_config, 'image tokenizer')
    self._need_decoder()
    return images.to_uint8(vqgan.decode_pixels(config, self.parts.vqgan_params, np.asarray(codes)))

  def _need_decoder(self) -> None:
    params: Any = self._need(self.parts.vqgan_params, 'image tokenizer')
    self._need(params.get('decoder'), "picture decoder (Hugging Face's port ships none; tokenizer=DIR names a folder with vqgan.ckpt)")

  @functools.cached_property
  def _encode_list(self) -> Encoder:
    return make_encoder(self._need(self.parts.vqgan_config, 'image tokenizer'), self.parts.vqgan_params)

  def prompt_tokens(self, document: documents.Document) -> np.ndarray:
    """The tokens that the model continues for this document: int32 [T]."""
    text = self._need(self.parts.text_tokenizer, 'text tokenizer')

    def encode(pictures: Sequence[np.ndarray]) -> np.ndarray:  # the encoder is made only where there are pictures
      return self._encode_list(pictures)

    return render_prompt(document, self.vocabulary, text, encode_images=encode)

  def generate_tokens(self, prompts: Sequence[Sequence[int] | np.ndarray], options: SamplingOptions) -> list[np.ndarray]:
    """Continues token lists; returns the new tokens of each, the stop token included where one was drawn."""
    if options.modalities != 'text':
      self._need(self.parts.vqgan_config, "image tokenizer, which says how many codes a picture has (modalities='text' needs none)")
    return self._sampler.generate_tokens([np.asarray(prompt, np.int32) for prompt in prompts], options)

  def generate(self, prompts: Sequence[documents.Document], options: SamplingOptions = SamplingOptions()) -> list[documents.Document]:
    """Continues documents; returns what was written, its pictures decoded.

    A picture cut off by the length limit comes back as `Codes`.
    """
    if not prompts:
      return []
    text = self._need(self.parts.text_tokenizer, 'text tokenizer')
    if options.modalities == 'image':
      self._need_decoder()  # before the work, not after it
    rows = self.generate_tokens([self.prompt_tokens(prompt) for prompt in prompts], options)
    return self.decode_documents([unrender(row, self.vocabulary, text) for row in rows])

  def decode_documents(self, given: Sequence[documents.Document]) -> list[documents.Document]:
    """Replaces every complete `Codes` segment by its picture; all pictures are decoded together."""
    if not any(isinstance(segment, documents.Codes) for document in given for segment in document.segments):
      return list(given)
    n = self.n_image_tokens

    def complete(segment: documents.Segment) -> TypeGuard[documents.Codes]:
      return isinstance(segment, documents.Codes) and len(segment.codes) == n

    found = [segment.codes for document in given for segment in document.segments if complete(segment)]
    pictures = iter(self.decode_codes(np.stack(found)) if found else ())

    def decoded(turn: documents.Turn) -> documents.Turn:
      segments = (documents.Image(next(pictures)) if complete(segment) else segment for segment in turn.segments)
      return documents.Turn(tuple(segments), role=turn.role)

    return [documents.Document(tuple(decoded(turn) for turn in document.turns)) for document in given]
