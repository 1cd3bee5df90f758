"""Picture files to pixels and back: decode, white blend, resize, crop or pad, [-1, 1]; the only file with PIL.

Two conventions, which give different codes for one picture (spec model.md 7.1 to 7.3):

    meta          facebookresearch/chameleon: the language model saw pictures made this way
    huggingface   transformers' ChameleonImageProcessorPil, bit for bit as of 5.24

    step                       meta                              huggingface
    transparency over white    (1 - a) * 255 + a * rgb, cut off  PIL's alpha_composite; a key colour of RGB files too
    16-bit gray                upper byte (ours)                 clipped at 255
    long side                  round                             cut off
    scale                      v / 255 * 2 - 1                   v * 0.0078 - 1

Does not know codes or tokens. EXIF orientation is not applied: the release and the processor leave it alone (transformers'
helper for paths and addresses applies it, and drops transparency; TIFF files come turned out of PIL itself).
Not followed: transformers' default processor on torchvision, and releases before alpha_composite, which blend as Meta.
"""

import io
import os
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from chameleon_jax.errors import ConfigError, ImageError

Convention = Literal['meta', 'huggingface']

MAX_PIXELS = 64_000_000  # 8000 x 8000; at four bytes each this is 256 MB while decoding
# Raster formats only: the others can run programs (EPS) or have no size of their own.
_FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')
_WHITE = (255, 255, 255)
_HUGGINGFACE_SCALE = 0.0078  # rescale_factor of preprocessor_config.json


def load_image(
    source: bytes | str | Path, *, max_pixels: int = MAX_PIXELS, convention: Convention = 'meta'
) -> UInt8[np.ndarray, 'H W 3']:
  """Decodes a picture to RGB; transparent parts are blended with white.

  Of an animation the first frame is taken.

  Args:
    source: the bytes of a file, or its path.
    max_pixels: a picture that claims more than this is refused before it is decoded.
    convention: how other modes become RGB, as in the table at the head of this file.

  Raises:
    ImageError: missing, empty, undecodable, truncated or too large.
  """
  name = 'picture' if isinstance(source, bytes) else f'picture {source}'
  try:
    encoded = source if isinstance(source, bytes) else Path(source).read_bytes()
  except (OSError, ValueError) as error:  # ValueError: a path with a null character
    raise ImageError(f'cannot read {name}: {getattr(error, "strerror", None) or error}') from error
  if not encoded:
    raise ImageError(f'{name} is empty (0 bytes)')
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # remarks on damaged metadata
      warnings.simplefilter('error', PIL.Image.DecompressionBombWarning)
      return _decode(encoded, name, max_pixels, convention)
  except ImageError:
    raise
  except PIL.UnidentifiedImageError as error:
    raise ImageError(f'{name} is not a picture in a known format ({", ".join(_FORMATS)})') from error
  except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
    raise ImageError(f'{name} has far too many pixels (limit {max_pixels}): make it smaller first') from error
  except Exception as error:  # a decoder fed with damaged bytes raises anything: OSError, SyntaxError, struct.error, ...
    raise ImageError(f'{name} cannot be decoded: {" ".join(str(error).split()) or type(error).__name__}') from error


def _decode(encoded: bytes, name: str, max_pixels: int, convention: Convention) -> np.ndarray:
  with PIL.Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
    width, height = image.size
    if width * height > max_pixels:
      raise ImageError(f'{name} has {width} x {height} pixels, more than the limit of {max_pixels}: make it smaller first')
    return _to_rgb(image) if convention == 'meta' else _to_rgb_as_huggingface(image)


