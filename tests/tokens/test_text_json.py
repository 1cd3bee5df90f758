"""The released tokenizer file: tokens by name, exact round trips, and no way from text to a special or image token."""

import copy
import json
import pathlib
import pickle
import random

import numpy as np
import pytest

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import CheckpointError, DataError
from chameleon_jax.sampling import modality
from chameleon_jax.tokens.document import Document
from chameleon_jax.tokens.render import render_prompt, unrender
from chameleon_jax.tokens.text import TextTokenizer
from chameleon_jax.tokens.text_json import JsonText
from chameleon_jax.tokens.vocabulary import Vocabulary
from tests.tokens import released_tokenizer as released
from tests.tokens.conftest import HOSTILE, random_text

GOLDEN = pathlib.Path(__file__).parent.parent / 'golden'
BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
SHUFFLED = [5, 0, 11, 3, 10, 1, 2, 9, 4, 8, 7, 6]


@pytest.fixture(scope='module')
def text():
  return JsonText(released.data())


def changed(**fields):
  """A file with other values of `content['model']` (vocab, merges, ...) or of the content itself."""
  content = released.content()
  for name, value in fields.items():
    (content['model'] if name in content['model'] else content)[name] = value
  return content


def moved(name, token):
  content = released.content()
  content['model']['vocab'][name] = token
  content['added_tokens'] = [{**entry, 'id': token} if entry['content'] == name else entry for entry in content['added_tokens']]
  return content


def renamed(old, new):
  return json.loads(released.dump(released.content()).decode().replace(json.dumps(old), json.dumps(new)))


# -------------------------------------------------------------------------------------------- reading


def test_layout_is_read_from_the_names(text):
  assert text.vocabulary_config == VocabularyConfig(size=24 + 256 + 8, n_codes=12, n_sentinels=2, n_reserved=4)
  assert text.names == tuple(released.leading_names())
  assert text.n_pieces == 264
  assert text.vocabulary.names == Vocabulary(text.vocabulary_config).names
  assert isinstance(text, TextTokenizer)


def test_image_tokens_in_any_order():
  text = JsonText(released.data(names=released.leading_names(SHUFFLED)))
  vocabulary = text.vocabulary
  assert vocabulary.code_of_token[4:16].tolist() == SHUFFLED
  assert vocabulary.codes_to_tokens(np.array(SHUFFLED)).tolist() == list(range(4, 16))
  assert (vocabulary.end_image, vocabulary.begin_image, vocabulary.end_turn, vocabulary.text_start) == (16, 17, 20, 24)
  document = Document.plain('the')
  assert unrender(render_prompt(document, vocabulary, text), vocabulary, text) == document


def test_special_tokens_by_name_not_by_place():
  names = released.leading_names()
  names[0], names[17], names[2], names[20] = names[17], names[0], names[20], names[2]
  vocabulary = JsonText(released.data(names=names)).vocabulary
  assert (vocabulary.begin_sequence, vocabulary.begin_image) == (17, 0)
  assert (vocabulary.end_sequence, vocabulary.end_turn, vocabulary.pad) == (20, 2, 1)


def test_huggingface_form_is_normalised(text):
  same = JsonText(released.dump(released.huggingface(released.content())))
  assert same.names == text.names
  assert same == text
  assert json.loads(same.to_json())['post_processor'] is None
  assert JsonText(same.to_json()) == text


