"""Every layout of tests/golden against what torch and transformers made of it, through the readers, the public object and the converter.

The values hold without torch; where torch and transformers are installed everything is made anew and compared, and what the converter
writes is opened by transformers itself. How the values came about: tests/golden/README.md.
"""

import json
import pathlib
import struct
import sys

import ml_dtypes
import numpy as np
import pytest

import chameleon_jax
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.convert import convert
from chameleon_jax.interop.files.pth import open_pth
from chameleon_jax.interop.opening import open_checkpoint
from chameleon_jax.interop.verify import forward as verify_forward
from chameleon_jax.tokens.text_json import JsonText

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests' / 'golden'
META = ('meta_7b_like', 'meta_30b_like', 'meta_fused')
PORT = ('hf_7b_like', 'hf_30b_like', 'anole_like', 'lumina_like')
WITH_PICTURES = tuple(name for name in META + PORT if name != 'lumina_like')
WITH_DECODER = (*META, 'anole_like')
SHARDS = {'meta_30b_like': 4, 'meta_fused': 2, 'hf_30b_like': 4, 'lumina_like': 4}
LIMIT = 2e-4  # of logits and activations, float32
TIE = 1e-4  # squared distance below which either of the two nearest codes will do

TYPES = {'F64': 'f8', 'F32': 'f4', 'F16': 'f2', 'BF16': ml_dtypes.bfloat16, 'I64': 'i8', 'I32': 'i4', 'I16': 'i2', 'I8': 'i1', 'U8': 'u1'}


def golden(layout):
  with np.load(GOLDEN / layout / 'golden.npz') as file:
    return dict(file)


def source(layout):
  return GOLDEN / 'models' / layout


def read_safetensors(path):
  """Name -> array, read by the description of the format and by nothing of the package."""
  data = path.read_bytes()
  (size,) = struct.unpack('<Q', data[:8])
  header = json.loads(data[8 : 8 + size])
  header.pop('__metadata__', None)
  found = {}
  for name, entry in header.items():
    start, end = entry['data_offsets']
    found[name] = np.frombuffer(data[8 + size + start : 8 + size + end], np.dtype(TYPES[entry['dtype']])).reshape(entry['shape'])
  return found


def read_files(folder):
  """All tensors of a foreign checkpoint as its files hold them: `consolidated.00/norm.weight`, `lm_head.weight`, or None."""
  found = {}
  for path in sorted([*folder.rglob('*.pth'), *folder.rglob('vqgan.ckpt')]):
    with open_pth(path, verify=True) as file:
      part = ('state_dict',) if path.suffix == '.ckpt' else ()
      keys = file.tree['state_dict'] if part else file.tree
      tensors = {name: np.array(lazy.read()) for name, lazy in file.tensors(*part).items()}
      found |= {f'{path.stem}/{key}': tensors.get(key) for key in keys}
  for path in sorted(folder.glob('*.safetensors')):
    found |= read_safetensors(path)
  return found


def assert_same_tensors(found, expected):
  assert sorted(found) == sorted(expected)
  for name, value in expected.items():
    if value is None:
      continue
    assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
    assert found[name].tobytes() == value.tobytes(), name


def assert_values(layout, folder, *, pictures=True):
  """The checkpoint at `folder` computes what the oracle of `layout` did."""
  values = golden(layout)
  with open_checkpoint(folder) as model:
    *stream, _, head = verify_forward.run_stages(model, values['tokens'], 'float32')
    for index, stage in enumerate(stream):
      np.testing.assert_allclose(stage.output, values[f'hidden_{index}'], rtol=0, atol=LIMIT, err_msg=stage.name)
    assert f'hidden_{len(stream)}' not in values
    np.testing.assert_allclose(head.output, values['logits'], rtol=0, atol=LIMIT)
    assert (model.vqgan is not None) == (pictures and 'codes' in values)


def assert_codes(found, expected, margin):
  assert found.dtype == np.int32 and found.shape == expected.shape
  assert ((found == expected) | (margin < TIE)).all()


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize('layout', META + PORT)
def test_activations_and_logits(layout):
  assert_values(layout, source(layout))


