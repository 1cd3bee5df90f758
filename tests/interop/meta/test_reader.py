"""Checkpoints in Meta's form: the network computes what Meta's does, and what is missing, damaged or of two minds is refused."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import mapping, trees
from chameleon_jax.interop.meta.reader import is_meta, open_meta
from chameleon_jax.models.transformer.model import Transformer
from chameleon_jax.tokens.text import train_text_tokenizer
from chameleon_jax.tokens.text_export import export_json
from tests.interop import meta_reference as reference
from tests.interop.meta_reference import BFLOAT16, Tiny

TOKENS = np.array([1, 5, 60, 2, 33, 5, 17, 0, 9])


@pytest.fixture(scope='module')
def text():
  """A text tokenizer in Meta's form, with 32 codes and 340 tokens."""
  vocabulary = VocabularyConfig(size=34 + 4 + 2 + 300, n_codes=32, n_sentinels=0, n_reserved=2)
  trained = train_text_tokenizer(['draw a red apple', 'a green pear'] * 20, n_pieces=vocabulary.n_text, character_coverage=1.0, seed=0)
  return export_json(trained, vocabulary, form='meta')


def our_logits(model, tokens):
  config = dataclasses.replace(model.transformer_config, dtype='float32', param_dtype='float32')
  params = trees.nested({name: jnp.asarray(model.transformer.read(name), jnp.float32) for name in model.transformer.specs})
  return np.asarray(Transformer(config).apply({'params': params}, jnp.asarray(tokens)[None])[0][0])


def refused(fragment, folder, **kwargs):
  """Opening, or reading everything, ends in one line."""
  with pytest.raises(CheckpointError, match=fragment) as caught, open_meta(folder, **kwargs) as model:
    read_all(model)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 700
  return str(caught.value)


def read_all(model):
  found = {}
  for source in (model.transformer, model.vqgan, model.origin.extras):
    found |= {name: np.array(source.read(name)) for name in source.specs} if source else {}
  return found


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('swin', [False, True])
@pytest.mark.parametrize('ranks', [1, 2, 4])
def test_logits_are_those_of_meta(tmp_path, ranks, swin, fused):
  tiny = Tiny(ranks=ranks, swin=swin)
  tensors = reference.make_ranks(tiny)
  folder = reference.save_model(tmp_path / '7b', [reference.fuse(rank) for rank in tensors] if fused else tensors, tiny)
  with open_meta(folder) as model:
    config = model.transformer_config
    assert (config.n_heads, config.n_kv_heads, config.d_head, config.d_ff, config.n_layers) == (8, 4, 4, 96, 2)
    assert config.norm_position == ('post' if swin else 'pre') and config.qk_norm and not config.scan_layers
    assert list(model.transformer.specs) == list(mapping.transformer_specs(config))
    for name, spec in model.transformer.specs.items():
      read = model.transformer.read(name)
      assert (read.shape, read.dtype) == (spec.shape, spec.dtype)
    logits = our_logits(model, TOKENS)
  expected = reference.logits(tensors, tiny, TOKENS)
  assert 0.5 < np.std(expected) < 5
  np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=0)


def test_the_reference_tells_ranks_apart(tmp_path):
  """With rank 0's norms everywhere, or their mean, the logits are others: the test above would see it."""
  tiny = Tiny(ranks=4)
  tensors = reference.make_ranks(tiny)
  expected = reference.logits(tensors, tiny, TOKENS)
  norms = [name for name in tensors[0] if '_normalization' in name]
  first = [rank | {name: tensors[0][name] for name in norms} for rank in tensors]
  mean = [rank | {name: np.mean([other[name] for other in tensors], 0) for name in norms} for rank in tensors]
  swapped = [tensors[1], tensors[0], *tensors[2:]]
  for changed in (first, mean, swapped):
    assert np.abs(reference.logits(changed, tiny, TOKENS) - expected).max() > 0.1


@pytest.mark.parametrize('theta, eps', [(500.0, 1e-5), (10000.0, 1e-2)])
def test_rope_theta_and_norm_eps_come_from_the_file(tmp_path, theta, eps):
  tiny = Tiny(theta=theta, eps=eps)
  tensors = reference.make_ranks(tiny)
  with open_meta(reference.save_model(tmp_path / 'm', tensors, tiny)) as model:
    np.testing.assert_allclose(our_logits(model, TOKENS), reference.logits(tensors, tiny, TOKENS), atol=2e-4, rtol=0)


