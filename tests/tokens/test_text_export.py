"""Our sentencepiece tables as tokenizer files: the same tokens, read by this package, by `tokenizers` and by transformers."""

import io
import json
import random

import pytest
import sentencepiece
import tokenizers

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.tokens.text import SPACE_SIGN, SentencePieceText, train_text_tokenizer
from chameleon_jax.tokens.text_export import export_json
from chameleon_jax.tokens.text_json import JsonText
from chameleon_jax.tokens.vocabulary import Vocabulary
from tests.tokens import released_tokenizer as released
from tests.tokens.conftest import HOSTILE, random_text

FORMS = ('meta', 'huggingface')
FRAGMENTS = (
  *(' ', '  ', '   ', '\n', '\t', '\u2581', '<', '<s>', '>', '.', ': ', '12', '\x00'),
  *('a', 'b', 'skin', ' tone', 'light', 'ing', 'é'),
)


@pytest.fixture(scope='module')
def files(tokenizer, vocabulary):
  return {form: export_json(tokenizer, vocabulary.config, form=form) for form in FORMS}


def texts():
  rng = random.Random(0)
  yield from HOSTILE
  for _ in range(500):
    yield random_text(rng)
    yield ''.join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(50)))


@pytest.mark.parametrize('form', FORMS)
def test_our_reader_gives_the_same_pieces(tokenizer, files, form):
  text = JsonText(files[form])
  for sample in texts():
    pieces = text.encode(sample)
    assert pieces == tokenizer.encode(sample), ascii(sample)
    assert text.decode(pieces) == sample


def test_vocabulary_comes_back(tokenizer, vocabulary, files):
  text = JsonText(files['meta'])
  assert text.vocabulary_config == vocabulary.config
  assert text.names == vocabulary.names
  room = range(vocabulary.text_start + tokenizer.n_pieces, vocabulary.size)
  assert len(room) == 10
  assert text.barred_text == tuple(room), 'tokens that no piece fills'
  assert text.decode([room[0] - vocabulary.text_start]) == '\ufffd'
  full = VocabularyConfig(size=vocabulary.size - 10, n_codes=12, n_sentinels=2, n_reserved=3)
  assert JsonText(export_json(tokenizer, full, form='meta')).vocabulary == Vocabulary(full)


def test_forms_differ_as_the_port_has_it(vocabulary, files):
  meta, huggingface = json.loads(files['meta']), json.loads(files['huggingface'])
  name, token = '<reserved00017>', vocabulary.end_turn + 1
  assert (meta['model']['vocab'][name], huggingface['model']['vocab']['<image>']) == (token, token)
  assert name not in huggingface['model']['vocab']
  assert [entry['content'] for entry in huggingface['added_tokens'] if entry['id'] == token] == ['<image>']
  assert meta['post_processor'] is None
  assert len(meta['model']['vocab']) == vocabulary.size
  assert JsonText(files['huggingface']) == JsonText(files['meta'])
  assert JsonText(files['huggingface']).to_json() == files['meta']


@pytest.mark.parametrize('form', FORMS)
def test_the_library_gives_the_same_tokens(tokenizer, vocabulary, files, form):
  library = tokenizers.Tokenizer.from_str(files[form].decode())
  names = set(vocabulary.names) | {'<image>'}
  for sample in texts():
    if any(name in sample for name in names):
      continue  # the library takes names in raw text for tokens: below
    expected = [vocabulary.text_start + piece for piece in tokenizer.encode(sample)]
    assert library.encode(sample, add_special_tokens=False).ids == expected, ascii(sample)
    assert library.decode(expected, skip_special_tokens=False) == sample
  begin = [vocabulary.begin_sequence] if form == 'huggingface' else []
  spelled = library.encode('<racm3:break>IMGIMGAZIMGIMGBBZ<eoss>').ids
  assert spelled == [*begin, vocabulary.begin_image, 4, 15, vocabulary.end_image]


def test_transformers_reads_it(tokenizer, vocabulary, files, tmp_path):
  transformers = pytest.importorskip('transformers')
  path = tmp_path / 'tokenizer.json'
  path.write_bytes(files['huggingface'])
  fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token='<s>', eos_token='</s>', pad_token='<pad>')
  assert len(fast) == vocabulary.size
  assert fast.convert_tokens_to_ids('<image>') == vocabulary.end_turn + 1
  for sample in ('light skin tone', ' two  spaces \u2581 é\n', 'unseen \U0001f600'):
    expected = [vocabulary.begin_sequence, *(vocabulary.text_start + piece for piece in tokenizer.encode(sample))]
    assert fast(sample)['input_ids'] == expected
    assert fast.decode(expected[1:]) == sample
  assert fast('<image>')['input_ids'] == [0, vocabulary.end_turn + 1]


