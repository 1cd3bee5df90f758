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
from typing import Any, TypeAlias, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from chameleon_jax.array_types import Codes, Logits, Pictures, Tokens
from chameleon_jax.config import CacheDtype, Dtype, Quantization, SamplingOptions, TransformerConfig
from chameleon_jax.data.encode import Encoder, make_encoder
from chameleon_jax.errors import ChameleonError, CheckpointError
from chameleon_jax.interop.native import ModelParts, make_vocabulary
from chameleon_jax.interop.native.adapter import with_adapter
from chameleon_jax.interop.opening import load_parts, open_checkpoint
from chameleon_jax.models.transformer.cache import check_cache_dtype
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.models.vqgan import model as vqgan
from chameleon_jax.sampling.engine import Engine
from chameleon_jax.sampling.requests import open_codes
from chameleon_jax.sampling.scoring import Score, Scorer
from chameleon_jax.sampling.scoring import best_of as best
from chameleon_jax.sampling.stream import Stream
from chameleon_jax.tokens import document as documents
from chameleon_jax.tokens import images
from chameleon_jax.tokens.render import render_prompt, unrender
from chameleon_jax.tokens.vocabulary import Vocabulary

_T = TypeVar('_T')
Options: TypeAlias = SamplingOptions | Sequence[SamplingOptions]
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
    cache_dtype: of the sampler's keys and values, see `load`.
  """

  def __init__(
      self, parts: ModelParts, *, name: str = 'model', notes: Sequence[str] = (), cache_dtype: CacheDtype | None = None
  ):
    self.parts = parts
    self.name = name
    self.notes = tuple(notes)
    self.cache_dtype = cache_dtype

  @classmethod
  def load(
      cls,
      path: str | os.PathLike[str],
      *,
      tokenizer: str | os.PathLike[str] | None = None,
      adapter: str | os.PathLike[str] | None = None,
      dtype: Dtype | None = None,
      mesh: Mesh | None = None,
      quantization: Quantization | None = None,
      cache_dtype: CacheDtype | None = None,
  ) -> 'Chameleon':
    """Opens a checkpoint of any format, or the shipped weights by their name ('emoji').

    The weights go to the devices one tensor at a time. What there is to know about them is warned of, and kept in `notes`.

    Args:
      path: the folder with the weights; its format is detected.
      tokenizer: folder of text_tokenizer.json and vqgan.ckpt, where they are not found by themselves, see `open_checkpoint`.
      adapter: folder of a LoRA adapter to add to the weights, ours or in the form of Hugging Face's peft.
      dtype: of the transformer's parameters and computation; by default that of the stored weights, or of a model folder's config.
      mesh: devices to spread the weights over; None means the default device.
      quantization: 'int8' keeps the transformer's weights in int8, one scale for each output channel, and computes in `dtype` as before: a
        quarter of the memory of float32, half of bfloat16. For sampling and scoring; such a model cannot be saved.
      cache_dtype: type in which the sampler keeps keys and values; by default that of the computation, on the CPU float32. 'int8' has a
        scale for each token and head: half the memory of bfloat16 and a little for the scales. Scoring keeps none.

    Raises:
      CheckpointError: the folder is missing, foreign or damaged.
      ConfigError: there is no such quantization, or type of cache.
    """
    check_cache_dtype(cache_dtype)
    folder = pathlib.Path(path)
    if not folder.exists():
      folder = shipped_path(str(path)) or folder
    with open_checkpoint(folder, tokenizer=tokenizer) as model:
      model = model if adapter is None else with_adapter(model, adapter, dtype=dtype)
      parts = load_parts(model, dtype=dtype, mesh=mesh, quantization=quantization)
    for note in model.notes:
      warnings.warn(f'{path}: {note}', stacklevel=2)
    return cls(parts, name=str(path), notes=model.notes, cache_dtype=cache_dtype)

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

  def engine(self, *, max_rows: int = 64) -> Engine:
    """A new engine over these weights: requests in, tokens out, with reports on the way (`sampling.engine`)."""
    # Without an image tokenizer only text is written (see _check_options), and any number will do.
    n_image_tokens = 1 if self.parts.vqgan_config is None else self.n_image_tokens
    return Engine(
      self.config,
      self.parts.transformer_params,
      self.vocabulary,
      n_image_tokens=n_image_tokens,
      max_rows=max_rows,
      cache_dtype=self.cache_dtype,
    )

  def _check_options(self, options: Options) -> None:
    """What the options need of the parts, before the work and not after it."""
    for option in [options] if isinstance(options, SamplingOptions) else options:
      if option.modalities != 'text':
        self._need(self.parts.vqgan_config, "image tokenizer, which says how many codes a picture has (modalities='text' needs none)")

  def generate_tokens(self, prompts: Sequence[Sequence[int] | np.ndarray], options: Options) -> list[np.ndarray]:
    """Continues token lists; returns the new tokens of each, the stop token included where one was drawn.

    Args:
      prompts: token ids; lengths may differ.
      options: for all, or one for each.

    Raises:
      PromptError, SamplingError: see `Engine.generate_tokens`.
    """
    self._check_options(options)
    return self.engine().generate_tokens([np.asarray(prompt, np.int32) for prompt in prompts], options)

  def generate(
    self, prompts: Sequence[documents.Document], options: Options = SamplingOptions(), *, best_of: int = 1
  ) -> list[documents.Document]:
    """Continues documents; returns what was written, its pictures decoded.

    A picture cut off by the length limit comes back as `Codes`.

    Args:
      prompts: documents; they may be of any mixture of kinds and lengths.
      options: for all, or one for each.
      best_of: how many continuations of each prompt to draw; the one that the model itself finds most likely, by the mean
        over its tokens, is returned.

    Raises:
      PromptError, SamplingError: see `Engine.generate_tokens`.
    """
    if not prompts:
      return []
    text = self._need(self.parts.text_tokenizer, 'text tokenizer')
    self._check_options(options)
    each = [options] * len(prompts) if isinstance(options, SamplingOptions) else list(options)
    if any(option.modalities == 'image' for option in each):
      self._need_decoder()
    tokens = [self.prompt_tokens(prompt) for prompt in prompts]
    rows = self.generate_tokens(tokens * best_of, each * best_of)
    if best_of > 1:
      rows = self._most_likely(tokens, each, rows)
    return self.decode_documents([unrender(row, self.vocabulary, text) for row in rows])

  def _most_likely(self, prompts: list[np.ndarray], options: list[SamplingOptions], rows: list[np.ndarray]) -> list[np.ndarray]:
    """Of the rows written for each prompt (all prompts once, then again, ..) the most likely."""
    v = self.vocabulary
    begun = [
      np.append(prompt, np.int32(v.begin_image)) if option.modalities == 'image' and open_codes(prompt, v) is None else prompt
      for prompt, option in zip(prompts, options)
    ]
    scores = self._scorer.score([begun[place % len(begun)] for place in range(len(rows))], rows)
    return [rows[place + len(begun) * best(scores[place :: len(begun)])] for place in range(len(begun))]

  def stream(
    self,
    prompts: Sequence[documents.Document],
    options: Options = SamplingOptions(),
    *,
    max_steps: int = 16,
    preview_every: int | None = None,
  ) -> Stream:
    """Continues documents and gives what is written as it is written: an iterator of `sampling.events`.

    One request that cannot be done gives a `Failed` event; the others go on.

    Args:
      prompts: documents.
      options: for all, or one for each.
      max_steps: decode steps between two looks at what came: few for lively text, many for speed.
      preview_every: rows of codes between two previews of a picture under way; None for none.

    Raises:
      CheckpointError: a part that every request needs is missing.
    """
    text = self._need(self.parts.text_tokenizer, 'text tokenizer')
    self._check_options(options)
    given: list[np.ndarray | ChameleonError] = []
    for prompt in prompts:
      try:
        given.append(self.prompt_tokens(prompt))
      except ChameleonError as error:
        given.append(error)
    has_decoder = 'decoder' in (self.parts.vqgan_params or {})
    return Stream(
      self.engine(),
      given,
      options,
      vocabulary=self.vocabulary,
      text_tokenizer=text,
      n_image_tokens=1 if self.parts.vqgan_config is None else self.n_image_tokens,
      decode=self.decode_codes if has_decoder else None,
      max_steps=max_steps,
      preview_every=preview_every if has_decoder else None,
    )

  @functools.cached_property
  def _scorer(self) -> Scorer:
    return Scorer(self.config, self.parts.transformer_params, self.vocabulary)

  def score(self, prompts: Sequence[documents.Document], continuations: Sequence[documents.Document | str]) -> list[Score]:
    """Log-likelihood of what could follow each prompt.

    Args:
      prompts: as for `generate`: a conversation that ends with a prompt is scored on its answer.
      continuations: text, or a plain document of text and pictures; nothing is added behind it.

    Returns:
      Natural logarithms, see `sampling.scoring.Score`.

    Raises:
      PromptError: different numbers of prompts and continuations, or a pair longer than the context.
    """
    tails = [documents.Document.plain(tail) if isinstance(tail, str) else tail for tail in continuations]
    return self._scorer.score([self.prompt_tokens(prompt) for prompt in prompts], [self.prompt_tokens(tail)[1:] for tail in tails])

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
