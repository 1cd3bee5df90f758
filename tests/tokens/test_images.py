"""Decoding and preprocessing against plain numpy and the numbers of spec model.md section 7."""

import io
import pathlib
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from chameleon_jax.errors import ConfigError, ImageError
from chameleon_jax.tokens.images import load_image, png_bytes, preprocess, save_png, to_float, to_uint8
from tests.golden import make_preprocessing

GOLDEN = pathlib.Path(__file__).parent.parent / 'golden' / 'preprocessing.npz'
NAMES = sorted(make_preprocessing.pictures())


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as stored:
    return dict(stored)


def encoded(image, file_format='PNG', **options):
  buffer = io.BytesIO()
  image.save(buffer, format=file_format, **options)
  return buffer.getvalue()


def noise(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png_that_claims(width, height):
  """A PNG file of a few bytes whose header promises width x height pixels."""

  def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\x00' * 100)) + chunk(b'IEND', b'')


# -------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize('file_format', ['PNG', 'BMP', 'TIFF', 'PPM', 'WEBP'])
def test_lossless_formats(file_format):
  pixels = noise(5, 7, 3)
  options = {'lossless': True} if file_format == 'WEBP' else {}
  np.testing.assert_array_equal(load_image(encoded(PIL.Image.fromarray(pixels), file_format, **options)), pixels)


def test_jpeg():
  picture = load_image(encoded(PIL.Image.new('RGB', (9, 6), (200, 100, 50)), 'JPEG', quality=95))
  assert picture.shape == (6, 9, 3)
  assert np.abs(picture.astype(int) - (200, 100, 50)).max() <= 3


def test_gray():
  gray = noise(4, 6)
  np.testing.assert_array_equal(load_image(encoded(PIL.Image.fromarray(gray))), np.stack([gray] * 3, -1))


def test_black_and_white():
  bits = noise(4, 6) > 127
  np.testing.assert_array_equal(load_image(encoded(PIL.Image.fromarray(bits))), np.stack([bits * 255] * 3, -1))


def test_16_bit_gray_keeps_the_upper_byte():
  gray = noise(4, 6)
  deep = gray.astype(np.uint16) * 256 + noise(4, 6, seed=1)
  np.testing.assert_array_equal(load_image(encoded(PIL.Image.fromarray(deep))), np.stack([gray] * 3, -1))


def blended(rgb, alpha):
  """The blend of the release, value by value in plain Python: cut off, not rounded."""
  height, width = alpha.shape
  out = np.zeros((height, width, 3), np.uint8)
  for y in range(height):
    for x in range(width):
      a = int(alpha[y, x]) / 255
      for c in range(3):
        out[y, x, c] = int((1 - a) * 255 + a * int(rgb[y, x, c]))
  return out


def test_rgba_is_blended_with_white_and_cut_off():
  rgba = noise(16, 16, 4)
  picture = load_image(encoded(PIL.Image.fromarray(rgba)))
  np.testing.assert_array_equal(picture, blended(rgba[..., :3], rgba[..., 3]))
  # (1 - a) * 255 + a * 100 = 254.39 at a = 1/255: rounding and cutting off differ for the next one, 253.78.
  two = np.array([[[100, 100, 100, 1], [100, 100, 100, 2]]], np.uint8)
  assert load_image(encoded(PIL.Image.fromarray(two)))[0, :, 0].tolist() == [254, 253]


def test_rgba_without_transparency_is_not_touched():
  rgba = noise(8, 8, 4)
  rgba[..., 3] = 255
  np.testing.assert_array_equal(load_image(encoded(PIL.Image.fromarray(rgba))), rgba[..., :3])


def test_gray_with_alpha():
  gray, alpha = noise(8, 8), noise(8, 8, seed=1)
  picture = load_image(encoded(PIL.Image.fromarray(np.stack([gray, alpha], -1))))
  np.testing.assert_array_equal(picture, blended(np.stack([gray] * 3, -1), alpha))


def test_palette_with_transparency():
  image = PIL.Image.new('P', (3, 1))
  image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
  image.putdata([0, 1, 2])
  picture = load_image(encoded(image, transparency=1))
  assert picture.tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
  assert load_image(encoded(image)).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


def test_cmyk():
  image = PIL.Image.new('CMYK', (2, 1))
  image.putdata([(0, 0, 0, 0), (0, 255, 255, 0)])
  assert load_image(encoded(image, 'TIFF')).tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_animation_gives_the_first_frame():
  frames = [PIL.Image.new('RGB', (4, 4), color) for color in ('red', 'blue')]
  assert load_image(encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


def test_orientation_is_not_applied():
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # turn by 90 degrees
  assert load_image(encoded(PIL.Image.new('RGB', (9, 4)), 'JPEG', exif=exif)).shape == (4, 9, 3)


def test_paths(tmp_path):
  pixels = noise(5, 7, 3)
  save_png(tmp_path / 'a.png', pixels)
  np.testing.assert_array_equal(load_image(tmp_path / 'a.png'), pixels)
  np.testing.assert_array_equal(load_image(str(tmp_path / 'a.png')), pixels)
  np.testing.assert_array_equal(load_image(png_bytes(pixels)), pixels)
  assert [file.name for file in tmp_path.iterdir()] == ['a.png']


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', r'picture is empty \(0 bytes\)'),
    (b'not a picture at all', 'not a picture in a known format'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'not a picture in a known format'),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'not a picture in a known format'),
    (encoded(PIL.Image.fromarray(noise(64, 64, 3)))[:4000], 'cannot be decoded'),
    (encoded(PIL.Image.fromarray(noise(64, 64, 3)), 'JPEG')[:900], 'cannot be decoded'),
    (encoded(PIL.Image.fromarray(noise(64, 64, 3)))[:30], 'cannot be decoded|known format'),
    (png_that_claims(64, 64), 'cannot be decoded'),
    (png_that_claims(9000, 9000), r'9000 x 9000 pixels, more than the limit of 64000000'),
    (png_that_claims(12_000, 12_000), r'far too many pixels \(limit 64000000\)'),
    (png_that_claims(2_000_000, 1_000_000), r'far too many pixels'),
    (png_that_claims(0, 5), 'cannot be decoded|known format'),
  ],
  ids=lambda value: value[:10] if isinstance(value, bytes) else '',
)
@pytest.mark.filterwarnings('error')
def test_bad_pictures(content, message):
  with pytest.raises(ImageError, match=message) as caught:
    load_image(content)
  assert '\n' not in str(caught.value)


