"""The text tokenizer for `make_golden.py`: a byte-level BPE of a few hundred entries, laid out as text_tokenizer.json (spec model.md 5).

What the release's file leaves open is chosen here, not known: no normalizer, no prefix space, image names not among the added tokens.
Does not know: the package that these values test.
"""

import collections
import json
import pathlib
from typing import Any

import tokenizers
from golden_meta import N_TOKENS
from tokenizers import decoders, models, pre_tokenizers

N_CODES = 32
N_SENTINELS = 8
N_RESERVED = 10
END_TURN = 4 + N_CODES + 2 + N_SENTINELS
PLACEHOLDER = END_TURN + 1  # a reserved token to Meta, `<image>` to the port
TEXT_START = END_TURN + N_RESERVED

_CORPUS = """the red apple and the green pear are on the table . draw a picture of the red apple . there is a little dog under the
tree and the other one is there too . what do you see here ? tell me about the history of this picture . she said that they were reading
the letter in the garden , and the rain came down on the roof . a number of things in the world are better than they were"""

TEXTS = (
  *('', 'a', ' a', 'the', ' the', 'Draw a red apple.', 'the red apple and the green pear', 'reading the letter  in the rain'),
  *('   leading', 'trailing   ', '    four', '     five', 'a\tb', '\t\t', '\n', 'one\ntwo\n\nthree\r\n', ' \n \t ', '\u00a0x', '\u2003y'),
  *('0', '1234567890', '3.14159', 'x2y3', '²³½', '٣٤', "don't, it's, we'll", '(a) [b] {c} "d"', 'a<b>c</d>', '</', '...', '$5 + 7% = #1'),
  *('naïve café', 'größe', '¿qué?', 'Ελληνικά', 'русский текст', '漢字かな交じり', '한국어', 'עברית', '🍎', '🍎🍐 👩\u200d🚀', 'e\u0301'),
  *('\x00\x01\x7f', 'IMGIMG', 'IMGIMGBAZ', 'sentinel:3', '< s >', 'HTTPServer_v2.tar.gz', 'theatre theory other'),
)


def special_names() -> list[str]:
  """Names of all ids before the first text id, image codes included; a reserved token's number is its id less 4, as in the release."""
  names = ['<s>', '<pad>', '</s>', '<unk>']
  names += ['IMGIMG' + ''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code)) + 'Z' for code in range(N_CODES)]
  names += ['<eoss>', '<racm3:break>', *(f'<sentinel:{index}>' for index in range(N_SENTINELS))]
  return names + [f'<reserved{index - 4:05d}>' for index in range(END_TURN, TEXT_START)]


def _pre_tokenizer() -> Any:
  split = [pre_tokenizers.Split(tokenizers.Regex(rule), 'isolated') for rule in ('<sentinel:[0-9]+>', 'IMGIMG[A-I]{1,4}Z', '\t|\n|    |  ')]
  rest = (pre_tokenizers.Digits(True), pre_tokenizers.Punctuation('isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False))
  return pre_tokenizers.Sequence([*split, *rest])


def _merges(n: int) -> list[tuple[str, str]]:
  """Byte-pair merges of the corpus, the most frequent first, the alphabet deciding ties; and one that looks like a special token."""
  words = collections.Counter(word for word, _ in _pre_tokenizer().pre_tokenize_str(_CORPUS))
  pieces = {word: list(word) for word in words}
  merges = [('<', '/')]  # text, although it starts with `<`
  while len(merges) < n:
    pairs: collections.Counter[tuple[str, str]] = collections.Counter()
    for word, count in words.items():
      for pair in zip(pieces[word], pieces[word][1:]):
        pairs[pair] += count
    best = min(pairs, key=lambda pair: (-pairs[pair], pair))
    merges.append(best)
    for word, old in pieces.items():
      new: list[str] = []
      for piece in old:
        if new and (new[-1], piece) == best:
          new[-1] += piece
        else:
          new.append(piece)
      pieces[word] = new
  return merges


def build() -> tokenizers.Tokenizer:
  """The tokenizer of the release's form."""
  names = special_names() + sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = _merges(N_TOKENS - len(names))
  names += [left + right for left, right in merges]
  vocab = {name: index for index, name in enumerate(names)}
  if len(vocab) != N_TOKENS:
    raise RuntimeError('two tokens have one name')
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  tokenizer.pre_tokenizer = _pre_tokenizer()
  tokenizer.decoder = decoders.ByteLevel()
  specials = [name for name in special_names() if name.startswith('<')]
  tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in specials])
  return tokenizer


def to_huggingface(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """The port's form: the placeholder's name is `<image>`, and `<s>` goes before every text (spec model.md 3.4)."""
  tree = json.loads(tokenizer.to_str())
  old = special_names()[PLACEHOLDER]
  tree['model']['vocab'] = {'<image>' if name == old else name: index for name, index in tree['model']['vocab'].items()}
  for token in tree['added_tokens']:
    if token['content'] == old:
      token['content'] = '<image>'
  ported = tokenizers.Tokenizer.from_str(json.dumps(tree))
  begin = tokenizers.processors.TemplateProcessing(single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', 0)])
  ported.post_processor = begin
  return ported


def encodings(tokenizer: tokenizers.Tokenizer) -> list[dict[str, Any]]:
  """Ids of every sample text."""
  return [{'text': text, 'ids': tokenizer.encode(text).ids} for text in TEXTS]


def write_json(path: pathlib.Path, value: Any, *, indent: int | None = 2) -> None:
  """Writes readable JSON."""
  path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + '\n', encoding='utf-8')
