"""The image tokenizers of two checkpoints, or one and golden values: codes of pictures, and pictures of codes.

A difference is explained where it can be: by the port's scaling of pixel values, or by a constant between codes.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from chameleon_jax.array_types import Codes, Params, Pictures
from chameleon_jax.config import Dtype, VQGANConfig
from chameleon_jax.interop.lazy import LazyModel
from chameleon_jax.interop.verify import forward as verify_forward
from chameleon_jax.interop.verify.golden import Golden
from chameleon_jax.interop.verify.outputs import PIXELS_LIMIT, codes_row, constant_offset, pictures_row
from chameleon_jax.interop.verify.report import Finding, Row, judged, lone, not_compared
from chameleon_jax.models.vqgan.quantizer import nearest_codes
from chameleon_jax.tokens import images

_Result = tuple[list[Row], list[Finding]]
_port_pixels = functools.partial(images.to_float, convention='huggingface')
_SCALINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {'codes': images.to_float, 'codes_huggingface': _port_pixels}


class _Tokenizer:
  """One checkpoint's image tokenizer with its parameters."""

  def __init__(self, model: LazyModel, config: VQGANConfig, dtype: Dtype) -> None:
    self.config = config
    self.params: Params = verify_forward.load_vqgan(model, dtype)
    self.codebook = np.asarray(self.params['quantize']['embedding'])

  def encode(self, pixels: np.ndarray) -> tuple[Codes, np.ndarray]:
    """Codes [P, n] and latents [P, n, Z] of pixels [P, H, W, 3]."""
    z = verify_forward.latents(self.config, self.params, pixels)
    return np.asarray(nearest_codes(jnp.asarray(z), self.codebook)), z

  def decode(self, codes: Codes) -> Pictures:
    return verify_forward.decoded_pictures(self.config, self.params, codes)


def compare_models(a: LazyModel, b: LazyModel, dtype: Dtype, *, log: Callable[[str], None]) -> _Result:
  """Codes of test pictures by both, then pictures of A's codes by both."""
  if a.vqgan is None or b.vqgan is None or a.vqgan_config is None or b.vqgan_config is None:
    return [], []
  shared = [name for name in a.vqgan.specs if name in b.vqgan.specs]
  unlike = [name for name in shared if a.vqgan.specs[name].shape != b.vqgan.specs[name].shape]
  needed = [name for name in set(a.vqgan.specs) ^ set(b.vqgan.specs) if not name.startswith(('decoder/', 'post_quant_conv/'))]
  if unlike or needed or a.vqgan_config.resolution != b.vqgan_config.resolution:
    return [not_compared('codes, pictures', 'the image tokenizers have other sizes', skipped='codes, pictures')], []
  log('encoding and decoding test pictures with both image tokenizers')
  one, two = _Tokenizer(a, a.vqgan_config, dtype), _Tokenizer(b, b.vqgan_config, dtype)
  pictures = test_pictures(one.config.resolution)
  codes, z = one.encode(images.to_float(pictures))
  others, _ = two.encode(images.to_float(pictures))
  rows = [codes_row('codes', codes, others, z, one.codebook)]
  findings = _explain('B', codes, others, None, one.config.n_codes) if rows[0].status == 'fail' else []
  changed = (one.encode(_port_pixels(pictures))[0] != codes).mean()
  where = "the port's 0.0078 against the release's 2/255, other codes by A from the same pictures"
  rows.append(Row('effect of the scaling', f'{changed:.2%} of the codes', None, 'info', where))
  if verify_forward.has_decoder(a) and verify_forward.has_decoder(b):
    rows.append(pictures_row('decoded pictures (levels)', one.decode(codes), two.decode(codes)))
  else:
    sides = 'one side holds no' if verify_forward.has_decoder(a) or verify_forward.has_decoder(b) else 'neither side holds a'
    rows.append(not_compared('decoded pictures (levels)', f'{sides} picture decoder'))
  return rows, findings