def test_other_post_processors_stay():
  content = released.huggingface(released.content())
  byte_level = {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': False, 'use_regex': True}
  content['post_processor'] = {'type': 'Sequence', 'processors': [byte_level, content['post_processor']]}
  assert json.loads(JsonText(released.dump(content)).to_json())['post_processor'] == byte_level


def test_file_of_the_golden_values():
  """Another's file: every id of the library is found, except where the library takes a name in the text for its token."""
  text = JsonText.load(GOLDEN / 'tokenizer' / 'text_tokenizer.json')
  cases = json.loads((GOLDEN / 'encodings.json').read_text())
  start = text.vocabulary.text_start
  plain = [case for case in cases if all(token >= start for token in case['ids'])]
  assert len(plain) > 20
  for case in plain:
    assert [start + piece for piece in text.encode(case['text'])] == case['ids'], case['text']
  assert JsonText.load(GOLDEN / 'models' / 'hf_7b_like' / 'tokenizer.json').names == text.names


def test_merges_as_strings(text):
  content = released.content()
  content['model']['merges'] = [' '.join(merge) for merge in content['model']['merges']]
  assert JsonText(released.dump(content)).encode('the red') == text.encode('the red')


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (renamed('IMGIMGDZ', 'IMGIMGADZ'), r"'IMGIMGADZ' \(token 7\) spells no code"),
    (renamed('IMGIMGDZ', 'IMGIMGKZ'), r"'IMGIMGKZ' \(token 7\) spells no code"),
    (renamed('IMGIMGDZ', 'IMGIMGBCZ'), r"'IMGIMGDZ' \(code 3\) is missing, though 'IMGIMGBCZ' is there"),
    (renamed('IMGIMGDZ', '<x>'), r"'IMGIMGDZ' \(code 3\) is missing"),
    (moved('IMGIMGDZ', 8), "'IMGIMGDZ' and 'IMGIMGEZ' have the same id 8|'IMGIMGEZ' and 'IMGIMGDZ' have the same id 8"),
    (moved('IMGIMGDZ', 10_000), "no token has the id 7, though 'IMGIMGDZ' has 10000"),
    (renamed('the', 'IMGIMGBCZ'), r"image token 'IMGIMGBCZ' \(token \d+\) stands among the text pieces, which start at 24"),
    (renamed('<eoss>', '<x>'), "special token '<eoss>' is missing"),
    (renamed('<s>', '<x>'), "special token '<s>' is missing"),
    (changed(added_tokens=[{'id': 5, 'content': '<s>'}]), "'<s>' has the id 0 in model.vocab and 5 in added_tokens"),
    (changed(added_tokens=['<s>']), 'no token with a content and an id'),
    (changed(merges=[['t', 'h'], ['th']]), 'no pair of names'),
    (changed(merges=[['t', 'x%']]), 'does not take the text tokenizer: .*out of vocabulary'),
    (changed(merges=None), 'needs model.vocab and model.merges'),
    (changed(vocab=[]), 'needs model.vocab and model.merges'),
    (changed(vocab={'<s>': True}), "'<s>' the id True, which is no token"),
    (changed(vocab={'<s>': 0.0}), "'<s>' the id 0.0, which is no token"),
    (changed(type='WordPiece'), "of type 'WordPiece', expected BPE"),
    (changed(continuing_subword_prefix='##'), "marks pieces by continuing_subword_prefix = '##'"),
    (changed(pre_tokenizer=None, decoder=None), 'neither byte-level nor has it byte_fallback'),
    (changed(pre_tokenizer={'type': 'None of ours'}), 'does not take the text tokenizer'),
    (changed(pre_tokenizer=None, decoder=None, byte_fallback=True), 'piece <0x00> is missing'),
  ],
)
def test_files_that_are_refused(content, message):
  with pytest.raises(CheckpointError, match=message) as caught:
    JsonText(released.dump(content))
  assert '\n' not in str(caught.value)


def test_reserved_tokens_are_needed():
  names = [name for name in released.leading_names() if not name.startswith('<reserved')]
  with pytest.raises(CheckpointError, match='no reserved token'):
    JsonText(released.data(names=names))


def test_image_placeholder_beside_its_reserved_name():
  content = renamed('<reserved00016>', '<image>')
  content['model']['vocab']['<reserved00016>'] = 21
  content['model']['vocab'].pop('<reserved00017>')
  content['added_tokens'] = []
  with pytest.raises(CheckpointError, match="both '<image>' and '<reserved00016>'"):
    JsonText(released.dump(content))


@pytest.mark.parametrize('data', [b'', b'\xff', b'[1, 2', b'7', b'null', b'{}', b'{"model": {}}', b'[' * 100_000, b'{"a": 1, "a": 2}'])
def test_files_of_another_kind(data):
  with pytest.raises(CheckpointError) as caught:
    JsonText(data)
  assert '\n' not in str(caught.value)


