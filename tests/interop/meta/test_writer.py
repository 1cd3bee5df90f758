"""Meta -> ours -> Meta gives every tensor back bit for bit, no key lost or added; what Meta's form cannot hold is refused before."""

import dataclasses
import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop import mapping
from chameleon_jax.interop.lazy import LazyModel, Origin, TensorSource, TensorSpec
from chameleon_jax.interop.meta.params import release_name
from chameleon_jax.interop.meta.reader import open_meta, verify_checklist, write_meta
from chameleon_jax.interop.native.lazy import open_native, write_native
from chameleon_jax.tokens.text import train_text_tokenizer
from chameleon_jax.tokens.text_export import export_json
from tests.interop import meta_reference as reference
from tests.interop.meta_reference import BFLOAT16, Tiny

VOCABULARY = VocabularyConfig(size=34 + 4 + 2 + 300, n_codes=32, n_sentinels=0, n_reserved=2)


@pytest.fixture(scope='module')
def tokenizer():
  return train_text_tokenizer(['draw a red apple', 'a green pear'] * 20, n_pieces=VOCABULARY.n_text, character_coverage=1.0, seed=0)


def through(model, tmp_path, way):
  """The model itself, or as our own folder gives it back."""
  if way == 'direct':
    return model
  (tmp_path / 'ours').mkdir()
  write_native(tmp_path / 'ours', model)
  return open_native(tmp_path / 'ours')


def write(folder, model, **kwargs):
  folder.mkdir()
  return write_meta(folder, model, **kwargs)


def refused(fragment, tmp_path, model, **kwargs):
  """Nothing is written, and one line says why."""
  folder = tmp_path / 'refused'
  folder.mkdir(exist_ok=True)
  with pytest.raises(CheckpointError, match=fragment) as caught:
    write_meta(folder, model, **kwargs)
  assert '\n' not in str(caught.value) and list(folder.iterdir()) == []
  return str(caught.value)


def source_of(values):
  return TensorSource({name: TensorSpec(array.shape, array.dtype) for name, array in values.items()}, values.__getitem__)


