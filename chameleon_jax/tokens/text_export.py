"""A text tokenizer as `text_tokenizer.json` (Meta) or `tokenizer.json` (Hugging Face).

A sentencepiece table becomes a BPE table with byte fallback and the same token ids:

    names    special and image names of the vocabulary, `<0x00>` .. `<0xFF>`, pieces with spaces as spaces,
             `<unused:N>` where the vocabulary has more room than the tokenizer has pieces
    merges   every way to cut a piece into two pieces, in the order of sentencepiece's scores
    added    special and image names, so that readers of the format find them in text

Spaces stay spaces, where sentencepiece writes U+2581: this file format needs no sign for them, and a U+2581 in the text
then goes as its bytes, as in `text.py`. One difference is in the format: its readers take a `<s>` that stands in a
text for the token, which ours never do (`text_json.py`).
"""

from typing import Literal

from chameleon_jax.config import VocabularyConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.tokens import text_forms
from chameleon_jax.tokens.text import N_BYTES, PROBES, SentencePieceText, TextTokenizer
from chameleon_jax.tokens.text_json import JsonText
from chameleon_jax.tokens.vocabulary import IMAGE_PREFIX, Vocabulary, unused_name


def export_json(tokenizer: TextTokenizer, vocabulary: VocabularyConfig, *, form: Literal['meta', 'huggingface']) -> bytes:
  """The content of a tokenizer file that the `tokenizers` library, and with it transformers, reads.

  Args:
    tokenizer: a sentencepiece model, or a `JsonText`, which only changes its form.
    vocabulary: the token table that the tokenizer belongs to.
    form: 'huggingface' names the token after end_turn `<image>` and puts `<s>` in front of every text (spec model.md 3.4).

  Raises:
    CheckpointError: the two do not belong together, a piece has the name of a special token, or the table cannot be
      written in this format.
  """
  if isinstance(tokenizer, JsonText):
    if tokenizer.vocabulary_config != vocabulary:
      raise CheckpointError(f'the text tokenizer is of {tokenizer.vocabulary_config}, the model of {vocabulary}')
    table, data = tokenizer.vocabulary, tokenizer.to_json()
  elif isinstance(tokenizer, SentencePieceText):
    table = Vocabulary(vocabulary)
    data = text_forms.dump(_from_sentencepiece(tokenizer, table))
    _check_same(tokenizer, JsonText(data))
  else:
    raise CheckpointError(f'a text tokenizer of type {type(tokenizer).__name__} cannot be written as JSON')
  return data if form == 'meta' else text_forms.dump(text_forms.to_huggingface(text_forms.parse_content(data), table))


def _from_sentencepiece(tokenizer: SentencePieceText, vocabulary: Vocabulary) -> text_forms.Content:
  n = tokenizer.n_pieces
  if n > vocabulary.n_text:
    raise CheckpointError(f'the text tokenizer has {n} pieces, the vocabulary room for {vocabulary.n_text}: they are not of one model')
  pieces = [tokenizer.piece(i) for i in range(n)]
  special = set(vocabulary.names)
  for piece in pieces[N_BYTES:]:
    if piece in special or piece.startswith(IMAGE_PREFIX):
      raise CheckpointError(f'the text piece {piece!r} has the name of a special or image token; this format cannot tell them apart')
  unused = [unused_name(token) for token in range(vocabulary.text_start + n, vocabulary.size)]
  vocab = {name: token for token, name in enumerate((*vocabulary.names, *pieces, *unused))}
  if len(vocab) != vocabulary.size:
    raise CheckpointError('two text pieces have the same name; this format cannot tell them apart')
  return {
      'version': '1.0',
      'truncation': None,
      'padding': None,
      'added_tokens': [_added(token, name) for token, name in enumerate(vocabulary.names)],
      'normalizer': None,
      'pre_tokenizer': None,
      'post_processor': None,
      'decoder': {'type': 'Sequence', 'decoders': [{'type': 'ByteFallback'}, {'type': 'Fuse'}]},
      'model': {
          'type': 'BPE',
          'dropout': None,
          'unk_token': None,
          'continuing_subword_prefix': None,
          'end_of_word_suffix': None,
          'fuse_unk': False,
          'byte_fallback': True,
          'ignore_merges': False,
          'vocab': vocab,
          'merges': _merges(tokenizer, pieces),
      },
  }


def _added(token: int, name: str) -> text_forms.Content:
  rules = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
  return {'id': token, 'content': name, **rules, 'special': True}


def _merges(tokenizer: SentencePieceText, pieces: list[str]) -> list[list[str]]:
  """All pairs of pieces that join to a piece, best score first."""
  known = set(pieces[N_BYTES:])
  by_score = sorted(range(N_BYTES, len(pieces)), key=lambda i: (-tokenizer.score(i), i))
  return [
      [piece[:cut], piece[cut:]]
      for piece in (pieces[i] for i in by_score)
      for cut in range(1, len(piece))
      if piece[:cut] in known and piece[cut:] in known
  ]


def _check_same(tokenizer: SentencePieceText, exported: JsonText) -> None:
  """Raises CheckpointError unless both cut every piece, and a few hard texts, in the same way."""
  pieces = (tokenizer.piece(i) for i in range(N_BYTES, tokenizer.n_pieces))
  for text in (*pieces, *PROBES, ''.join(PROBES)):
    if exported.encode(text) != tokenizer.encode(text):
      raise CheckpointError(f'the sentencepiece model cuts {text!r} in a way that this format cannot express')
