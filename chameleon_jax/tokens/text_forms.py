"""The content of a `text_tokenizer.json` as plain data: checked, its tokens listed by id, in Meta's form or Hugging Face's.

Knows the fields of the Hugging Face `tokenizers` format that carry tokens, and nothing of how text is encoded
(`text_json.py`). The two forms of a Chameleon tokenizer differ in two places (spec model.md 3.4):

    form          token end_turn + 1     post-processor
    meta          <reserved08707>        as it is, without one that puts <s> in front of every text
    huggingface   <image>                as it is, then <s> in front
"""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from chameleon_jax.errors import CheckpointError
from chameleon_jax.tokens.vocabulary import BEGIN_SEQUENCE, PLACEHOLDER, Vocabulary, reserved_name

Content = dict[str, Any]


def parse_content(data: bytes) -> Content:
  """The JSON object of a tokenizer file, with a BPE model whose table and added tokens have the right types.

  Raises:
    CheckpointError: no JSON, a name twice in one object, or another kind of file.
  """
  try:
    content = json.loads(data.decode('utf-8'), object_pairs_hook=_without_doubles)
  except CheckpointError:
    raise
  except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
    raise CheckpointError(f'not a JSON file ({len(data)} bytes): {" ".join(str(error).split())}') from error
  model = content.get('model') if isinstance(content, dict) else None
  if not isinstance(model, dict) or not isinstance(model.get('vocab'), dict) or not isinstance(model.get('merges'), list):
    raise CheckpointError('not a text tokenizer: it needs model.vocab and model.merges')
  if model.get('type', 'BPE') != 'BPE':
    raise CheckpointError(f'the text tokenizer is of type {model["type"]!r}, expected BPE')
  for field in ('continuing_subword_prefix', 'end_of_word_suffix'):
    if model.get(field):
      raise CheckpointError(f'the text tokenizer marks pieces by {field} = {model[field]!r}; only byte-level tables are supported')
  for name, token in model['vocab'].items():
    if type(token) is not int or token < 0:
      raise CheckpointError(f'model.vocab gives {name!r} the id {token!r}, which is no token')
  for merge in model['merges']:
    merge_parts(merge)
  _check_added(content.setdefault('added_tokens', []))
  return content


def dump(content: Content) -> bytes:
  """The bytes of a file with this content."""
  return json.dumps(content, ensure_ascii=False).encode()


def _without_doubles(pairs: list[tuple[str, Any]]) -> Content:
  found = dict(pairs)
  if len(found) < len(pairs):
    seen: set[str] = set()
    double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    raise CheckpointError(f'the name {double!r} comes twice in one table of the text tokenizer')
  return found


def _check_added(added: Any) -> None:
  for entry in added if isinstance(added, list) else [added]:
    if not isinstance(entry, dict) or not isinstance(entry.get('content'), str) or type(entry.get('id')) is not int:
      raise CheckpointError(f'added_tokens holds {str(entry)[:80]!r}, which is no token with a content and an id')


def merge_parts(merge: Any) -> tuple[str, str]:
  """The two names that a merge joins, written as a pair or as one string with a space. Raises CheckpointError for others."""
  parts = merge.split(' ') if isinstance(merge, str) else merge
  if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
    raise CheckpointError(f'model.merges holds {str(merge)[:80]!r}, which is no pair of names')
  return parts[0], parts[1]


def token_names(content: Content) -> list[str]:
  """The name of every token 0..size-1, from the table and the added tokens.

  Raises:
    CheckpointError: two tokens share a name or two names a token, or an id is left out.
  """
  token_of: dict[str, int] = dict(content['model']['vocab'])
  for entry in content['added_tokens']:
    name, token = entry['content'], entry['id']
    if token_of.setdefault(name, token) != token:
      raise CheckpointError(f'the token {name!r} has the id {token_of[name]} in model.vocab and {token} in added_tokens')
  name_of: dict[int, str] = {}
  for name, token in token_of.items():
    if token in name_of:
      raise CheckpointError(f'the tokens {name_of[token]!r} and {name!r} have the same id {token}')
    name_of[token] = name
  for token in range(len(name_of)):
    if token not in name_of:
      raise CheckpointError(f'no token has the id {token}, though {name_of[max(name_of)]!r} has {max(name_of)}')
  names = [name_of[token] for token in range(len(name_of))]
  for token, name in enumerate(names):
    if any('\ud800' <= character <= '\udfff' for character in name):
      raise CheckpointError(f'the name of token {token}, {name!r}, holds half a character (a lone surrogate)')
  return names


