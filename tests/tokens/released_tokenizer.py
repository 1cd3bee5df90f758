"""Tiny tokenizer files in the layout of the release (spec model.md 5.4), built with the `tokenizers` library."""

import json

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from chameleon_jax.tokens.vocabulary import image_token_name

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [('t', 'h'), ('th', 'e'), ('Ġ', 'the'), ('Ġ', 'a'), ('r', 'e'), ('re', 'd'), ('<', '/'), ('Ã', '©')]
N_CODES, N_SENTINELS, N_RESERVED = 12, 2, 4


def leading_names(codes=range(N_CODES)):
  """Names of ids 0 .. text_start - 1, the image names in the given order."""
  first = 6 + N_CODES + N_SENTINELS
  return [
    *('<s>', '<pad>', '</s>', '<unk>'),
    *(image_token_name(code) for code in codes),
    *('<eoss>', '<racm3:break>'),
    *(f'<sentinel:{i}>' for i in range(N_SENTINELS)),
    *(f'<reserved{i - 4:05d}>' for i in range(first, first + N_RESERVED)),
  ]


def tokenizer(*, names=None, merges=MERGES, letters=LETTERS, **model):
  """The library's tokenizer: byte-level BPE behind the six rules of pre-tokenization, special and image tokens added."""
  names = names or leading_names()
  pieces = [*letters, *(a + b for a, b in merges if a + b not in names)]
  vocab = {name: i for i, name in enumerate([*names, *pieces])}
  built = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges), **model))
  built.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex('<sentinel:[0-9]+>'), 'isolated'),
      pre_tokenizers.Split(Regex('IMGIMG[A-I]{1,4}Z'), 'isolated'),
      pre_tokenizers.Split(Regex('[\\t\\n]|    |  '), 'isolated'),
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.Punctuation('isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  built.decoder = decoders.ByteLevel()
  built.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
  return built


def content(**options):
  """The content of the file, to be changed and dumped."""
  return json.loads(tokenizer(**options).to_str())


def data(**options):
  """The bytes of the file."""
  return dump(content(**options))


def dump(changed):
  """Bytes of a changed content."""
  return json.dumps(changed, ensure_ascii=False).encode()


def huggingface(changed):
  """A content in Hugging Face's form, as transformers writes it."""
  text = dump(changed).decode().replace('<reserved00017>', '<image>')
  built = tokenizers.Tokenizer.from_str(text)
  built.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', pair='<s> $A <s>:1 $B:1', special_tokens=[('<s>', 0)]
  )
  return json.loads(built.to_str())