def test_what_torch_saved(tmp_path):
  """bfloat16, two ranks, written by PyTorch itself, with parameters, shared storages and turned matrices among the tensors."""
  torch = pytest.importorskip('torch')
  tiny = Tiny(ranks=2)
  tensors = reference.make_ranks(tiny, dtype=BFLOAT16)
  folder = reference.save_model(tmp_path / 'm', tensors, tiny)
  for rank, names in enumerate(tensors):
    state = {}
    for name, array in names.items():
      state[name] = torch.from_numpy(array.view('i2').copy()).view(torch.bfloat16) if array.dtype == BFLOAT16 else torch.from_numpy(array)
    state['norm.weight'] = torch.nn.Parameter(state['norm.weight'])
    state['layers.0.feed_forward.w2.weight'] = state['layers.0.feed_forward.w2.weight'].T.contiguous().T
    torch.save(state, folder / f'consolidated.{rank:02d}.pth')
  with open_meta(folder) as model:
    assert model.transformer_config.param_dtype == model.transformer_config.dtype == 'bfloat16'
    assert {str(spec.dtype) for spec in model.transformer.specs.values()} == {'bfloat16'}
    np.testing.assert_allclose(our_logits(model, TOKENS), reference.logits(tensors, tiny, TOKENS), atol=2e-4, rtol=0)


def test_without_qk_norms(tmp_path):
  tiny = Tiny(ranks=2)
  ranks = [{name: array for name, array in rank.items() if '_normalization' not in name} for rank in reference.make_ranks(tiny)]
  params = reference.params_of(tiny)
  params['model']['qk_normalization'] = False
  with open_meta(reference.save_model(tmp_path / 'm', ranks, tiny, params=params)) as model:
    assert not model.transformer_config.qk_norm and model.transformer_config.d_head == 4
    assert not any('_norm/' in name and 'attention/' in name for name in model.transformer.specs)
    read_all(model)
  del params['model']['n_heads']
  refused('gives no n_heads, and without q/k norms', reference.save_model(tmp_path / 'm', ranks, tiny, params=params))


# --------------------------------------------------------------------------------------------- the layout


def release(tmp_path, text, *, names=('7b',), vocab=340):
  """data/ with models and tokenizer."""
  for seed, name in enumerate(names):
    tiny = Tiny(vocab=vocab, ranks=1 + seed)
    reference.save_model(tmp_path / 'data' / 'models' / name, reference.make_ranks(tiny, seed=seed), tiny)
  reference.save_tokenizer(tmp_path / 'data' / 'tokenizer', {'state_dict': reference.make_vqgan()}, text=text)
  return tmp_path / 'data'


def test_the_tokenizer_is_found_beside_the_models(tmp_path, text):
  data = release(tmp_path, text)
  for folder in (data, data / 'models' / '7b'):
    assert is_meta(folder)
    with open_meta(folder) as model:
      assert model.vocabulary.size == 340 and model.text_tokenizer.n_pieces == 300 and model.vqgan_config.n_codes == 32
      assert (model.format, model.origin.format, model.origin.n_shards, model.notes) == ('meta', 'meta', 1, ())
      assert set(model.origin.files) >= {'params.json', 'consolidate_params.json', 'vqgan.yaml'}
      assert model.origin.files['vqgan.yaml'] == (data / 'tokenizer' / 'vqgan.yaml').read_bytes()
      assert list(model.origin.extras.specs) == ['consolidated/rope.freqs']
      np.testing.assert_array_equal(model.origin.extras.read('consolidated/rope.freqs'), [0, 1])
      read_all(model)


def test_places_of_the_tokenizer_in_their_order(tmp_path, text):
  data = release(tmp_path, text)
  model_folder = data / 'models' / '7b'
  shutil.move(data / 'tokenizer', data / 'models' / 'tokenizer')
  for place in (data / 'models' / 'tokenizer', data / 'tokenizer', model_folder):
    if place != data / 'models' / 'tokenizer':
      tree = {'state_dict': reference.make_vqgan(seed=len(str(place)))}
      reference.save_tokenizer(place, tree, text=text)
    with open_meta(model_folder) as model:
      expected = reference.load_pth(place / 'vqgan.ckpt')[0]['state_dict']['quantize.embedding.weight']
      np.testing.assert_array_equal(model.vqgan.read('quantize/embedding'), expected)
  given = reference.save_tokenizer(tmp_path / 'other', {'state_dict': reference.make_vqgan(seed=9)})
  with open_meta(model_folder, tokenizer=given) as model:
    np.testing.assert_array_equal(model.vqgan.read('quantize/embedding'), reference.make_vqgan(seed=9)['quantize.embedding.weight'])
    assert model.text_tokenizer is not None  # the given folder has none, the model's own does
  refused('has neither text_tokenizer.json nor vqgan.ckpt', model_folder, tokenizer=tmp_path)