def parts_of(component: Any, field: str) -> Iterator[Mapping[str, Any]]:
  """A pre-tokenizer, decoder, ... and, where it is a sequence, each of its parts (listed under `field`)."""
  if isinstance(component, dict):
    if component.get('type') == 'Sequence' and isinstance(component.get(field), list):
      for part in component[field]:
        yield from parts_of(part, field)
    else:
      yield component


# ------------------------------------------------------------------------------------------------ forms


def to_meta(content: Content) -> Content:
  """Meta's form of either form; the same object where nothing differs.

  Raises:
    CheckpointError: `<image>` stands where a token with the reserved name is there already.
  """
  names = token_names(content)
  post = content.get('post_processor')
  kept = [part for part in parts_of(post, 'processors') if not _prepends(part)]
  renamed = names.index(PLACEHOLDER) if PLACEHOLDER in names else None
  if renamed is None and len(kept) == len(list(parts_of(post, 'processors'))):
    return content
  content = copy.copy(content)
  if len(kept) < len(list(parts_of(post, 'processors'))):
    content['post_processor'] = None if not kept else kept[0] if len(kept) == 1 else {'type': 'Sequence', 'processors': kept}
  if renamed is not None:
    if reserved_name(renamed) in names:
      raise CheckpointError(f'both {PLACEHOLDER!r} and {reserved_name(renamed)!r}, of which it takes the place, are there')
    content = _rename(content, PLACEHOLDER, reserved_name(renamed))
  return content


def to_huggingface(content: Content, vocabulary: Vocabulary) -> Content:
  """Hugging Face's form of a content in Meta's form.

  Raises:
    CheckpointError: no reserved token stands after end_turn, so that none is left for `<image>`.
  """
  token = vocabulary.end_turn + 1
  if token >= vocabulary.text_start or vocabulary.names[token] != reserved_name(token):
    raise CheckpointError(
        f'no reserved token {reserved_name(token)!r} follows the end of a turn (token {token - 1}); '
        f'the Hugging Face form needs one for {PLACEHOLDER!r}: choose n_reserved of at least 2'
    )
  content = _rename(content, vocabulary.names[token], PLACEHOLDER)
  template = _template(vocabulary.begin_sequence)
  post = content.get('post_processor')
  content['post_processor'] = {'type': 'Sequence', 'processors': [*parts_of(post, 'processors'), template]} if post else template
  return content


def _rename(content: Content, old: str, new: str) -> Content:
  content = copy.copy(content)
  content['model'] = copy.copy(content['model'])
  content['model']['vocab'] = {new if name == old else name: token for name, token in content['model']['vocab'].items()}
  content['added_tokens'] = [{**entry, 'content': new} if entry['content'] == old else entry for entry in content['added_tokens']]
  return content


def _template(begin: int) -> Content:
  """The post-processor that puts `<s>` in front of a text, and of both texts of a pair."""
  special = [{'SpecialToken': {'id': BEGIN_SEQUENCE, 'type_id': i}} for i in range(2)]
  text = [{'Sequence': {'id': name, 'type_id': i}} for i, name in enumerate('AB')]
  return {
      'type': 'TemplateProcessing',
      'single': [special[0], text[0]],
      'pair': [special[0], text[0], special[1], text[1]],
      'special_tokens': {BEGIN_SEQUENCE: {'id': BEGIN_SEQUENCE, 'ids': [begin], 'tokens': [BEGIN_SEQUENCE]}},
  }


def _prepends(part: Mapping[str, Any]) -> bool:
  special = part.get('special_tokens')
  return part.get('type') == 'TemplateProcessing' and isinstance(special, dict) and BEGIN_SEQUENCE in special