def test_limit_of_the_caller():
  content = png_bytes(noise(10, 11, 3))
  assert load_image(content, max_pixels=110).shape == (10, 11, 3)
  with pytest.raises(ImageError, match='11 x 10 pixels, more than the limit of 109'):
    load_image(content, max_pixels=109)


def test_flipped_bytes_never_escape_as_another_error():
  rng = np.random.default_rng(0)
  files = [encoded(PIL.Image.fromarray(noise(16, 16, 3)), file_format) for file_format in ('PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF', 'BMP')]
  refused = 0
  for _ in range(300):
    content = bytearray(files[rng.integers(len(files))])
    for place in rng.integers(0, len(content), 4):
      content[place] = rng.integers(256)
    try:
      assert load_image(bytes(content)).dtype == np.uint8
    except ImageError:
      refused += 1
  assert refused > 50


@pytest.mark.parametrize(('name', 'message'), [('missing.png', 'No such file'), ('', 'Is a directory'), ('nul\x00.png', 'null')])
def test_unreadable_paths(tmp_path, name, message):
  with pytest.raises(ImageError, match=f'cannot read picture .*{message}'):
    load_image(f'{tmp_path}/{name}')


# ---------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize(
  ('width', 'height', 'new_width', 'new_height'),
  [(640, 480, 683, 512), (480, 640, 512, 683), (333, 777, 512, 1195), (1023, 767, 683, 512), (100, 100, 512, 512), (1025, 1024, 512, 512)],
)
def test_crop_resizes_as_the_release(width, height, new_width, new_height):
  pixels = noise(height, width, 3)
  resized = np.asarray(PIL.Image.fromarray(pixels).resize((new_width, new_height), PIL.Image.Resampling.LANCZOS))
  x, y = (new_width - 512) // 2, (new_height - 512) // 2
  np.testing.assert_array_equal(preprocess(pixels, 512), resized[y : y + 512, x : x + 512])