def compare_golden(
    label: str, model: LazyModel, golden: Golden, dtype: Dtype, *, partial: bool, log: Callable[[str], None]
) -> _Result:
  """Pixels, codes and decoded pictures against golden values."""
  if model.vqgan is None or model.vqgan_config is None:
    if not {*_SCALINGS, 'decoded', 'pixels'} & set(golden.values):
      return [], []
    where = f'{label} holds no image tokenizer, the golden values are of one'
    return [lone(f'{label}, golden: image tokenizer', 'image tokenizer', where, partial=partial)], []
  pictures, pixels, decoded = golden.get('pictures'), golden.get('pixels'), golden.get('decoded')
  rows: list[Row] = []
  findings: list[Finding] = []
  if pixels is not None and pictures is not None:
    gap = float(np.abs(images.to_float(pictures) - pixels).max())
    rows.append(judged('pixel values', gap, PIXELS_LIMIT, good=gap <= PIXELS_LIMIT))
    if not gap <= PIXELS_LIMIT and np.abs(_port_pixels(pictures) - pixels).max() <= PIXELS_LIMIT:
      findings.append(_rescaled('the golden pixel values are'))
  if not set(_SCALINGS) & set(golden.values) and decoded is None:
    return _named(label, rows), findings
  log(f'running the image tokenizer of {label} on the golden pictures')
  tokenizer = _Tokenizer(model, model.vqgan_config, dtype)
  for key, scaled in _SCALINGS.items():
    target = golden.get(key)
    if target is None or pictures is None:
      continue
    codes, z = tokenizer.encode(scaled(pictures))
    rows.append(codes_row('codes' if key == 'codes' else 'codes (scaling of the port)', codes, target, z, tokenizer.codebook))
    if rows[-1].status == 'fail':
      other = tokenizer.encode(_port_pixels(pictures))[0] if key == 'codes' else None
      findings += _explain('the golden values', codes, target, other, tokenizer.config.n_codes)
  codes_to_decode = golden.get('codes')
  if decoded is not None and codes_to_decode is not None:
    if verify_forward.has_decoder(model):
      rows.append(pictures_row('decoded pictures (levels)', decoded, tokenizer.decode(codes_to_decode)))
    else:
      rows.append(not_compared('decoded pictures (levels)', f'{label} holds no picture decoder', skipped='picture decoder'))
  return _named(label, rows), findings


def _explain(whose: str, codes: Codes, target: Codes, rescaled: Codes | None, n_codes: int) -> list[Finding]:
  """Why `target` is not `codes`; `rescaled` are the codes of pixels in the port's scaling, where these are worth a look."""
  if (offset := constant_offset(codes, target, n_codes)) is not None:
    return [Finding('code_offset', f'the codes of {whose} are offset by {offset}: token ids were taken for codes, or the other way round')]
  if rescaled is not None and (rescaled == target).mean() > max(0.99, (codes == target).mean()):
    return [_rescaled('the golden codes are those of pixel values')]
  return []


def _rescaled(what: str) -> Finding:
  return Finding('rescale', f'{what} scaled by 0.0078, the convention of the port, and not to [-1, 1] as the release does')


def _named(label: str, rows: list[Row]) -> list[Row]:
  return [dataclasses.replace(row, name=f'{label}, golden: {row.name}') for row in rows]


def test_pictures(size: int) -> Pictures:
  """Two pictures [2, size, size, 3] with smooth and with random parts; always the same."""
  rng = np.random.default_rng(1)
  ramp = np.linspace(0, 255, size)
  smooth = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], 255 - ramp[:, None]), axis=-1)
  noise = rng.integers(0, 256, (size, size, 3))
  mixed = np.where((np.arange(size) // max(1, size // 8) % 2 == 0)[None, :, None], smooth, noise)
  return np.stack([smooth, mixed]).astype(np.uint8)