def _to_rgb(image: PIL.Image.Image) -> np.ndarray:
  """RGB of any mode: as it is, or through RGBA and `(1 - a) * 255 + a * rgb`, cut off (not rounded) to uint8."""
  if image.mode == 'RGB':
    return np.array(image)
  if image.mode.startswith('I;16'):
    return np.repeat((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
  rgba = np.asarray(image.convert('RGBA'))
  rgb, alpha = rgba[..., :3], rgba[..., 3:]
  if (alpha == 255).all():
    return np.ascontiguousarray(rgb)
  opacity = alpha / 255.0
  return ((1 - opacity) * 255 + opacity * rgb).astype(np.uint8)


def _to_rgb_as_huggingface(image: PIL.Image.Image) -> np.ndarray:
  """RGB of any mode; what has transparency (a key colour included) is laid over white in PIL's integer arithmetic."""
  if 'A' not in image.getbands() and image.info.get('transparency') is None:
    return np.array(image.convert('RGB'))
  white = PIL.Image.new('RGBA', image.size, (*_WHITE, 255))
  return np.array(PIL.Image.alpha_composite(white, image.convert('RGBA')).convert('RGB'))


def preprocess(
    image: np.ndarray, size: int, *, fit: Literal['crop', 'pad'] = 'crop', convention: Convention = 'meta'
) -> UInt8[np.ndarray, 'size size 3']:
  """A square picture for the image tokenizer.

      crop   4 x 2, size 2 ->  . X X .      the short side becomes `size`, the middle stays
      pad    4 x 2, size 4 ->  - - - -      the long side becomes `size`, white fills the rest
                               X X X X
                               X X X X
                               - - - -

  Args:
    image: uint8 [H, W, 3].
    size: side of the result in pixels.
    fit: 'crop' as the release does it; 'pad' for prompts of fine-tuning, where nothing may be cut off
      (paper section 3.1; the colour of the border is not published, white as in the blend).
    convention: how the long side is rounded; 'huggingface' has no 'pad'.

  Raises:
    ConfigError: 'pad' in the convention that has none.
    ImageError: not uint8 [H, W, 3], or so long and thin that resizing it would need too many pixels.
  """
  _check_picture(image)
  if fit == 'pad' and convention == 'huggingface':
    raise ConfigError("the 'huggingface' preprocessing only crops: choose fit = 'crop' or the 'meta' convention")
  height, width = image.shape[:2]
  if convention == 'meta':
    scale = size / (min(width, height) if fit == 'crop' else max(width, height))
    new_width, new_height = max(1, round(scale * width)), max(1, round(scale * height))  # round half to even, as the release
  else:
    short, long = min(width, height), max(width, height)
    new_width, new_height = (size, int(size * long / short)) if width <= height else (int(size * long / short), size)
  if new_width * new_height > MAX_PIXELS:
    raise ImageError(f'a picture of {width} x {height} is too long and thin to be resized to {new_width} x {new_height}: cut it first')
  resized = PIL.Image.fromarray(np.ascontiguousarray(image)).resize((new_width, new_height), PIL.Image.Resampling.LANCZOS)
  if fit == 'crop':
    x, y = (new_width - size) // 2, (new_height - size) // 2
    return np.array(resized.crop((x, y, x + size, y + size)))
  canvas = PIL.Image.new('RGB', (size, size), _WHITE)
  canvas.paste(resized, ((size - new_width) // 2, (size - new_height) // 2))
  return np.array(canvas)


def to_float(pixels: UInt8[np.ndarray, '... 3'], convention: Convention = 'meta') -> Float32[np.ndarray, '... 3']:
  """uint8 0..255 -> float32: meta -1..1, computed in float64; huggingface -1..0.989, subtracted in float32."""
  if convention == 'meta':
    return (pixels / 255.0 * 2.0 - 1.0).astype(np.float32)
  return (pixels.astype(np.float64) * _HUGGINGFACE_SCALE).astype(np.float32) - np.float32(1)


def to_uint8(pixels: np.ndarray) -> UInt8[np.ndarray, '... 3']:
  """Float -1..1 [..., 3] -> uint8: clamped, then cut off and not rounded, so 95 of 256 levels come back one lower.

  Raises:
    ImageError: a value is not finite.
  """
  values = np.asarray(pixels, np.float32)
  if not np.isfinite(values).all():
    raise ImageError('a decoded picture holds values that are not finite: the image tokenizer is damaged or diverged')
  return ((np.clip(values, -1, 1) + np.float32(1)) / np.float32(2) * np.float32(255)).astype(np.uint8)


def png_bytes(pixels: np.ndarray) -> bytes:
  """A picture uint8 [H, W, 3] as a PNG file, lossless."""
  _check_picture(pixels)
  buffer = io.BytesIO()
  PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format='PNG')
  return buffer.getvalue()


def save_png(path: str | Path, pixels: np.ndarray) -> None:
  """Writes a picture uint8 [H, W, 3]; an interrupted write leaves no file of that name."""
  path = Path(path)
  encoded = png_bytes(pixels)
  aside = path.with_name(f'{path.name}.{os.getpid()}.part')
  try:
    aside.write_bytes(encoded)
    os.replace(aside, path)
  finally:
    aside.unlink(missing_ok=True)


def _check_picture(image: np.ndarray) -> None:
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
    raise ImageError(f'a picture must be uint8 [H, W, 3] and not empty, got {image.dtype} {list(image.shape)}')