def test_crop_as_drawn():
  pixels = np.zeros((2, 4, 3), np.uint8)
  pixels[:, 1:3] = 255
  assert (preprocess(pixels, 2) == 255).all()


def test_pad_as_drawn():
  pixels = noise(2, 4, 3)
  padded = preprocess(pixels, 4, fit='pad')
  np.testing.assert_array_equal(padded[1:3], pixels)
  assert (padded[[0, 3]] == 255).all()


def test_pad_keeps_everything_in_view():
  padded = preprocess(np.zeros((480, 640, 3), np.uint8), 64, fit='pad')
  assert (padded == 0).all(-1).sum(0).tolist() == [48] * 64
  assert (padded[:8] == 255).all()
  assert (padded[56:] == 255).all()


def test_pad_of_a_thread_keeps_one_row():
  assert (preprocess(np.zeros((1, 1000, 3), np.uint8), 16, fit='pad') == 0).all(-1).sum() == 16


def test_right_size_is_left_alone():
  pixels = noise(64, 64, 3)
  np.testing.assert_array_equal(preprocess(pixels, 64), pixels)
  np.testing.assert_array_equal(preprocess(pixels, 64, fit='pad'), pixels)
  assert preprocess(pixels[:, ::-1], 64).flags.c_contiguous


@pytest.mark.parametrize(
  ('picture', 'message'),
  [
    (np.zeros((1, 1_000_000, 3), np.uint8), 'too long and thin'),
    (np.zeros((0, 4, 3), np.uint8), 'not empty'),
    (np.zeros((4, 4), np.uint8), r'\[H, W, 3\], and not empty|\[4, 4\]'),
    (np.zeros((4, 4, 3), np.float32), 'float32'),
  ],
)
def test_pictures_that_cannot_be_resized(picture, message):
  with pytest.raises(ImageError, match=message):
    preprocess(picture, 512)


# ----------------------------------------------------------------------------------------- conventions


def meta_by_the_text(file, size):
  """Spec model.md 7.1, step by step, in plain PIL and floats."""
  image = PIL.Image.open(io.BytesIO(file))
  if image.mode != 'RGB':
    rgba = image.convert('RGBA')
    if min(rgba.getchannel('A').tobytes()) == 255:
      image = rgba.convert('RGB')
    else:
      values = np.array(rgba)
      image = PIL.Image.fromarray(blended(values[..., :3], values[..., 3]))
  width, height = image.size
  scale = size / min(width, height)
  image = image.resize((round(scale * width), round(scale * height)), PIL.Image.Resampling.LANCZOS)
  left, top = (image.width - size) // 2, (image.height - size) // 2
  pixels = np.array(image.crop((left, top, left + size, top + size)))
  return pixels, np.array([v / 255 * 2 - 1 for v in pixels.reshape(-1).tolist()]).astype(np.float32).reshape(pixels.shape)


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'gray_16_bit'])  # of which we keep more than PIL does: above
def test_meta_follows_the_text_of_the_spec(golden, name):
  file = golden[f'file/{name}'].tobytes()
  pixels, floats = meta_by_the_text(file, 16)
  ours = preprocess(load_image(file), 16)
  np.testing.assert_array_equal(ours, pixels)
  np.testing.assert_array_equal(to_float(ours), floats)


@pytest.mark.parametrize('name', NAMES)
def test_huggingface_equals_the_stored_values(golden, name):
  loaded = load_image(golden[f'file/{name}'].tobytes(), convention='huggingface')
  np.testing.assert_array_equal(preprocess(loaded, 16, convention='huggingface'), golden[f'pixels/{name}'])


def test_huggingface_levels(golden):
  levels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
  floats = to_float(levels, 'huggingface')
  assert floats.dtype == np.float32
  np.testing.assert_array_equal(floats, golden['levels'][:, None].repeat(3, 1))
  assert floats[0, 0] == -1
  assert floats.max() == np.float32(0.0078 * 255) - 1
  assert np.abs(floats - to_float(levels)).max() == pytest.approx(0.011, abs=1e-5), 'spec model.md 7.2'