@pytest.mark.parametrize('layout', META + PORT)
def test_the_public_object(layout):
  values = golden(layout)
  model = chameleon_jax.load(source(layout), dtype='float32')
  logits = np.asarray(model.logits(values['tokens']))
  assert logits.dtype == np.float32
  np.testing.assert_allclose(logits, values['logits'], rtol=0, atol=LIMIT)
  assert model.vocabulary.size == 384 and model.vocabulary.n_codes == 32
  if 'codes' in values:
    for convention, end in (('meta', ''), ('huggingface', '_huggingface')):
      codes = model.encode_images(values['pictures'], convention=convention)
      assert_codes(codes, values[f'codes{end}'], values[f'code_margin{end}'])
  if 'decoded' in values:
    decoded = model.decode_codes(values['codes'])
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - values['decoded']).max() <= 1


@pytest.mark.parametrize('layout', [name for name in META + PORT if name not in WITH_DECODER])
def test_a_part_that_is_missing_is_named(layout):
  model = chameleon_jax.load(source(layout), dtype='float32')
  with pytest.raises(CheckpointError, match='decoder|image tokenizer'):
    model.decode_codes(np.zeros((1, 64), np.int32))


@pytest.mark.parametrize('layout, convention', [('meta_7b_like', 'meta'), ('hf_7b_like', 'huggingface')])
def test_pictures_of_other_sizes(layout, convention):
  values = golden(layout)
  model = chameleon_jax.load(source(layout), dtype='float32')
  n = sum(name.startswith('source_codes_') for name in values)
  assert n >= 5
  for index in range(n):
    codes = model.encode_images(values[f'source_{index}'][None], convention=convention)
    assert_codes(codes[0], values[f'source_codes_{index}'], values[f'source_margin_{index}'])


def test_the_values_could_tell():
  """Were the codes all one, or logits all alike, the comparisons above would prove little."""
  for layout in META + PORT:
    values = golden(layout)
    assert 0.5 < values['logits'].std() < 2
    if layout in WITH_PICTURES:
      assert len(np.unique(values['codes'])) >= 8
      assert (values['code_margin'] > TIE).all()
  with open_checkpoint(source('meta_30b_like')) as model:
    norm = model.transformer.read('layers_0/attention/q_norm/weight').astype(np.float32)
  assert np.abs(norm[0] - norm[1]).max() == 0 and np.abs(norm[1] - norm[2]).max() > 0.1


@pytest.mark.parametrize('path', ['tokenizer/text_tokenizer.json', 'models/hf_7b_like/tokenizer.json'])
def test_text(path):
  text = JsonText.load(GOLDEN / path)
  samples = json.loads((GOLDEN / 'encodings.json').read_text(encoding='utf-8'))
  assert len(samples) >= 40
  for sample in samples:
    pieces = text.encode(sample['text'])
    assert [piece + text.vocabulary_config.text_start for piece in pieces] == sample['ids'], sample['text']
    assert text.decode(pieces) == sample['text']


# ----------------------------------------------------------------------------------------- conversions


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
  """Every layout in our own format."""
  folder = tmp_path_factory.mktemp('ours')
  for layout in META + PORT:
    convert(source(layout), folder / layout, 'orbax')
  return folder


@pytest.mark.parametrize('layout', META + PORT)
def test_ours_computes_the_same(ours, layout):
  assert_values(layout, ours / layout)


@pytest.mark.parametrize('layout', META)
def test_meta_to_ours_and_back(ours, tmp_path, layout):
  convert(ours / layout, tmp_path / 'back', 'meta')
  expected = read_files(source(layout)) | read_files(GOLDEN / 'tokenizer')
  assert_same_tensors(read_files(tmp_path / 'back'), expected)


