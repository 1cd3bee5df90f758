"""The tables of names and layouts: complete, invertible, and right about the rotary pairs."""

import ml_dtypes
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.interop import mapping
from chameleon_jax.interop.mapping import HUGGINGFACE_RULES, META_RULES, rules_for, transformer_specs, vqgan_specs

TINY = presets.tiny_transformer(scan_layers=False)
FAMILIES = {'meta': META_RULES, 'huggingface': HUGGINGFACE_RULES}


def rule_of(rules, ours):
  return next(rule for rule in rules if rule.ours == f'layers_{{layer}}/attention/{ours}')


def test_names_come_in_reading_order():
  names = list(transformer_specs(presets.tiny_transformer(n_layers=11)))
  assert names[0] == 'embedding' and names[-2:] == ['final_norm/weight', 'lm_head'] and len(names) == 3 + 11 * 13
  assert [name.split('/')[0] for name in names[1:-2:13]] == [f'layers_{i}' for i in range(11)], 'by number, not by letter'
  assert transformer_specs(TINY)['layers_1/attention/k_proj'] == (32, 2, 8)
  assert not any('_norm/' in name and 'attention/' in name for name in transformer_specs(presets.tiny_transformer(qk_norm=False)))


def test_counts_of_the_release():
  """Tensors and parameters of spec model.md 1.1, 3.2 and 4.1, without an array being made."""
  for config, n_tensors, n_huggingface, n_meta in (
      (presets.chameleon_7b(), 419, 7_013_666_816, 7_013_158_912),
      (presets.chameleon_34b(), 627, 34_294_308_864, 34_293_448_704),
  ):
    for rules, n in ((HUGGINGFACE_RULES, n_huggingface), (META_RULES, n_meta)):
      found = rules_for(rules, config)
      assert len(found) == n_tensors
      assert sum(int(np.prod(rule.shape(config))) for rule in found) == n
  vqgan = presets.vqgan_512()
  assert len(vqgan_specs(vqgan, decoder=False)) == 129 and len(vqgan_specs(vqgan)) == 129 + 164
  assert sum(int(np.prod(shape)) for shape in vqgan_specs(vqgan).values()) == 68_718_467


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_every_tensor_goes_there_and_back(family, dtype):
  rng = np.random.default_rng(0)
  rules = rules_for(FAMILIES[family], TINY)
  assert [rule.ours for rule in rules] == list(transformer_specs(TINY))
  assert len({rule.theirs for rule in rules}) == len(rules)
  assert '{' not in ''.join(rule.ours + rule.theirs for rule in rules)
  for rule in rules:
    ours = rng.normal(size=transformer_specs(TINY)[rule.ours]).astype(dtype)
    theirs = rule.to_theirs(ours, TINY)
    assert theirs.dtype == dtype
    if rule.axis == 'rank':
      assert theirs.shape == ours.shape and rule.shape(TINY) == ours.shape[1:]
    else:
      assert theirs.shape == rule.shape(TINY)
    np.testing.assert_array_equal(rule.to_ours(theirs, TINY), ours, err_msg=rule.ours)


def test_matrices_are_transposed_and_heads_apart():
  matrix = np.arange(64 * 32).reshape(64, 32)  # [F, D]
  gate = next(rule for rule in META_RULES if rule.ours.endswith('gate_proj'))
  np.testing.assert_array_equal(gate.to_ours(matrix, TINY), matrix.T)
  for rules in FAMILIES.values():
    v = np.arange(16 * 32).reshape(16, 32)  # [K H, D]
    ours = rule_of(rules, 'v_proj').to_ours(v, TINY)
    assert ours.shape == (32, 2, 8)
    for d, head, channel in ((0, 0, 0), (5, 1, 3), (31, 1, 7)):
      assert ours[d, head, channel] == v[head * 8 + channel, d], 'v is not permuted'
    o = np.arange(32 * 32).reshape(32, 32)  # [D, N H]
    ours = rule_of(rules, 'o_proj').to_ours(o, TINY)
    for d, head, channel in ((0, 0, 0), (5, 1, 3), (31, 3, 7)):
      assert ours[head, channel, d] == o[d, head * 8 + channel], 'o is not permuted'


