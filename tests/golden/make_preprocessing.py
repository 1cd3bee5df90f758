"""Makes preprocessing.npz: small pictures of every mode, and what transformers' PIL processor of Chameleon makes of them.

Run from the root of the repository, with transformers installed (made with transformers 5.24 and Pillow 13.0):

    python tests/golden/make_preprocessing.py

Contents: `file/NAME` the bytes of a picture file (uint8), `pixels/NAME` the picture uint8 [16, 16, 3] after resize and crop,
`levels` float32 [256], the number that the network gets for each level, and `versions`.
"""

import io
import pathlib

import numpy as np
import PIL
import PIL.Image

SIZE = 16
PATH = pathlib.Path(__file__).with_name('preprocessing.npz')


def encoded(image: PIL.Image.Image, file_format: str = 'PNG', **options: object) -> bytes:
  """The bytes of a picture file."""
  buffer = io.BytesIO()
  image.save(buffer, format=file_format, **options)
  return buffer.getvalue()


def pictures() -> dict[str, bytes]:
  """Files whose long sides round differently in the two conventions (37 * 16 / 23 = 25.7), and every mode."""

  def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, dtype=np.uint8)

  def image(*shape: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(noise(*shape))

  palette = image(23, 37, 3).quantize(13)
  turned = PIL.Image.Exif()
  turned[0x0112] = 6  # by 90 degrees
  return {
    'landscape': encoded(image(23, 37, 3)),
    'portrait': encoded(image(37, 23, 3)),
    'half': encoded(image(32, 49, 3)),  # 24.5: round half to even and cutting off agree
    'square': encoded(image(19, 19, 3)),
    'right_size': encoded(image(16, 16, 3)),
    'one_pixel': encoded(image(1, 1, 3)),
    'thin': encoded(image(3, 40, 3)),
    'gray': encoded(image(23, 37)),
    'black_and_white': encoded(image(23, 37).convert('1')),
    'gray_16_bit': encoded(PIL.Image.fromarray(noise(23, 37).astype(np.uint16) * 2)),
    'gray_alpha': encoded(image(23, 37, 2)),
    'palette': encoded(palette),
    'palette_one_transparent': encoded(palette, transparency=5),
    'palette_alpha': encoded(palette, transparency=bytes(range(0, 247, 19))),
    'rgba': encoded(image(23, 37, 4)),
    'rgba_opaque': encoded(PIL.Image.merge('RGBA', [*image(23, 37, 3).split(), PIL.Image.new('L', (37, 23), 255)])),
    'rgb_key_color': encoded(image(23, 37, 3), transparency=tuple(noise(23, 37, 3)[3, 4].tolist())),
    'cmyk': encoded(PIL.Image.merge('CMYK', image(23, 37, 4).split()), 'TIFF'),
    'exif_turned': encoded(image(23, 37, 3), exif=turned),
  }


def huggingface_pixels(file: bytes, size: int = SIZE) -> np.ndarray:
  """uint8 [size, size, 3]: the processor without its last two steps, which make numbers of levels."""
  return _process(file, size, do_rescale=False, do_normalize=False)


def huggingface_floats(file: bytes, size: int = SIZE) -> np.ndarray:
  """float32 [size, size, 3]."""
  return _process(file, size)


def _process(file: bytes, size: int, **options: bool) -> np.ndarray:
  from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

  processor = ChameleonImageProcessorPil(size={'shortest_edge': size}, crop_size={'height': size, 'width': size})
  values = processor(PIL.Image.open(io.BytesIO(file)), return_tensors='np', **options)['pixel_values'][0]
  return np.moveaxis(values, 0, -1)


def huggingface_levels() -> np.ndarray:
  """float32 [256]: what the processor makes of each level."""
  levels = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, -1)
  return huggingface_floats(encoded(PIL.Image.fromarray(levels)), 16)[..., 0].reshape(-1)


def main() -> None:
  """Writes the file."""
  import transformers

  files = pictures()
  arrays = {f'file/{name}': np.frombuffer(file, np.uint8) for name, file in files.items()}
  arrays |= {f'pixels/{name}': huggingface_pixels(file) for name, file in files.items()}
  versions = np.array(f'transformers {transformers.__version__}, Pillow {PIL.__version__}')
  np.savez_compressed(PATH, levels=huggingface_levels(), versions=versions, **arrays)


if __name__ == '__main__':
  main()
