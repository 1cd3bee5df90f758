"""What a row may write next: the modality of every row as arrays, and two pure functions on them.

Modality is data per row, not control flow, so rows in text, inside a picture and finished share a batch:

    mode           allowed                                                          next
    TEXT           text tokens, end_sequence, end_turn if asked for,                TEXT / DONE / IMAGE(0)
                   begin_image if the budget and the context leave room;
                   begin_image alone where a picture is owed and room runs out
    IMAGE(i < n)   image tokens                                                     IMAGE(i + 1)
    IMAGE(n)       end_image                                                        TEXT
    DONE           pad                                                              DONE

A row is DONE after end_sequence, end_turn or one of its own stop tokens, or when nothing remains; a row that writes a
single picture (`modalities='image'`) after its n-th code, without end_image, as the released sampler does. Banned
tokens are taken out of what TEXT and IMAGE(i < n) allow. A row that owes pictures (`min_images`) may not end in text.

Room for a picture. A picture takes n + 2 tokens (begin_image, n codes, end_image), so begin_image needs
`remaining >= n + 2`, where `remaining` counts what the row may still draw. Beside this budget the context has a rule
of its own, the release's (spec model.md 8.2, row 2): begin_image is refused once the row's length reaches
`max_seq_len - (n + 2)`. With 4096 and n = 1024 the last length that allows it is 3069: begin_image at index
3069, codes at 3070 to 4093, end_image at 4094, and index 4095 stays free for a stop token. The context rule
is thus one token stricter than the budget rule; each holds as its source states it.

Example, n = 2, a budget of 9 (B begin_image, E end_image, # end_sequence, c codes, t text):

    drawn       t     B         c         c         E     t     #
    mode  TEXT  TEXT  IMAGE(0)  IMAGE(1)  IMAGE(2)  TEXT  TEXT  DONE
    left  9     8     7         6         5         4     3     2

This file knows no model, no logits and no cache. Source: spec model.md 8.2 to 8.4 and the table above.
"""

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from chameleon_jax.array_types import AnyArray, Array
from chameleon_jax.config import SamplingOptions
from chameleon_jax.tokens.vocabulary import Vocabulary

TEXT, IMAGE, DONE = 0, 1, 2

# Kinds of token, the columns of the small table that `allowed` gathers from. `NEVER` holds what no mode draws:
# begin_sequence, unknown, sentinels, the reserved tokens other than end_turn, barred text.
NEVER, TEXT_TOKEN, END_SEQUENCE, END_TURN, BEGIN_IMAGE, CODE, END_IMAGE, PAD = range(8)

UNLIMITED = np.iinfo(np.int32).max


@flax.struct.dataclass
class TokenTable:
  """What the state machine knows of the vocabulary, the picture and the context.

  Attributes:
    kind: [V], the kind of each token.
    n_image_tokens: codes of one picture.
    max_seq_len: longest row of the model.
  """

  kind: Int[AnyArray, ' V']
  n_image_tokens: int = flax.struct.field(pytree_node=False)
  max_seq_len: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Rules:
  """What the options permit each row, all [B].

  Attributes:
    pictures: may open pictures by itself.
    single_picture: is done after the last code of its picture.
    end_turn: may draw end_turn.
    max_images: pictures it may open at most (one open at the end of the prompt counts).
    min_images: pictures it must open before it may end.
  """

  pictures: Bool[AnyArray, ' B']
  single_picture: Bool[AnyArray, ' B']
  end_turn: Bool[AnyArray, ' B']
  max_images: Int[AnyArray, ' B']
  min_images: Int[AnyArray, ' B']


@flax.struct.dataclass
class RowState:
  """Where each row stands, all int32 [B].

  Attributes:
    mode: TEXT, IMAGE or DONE.
    codes: codes of the open picture so far; 0 outside pictures.
    remaining: tokens the row may still draw.
    position: length of the row so far, prompt included = index of its next token.
    images: pictures opened, one left open by the prompt included.
    drawn: tokens drawn, the stop token included.
  """

  mode: Int[AnyArray, ' B']
  codes: Int[AnyArray, ' B']
  remaining: Int[AnyArray, ' B']
  position: Int[AnyArray, ' B']
  images: Int[AnyArray, ' B']
  drawn: Int[AnyArray, ' B']


def token_table(vocabulary: Vocabulary, *, n_image_tokens: int, max_seq_len: int) -> TokenTable:
  """Sorts the vocabulary into kinds (numpy, once per sampler)."""
  kind = np.full(vocabulary.size, NEVER, np.int32)
  kind[vocabulary.is_text & ~vocabulary.is_barred] = TEXT_TOKEN
  kind[vocabulary.is_image] = CODE
  kind[vocabulary.end_sequence] = END_SEQUENCE
  kind[vocabulary.end_turn] = END_TURN
  kind[vocabulary.begin_image] = BEGIN_IMAGE
  kind[vocabulary.end_image] = END_IMAGE
  kind[vocabulary.pad] = PAD
  return TokenTable(kind=kind, n_image_tokens=n_image_tokens, max_seq_len=max_seq_len)