def test_the_permutation_in_closed_form():
  """ours[j] = meta[2j], ours[j + H/2] = meta[2j + 1] (spec model.md 1.5), for q, k and both parts of their norms."""
  order = [0, 2, 4, 6, 1, 3, 5, 7]
  for name, heads in (('q_proj', 4), ('k_proj', 2)):
    theirs = np.arange(heads * 8 * 32).reshape(heads * 8, 32)
    expected = theirs.reshape(heads, 8, 32)[:, order].transpose(2, 0, 1)
    np.testing.assert_array_equal(rule_of(META_RULES, name).to_ours(theirs, TINY), expected)
    np.testing.assert_array_equal(rule_of(HUGGINGFACE_RULES, name).to_ours(theirs, TINY), theirs.reshape(heads, 8, 32).transpose(2, 0, 1))
  for name, heads in (('q_norm/weight', 4), ('q_norm/bias', 4), ('k_norm/weight', 2), ('k_norm/bias', 2)):
    for ranks in (1, 2):
      theirs = np.arange(ranks * 8).reshape(ranks, 8)
      ours = rule_of(META_RULES, name).to_ours(theirs, TINY)
      assert ours.shape == (heads, 8)
      for head in range(heads):
        np.testing.assert_array_equal(ours[head], theirs[head // (heads // ranks), order])
      back = rule_of(META_RULES, name).to_theirs(ours, TINY)
      np.testing.assert_array_equal(back, np.repeat(theirs, heads // ranks, axis=0))
      grouped = rule_of(HUGGINGFACE_RULES, name).to_ours(theirs, TINY)
      np.testing.assert_array_equal(grouped, np.repeat(theirs, heads // ranks, axis=0))


def _norm(x, weight, bias):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def _turned(x, *, interleaved):
  """Rotates [T, N, H], position = row."""
  half = x.shape[-1] // 2
  angle = np.arange(len(x))[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
  first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
  turned = first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)
  return np.stack(turned, -1).reshape(x.shape) if interleaved else np.concatenate(turned, -1)


def test_scores_are_equal_under_both_rotary_conventions():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(6, 32))
  meta, ours = {}, {}
  for name, heads in (('q', 4), ('k', 2)):
    kernel, weight, bias = rng.normal(size=(heads * 8, 32)), rng.normal(size=(2, 8)), rng.normal(size=(2, 8))
    per_head = [np.repeat(part, heads // 2, axis=0) for part in (weight, bias)]
    meta[name] = _turned(_norm((x @ kernel.T).reshape(6, heads, 8), *per_head), interleaved=True)
    rules = {part: rule_of(META_RULES, f'{name}_{part}') for part in ('proj', 'norm/weight', 'norm/bias')}
    values = [rules['norm/weight'].to_ours(weight, TINY), rules['norm/bias'].to_ours(bias, TINY)]
    projected = np.einsum('td,dnh->tnh', x, rules['proj'].to_ours(kernel, TINY))
    ours[name] = _turned(_norm(projected, *values), interleaved=False)
    if name == 'q':
      unpermuted = _turned(_norm(projected, *per_head), interleaved=False)

  def scores(q, k):
    return np.einsum('tnh,snh->nts', q, np.repeat(k, 2, axis=1))

  expected = scores(meta['q'], meta['k'])
  np.testing.assert_allclose(scores(ours['q'], ours['k']), expected, rtol=0, atol=1e-12)
  assert np.abs(scores(unpermuted, ours['k']) - expected).max() > 1, 'norms that are left alone are seen'


def test_transposition_in_blocks(monkeypatch):
  monkeypatch.setattr(mapping, '_BLOCK', 3)
  for shape, axes in (((7, 5), (1, 0)), ((4, 2, 2, 5), (3, 0, 2, 1)), ((3, 3, 4, 7), (3, 2, 0, 1)), ((6,), (0,)), ((0, 3), (1, 0))):
    for dtype in (np.float32, ml_dtypes.bfloat16, np.int8):
      array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
      found = mapping.transposed(array, axes)
      assert found.flags.c_contiguous and found.dtype == dtype
      np.testing.assert_array_equal(found, array.transpose(axes))


def test_names_of_the_image_tokenizer():
  for ours, theirs in {
      'encoder/conv_in/kernel': 'encoder.conv_in.weight',
      'encoder/conv_in/bias': 'encoder.conv_in.bias',
      'encoder/down_0/block_0/conv1/kernel': 'encoder.down.0.block.0.conv1.weight',
      'encoder/down_2/block_1/nin_shortcut/bias': 'encoder.down.2.block.1.nin_shortcut.bias',
      'encoder/down_3/downsample/conv/kernel': 'encoder.down.3.downsample.conv.weight',
      'encoder/mid/block_1/norm1/scale': 'encoder.mid.block_1.norm1.weight',
      'encoder/mid/attn_1/proj_out/kernel': 'encoder.mid.attn_1.proj_out.weight',
      'encoder/norm_out/scale': 'encoder.norm_out.weight',
      'decoder/up_4/block_2/norm2/bias': 'decoder.up.4.block.2.norm2.bias',
      'decoder/up_1/upsample/conv/kernel': 'decoder.up.1.upsample.conv.weight',
      'quantize/embedding': 'quantize.embedding.weight',
      'quant_conv/kernel': 'quant_conv.weight',
      'post_quant_conv/bias': 'post_quant_conv.bias',
  }.items():
    assert mapping.vqgan_name(ours) == theirs
  specs = vqgan_specs(presets.tiny_vqgan())
  assert len({mapping.vqgan_name(name) for name in specs}) == len(specs)


def test_kernels_of_the_image_tokenizer_go_there_and_back():
  rng = np.random.default_rng(0)
  for name, shape in vqgan_specs(presets.tiny_vqgan()).items():
    ours = rng.normal(size=shape)
    theirs = mapping.vqgan_to_theirs(name, ours)
    assert theirs.shape == mapping.vqgan_their_shape(name, shape)
    np.testing.assert_array_equal(mapping.vqgan_to_ours(name, theirs), ours)
  kernel = np.arange(3 * 3 * 2 * 5).reshape(3, 3, 2, 5)
  theirs = mapping.vqgan_to_theirs('encoder/conv_in/kernel', kernel)
  assert theirs[4, 1, 2, 0] == kernel[2, 0, 1, 4], '[out, in, kh, kw] of [kh, kw, in, out]'


def test_vqgan_specs_do_not_depend_on_the_resolution():
  assert vqgan_specs(presets.tiny_vqgan()) == vqgan_specs(presets.tiny_vqgan(resolution=64))
  assert {name for name in vqgan_specs(presets.tiny_vqgan()) if not name.startswith('decoder/')} == set(
      vqgan_specs(presets.tiny_vqgan(), decoder=False)
  )
