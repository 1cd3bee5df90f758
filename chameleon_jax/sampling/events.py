"""What a stream of requests reports, in order: text as it comes, pictures as they are drawn, an end for each request.

    TextPiece*  (PictureStarted PictureRows* PictureDone TextPiece*)*  (Ended | Failed)

Events of several requests come mixed; `request` is the place of the prompt in the call, from 0. A picture that is cut off
has a start and no `PictureDone`. Made by `assembler.Assembler`; knows no tokens. Source: spec model.md 8.4 says
what Meta streams (tokens); these are its consumers' segments.
"""

import dataclasses
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int32, UInt8

from chameleon_jax.tokens.document import Document

Pixels: TypeAlias = UInt8[np.ndarray, 'H W 3']
Reason: TypeAlias = Literal['stop', 'length', 'picture', 'cancelled']


@dataclasses.dataclass(frozen=True)
class TextPiece:
  """New text; pieces of a request joined are its text. Never half a character."""

  request: int
  text: str


@dataclasses.dataclass(frozen=True)
class PictureStarted:
  """The request writes a picture from now on; `picture` counts its pictures from 0."""

  request: int
  picture: int


@dataclasses.dataclass(frozen=True, eq=False)
class PictureRows:
  """More rows of the grid of codes are complete.

  Attributes:
    request, picture: which.
    codes: all codes so far, whole rows, from the top left.
    preview: what they look like; the part that is still missing means nothing. None where no preview was asked for.
  """

  request: int
  picture: int
  codes: Int32[np.ndarray, ' k']
  preview: Pixels | None


@dataclasses.dataclass(frozen=True, eq=False)
class PictureDone:
  """A picture is complete: its codes, and what they look like (None without a picture decoder)."""

  request: int
  picture: int
  codes: Int32[np.ndarray, ' n']
  image: Pixels | None


@dataclasses.dataclass(frozen=True, eq=False)
class Ended:
  """The last event of a request.

  Attributes:
    request: which.
    reason: 'stop' at a stop token, 'length' at a limit, 'picture' when its only picture is complete, or 'cancelled'.
    document: all it wrote, as `Chameleon.generate` returns it.
    tokens: the same as ids, the stop token included.
  """

  request: int
  reason: Reason
  document: Document
  tokens: Int32[np.ndarray, ' T']


@dataclasses.dataclass(frozen=True)
class Failed:
  """The last event of a request that cannot be done, or that failed on the way: one line."""

  request: int
  message: str


Event: TypeAlias = TextPiece | PictureStarted | PictureRows | PictureDone | Ended | Failed