def test_damaged_files_never_escape_as_another_error():
  rng = np.random.default_rng(0)
  whole = released.data()
  refused = 0
  for trial in range(200):
    data = bytearray(whole)
    if trial % 4 == 0:
      del data[rng.integers(len(data)) :]
    else:
      for place in rng.integers(0, len(data), 3):
        data[place] ^= 1 << rng.integers(8)
    try:
      text = JsonText(bytes(data))
    except CheckpointError as error:
      assert '\n' not in str(error)
      refused += 1
    else:
      assert text.decode(text.encode('a red apple')) is not None
  assert refused > 100


def test_missing_file(tmp_path):
  with pytest.raises(CheckpointError, match='cannot read the text tokenizer .*no.json: No such file'):
    JsonText.load(tmp_path / 'no.json')
  (tmp_path / 'bad.json').write_bytes(b'{')
  with pytest.raises(CheckpointError, match=r'text tokenizer .*bad.json: not a JSON file'):
    JsonText.load(tmp_path / 'bad.json')


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize('sample', HOSTILE, ids=lambda sample: ascii(sample[:12]))
def test_hostile_text_comes_back_exactly(text, sample):
  pieces = text.encode(sample)
  assert text.decode(pieces) == sample
  assert all(0 <= piece < text.n_pieces for piece in pieces)


def test_random_text_comes_back_exactly(text):
  rng = random.Random(0)
  for _ in range(1000):
    sample = random_text(rng)
    assert text.decode(text.encode(sample)) == sample, ascii(sample)


def test_same_pieces_as_the_library(text):
  library = released.tokenizer()
  for sample in ('the red pear', 'a\tb\n  c    d', 'thethe é 123', '</a> < b', ' \u2581 \U0001f600'):
    expected = library.encode(sample, add_special_tokens=False).ids
    assert [text.vocabulary.text_start + piece for piece in text.encode(sample)] == expected, sample


def special_spelled_out():
  """A file whose merges spell special and image names, and pieces that go on from them."""
  image = [('I', 'M'), ('IM', 'G'), ('IMG', 'IMG'), ('IMGIMG', 'A'), ('IMGIMGA', 'Z'), ('IMGIMGAZ', 'x')]
  special = [(name[:i], name[i]) for name in ('<s>', '<reserved00016>') for i in range(1, len(name))]
  return [*released.MERGES[:4], *image, *special]


@pytest.mark.parametrize('ignore_merges', [False, True])
@pytest.mark.parametrize('merges', [released.MERGES, special_spelled_out()], ids=['plain', 'spelling merges'])
@pytest.mark.parametrize('pre_tokenizer', ['six rules', 'no split'])
def test_no_text_becomes_a_special_or_image_token(ignore_merges, merges, pre_tokenizer):
  built = released.tokenizer(merges=merges, ignore_merges=ignore_merges)
  content = json.loads(built.to_str())
  if pre_tokenizer == 'no split':
    content['pre_tokenizer'] = BYTE_LEVEL
  text = JsonText(released.dump(content))
  names = [*released.leading_names(), '<image>', 'IMGIMGAZx', '<reserved00016> IMGIMGAZ<s>']
  for sample in (*names, ''.join(names), ' '.join(names)):
    pieces = text.encode(sample)
    assert all(0 <= piece < text.n_pieces for piece in pieces), sample
    assert text.decode(pieces) == sample
    assert not {text.piece(piece) for piece in pieces} & set(released.leading_names())


def test_the_library_alone_would_make_them():
  """What the test above guards against: the names are matched in raw text, and the merges reach them too."""
  plain = released.tokenizer()
  assert plain.encode('<s>').ids == [0]
  content = json.loads(released.tokenizer(merges=special_spelled_out()).to_str())
  content['added_tokens'] = []
  without_added = type(plain).from_str(json.dumps(content))
  assert without_added.encode('IMGIMGAZ').ids == [4]
  content['pre_tokenizer'] = BYTE_LEVEL
  assert type(plain).from_str(json.dumps(content)).encode('<s><reserved00016>').ids == [0, 20]