def test_the_stored_values_tell_the_conventions_apart(golden):
  """Else the tests above would say little: long sides and transparency differ, square opaque pictures do not."""
  same = []
  for name in NAMES:
    file = golden[f'file/{name}'].tobytes()
    meta = preprocess(load_image(file), 16)
    if np.array_equal(meta, golden[f'pixels/{name}']):
      same.append(name)
  assert same == ['half', 'one_pixel', 'right_size', 'square', 'thin']
  blended_by = [load_image(golden['file/rgba'].tobytes(), convention=convention) for convention in ('meta', 'huggingface')]
  assert np.abs(np.subtract(*blended_by, dtype=int)).max() == 1


@pytest.mark.parametrize('name', NAMES)
def test_huggingface_equals_transformers(golden, name):
  pytest.importorskip('transformers.models.chameleon.image_processing_pil_chameleon')
  file = golden[f'file/{name}'].tobytes()
  np.testing.assert_array_equal(golden[f'pixels/{name}'], make_preprocessing.huggingface_pixels(file), 'made anew')
  for size in (16, 33):
    ours = to_float(preprocess(load_image(file, convention='huggingface'), size, convention='huggingface'), 'huggingface')
    np.testing.assert_array_equal(ours, make_preprocessing.huggingface_floats(file, size))


@pytest.mark.parametrize('shape', [(480, 640), (777, 333), (767, 1023), (1000, 511), (200, 300)])
def test_huggingface_equals_transformers_at_full_size(shape):
  pytest.importorskip('transformers.models.chameleon.image_processing_pil_chameleon')
  pixels = noise(*shape, 3)
  ours = preprocess(pixels, 512, convention='huggingface')
  np.testing.assert_array_equal(ours, make_preprocessing.huggingface_pixels(encoded(PIL.Image.fromarray(pixels)), 512))


@pytest.mark.parametrize(
  ('width', 'height', 'new_width', 'new_height'),
  [(640, 480, 682, 512), (480, 640, 512, 682), (333, 777, 512, 1194), (1023, 767, 682, 512), (300, 200, 768, 512)],
)
def test_huggingface_cuts_the_long_side_off(width, height, new_width, new_height):
  pixels = noise(height, width, 3)
  resized = np.asarray(PIL.Image.fromarray(pixels).resize((new_width, new_height), PIL.Image.Resampling.LANCZOS))
  x, y = (new_width - 512) // 2, (new_height - 512) // 2
  np.testing.assert_array_equal(preprocess(pixels, 512, convention='huggingface'), resized[y : y + 512, x : x + 512])


def test_huggingface_has_no_pad():
  with pytest.raises(ConfigError, match="the 'huggingface' preprocessing only crops"):
    preprocess(noise(4, 5, 3), 4, fit='pad', convention='huggingface')
  with pytest.raises(ImageError, match='too long and thin'):
    preprocess(np.zeros((1, 1_000_000, 3), np.uint8), 512, convention='huggingface')


# ------------------------------------------------------------------------------------- numbers and files


def test_float_range():
  levels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
  floats = to_float(levels)
  assert floats.dtype == np.float32
  assert (floats[0, 0], floats[255, 0]) == (-1, 1)
  np.testing.assert_allclose(floats[:, 0], np.arange(256) / 127.5 - 1, atol=1e-7)


def test_cutting_off_loses_95_levels():
  levels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
  back = to_uint8(to_float(levels))
  assert ((levels - back)[:, 0] == 1).sum() == 95, 'spec model.md 7.3'
  assert ((levels - back)[:, 0] == 0).sum() == 161


def test_to_uint8_clamps_and_cuts_off():
  values = np.array([[-9.0, -1, -0.999], [0, 0.5, 7]])
  assert to_uint8(values).tolist() == [[0, 0, 0], [127, 191, 255]]


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_not_finite(value):
  with pytest.raises(ImageError, match='not finite'):
    to_uint8(np.array([0, value, 0], np.float32))


def test_png_is_refused_for_other_arrays(tmp_path):
  with pytest.raises(ImageError, match='uint8'):
    save_png(tmp_path / 'a.png', np.zeros((4, 4, 3), np.float32))
  assert list(tmp_path.iterdir()) == []