def test_repetitive_pieces_are_cut_alike():
  """Many ways to cut one piece: the order of merges must not matter more than the score."""
  rng = random.Random(3)
  sentences = [''.join(rng.choice(('ab', 'aab ', 'a', 'abc', ' ')) for _ in range(40)) for _ in range(200)]
  tokenizer = train_text_tokenizer(sentences, n_pieces=400, character_coverage=1.0, seed=0)
  text = JsonText(export_json(tokenizer, VocabularyConfig(size=500, n_codes=12, n_sentinels=0, n_reserved=2), form='meta'))
  for _ in range(500):
    sample = ''.join(rng.choice('ab c') for _ in range(rng.randrange(60)))
    assert text.encode(sample) == tokenizer.encode(sample), sample


def test_space_sign_of_other_files(tokenizer, vocabulary):
  """A file that writes spaces as U+2581, as many do: the character itself still comes back."""
  content = json.loads(export_json(tokenizer, vocabulary.config, form='meta'))
  sign = '\u2581'
  model = content['model']
  model['vocab'] = {name.replace(' ', sign): token for name, token in model['vocab'].items()}
  model['merges'] = [[part.replace(' ', sign) for part in merge] for merge in model['merges']]
  content['normalizer'] = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': sign}
  replace = {'type': 'Replace', 'pattern': {'String': sign}, 'content': ' '}
  content['decoder'] = {'type': 'Sequence', 'decoders': [replace, {'type': 'ByteFallback'}, {'type': 'Fuse'}]}
  text = JsonText(released.dump(content))
  for sample in texts():
    assert text.encode(sample) == tokenizer.encode(sample), ascii(sample)
    assert text.decode(text.encode(sample)) == sample
  content['normalizer'] = {'type': 'Sequence', 'normalizers': [{'type': 'Prepend', 'prepend': sign}, content['normalizer']]}
  with pytest.raises(CheckpointError, match='changes text'):
    JsonText(released.dump(content))


@pytest.mark.parametrize('form', FORMS)
def test_released_files_only_change_their_form(form):
  text = JsonText(released.data())
  data = export_json(text, text.vocabulary_config, form=form)
  assert JsonText(data) == text
  if form == 'meta':
    assert data == released.data()
  else:
    assert json.loads(data)['post_processor'] == released.huggingface(released.content())['post_processor']
    assert '<reserved00017>' not in data.decode()


@pytest.mark.parametrize(
  ('piece', 'n_pieces', 'message'),
  [
    ('<s>', 6, "text piece '<s>' has the name of a special"),
    ('IMG', 9, "text piece 'IMGIMG.*' has the name of a special"),
  ],
)
def test_pieces_named_like_tokens_are_refused(piece, n_pieces, message):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([piece * 20] * 9),
    model_writer=model,
    model_type='bpe',
    vocab_size=257 + n_pieces,
    byte_fallback=True,
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    split_by_unicode_script=False,  # so that a piece may hold letters and signs, unlike those we train
    unk_id=0,
    bos_id=-1,
    eos_id=-1,
    pad_id=-1,
    required_chars=SPACE_SIGN,
    minloglevel=2,
  )
  tokenizer = SentencePieceText(model.getvalue())
  with pytest.raises(CheckpointError, match=message):
    export_json(tokenizer, VocabularyConfig(size=500, n_codes=12, n_sentinels=0, n_reserved=2), form='meta')


def test_parts_that_do_not_fit(tokenizer, vocabulary):
  small = VocabularyConfig(size=100, n_codes=12, n_sentinels=0, n_reserved=1)
  with pytest.raises(CheckpointError, match='340 pieces, the vocabulary room for 81'):
    export_json(tokenizer, small, form='meta')
  with pytest.raises(CheckpointError, match='the text tokenizer is of VocabularyConfig'):
    export_json(JsonText(released.data()), small, form='meta')
  one = VocabularyConfig(size=400, n_codes=12, n_sentinels=0, n_reserved=1)
  assert JsonText(export_json(tokenizer, one, form='meta')).vocabulary_config == one
  with pytest.raises(CheckpointError, match=r"no reserved token '<reserved00015>' follows the end of a turn \(token 18\)"):
    export_json(tokenizer, one, form='huggingface')


def test_other_tokenizers_cannot_be_written(vocabulary):
  class Letters:
    n_pieces = 1

    def encode(self, text):
      return []

    def decode(self, pieces):
      return ''

    def save(self, path):
      raise NotImplementedError

  with pytest.raises(CheckpointError, match='of type Letters cannot be written'):
    export_json(Letters(), vocabulary.config, form='meta')
