"""How tokens are drawn, and what a request must and must not hold."""

import dataclasses
from typing import Literal

from chameleon_jax.config.checks import require, require_positive

Modalities = Literal['text', 'image', 'mixed']


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
  """How the tokens of one request are drawn. Defaults are those of the release (spec model.md 8.1).

  Every request of a batch may have options of its own. All limits and constraints are data: none compiles a program.

  Attributes:
    modalities: 'text' writes text only, 'image' one picture only, 'mixed' both in any order.
    max_new_tokens: tokens drawn at most, `prefix` included; the context may end a row earlier.
    greedy, temperature, top_p, repetition_penalty: of text.
    image_greedy, image_temperature, image_top_p: of image tokens.
    guidance_text, guidance_image: s_text and s_image of `u + s_image (i - u) + s_text (f - i)`; both 1.0 switches guidance off.
    stop_at_end_turn: end_turn may be drawn in text and ends the row (the release cannot draw it).
    min_images: pictures that must be written: until then the row cannot end, and where the room for the missing ones
      would run out, the next one is begun.
    max_images: pictures written at most (one that the prompt leaves open counts). With `min_images` equal: exactly so many.
    stop_tokens: ids that end the row where they are drawn, besides end_sequence. They do not become drawable by it.
    banned_tokens: ids that are never drawn.
    prefix: ids that the result begins with, as if they had been drawn.
    fixed_codes: of the first picture, one entry a code, None where the model is free: in-painting, out-painting and variation
      (`sampling.constraints` makes them).
    seed: with the row's place in the request it decides what is drawn.
  """

  modalities: Modalities = 'mixed'
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
  min_images: int = 0
  max_images: int | None = None
  stop_tokens: tuple[int, ...] = ()
  banned_tokens: tuple[int, ...] = ()
  prefix: tuple[int, ...] = ()
  fixed_codes: tuple[int | None, ...] | None = None
  seed: int = 0

  def __post_init__(self):
    require(self.modalities in ('text', 'image', 'mixed'), f"modalities is 'text', 'image' or 'mixed', got {self.modalities!r}")
    require_positive(self, 'max_new_tokens', 'temperature', 'image_temperature', 'repetition_penalty')
    for name in ('top_p', 'image_top_p'):
      value = getattr(self, name)
      require(bool(0 < value <= 1), f'{name} must lie in (0, 1], got {value}')
    for name in ('guidance_text', 'guidance_image', 'temperature', 'image_temperature', 'repetition_penalty'):
      value = getattr(self, name)
      require(abs(value) < float('inf'), f'{name} must be a finite number, got {value}')  # false for NaN too
    most = self.max_images
    require(self.min_images >= 0, f'min_images must not be negative, got {self.min_images}')
    require(most is None or most >= self.min_images, f'max_images {most} is below min_images {self.min_images}')
    require(self.min_images == 0 or self.modalities != 'text', f"min_images {self.min_images} with modalities='text'; ask for 'mixed'")

  @classmethod
  def meta(
    cls,
    modalities: Modalities = 'mixed',
    *,
    greedy: bool = False,
    max_new_tokens: int = 4096,
    repetition_penalty: float = 1.2,
    temperature: float = 0.7,
    top_p: float = 0.9,
    guidance_text: float = 3.0,
    guidance_image: float = 1.2,
    seed: int = 0,
  ) -> 'SamplingOptions':
    """The released sampler: one temperature, top-p and greediness for text and pictures, and end_turn never drawn.

    'mixed' goes on through pictures, as the release does where begin_image is taken out of its stop tokens (spec model.md 8.1).
    """
    return cls(
      modalities=modalities,
      max_new_tokens=max_new_tokens,
      greedy=greedy,
      temperature=temperature,
      top_p=top_p,
      repetition_penalty=repetition_penalty,
      image_greedy=greedy,
      image_temperature=temperature,
      image_top_p=top_p,
      guidance_text=guidance_text,
      guidance_image=guidance_image,
      stop_at_end_turn=False,
      seed=seed,
    )

  @property
  def guided(self) -> bool:
    """Whether pictures need the two extra streams."""
    return self.modalities != 'text' and (self.guidance_text != 1.0 or self.guidance_image != 1.0)
