"""Runs the requests of `chameleon sample`: streamed while somebody may watch, or the best of several draws.

A request that cannot be done gives a result with an error of one line; the others are drawn as well. What a request draws
depends on its seed and its place among the sound ones. Knows a loaded model and no flags.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_jax.chameleon import Chameleon
from chameleon_jax.cli.sample_live import LiveText, PictureBar, Write
from chameleon_jax.cli.sample_requests import Malformed, Request
from chameleon_jax.cli.sample_results import Result
from chameleon_jax.cli.values import parse_value
from chameleon_jax.errors import ChameleonError, ConfigError
from chameleon_jax.sampling.constraints import inpaint, mask_from_pixels
from chameleon_jax.sampling.events import Ended, Failed
from chameleon_jax.tokens import images

_WATCHED_STEPS = 16  # decode steps between two looks at what came
_UNWATCHED_STEPS = 256


def fixed_codes(model: Chameleon, path: str | Path, redraw: str) -> tuple[int | None, ...]:
  """Codes of a picture file outside a rectangle, None inside.

  Args:
    model: encodes the picture, scaled and cropped to its square where it is of another size.
    path: of the picture.
    redraw: `top,left,height,width` in pixels of the file.

  Raises:
    ConfigError: the rectangle is none, or does not lie in the picture.
    ImageError: the picture cannot be read.
    PromptError: nothing of the rectangle is left in the model's square.
  """
  top, left, height, width = parse_value(redraw, tuple[int, int, int, int], key='--redraw (top,left,height,width)')
  picture = images.load_image(path)
  if min(top, left) < 0 or min(height, width) < 1 or top + height > picture.shape[0] or left + width > picture.shape[1]:
    sides = f'{picture.shape[0]} pixels high and {picture.shape[1]} wide'
    raise ConfigError(f'--redraw={redraw} (top,left,height,width) does not lie in {path}, which is {sides}')
  codes = np.asarray(model.encode_images(picture[None]))[0]
  config = model.parts.vqgan_config
  assert config is not None  # the pictures have been encoded
  painted = np.zeros_like(picture)
  painted[top : top + height, left : left + width] = 255
  if picture.shape[:2] != (config.resolution, config.resolution):
    painted = images.preprocess(painted, config.resolution)
  grid = math.isqrt(config.n_image_tokens)
  return inpaint(codes, mask_from_pixels(painted[..., 0] > 127, (grid, grid)))


def with_codes(requests: Sequence[Request | Malformed], codes: tuple[int | None, ...]) -> list[Request | Malformed]:
  """The requests with these codes fixed, but for those whose line fixes others."""

  def changed(request: Request | Malformed) -> Request | Malformed:
    if isinstance(request, Malformed) or request.options.fixed_codes is not None:
      return request
    return dataclasses.replace(request, options=dataclasses.replace(request.options, fixed_codes=codes))

  return [changed(request) for request in requests]


def draw(
  model: Chameleon, requests: Sequence[Request | Malformed], picture_names: Sequence[tuple[str, str]], *, live: bool, bar: bool
) -> list[Result]:
  """Streams all requests.

  Args:
    model: draws.
    requests: all of them, malformed ones too.
    picture_names: prefix and ending of the names that stand for each request's pictures, their number in between.
    live: print text to stdout as it comes.
    bar: show on stderr how far pictures are.

  Returns:
    One result a request.

  Raises:
    CheckpointError: the model lacks a part that is needed.
  """
  sound = [(request, names) for request, names in zip(requests, picture_names) if isinstance(request, Request)]
  text = LiveText(_writer(sys.stdout), [request.id for request, _ in sound], [names for _, names in sound]) if live else None
  config = model.parts.vqgan_config
  pictures = PictureBar(_writer(sys.stderr), config.n_image_tokens) if bar and config is not None else None
  steps = _UNWATCHED_STEPS if text is None and pictures is None else _WATCHED_STEPS
  if any(request.options.modalities == 'image' for request, _ in sound):
    model.decode_codes(np.zeros((0, model.n_image_tokens), np.int32))  # a missing decoder is said before the work
  results: dict[int, Result] = {}
  with model.stream([request.prompt for request, _ in sound], [request.options for request, _ in sound], max_steps=steps) as stream:
    for event in stream:
      if text is not None:
        if pictures is not None:
          pictures.clear()
        text.show(event)
      if pictures is not None:
        pictures.show(event)
      request, _ = sound[event.request]
      if isinstance(event, Ended):
        results[event.request] = Result(request, event.document, event.reason, tuple(event.tokens.tolist()))
      elif isinstance(event, Failed):
        results[event.request] = Result(request, error=_located(request, event.request, event.message))
  if pictures is not None:
    pictures.clear()
  return _in_order(requests, [results[place] for place in range(len(sound))])


def draw_best(model: Chameleon, requests: Sequence[Request | Malformed], *, best_of: int) -> list[Result]:
  """Draws `best_of` for every request and keeps of each what the model finds most likely; one result a request.

  Where something goes wrong each is drawn on its own, so that the others have a result.
  """
  sound = [request for request in requests if isinstance(request, Request)]
  drawn = _draw_best(model, sound, best_of)
  return _in_order(requests, drawn)


def _draw_best(model: Chameleon, requests: Sequence[Request], best_of: int) -> list[Result]:
  if not requests:
    return []
  options = [request.options for request in requests]
  try:
    answers = model.generate([request.prompt for request in requests], options, best_of=best_of)
    return [Result(request, answer) for request, answer in zip(requests, answers)]
  except ChameleonError as error:
    if len(requests) == 1:
      return [Result(requests[0], error=_located(requests[0], 0, str(error)))]
  return [_draw_best(model, [request], best_of)[0] for request in requests]


def _writer(file: Any) -> Write:
  """Writes portions of a line to a text file at once."""
  return functools.partial(print, end='', flush=True, file=file)


def _in_order(requests: Sequence[Request | Malformed], drawn: Sequence[Result]) -> list[Result]:
  """Results of all requests, from those of the sound ones."""
  rest = iter(drawn)
  return [Result(request, error=request.error) if isinstance(request, Malformed) else next(rest) for request in requests]


def _located(request: Request, place: int, message: str) -> str:
  """A message about one of several prompts, with the line of the file in place of its number."""
  start = f'prompt {place} '
  if not request.where:
    return message
  return f'{request.where}: the prompt {message.removeprefix(start)}' if message.startswith(start) else f'{request.where}: {message}'