def test_parts_may_be_absent(tmp_path, text):
  tiny = Tiny()
  with open_meta(reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny)) as model:
    assert model.vqgan is model.vqgan_config is model.text_tokenizer is model.vocabulary is None
  data = release(tmp_path, text)
  shutil.rmtree(data / 'models')
  for folder in (data, data / 'tokenizer'):
    assert is_meta(folder)
    with open_meta(folder) as model:
      assert model.transformer is model.transformer_config is None
      assert model.vqgan_config.resolution == 8 and model.vocabulary.n_codes == 32
  assert not is_meta(tmp_path) and not is_meta(tmp_path / 'nothing') and not is_meta(data / 'tokenizer' / 'vqgan.ckpt')
  refused("holds nothing of Meta's format", tmp_path)


def test_several_models(tmp_path, text):
  data = release(tmp_path, text, names=('7b', '30b'))
  message = refused('holds several models; give one of', data)
  assert is_meta(data) and str(data / 'models' / '7b') in message and str(data / 'models' / '30b') in message
  with open_meta(data / 'models' / '30b') as model:
    assert model.origin.n_shards == 2 and model.vqgan is not None


def test_shards_that_do_not_add_up(tmp_path):
  tiny = Tiny(ranks=4)
  folder = reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny)
  (folder / 'consolidated.02.pth').rename(tmp_path / 'away')
  message = refused('3 shards but no consolidated.02.pth', folder)
  assert 'consolidated.03.pth' in message
  (folder / 'consolidated.03.pth').unlink()
  refused('has 2 shards, but its argument files give model_parallel_size 4', folder)
  (folder / 'consolidated.xx.pth').touch()
  refused('consolidated.xx.pth counts as a shard but has no number', folder)
  (folder / 'consolidated.xx.pth').unlink()
  (folder / 'consolidate_params.json').unlink()
  message = refused('has 2 shards, but their shapes are those of a checkpoint in 4', folder)
  assert message.endswith('(8 of 32 channels in each); download those up to consolidated.03.pth')


def test_one_file_wins_over_shards(tmp_path):
  tiny = Tiny()
  folder = reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny)
  (folder / 'consolidated.07.pth').touch()
  with open_meta(folder) as model:
    assert model.origin.n_shards == 1


def edit(ranks, name, change):
  """The ranks with `change(array)` in the last one; None takes it out."""
  changed = dict(ranks[-1])
  array = change(changed.pop(name))
  return [*ranks[:-1], changed if array is None else changed | {name: array}]


@pytest.mark.parametrize(
    'name, change, fragment',
    [
        ('layers.1.attention_norm.weight', lambda x: x + 1, 'attention_norm.weight must be the same in every shard, but 0 and 1 differ'),
        ('norm.weight', lambda x: np.nextafter(x, 9), 'norm.weight must be the same in every shard'),
        ('layers.1.feed_forward.w2.weight', lambda x: None, 'consolidated.01.pth has no tensor layers.1.feed_forward.w2.weight'),
        ('layers.1.attention.wk.weight', lambda x: x[:-1], r'01.pth: layers.1.attention.wk.weight has shape \[7, 32\], expected \[8, 32\]'),
        ('layers.0.attention.q_normalization.bias', lambda x: x[:2], r'q_normalization.bias has shape \[2\], expected \[4\]'),
        ('output.weight', lambda x: x.astype('f8'), 'output.weight is float64, not float32 in the first shard'),
        ('layers.0.ffn_norm.weight', lambda x: x[None], r'ffn_norm.weight has shape \[1, 32\]'),
    ],
)
def test_a_rank_that_differs(tmp_path, name, change, fragment):
  tiny = Tiny(ranks=2)
  refused(fragment, reference.save_model(tmp_path / 'm', edit(reference.make_ranks(tiny), name, change), tiny))


