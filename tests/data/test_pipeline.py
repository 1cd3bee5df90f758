"""The input pipeline: mixture, stages, packing, hosts, and resuming at any step."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from chameleon_jax import presets
from chameleon_jax.config import DataConfig, MeshConfig, StageConfig
from chameleon_jax.data.pipeline import CachedText, dropped_documents, make_batches, stage_ends, to_devices, validation_batches, with_noise
from chameleon_jax.data.sources import source as registry
from chameleon_jax.errors import ConfigError, DataError
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.tokens.document import Codes, Document, Image, Text
from chameleon_jax.tokens.render import Rendered, render
from chameleon_jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(presets.tiny_vocabulary())
FIRST_TEXT = VOCABULARY.text_start


class Letters:
  """A text tokenizer with one piece per character, 'a' = 0."""

  n_pieces = 26

  def __init__(self):
    self.calls = 0

  def encode(self, text):
    self.calls += 1
    return [ord(letter) - ord('a') for letter in text]

  def decode(self, pieces):
    return ''.join(chr(ord('a') + piece) for piece in pieces)

  def save(self, path):
    raise AssertionError('nothing here saves a tokenizer')


class Source:
  """Documents of one letter repeated, with the index told by the length; optionally with a picture, a random one."""

  def __init__(self, letter, *, n=20, picture=None, repeats=lambda index: 1 + index):
    self.letter, self.n, self.picture, self.repeats = letter, n, picture, repeats

  def __len__(self):
    return self.n

  def document(self, index, rng):
    text = Text(self.letter * self.repeats(index))
    if self.picture is None:
      return Document.plain(text)
    if self.picture == 'codes':
      return Document.plain(text, Codes(rng.integers(0, 32, 16).astype(np.int32)))
    return Document.plain(text, Image(np.zeros((8, 8, 3), np.uint8)))


@pytest.fixture(autouse=True)
def sources(monkeypatch):
  made = {
      'letters_a': lambda split, codes: Source('a'),
      'letters_b': lambda split, codes: Source('b', n=7 if split == 'train' else 3),
      'letters_train_only': lambda split, codes: Source('c', n=5 if split == 'train' else 0),
      'letters_pictures': lambda split, codes: Source('d', picture='codes'),
      'letters_pixels': lambda split, codes: Source('e', picture='pixels'),
      'letters_long': lambda split, codes: Source('f', picture='codes', repeats=lambda index: 30 if index % 2 else 3),
      'letters_table': lambda split, codes: Source(chr(ord('a') + int(codes[0, 0]))),
  }
  for name, factory in made.items():
    monkeypatch.setitem(registry.SOURCES, name, factory)


def _config(*stages, **changes):
  stages = stages or ((1.0, (('letters_a', 1.0),)),)
  values = {'seq_len': 32, 'batch_size': 4, 'packing_bins': 4, 'prefetch': 0, **changes}
  return DataConfig(stages=tuple(StageConfig(fraction, weights) for fraction, weights in stages), **values)


def _batches(config, *, n_steps=10, tokenizer=None, **options):
  return make_batches(config, VOCABULARY, tokenizer or Letters(), n_steps=n_steps, **options)


def _documents(batches):
  """(letter, length, positions of the codes) of every document in the batches."""
  found = []
  for batch in batches:
    for tokens, segments in zip(batch['tokens'], batch['segment_ids']):
      for segment in range(1, segments.max() + 1):
        inside = tokens[segments == segment]
        text = inside[VOCABULARY.is_text[inside]]
        found.append((chr(ord('a') + text[0] - FIRST_TEXT), len(text), tuple(inside[VOCABULARY.is_image[inside]])))
  return found


def _equal(one, other):
  return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_batches_have_the_form_the_step_takes():
  batches = list(_batches(_config()))
  assert len(batches) == 10
  for batch in batches:
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        'tokens': ((4, 32), 'int32'),
        'targets': ((4, 32), 'int32'),
        'loss_weights': ((4, 32), 'float32'),
        'segment_ids': ((4, 32), 'int32'),
        'positions': ((4, 32), 'int32'),
    }
    first = batch['segment_ids'] == 1
    assert np.all(batch['tokens'][:, 0] == VOCABULARY.begin_sequence)
    for row in range(4):
      document = batch['tokens'][row][first[row]]
      assert document[-1] == VOCABULARY.end_sequence
      np.testing.assert_array_equal(batch['targets'][row][first[row]][:-1], document[1:])


def test_an_epoch_holds_every_document_once_in_another_order():
  found = [length for _, length, _ in _documents(_batches(_config(), n_steps=20))]
  assert sorted(found[:20]) == list(range(1, 21))
  assert len(found) >= 60
  # First fit moves a document by a few places at most, so an epoch is told from the next by counting.
  assert found[:20] != list(range(1, 21))
  assert found[:20] != found[20:40]


def test_the_seed_decides():
  same, again, other = (list(_batches(_config(shuffle_seed=seed))) for seed in (3, 3, 4))
  assert all(map(_equal, same, again))
  assert not all(map(_equal, same, other))


def test_random_choices_differ_between_epochs():
  pictures = [codes for _, _, codes in _documents(_batches(_config((1.0, (('letters_pictures', 1.0),)), seq_len=64), n_steps=20))]
  assert len(pictures) > 60
  assert len(set(pictures)) == len(pictures)


def test_weights_count_documents():
  config = _config((1.0, (('letters_a', 3.0), ('letters_b', 1.0))))
  letters = [letter for letter, _, _ in _documents(_batches(config, n_steps=60))]
  assert letters.count('b') / len(letters) == pytest.approx(0.25, abs=0.02)


def test_stages_change_at_their_step():
  config = _config((0.5, (('letters_a', 1.0),)), (0.3, (('letters_b', 1.0),)), (0.2, (('letters_a', 1.0), ('letters_b', 1.0))))
  seen = [{letter for letter, _, _ in _documents([batch])} for batch in _batches(config, n_steps=20)]
  assert seen[:10] == [{'a'}] * 10
  assert seen[10:16] == [{'b'}] * 6
  assert seen[16:] == [{'a', 'b'}] * 4


@pytest.mark.parametrize(
    ('fractions', 'n_steps', 'ends'), [((0.8, 0.2), 1000, [800, 1000]), ((1.0,), 7, [7]), ((1 / 3, 1 / 3, 1 / 3), 10, [3, 7, 10])]
)
def test_stage_ends(fractions, n_steps, ends):
  assert stage_ends([StageConfig(fraction, (('x', 1.0),)) for fraction in fractions], n_steps) == ends


@pytest.mark.parametrize('prefetch', [0, 2])
def test_the_state_resumes_at_every_step(prefetch):
  stages = ((0.5, (('letters_a', 1.0), ('letters_pictures', 1.0))), (0.5, (('letters_b', 1.0), ('letters_pictures', 3.0))))
  config = _config(*stages, seq_len=40, prefetch=prefetch)
  iterator = _batches(config, n_steps=8)
  states, whole = [], []
  for batch in iterator:
    whole.append(batch)
    states.append(json.loads(json.dumps(iterator.get_state())))
  assert len(whole) == 8
  for done, state in enumerate(states[:-1], start=1):
    resumed = _batches(config, n_steps=8)
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == 8 - done
    assert all(map(_equal, rest, whole[done:]))


def test_hosts_share_the_documents():
  config = _config(batch_size=8)
  hosts = [list(_batches(config, n_steps=2, process=(index, 2))) for index in range(2)]
  assert all(batch['tokens'].shape == (4, 32) for host in hosts for batch in host)
  lengths = [[length for _, length, _ in _documents(host)] for host in hosts]
  assert not set(lengths[0][:8]) & set(lengths[1][:8])  # the first epoch of 20 documents, half of it each


def test_hosts_see_the_same_mixture():
  """Every second element of an alternating mixture would leave each host with one source."""
  config = _config((1.0, (('letters_a', 1.0), ('letters_b', 1.0))), batch_size=8)
  for index in range(2):
    letters = [letter for letter, _, _ in _documents(_batches(config, n_steps=10, process=(index, 2)))]
    assert 0.4 < letters.count('a') / len(letters) < 0.6


def test_long_documents_are_dropped_and_counted():
  iterator = _batches(_config((1.0, (('letters_long', 1.0),))), n_steps=10)
  found = _documents(iterator)
  assert {length for _, length, _ in found} == {3}
  assert dropped_documents(iterator) == pytest.approx(len(found), abs=12)


def test_pixels_are_encoded_on_the_way():
  calls = []

  def encode(pictures):
    calls.append(len(pictures))
    return np.full((len(pictures), 16), 5, np.int32)

  config = _config((1.0, (('letters_pixels', 1.0),)))
  found = _documents(_batches(config, encode_images=encode, n_steps=2))
  assert {codes for _, _, codes in found} == {(4 + 5,) * 16}
  assert calls
  with pytest.raises(DataError, match='no image tokenizer'):
    next(_batches(config))


def test_the_table_of_codes_reaches_the_source():
  found = _documents(_batches(_config((1.0, (('letters_table', 1.0),))), n_steps=1, codes=np.array([[7]], np.int32)))
  assert {letter for letter, _, _ in found} == {'h'}


def test_validation_batches_are_the_same_each_time():
  config = _config((0.5, (('letters_a', 1.0),)), (0.5, (('letters_b', 1.0), ('letters_train_only', 2.0))))
  first, second = (
      {name: list(batches) for name, batches in validation_batches(config, VOCABULARY, Letters(), n_steps=2).items()} for _ in range(2)
  )
  assert first.keys() == {'letters_b'}
  assert len(first['letters_b']) == 2
  assert all(map(_equal, first['letters_b'], second['letters_b']))
  assert {length for _, length, _ in _documents(first['letters_b'])} == {1, 2, 3}


def test_errors():
  with pytest.raises(ConfigError, match=r'data.stages is empty'):
    _batches(DataConfig(seq_len=32, batch_size=4))
  with pytest.raises(ConfigError, match='does not split over 3 hosts'):
    _batches(_config(), process=(0, 3))
  with pytest.raises(DataError, match="'letters_train_only' has no documents in split 'validation'"):
    _batches(_config((1.0, (('letters_train_only', 1.0),))), split='validation')
  with pytest.raises(DataError, match="unknown source 'letters_x'"):
    _batches(_config((1.0, (('letters_x', 1.0),))))


def test_short_texts_are_encoded_once():
  tokenizer = Letters()
  cached = CachedText(tokenizer, max_length=5)
  assert [cached.encode('abc') for _ in range(3)] == [[0, 1, 2]] * 3
  assert tokenizer.calls == 1
  cached.encode('abc').append(9)
  assert cached.encode('abc') == [0, 1, 2]
  for _ in range(2):
    cached.encode('abcabc')
  assert tokenizer.calls == 3
  assert cached.decode([1, 0]) == 'ba'
  assert cached.n_pieces == 26


def test_to_devices_splits_the_rows():
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  batch = to_devices({'tokens': np.arange(32).reshape(8, 4)}, mesh)['tokens']
  np.testing.assert_array_equal(batch, np.arange(32).reshape(8, 4))
  assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 4)}
  assert len(jax.devices()) == 8


def test_noise_changes_image_tokens_of_the_input_alone():
  picture = VOCABULARY.token_of_code[np.arange(4000) % 32]
  tokens = np.r_[0, FIRST_TEXT, VOCABULARY.begin_image, picture, VOCABULARY.end_image].astype(np.int32)
  plain = Rendered(tokens, np.roll(tokens, -1), np.ones(len(tokens), np.float32))
  shares = []
  for seed in range(40):
    noisy = with_noise(plain, VOCABULARY, np.random.default_rng(seed), answers=0.5, prompts=0.0)
    np.testing.assert_array_equal(noisy.targets, plain.targets)
    np.testing.assert_array_equal(noisy.loss_weights, plain.loss_weights)
    changed = noisy.tokens != plain.tokens
    assert not changed[:3].any() and not changed[-1] and VOCABULARY.is_image[noisy.tokens[3:-1]].all()
    shares.append(changed[3:-1].mean() * 32 / 31)  # one random code in 32 is the one it replaces
  assert 0 <= min(shares) < 0.1 and 0.4 < max(shares) < 0.54
  assert np.mean(shares) == pytest.approx(0.25, abs=0.08)  # uniform on [0, 0.5]


def test_pictures_of_a_prompt_have_their_own_share_of_noise():
  picture = VOCABULARY.token_of_code[np.arange(2000) % 32]
  turn = np.r_[VOCABULARY.begin_image, picture, VOCABULARY.end_image]
  tokens = np.r_[0, turn, turn].astype(np.int32)
  is_answer = np.arange(len(tokens)) > len(turn)
  rendered = Rendered(tokens, np.roll(tokens, -1), np.roll(is_answer, -1).astype(np.float32))
  shares = []
  for seed in range(40):
    changed = with_noise(rendered, VOCABULARY, np.random.default_rng(seed), answers=0.8, prompts=0.2).tokens != tokens
    assert not changed[~VOCABULARY.is_image[tokens]].any()
    shares.append([changed[~is_answer].sum() / 2000, changed[is_answer].sum() / 2000])
  prompts, answers = np.array(shares).T * 32 / 31
  assert np.mean(prompts) == pytest.approx(0.1, abs=0.03) and 0.15 < prompts.max() < 0.24
  assert np.mean(answers) == pytest.approx(0.4, abs=0.12) and 0.6 < answers.max() < 0.84


def test_noise_is_for_training_and_repeats():
  stages = (1.0, (('letters_pictures', 1.0),))
  plain, noisy, again = (list(_batches(_config(stages, image_noise=noise))) for noise in (0.0, 0.6, 0.6))
  assert any(np.any(a['tokens'] != b['tokens']) for a, b in zip(plain, noisy))
  for a, b, c in zip(plain, noisy, again, strict=True):
    np.testing.assert_array_equal(a['targets'], b['targets'])
    np.testing.assert_array_equal(b['tokens'], c['tokens'])
  for a, b in zip(*(_batches(_config(stages, image_noise=noise), split='validation') for noise in (0.0, 0.6)), strict=True):
    np.testing.assert_array_equal(a['tokens'], b['tokens'])


def test_a_source_that_changed_is_refused_on_resuming(monkeypatch):
  config = _config((1.0, (('letters_a', 1.0),)), prefetch=2)
  iterator = _batches(config)
  next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  monkeypatch.setitem(registry.SOURCES, 'letters_a', lambda split, codes: Source('a', n=21))
  with pytest.raises(DataError, match="source 'letters_a' changed since the checkpoint was saved: 20 documents then, 21 now"):
    resumed = _batches(config)
    resumed.set_state(state)
    next(resumed)
  accepting = _batches(dataclasses.replace(config, changed='accept'))
  accepting.set_state(state)
  assert next(accepting)['tokens'].shape == (4, 32)
  del state['sources']  # checkpoints of before this was saved
  older = _batches(config)
  older.set_state(state)
  next(older)


class Ready(Source):
  """A source whose documents were tokenized before."""

  has_pieces = False

  def fitted(self, vocabulary, text_tokenizer, image_fingerprint):
    self.seen = (vocabulary, text_tokenizer, image_fingerprint)
    self.has_pieces = True
    return self

  def rendered(self, index):
    return render(self.document(index, None), self.seen[0], Letters())

  def document(self, index, rng):
    assert not self.has_pieces or rng is None, 'tokenized documents are not rendered again'
    return super().document(index, rng)

  def fingerprint(self):
    return 'letters'


def test_tokenized_documents_are_checked_once_and_not_rendered_again(monkeypatch):
  source = Ready('g')
  monkeypatch.setitem(registry.SOURCES, 'letters_ready', lambda split, codes: source)
  monkeypatch.setitem(registry.SOURCES, 'letters_g', lambda split, codes: Source('g'))

  def encode(pictures):
    raise AssertionError('nothing to encode')

  encode.fingerprint = 'abc'
  ready = list(_batches(_config((1.0, (('letters_ready', 1.0),))), encode_images=encode))
  assert source.seen[0] is VOCABULARY
  assert source.seen[2] == 'abc'
  assert {letter for letter, _, _ in _documents(ready)} == {'g'}
  lengths = [sorted(length for _, length, _ in _documents(batches)) for batches in (ready, _batches(_config((1.0, (('letters_g', 1.0),)))))]
  assert set(lengths[0]) == set(lengths[1]) == set(range(1, 21))