def model_of(config, *, groups=1, dtype='f4', seed=0, **parts):
  """A model of ours with random weights, its q/k norms the same inside each of `groups` groups of heads."""
  rng = np.random.default_rng(seed)
  values = {}
  for name, shape in mapping.transformer_specs(config).items():
    if '_norm/' in name and len(shape) == 2:
      values[name] = np.repeat(rng.normal(size=(groups, shape[1])), shape[0] // groups, axis=0).astype(dtype)
    else:
      values[name] = rng.normal(size=shape).astype(dtype)
  return LazyModel('somewhere', 'orbax', transformer_config=config, transformer=source_of(values), **parts)


# ---------------------------------------------------------------------------------------- and back again


@pytest.mark.parametrize('way', ['direct', 'ours'])
@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('ranks, dtype, rope', [(1, 'f4', 'none'), (1, BFLOAT16, 'tensor'), (2, 'f2', 'tensor'), (4, BFLOAT16, 'tensor')])
def test_there_and_back(tmp_path, ranks, dtype, rope, fused, way):
  tiny = Tiny(ranks=ranks, swin=ranks == 4)
  tensors = reference.make_ranks(tiny, dtype=dtype, rope=rope)
  tensors = [(reference.fuse(rank) if fused else rank) | {'more': np.full(2, i, 'i8'), 'step': 3} for i, rank in enumerate(tensors)]
  folder = reference.save_model(tmp_path / '7b', tensors, tiny)
  with open_meta(folder) as opened, through(opened, tmp_path, way) as model:
    write(tmp_path / 'back', model)
  reference.same_folders(folder, tmp_path / 'back' / 'models' / 'model')
  assert verify_checklist(tmp_path / 'back' / 'models' / 'model') == []
  lines = (tmp_path / 'back' / 'models' / 'model' / 'checklist.chk').read_text().splitlines()
  assert len(lines) == ranks + 2 and not (tmp_path / 'back' / 'tokenizer').exists()


@pytest.mark.parametrize('way', ['direct', 'ours'])
@pytest.mark.parametrize('nested', [False, True])
def test_the_tokenizers_there_and_back(tmp_path, nested, way, tokenizer):
  state = reference.make_vqgan() | {'loss.logvar': np.zeros((), 'f4')}
  tree = state if not nested else {'epoch': 3, 'state_dict': state, 'opt': {0: [np.ones(2, 'f4'), ('a', None)]}, 'lr': 1e-3}
  text = export_json(tokenizer, VOCABULARY, form='meta')
  folder = reference.save_tokenizer(tmp_path / 'tokenizer', tree, text=text)
  with open_meta(folder) as opened, through(opened, tmp_path, way) as model:
    write(tmp_path / 'back', model)
  reference.same_folders(folder, tmp_path / 'back' / 'tokenizer')
  assert verify_checklist(tmp_path / 'back' / 'tokenizer') == [] and not (tmp_path / 'back' / 'models').exists()
  with open_meta(tmp_path / 'back') as model:
    assert model.transformer is None and model.vocabulary == VOCABULARY


def test_torch_reads_what_is_written(tmp_path):
  torch = pytest.importorskip('torch')
  tiny = Tiny(ranks=2)
  tensors = reference.make_ranks(tiny, dtype=BFLOAT16)
  with open_meta(reference.save_model(tmp_path / 'm', tensors, tiny)) as model:
    write(tmp_path / 'back', model)
  for rank, expected in enumerate(tensors):
    state = torch.load(tmp_path / 'back' / 'models' / 'model' / f'consolidated.{rank:02d}.pth', weights_only=True, mmap=True)
    assert list(state) == list(expected)
    for name, array in expected.items():
      assert state[name].view(torch.uint8).numpy().tobytes() == array.tobytes(), name


def test_one_shard_under_a_number(tmp_path):
  tiny = Tiny()
  folder = reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny)
  (folder / 'consolidated.pth').rename(folder / 'consolidated.00.pth')
  with open_meta(folder) as model:
    write(tmp_path / 'back', model)
  reference.same_folders(folder, tmp_path / 'back' / 'models' / 'model')


# ------------------------------------------------------------------------------------- from other formats