@pytest.mark.parametrize(
    'name, change, fragment',
    [
        ('tok_embeddings.weight', lambda x: None, 'has no tensor tok_embeddings.weight'),
        ('tok_embeddings.weight', lambda x: x.reshape(-1), 'tok_embeddings.weight has shape .*, not two axes'),
        ('layers.0.attention.wo.weight', lambda x: x[:, :6], '6 query and 16 key rows do not split into heads of 4'),
        ('layers.0.attention.wo.weight', lambda x: x[:, :16], 'give n_heads 8, the tensors 4'),
        ('layers.0.attention.q_normalization.weight', lambda x: x.reshape(2, 2), 'q_normalization.weight has shape .* not one axis'),
        ('output.weight', lambda x: x.astype('i4'), 'output.weight is int32, not floating numbers'),
    ],
)
def test_a_file_that_is_not_of_this_form(tmp_path, name, change, fragment):
  tiny = Tiny()
  refused(fragment, reference.save_model(tmp_path / 'm', edit(reference.make_ranks(tiny), name, change), tiny))


def test_layers_with_a_gap(tmp_path):
  tiny = Tiny(layers=3)
  ranks = [{name: array for name, array in rank.items() if not name.startswith('layers.1.')} for rank in reference.make_ranks(tiny)]
  refused('has 2 layers but none of number 1', reference.save_model(tmp_path / 'm', ranks, tiny))


def test_fused_tensors_that_do_not_fit(tmp_path):
  tiny = Tiny(ranks=2)
  ranks = [reference.fuse(rank) for rank in reference.make_ranks(tiny)]
  one_row_less = edit(ranks, 'layers.0.attention.wqkv.weight', lambda x: x[:-1])
  refused('layers.0.attention.wqkv.weight has shape .* does not split', reference.save_model(tmp_path / 'a', one_row_less, tiny))
  too_short = edit(ranks, 'layers.0.attention.wqkv.weight', lambda x: x[:3])
  refused('does not split into rows of', reference.save_model(tmp_path / 'f', too_short, tiny))
  odd = edit(ranks, 'layers.0.feed_forward.w13.weight', lambda x: x[:-1])
  refused('layers.0.feed_forward.w13.weight has shape .* does not split', reference.save_model(tmp_path / 'b', odd, tiny))
  mixed = [ranks[0], reference.make_ranks(tiny)[1]]
  refused('attention.wqkv.weight is in some shards only', reference.save_model(tmp_path / 'c', mixed, tiny))
  both = [rank | {'layers.0.attention.wk.weight': np.zeros((8, 32), 'f4')} for rank in ranks]
  refused('holds layers.0.attention.wk.weight twice', reference.save_model(tmp_path / 'd', both, tiny))
  lost = [{name: array for name, array in rank.items() if name != 'layers.0.attention.wo.weight'} for rank in ranks]
  refused('has no tensor layers.0.attention.wo.weight', reference.save_model(tmp_path / 'e', lost, tiny))


def test_more_ranks_than_key_heads(tmp_path):
  tiny = Tiny(ranks=4, kv_heads=2)
  refused('2 key/value heads do not split over 4 shards', reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny))


# ------------------------------------------------------------------------------------------------- extras


def test_keys_without_a_place_are_kept(tmp_path):
  tiny = Tiny(ranks=2)
  ranks = reference.make_ranks(tiny, rope='none')
  more = [{'a/b.more': np.full(3, i, 'i8'), 'step': 7, 'name': 'x', 'nested': {'t': np.array(i, '?')}} for i in range(2)]
  ranks = [rank | extra for rank, extra in zip(ranks, more)]
  with open_meta(reference.save_model(tmp_path / 'm', ranks, tiny)) as model:
    extras = model.origin.extras
    assert set(extras.specs) == {f'consolidated.{i:02d}/{name}' for i in range(2) for name in ('a/b.more', 'nested.t')}
    np.testing.assert_array_equal(extras.read('consolidated.01/a/b.more'), [1, 1, 1])
    pairs = json.loads(model.origin.files['consolidated.tree.json'])['consolidated.01']['dict']
    assert [pair for pair in pairs if not isinstance(pair[1], dict)] == [['rope.freqs', None], ['step', 7], ['name', 'x']]
    assert model.notes == ()