def make_rules(options: Sequence[SamplingOptions]) -> Rules:
  """The rules of each row (numpy)."""
  most = [UNLIMITED if o.max_images is None else o.max_images for o in options]
  return Rules(
    pictures=np.array([o.modalities == 'mixed' for o in options], bool),
    single_picture=np.array([o.modalities == 'image' for o in options], bool),
    end_turn=np.array([o.stop_at_end_turn for o in options], bool),
    max_images=np.array(most, np.int32),
    min_images=np.array([o.min_images for o in options], np.int32),
  )


def init_state(lengths: Int[np.ndarray, ' B'], *, open_codes: Int[np.ndarray, ' B'], remaining: Int[np.ndarray, ' B']) -> RowState:
  """The state after the prompts (numpy).

  Args:
    lengths: tokens of each prompt.
    open_codes: codes of the picture that the prompt leaves open (0 after a last begin_image); -1 where none is.
    remaining: tokens each row may draw; a row with 0 is DONE from the start.
  """
  inside = open_codes >= 0
  return RowState(
    mode=np.where(remaining <= 0, DONE, np.where(inside, IMAGE, TEXT)).astype(np.int32),
    codes=np.where(inside, open_codes, 0).astype(np.int32),
    remaining=np.maximum(remaining, 0).astype(np.int32),
    position=lengths.astype(np.int32),
    images=inside.astype(np.int32),
    drawn=np.zeros(len(lengths), np.int32),
  )


def may_begin_image(state: RowState, rules: Rules, table: TokenTable) -> Bool[AnyArray, ' B']:
  """Whether a row in text could open a picture now: permitted, within the budget, and with room in the context."""
  picture = table.n_image_tokens + 2
  permitted = rules.pictures & (state.images < rules.max_images)
  return permitted & (state.remaining >= picture) & (state.position < table.max_seq_len - picture)


def must_begin_image(state: RowState, rules: Rules, table: TokenTable) -> Bool[AnyArray, ' B']:
  """Whether a row in text owes so many pictures that one more text token would leave no room for them.

  Example, n = 2 (a picture takes 4), two pictures owed: a row with 9 tokens left may write one of text, with 8 none.
  """
  picture = table.n_image_tokens + 2
  owed = rules.min_images - state.images
  spare = (state.remaining - 1 >= owed * picture) & (state.position + 1 + (owed - 1) * picture < table.max_seq_len - picture)
  return rules.pictures & (owed > 0) & ~spare


def allowed(state: RowState, rules: Rules, table: TokenTable, banned: Bool[AnyArray, 'B V']) -> Bool[Array, 'B V']:
  """The tokens each row may draw next, by the table at the top of this file. None where a row has all of them banned."""
  text = state.mode == TEXT
  image = state.mode == IMAGE
  filled = state.codes >= table.n_image_tokens
  free = text & ~must_begin_image(state, rules, table)
  may_end = free & (state.images >= rules.min_images)
  by_kind = [jnp.zeros_like(text)] * 8
  by_kind[TEXT_TOKEN] = free
  by_kind[END_SEQUENCE] = may_end
  by_kind[END_TURN] = may_end & rules.end_turn
  by_kind[BEGIN_IMAGE] = text & may_begin_image(state, rules, table)
  by_kind[CODE] = image & ~filled
  by_kind[END_IMAGE] = image & filled
  by_kind[PAD] = state.mode == DONE
  forced = (image & filled) | (state.mode == DONE)
  return jnp.take(jnp.stack(by_kind, axis=1), table.kind, axis=1) & (~jnp.asarray(banned) | forced[:, None])


def advance(
  state: RowState, token: Int[AnyArray, ' B'], rules: Rules, table: TokenTable, *, stop: Bool[AnyArray, ' B']
) -> RowState:
  """The state after each row drew `token`, which must be one of its `allowed` tokens; DONE rows stay as they are.

  `stop`: rows for which this token is one of their own stop tokens.
  """
  kind = jnp.take(table.kind, token)
  active = state.mode != DONE
  drew = active.astype(jnp.int32)
  opened = kind == BEGIN_IMAGE
  code = kind == CODE
  codes = jnp.where(code, state.codes + 1, 0)
  remaining = state.remaining - drew
  stopped = (kind == END_SEQUENCE) | (kind == END_TURN) | (remaining <= 0) | stop
  stopped |= rules.single_picture & code & (codes >= table.n_image_tokens)
  mode = jnp.where(opened | code, IMAGE, TEXT)
  mode = jnp.where(~active | stopped, DONE, mode)
  return RowState(
    mode=mode,
    codes=jnp.where(active, codes, state.codes),
    remaining=remaining,
    position=state.position + drew,
    images=state.images + (active & opened),
    drawn=state.drawn + drew,
  )