@pytest.mark.parametrize('layout', PORT)
def test_port_to_ours_and_back(ours, tmp_path, layout):
  convert(ours / layout, tmp_path / 'back', 'huggingface')
  expected = read_files(source(layout))
  if layout == 'lumina_like':  # comes back in the form that transformers reads: a norm for each head
    heads = {'q_norm': 8, 'k_norm': 4}
    for name, value in expected.items():
      if '_norm.' in name:
        expected[name] = value.repeat(heads[name.split('.')[4]] // len(value), axis=0)
    assert expected['model.layers.0.self_attn.q_norm.bias'].shape == (8, 8)
  assert_same_tensors(read_files(tmp_path / 'back'), expected)


@pytest.mark.parametrize('layout', META + PORT)
@pytest.mark.parametrize('target_format', ['meta', 'huggingface'])
def test_every_format_to_every_other(tmp_path, layout, target_format):
  more = {'n_shards': SHARDS.get(layout, 1)} if target_format == 'meta' else {}
  if target_format == 'meta' and layout in WITH_PICTURES and layout not in WITH_DECODER:
    with pytest.raises(CheckpointError, match='no decoder'):  # half an image tokenizer has no place there
      convert(source(layout), tmp_path / 'converted', target_format, **more)
    assert list(tmp_path.iterdir()) == []
    return
  convert(source(layout), tmp_path / 'converted', target_format, **more)
  assert_values(layout, tmp_path / 'converted')


@pytest.mark.parametrize('layout', META)
def test_what_transformers_makes_of_a_conversion(ours, tmp_path, layout):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  values = golden(layout)
  convert(ours / layout, tmp_path / 'port', 'huggingface')
  load = transformers.ChameleonForConditionalGeneration.from_pretrained
  model, info = load(tmp_path / 'port', dtype=torch.float32, output_loading_info=True)
  assert not info['missing_keys'] and not info['mismatched_keys'] and not info['unexpected_keys']
  raw = []
  model.lm_head.register_forward_hook(lambda module, inputs, output: raw.append(output.clone()))
  pixels = torch.tensor((values['pictures'] / 255 * 2 - 1).astype(np.float32)).permute(0, 3, 1, 2)
  with torch.no_grad():
    model.eval()(input_ids=torch.tensor(values['tokens']).long())
    codes = model.model.vqmodel.encode(pixels).image_tokens.numpy().astype(np.int32)
  np.testing.assert_allclose(raw[0].numpy(), values['logits'], rtol=0, atol=LIMIT)
  assert_codes(codes.reshape(values['codes'].shape), values['codes'], values['code_margin'])


# ------------------------------------------------------------------------------------- everything anew


def agree(new, old, where):
  """The same JSON, where both know the field: another version of a library may add or drop one."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in old.keys() & new.keys() - {'transformers_version'}:
      agree(new[key], old[key], f'{where}/{key}')
  else:
    assert new == old, where


def small_files(folder):
  """All but the shards of the port, whose number is for transformers to choose."""
  found = (path for path in folder.rglob('*') if path.is_file() and not path.name.startswith('model-0'))
  return sorted(str(path.relative_to(folder)) for path in found)


def test_made_anew(tmp_path, monkeypatch):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  monkeypatch.setattr(sys, 'path', [str(ROOT / 'tools'), *sys.path])
  import make_golden

  make_golden.make(tmp_path / 'golden')
  names = small_files(tmp_path / 'golden')
  made = {path.name for path in (tmp_path / 'golden').iterdir()}
  assert names == [name for name in small_files(GOLDEN) if name.split('/')[0] in made]
  for name in names:
    new, old = tmp_path / 'golden' / name, GOLDEN / name
    if old.suffix == '.npz':
      with np.load(new) as new_values, np.load(old) as old_values:
        assert sorted(new_values.files) == sorted(old_values.files)
        for key in old_values.files:
          tolerance = 1e-6 if old_values[key].dtype.kind == 'f' else 0
          np.testing.assert_allclose(new_values[key], old_values[key], rtol=tolerance, atol=tolerance, err_msg=f'{name} {key}')
    elif old.suffix == '.json':
      if not name.endswith('.index.json'):
        agree(json.loads(new.read_text(encoding='utf-8')), json.loads(old.read_text(encoding='utf-8')), name)
    elif old.suffix == '.yaml':
      assert new.read_text() == old.read_text()
  for folder in ('tokenizer', *(f'models/{layout}' for layout in META + PORT)):
    assert_same_tensors(read_files(tmp_path / 'golden' / folder), read_files(GOLDEN / folder))