def test_values_that_cannot_be_kept_are_named(tmp_path):
  torch = pytest.importorskip('torch')
  tiny = Tiny()
  folder = reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny)
  state = torch.load(folder / 'consolidated.pth', weights_only=True)
  torch.save(state | {'kind': torch.bfloat16, 'deep': {'kind': torch.float32}}, folder / 'consolidated.pth')
  with open_meta(folder) as model:
    assert len(model.notes) == 1 and 'not kept: kind, deep.kind' in model.notes[0]


def test_vqgan_extras(tmp_path):
  tree = {'epoch': 3, 'state_dict': reference.make_vqgan() | {'loss.logvar': np.zeros((), 'f4')}, 'opt': {0: [np.ones(2, 'f4')]}}
  with open_meta(reference.save_tokenizer(tmp_path / 't', tree)) as model:
    assert list(model.origin.extras.specs) == ['vqgan.ckpt/loss.logvar', 'vqgan.ckpt//opt.0.0']
    np.testing.assert_array_equal(model.origin.extras.read('vqgan.ckpt//opt.0.0'), [1, 1])
    assert model.vqgan_config.channel_multipliers == (1, 2) and model.vqgan_config.n_res_blocks == 1 and model.vqgan_config.z_channels == 6
    state = tree['state_dict']
    np.testing.assert_array_equal(model.vqgan.read('quantize/embedding'), state['quantize.embedding.weight'])
    kernel = model.vqgan.read('encoder/down_1/block_0/conv1/kernel')
    np.testing.assert_array_equal(kernel, state['encoder.down.1.block.0.conv1.weight'].transpose(2, 3, 1, 0))
    assert list(model.vqgan.specs) == list(mapping.vqgan_specs(model.vqgan_config)) and len(model.vqgan.specs) == len(state) - 1


def test_a_vqgan_without_decoder_or_state_dict(tmp_path):
  with open_meta(reference.save_tokenizer(tmp_path / 't', reference.make_vqgan(decoder=False))) as model:
    assert not any(name.startswith('decoder/') for name in model.vqgan.specs) and 'post_quant_conv/kernel' in model.vqgan.specs
    assert len(model.notes) == 1 and 'no decoder' in model.notes[0]
    read_all(model)


def test_the_note_on_suppressed_pictures(tmp_path):
  tiny = Tiny()
  values = reference.consolidate_of(tiny) | {'src': '/x/chameleon-7b-noimggen/y'}
  with open_meta(reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny, consolidate=values)) as model:
    assert len(model.notes) == 1 and 'image output is suppressed' in model.notes[0] and 'lm_head' in model.notes[0]


def test_parts_of_different_models(tmp_path, text):
  refused('the transformer has 64 token ids, the vocabulary 340', release(tmp_path, text, vocab=64))


# ------------------------------------------------------------------------------------------------- damage


def test_damaged_files(tmp_path):
  """200 files cut short or with bits turned: the same tensors, or one line, and never another exception."""
  tiny = Tiny(vocab=8, layers=1, heads=2, kv_heads=2, d_head=4, ffn=16)
  params = reference.params_of(tiny) | {'model': reference.params_of(tiny)['model'] | {'multiple_of': 8}}
  folder = reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny, params=params)
  with open_meta(folder) as model:
    sound = read_all(model)
  whole = (folder / 'consolidated.pth').read_bytes()
  rng = np.random.default_rng(0)
  n_refused = 0
  for case in range(200):
    data = bytearray(whole)
    if case % 4 == 0:
      del data[int(rng.integers(len(data))) :]
    for _ in range(int(rng.integers(1, 4)) if case % 4 else 0):
      data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    (folder / 'consolidated.pth').write_bytes(data)
    try:
      with open_meta(folder) as model:
        found = read_all(model)
    except CheckpointError as error:
      n_refused += 1
      assert '\n' not in str(error), case
    else:
      assert found.keys() == sound.keys() and all(found[name].tobytes() == sound[name].tobytes() for name in sound), case
  assert 100 < n_refused < 200


def test_nothing_stays_open_after_a_refusal(tmp_path, monkeypatch):
  from chameleon_jax.interop.meta import reader as meta

  tiny = Tiny(ranks=2)
  folder = reference.save_model(tmp_path / 'm', edit(reference.make_ranks(tiny), 'output.weight', lambda x: None), tiny)
  closed = []
  monkeypatch.setattr(meta.CheckedPth, 'close', lambda self: closed.append(self.path.name))
  refused('has no tensor output.weight', folder)
  assert sorted(closed) == ['consolidated.00.pth', 'consolidated.01.pth']