@pytest.mark.parametrize('groups, n', [(1, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize('norm_position', ['pre', 'post'])
def test_the_fewest_shards_that_hold_the_norms(tmp_path, groups, n, norm_position, tokenizer):
  config = presets.tiny_transformer(vocab_size=340, n_heads=8, n_kv_heads=4, d_head=4, norm_position=norm_position, scan_layers=False)
  model = model_of(config, groups=groups, vocabulary=VOCABULARY, text_tokenizer=tokenizer)
  assert write(tmp_path / 'new', model) == ()
  folder = tmp_path / 'new' / 'models' / 'model'
  names = {'consolidated.pth'} if n == 1 else {f'consolidated.{rank:02d}.pth' for rank in range(n)}
  assert {path.name for path in folder.glob('*.pth')} == names
  with open_meta(tmp_path / 'new') as opened:
    for name, spec in model.transformer.specs.items():
      np.testing.assert_array_equal(opened.transformer.read(name), model.transformer.read(name), err_msg=name)
      assert opened.transformer.specs[name] == spec
    assert opened.transformer_config == config and opened.notes == ()  # the inner width by Meta's formula, max_seq_len 128
    assert opened.vocabulary == VOCABULARY and opened.text_tokenizer.encode('a red pear') == tokenizer.encode('a red pear')
    assert list(opened.origin.extras.specs) == [f'{name.removesuffix(".pth")}/rope.freqs' for name in sorted(names)]
    np.testing.assert_allclose(opened.origin.extras.read(list(opened.origin.extras.specs)[-1]), [1, 0.01], rtol=1e-6)


@pytest.mark.parametrize('d_ff', [8, 85, 86, 96, 100, 256, 1000])
def test_any_inner_width_comes_out_of_metas_formula(tmp_path, d_ff):
  config = presets.tiny_transformer(d_ff=d_ff, scan_layers=False, max_seq_len=4096)
  write(tmp_path / 'new', model_of(config))
  values = json.loads((tmp_path / 'new' / 'models' / 'model' / 'params.json').read_text())
  assert set(values) == {'model'} and values['model']['qk_normalization'] is True
  with open_meta(tmp_path / 'new') as opened:
    assert opened.notes == () and opened.transformer_config == config


def test_more_shards_on_demand(tmp_path):
  tiny = Tiny(ranks=2)
  tensors = reference.make_ranks(tiny)
  with open_meta(reference.save_model(tmp_path / 'm', [reference.fuse(rank) for rank in tensors], tiny)) as model:
    write(tmp_path / 'four', model, n_shards=4)
    with open_meta(tmp_path / 'four') as four:
      assert four.origin.n_shards == 4
      for name in model.transformer.specs:
        np.testing.assert_array_equal(four.transformer.read(name), model.transformer.read(name), err_msg=name)
  files = [reference.load_pth(tmp_path / 'four' / 'models' / 'model' / f'consolidated.{rank:02d}.pth')[0] for rank in range(4)]
  whole = [np.concatenate([rank['layers.1.attention.wo.weight'] for rank in ranks], 1) for ranks in (files, tensors)]
  np.testing.assert_array_equal(*whole)
  for rank, file in enumerate(files):
    assert list(file) == list(reference.fuse(tensors[0]))  # still fused
    half = tensors[rank // 2]
    np.testing.assert_array_equal(file['layers.0.attention.k_normalization.bias'], half['layers.0.attention.k_normalization.bias'])
    rows = slice(rank % 2 * 8, rank % 2 * 8 + 8)
    np.testing.assert_array_equal(file['layers.1.attention.wqkv.weight'][:8], half['layers.1.attention.wq.weight'][rows])
    np.testing.assert_array_equal(file['rope.freqs'], [0, 1])
  values = json.loads((tmp_path / 'four' / 'models' / 'model' / 'consolidate_params.json').read_text())
  assert values == reference.consolidate_of(tiny) | {'model_parallel_size': 4}


@pytest.mark.parametrize('dtype, short', [('bfloat16', 'bf16'), ('float16', 'fp16')])
def test_another_type(tmp_path, dtype, short):
  tiny = Tiny(ranks=2)
  tree = {'state_dict': reference.make_vqgan()}
  folder = reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny)
  with open_meta(folder, tokenizer=reference.save_tokenizer(tmp_path / 't', tree)) as model:
    write(tmp_path / 'new', model, dtype=dtype)
    with open_meta(tmp_path / 'new') as new:
      for name in model.transformer.specs:
        read = new.transformer.read(name)
        assert read.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(read, model.transformer.read(name).astype(read.dtype))
      assert {str(spec.dtype) for spec in new.vqgan.specs.values()} == {'float32'}
  values = json.loads((tmp_path / 'new' / 'models' / 'model' / 'consolidate_params.json').read_text())
  assert values == reference.consolidate_of(tiny) | {'dtype': short}


def test_values_that_a_type_cannot_hold(tmp_path):
  model = model_of(presets.tiny_transformer(scan_layers=False))
  huge = {'lm_head': model.transformer.read('lm_head') * 1e30}
  model = dataclasses.replace(model, transformer=TensorSource(model.transformer.specs, lambda name: huge.get(name, model_of_values(name))))
  refused('tensor output.weight has values that float16 cannot hold', tmp_path, model, dtype='float16')
  refused("the type must be one of float32, bfloat16, float16, got 'int8'", tmp_path, model, dtype='int8')


def model_of_values(name):
  return model_of(presets.tiny_transformer(scan_layers=False)).transformer.read(name)


# --------------------------------------------------------------------------------------------- the limits


def test_norms_that_differ_inside_a_rank(tmp_path):
  config = presets.tiny_transformer(n_heads=8, n_kv_heads=4, d_head=4, scan_layers=False)
  model = model_of(config, groups=2)
  message = refused('with n_shards 1: layers.0.attention.k_normalization', tmp_path, model, n_shards=1)
  assert 'same for heads 0 and 2, which share one of 1 ranks, and differs; it can be held in 2, 4' in message
  untied = model_of(config, groups=4)
  values = {name: np.array(untied.transformer.read(name)) for name in untied.transformer.specs}
  values['layers_1/attention/q_norm/bias'][5, 2] = np.nextafter(values['layers_1/attention/q_norm/bias'][5, 2], np.float32(9))
  untied = dataclasses.replace(untied, transformer=source_of(values))
  message = refused('layers.1.attention.q_normalization.bias would have to be the same for heads 4 and 5', tmp_path, untied)
  assert 'no number of shards can hold it' in message


def test_a_fine_tuned_checkpoint_of_meta(tmp_path):
  """It goes back into as many shards as it had, or not at all."""
  tiny = Tiny(ranks=2)
  with open_meta(reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny)) as model:
    values = {name: np.array(model.transformer.read(name)) for name in model.transformer.specs}
    values['layers_0/attention/k_norm/weight'][1] += 1
    tuned = dataclasses.replace(model, transformer=source_of(values))
    message = refused('n_shards 2: layers.0.attention.k_normalization.weight .* heads 0 and 1', tmp_path, tuned)
    assert message.endswith('it can be held in 4')
    write(tmp_path / 'four', tuned, n_shards=4)
  with open_meta(tmp_path / 'four') as four:
    np.testing.assert_array_equal(four.transformer.read('layers_0/attention/k_norm/weight'), values['layers_0/attention/k_norm/weight'])


def test_numbers_of_shards_that_do_not_divide(tmp_path):
  model = model_of(presets.tiny_transformer(n_heads=8, n_kv_heads=4, d_head=4, scan_layers=False))
  refused('4 key/value heads do not split over 3 shards; it can be held in 1, 2, 4', tmp_path, model, n_shards=3)
  refused('4 key/value heads do not split over 8 shards', tmp_path, model, n_shards=8)
  refused('there must be at least one shard', tmp_path, model, n_shards=0)
  odd = model_of(presets.tiny_transformer(vocab_size=127, scan_layers=False))
  refused('127 vocabulary entries do not split over 2 shards; it can be held in 1', tmp_path, odd, n_shards=2)
  odd = model_of(presets.tiny_transformer(d_ff=63, scan_layers=False))
  refused('63 channels of the inner width do not split', tmp_path, odd, n_shards=2)


def test_extras_that_cannot_be_split(tmp_path):
  tiny = Tiny(ranks=2)
  ranks = [rank | {'more': np.zeros(2, 'f4')} for rank in reference.make_ranks(tiny)]
  with open_meta(reference.save_model(tmp_path / 'm', ranks, tiny)) as model:
    refused("n_shards 4: tensor 'more' is unknown here; keep n_shards 2", tmp_path, model, n_shards=4)
  ranks = reference.make_ranks(tiny)
  ranks[1]['rope.freqs'] = ranks[1]['rope.freqs'] + 1
  with open_meta(reference.save_model(tmp_path / 'n', ranks, tiny)) as model:
    refused("tensor 'rope.freqs' differs between the shards", tmp_path, model, n_shards=4)
    write(tmp_path / 'two', model)
  reference.same_folders(tmp_path / 'n', tmp_path / 'two' / 'models' / 'model')


def vqgan_of(config, *, decoder=True):
  specs = {name: TensorSpec(shape, np.dtype('f4')) for name, shape in mapping.vqgan_specs(config, decoder=decoder).items()}
  source = TensorSource(specs, lambda name: np.ones(specs[name].shape, 'f4'))
  return LazyModel('somewhere', 'orbax', vqgan_config=config, vqgan=source)


def test_image_tokenizers_that_meta_has_no_form_for(tmp_path):
  fitting = presets.tiny_vqgan(norm_groups=32, base_channels=32)
  write(tmp_path / 'new', vqgan_of(fitting))
  with open_meta(tmp_path / 'new') as model:
    assert model.vqgan_config == fitting and model.notes == ()
  refused('has norm_groups 8, and the format fixes them at 32', tmp_path, vqgan_of(presets.tiny_vqgan()))
  refused('folds patches .patch_size 2.', tmp_path, vqgan_of(dataclasses.replace(fitting, patch_size=2)))
  refused('the image tokenizer has no decoder/.*give a folder that has a whole vqgan.ckpt', tmp_path, vqgan_of(fitting, decoder=False))


@pytest.mark.parametrize(
    'change, fragment',
    [
        ({'qk_norm_eps': 1e-6}, 'qk_norm_eps is 1e-06, and the format fixes it at 1e-05'),
        ({'d_model': 64}, '4 heads of 8 channels are not d_model 64'),
    ],
)
def test_networks_that_meta_has_no_form_for(tmp_path, change, fragment):
  refused(fragment, tmp_path, model_of(presets.tiny_transformer(scan_layers=False, **change)))


def test_models_without_parts(tmp_path, tokenizer):
  refused('it holds no weights and no text tokenizer', tmp_path, LazyModel('somewhere', 'orbax'))
  refused('a text tokenizer but no vocabulary', tmp_path, LazyModel('somewhere', 'orbax', text_tokenizer=tokenizer))
  notes = write(tmp_path / 'new', model_of(presets.tiny_transformer(vocab_size=340, scan_layers=False), vocabulary=VOCABULARY))
  assert len(notes) == 1 and 'there is no text tokenizer' in notes[0]


def test_an_origin_that_does_not_fit(tmp_path):
  tiny = Tiny()
  with open_meta(reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny)) as model:
    for content, fragment in (
        ({'../x': {'dict': []}}, 'is not of 1 shards'),
        ({'consolidated': [1]}, 'is no tree of a checkpoint'),
        ({'consolidated': 3}, 'is no tree of a checkpoint'),
        ({'consolidated': {'dict': [['gone', {'tensor': 1}]]}}, "had a tensor 'gone', which is not there any more"),
    ):
      files = dict(model.origin.files) | {'consolidated.tree.json': json.dumps(content).encode()}
      refused(fragment, tmp_path, dataclasses.replace(model, origin=dataclasses.replace(model.origin, files=files)))
    write(tmp_path / 'bare', dataclasses.replace(model, origin=Origin(format='meta')))
    with open_meta(tmp_path / 'bare') as bare:
      assert set(bare.origin.extras.specs) == {'consolidated/rope.freqs'}


def test_a_source_that_breaks_leaves_nothing(tmp_path):
  model = model_of(presets.tiny_transformer(scan_layers=False))

  def read(name):
    if name == 'final_norm/weight':
      raise CheckpointError('damaged')
    return model.transformer.read(name)

  refused('damaged', tmp_path, dataclasses.replace(model, transformer=TensorSource(model.transformer.specs, read)))
  (tmp_path / 'refused' / 'models').mkdir()
  with pytest.raises(CheckpointError, match='models exists already; write into an empty folder'):
    write_meta(tmp_path / 'refused', model)


def test_names_of_the_released_sizes():
  seven, thirty = presets.chameleon_7b(), presets.chameleon_34b()
  assert release_name(dataclasses.replace(seven, dtype='float32', remat='none')) == '7b'
  assert release_name(thirty) == '30b'
  assert release_name(dataclasses.replace(seven, n_layers=31)) is None


def test_memory_holds_one_tensor_at_a_time(tmp_path):
  """Four shards merged and cut again, 13 MB in tensors of up to 4 MB: the peak stays under three of the largest."""
  tiny = Tiny(ranks=4, vocab=32768, layers=2, ffn=32768 // 4)
  params = reference.params_of(tiny) | {'model': reference.params_of(tiny)['model'] | {'multiple_of': tiny.ffn}}
  folder = reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny, params=params)
  with open_meta(folder) as model:
    total = sum(spec.nbytes for spec in model.transformer.specs.values())
    largest = max(spec.nbytes for spec in model.transformer.specs.values())
    (tmp_path / 'back').mkdir()
    tracemalloc.start()
    write_meta(tmp_path / 'back', model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  assert largest == 4 << 20 and total > 13 << 20
  assert peak < 3 * largest