def test_special_tokens_behind_the_block_are_no_text():
  content = released.content()
  size = len(content['model']['vocab'])
  rules = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
  content['added_tokens'] += [
    {'id': size, 'content': '[end]', **rules, 'special': True},
    {'id': size + 1, 'content': '<reserved99999>', **rules, 'special': False},
    {'id': size + 2, 'content': 'the red', **rules, 'special': False},
  ]
  text = JsonText(released.dump(content))
  assert text.vocabulary_config.size == size + 3
  first = text.vocabulary.text_start
  assert text.encode('the red') == [size + 2 - first], 'an added token that is not special is text'
  assert text.decode(text.encode('[end]<reserved99999>the red')) == '[end]<reserved99999>the red'
  assert max(text.encode('[end]<reserved99999>')) < size - first
  assert {size, size + 1} < set(text.barred_text)
  assert size + 2 not in text.barred_text
  assert text.decode([size - first, size + 1 - first]) == '\ufffd\ufffd'


def test_broken_bytes_become_replacement_characters(text):
  pieces = [*text.encode('é')][:1]
  assert text.piece(pieces[0]) == 'Ã©', 'two bytes, one piece'
  lead = next(i for i in range(text.n_pieces) if text.piece(i) == 'Ã')
  assert text.decode([lead, *text.encode('A')]) == '\ufffdA'
  assert text.decode([]) == ''


@pytest.mark.parametrize('sample', ['\ud800', 'ab\udfff', '\ud83d text'])
def test_lone_surrogate_is_a_clear_error(text, sample):
  with pytest.raises(DataError, match=r'lone surrogate U\+D[0-9A-F]{3} at character \d+: remove'):
    text.encode(sample)


@pytest.mark.parametrize('piece', [-1, 264, 10**9])
def test_piece_outside_the_table(text, piece):
  with pytest.raises(DataError, match=f'text piece {piece} lies outside the table of 264'):
    text.decode([0, piece])


def test_missing_bytes_are_named():
  text = JsonText(released.data(letters=[letter for letter in released.LETTERS if letter != 'q']))
  assert text.decode(text.encode('the red')) == 'the red'
  with pytest.raises(DataError, match='no piece for the byte 0x71'):
    text.encode('square')


# ------------------------------------------------------------------------------------------- barred text


def test_barred_pieces_are_read_and_never_sampled():
  content = released.content()
  content['pre_tokenizer'] = BYTE_LEVEL  # the six rules split '</'
  text = JsonText(released.dump(content))
  (piece,) = text.encode('</')
  token = text.vocabulary.text_start + piece
  assert text.piece(piece) == '</'
  assert text.barred_text == (token,), "'<' alone is text"
  assert text.decode([piece]) == '</'
  vocabulary = text.vocabulary
  assert vocabulary.is_text[token]
  document = Document.plain('a </b')
  tokens = render_prompt(document, vocabulary, text)
  assert token in tokens
  assert unrender(tokens, vocabulary, text) == document
  kind = modality.token_table(vocabulary, n_image_tokens=4, max_seq_len=32).kind
  assert kind[token] == modality.NEVER
  assert kind[text.vocabulary.text_start + text.encode('<')[0]] == modality.TEXT_TOKEN
  assert (kind == modality.TEXT_TOKEN).sum() == text.n_pieces - 1


# ------------------------------------------------------------------------------------------------- value


def test_it_is_a_value(text, tmp_path):
  path = tmp_path / 'text_tokenizer.json'
  text.save(path)
  assert path.read_bytes() == released.data(), 'a file in the form of the release is kept byte for byte'
  assert [file.name for file in tmp_path.iterdir()] == ['text_tokenizer.json']
  loaded = JsonText.load(path)
  assert (loaded, hash(loaded)) == (text, hash(text))
  for same in (pickle.loads(pickle.dumps(text)), copy.deepcopy(text), JsonText(json.dumps(released.content(), indent=1).encode())):
    assert same == text
    assert same.encode('the red') == text.encode('the red')
  assert text != JsonText(released.data(merges=released.MERGES[:5]))
  assert text != 'text'


def test_save_into_a_missing_folder_leaves_nothing(text, tmp_path):
  with pytest.raises(OSError):
    text.save(tmp_path / 'no' / 'text_tokenizer.json')
  assert list(tmp_path.iterdir()) == []
