"""How likely a model holds given continuations of given prompts: log-likelihoods, batched.

    score = log p(continuation | prompt) = sum over its tokens of log softmax(raw logits)[token]

The softmax is that of the model: over the whole vocabulary, raw logits, float32, without temperature, guidance or the
modality table of the sampler. Logits of all columns never exist together: only the columns that predict a continuation
are projected to the vocabulary, a chunk at a time.

    row        s  a  b  c  d        prompt s a b, continuation c d e: the last token is predicted, never fed
    predicts         c  d  e        only these columns are projected

One row serves every request whose inputs begin it:

    s a b | c d e      row  s a b c d      columns 2 3 4 -> c d e
    s a b | c                              column  2     -> c
    s a b | x                              column  2     -> x

so the one-token answers of a multiple choice cost one row. Longer continuations that differ run on rows of their own:
sharing their prompt would take a cache of every layer's keys and values, larger than the rows it saves time on.

Does not know text, pictures or documents. Source: spec evaluation.md 7 (what evaluation harnesses ask for); the likelihood
is that of the training loss without its weights (arXiv 2405.09818, section 2.3).
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float32, Int

from chameleon_jax.array_types import AnyArray, Array, Params, Tokens
from chameleon_jax.config import TransformerConfig
from chameleon_jax.errors import CheckpointError, ConfigError, PromptError
from chameleon_jax.models.transformer.model import Transformer, decoding_params
from chameleon_jax.models.transformer.quantization import match_shardings
from chameleon_jax.partitioning import constrain, shardings_of
from chameleon_jax.tokens.vocabulary import Vocabulary

_MIN_LENGTH = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
  """What a model makes of one continuation.

  Attributes:
    log_likelihood: of the whole continuation, in nats; 0 for an empty one, NaN where the model's logits are.
    token_log_likelihoods: of each token given all before it, float32 [n], in nats.
    is_greedy: whether every token is the model's most likely one (of equally likely ones the smallest id), so that drawing
      greedily without any constraint would have written the continuation. True for an empty one.
  """

  log_likelihood: float
  token_log_likelihoods: Float32[np.ndarray, ' n']
  is_greedy: bool

  @property
  def n_tokens(self) -> int:
    """Tokens of the continuation."""
    return len(self.token_log_likelihoods)

  @property
  def per_token(self) -> float:
    """Mean log-likelihood of a token, in nats; 0 for an empty continuation."""
    return self.log_likelihood / max(self.n_tokens, 1)


def best_of(scores: Sequence[Score], *, by: str = 'mean') -> int:
  """Place of the sample that the model holds most likely; of equal ones the first.

  'mean' compares the likelihood per token, 'sum' that of the whole continuation, which favours short ones. Samples of
  one length (pictures) come in the same order either way. A sample without tokens is chosen only where there is no
  other, one whose likelihood is NaN only where there is nothing else at all.

  Raises:
    PromptError: there are no scores.
    ConfigError: `by` is neither 'mean' nor 'sum'.
  """
  if not scores:
    raise PromptError('best_of got no scores; give at least one sample')
  if by not in ('mean', 'sum'):
    raise ConfigError(f"by is 'mean' or 'sum', got {by!r}")

  def rank(index: int) -> tuple[bool, bool, float]:
    value = scores[index].per_token if by == 'mean' else scores[index].log_likelihood
    known = not np.isnan(value)
    return known, scores[index].n_tokens > 0, value if known else 0.0

  return max(range(len(scores)), key=rank)  # of equal ones `max` takes the first


@dataclasses.dataclass(frozen=True, eq=False)
class _Request:
  """One checked request. `inputs` is all that is fed to the model: everything but the last token."""

  index: int
  inputs: Int[np.ndarray, ' T']
  continuation: Int[np.ndarray, ' n']

  @property
  def first_column(self) -> int:
    """Column that predicts the first token of the continuation."""
    return len(self.inputs) - len(self.continuation)

  @functools.cached_property
  def key(self) -> bytes:
    """Sorts as the inputs do, and begins another's key exactly where the inputs begin the other's."""
    return self.inputs.astype('>i4').tobytes()


@dataclasses.dataclass(frozen=True)
class _Row:
  """One row of the network and the requests it answers; the first of them is the longest."""

  requests: list[_Request]
  width: int  # columns of its batch

  @property
  def n_columns(self) -> int:
    """Columns to project, those of several requests counted for each."""
    return sum(len(request.continuation) for request in self.requests)


def _bucket(n: int, smallest: int = 1) -> int:
  """The least power of two that is at least `n` and `smallest` (itself a power of two)."""
  return max(smallest, 1 << max(n - 1, 0).bit_length())


def _width(n: int, context: int) -> int:
  """Columns of the rows that hold `n` inputs."""
  return min(_bucket(n, _MIN_LENGTH), context)


def _share_rows(requests: Sequence[_Request], context: int) -> list[_Row]:
  """Puts each request on a row that its inputs begin, where there is one with room for its columns (as many as its width).

  In the order of their inputs a request stands right before one that it begins, if it begins any.
  """
  rows: list[_Row] = []
  for request in sorted(requests, key=lambda request: request.key, reverse=True):
    row = rows[-1] if rows else None
    shares = row is not None and row.requests[0].key.startswith(request.key)
    if row is not None and shares and row.n_columns + len(request.continuation) <= row.width:
      row.requests.append(request)
    else:
      rows.append(_Row([request], _width(len(request.inputs), context)))
  return rows


@functools.partial(jax.jit, static_argnames=('config', 'piece'))
def _likelihoods(
  params: Params,
  tokens: Tokens,
  columns: Int[AnyArray, 'B C'],
  targets: Int[AnyArray, 'B C'],
  n_pieces: Int[AnyArray, ''],
  *,
  config: TransformerConfig,
  piece: int,
) -> tuple[Float[Array, 'B C'], Bool[Array, 'B C']]:
  """Log-likelihoods of `targets` at `columns` of the rows, and whether each is the largest logit.

  The first `n_pieces` times `piece` of the C entries of each row are computed, `piece` of every row at a time; the rest is 0.
  """
  model = Transformer(config)
  outputs: Any = model.apply({'params': params}, tokens, method='hidden')
  hidden = outputs[0]

  def add_piece(index: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
    start = index * piece
    here, wanted = (jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, piece, axis=1)[..., None] for x in (columns, targets))
    logits: Any = model.apply({'params': params}, jnp.take_along_axis(hidden, here, axis=1), method='unembed')
    picked = jnp.take_along_axis(logits, wanted, axis=-1)[..., 0]
    values = picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == wanted[..., 0]
    written = (jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1) for whole, part in zip(found, values))
    likelihoods, greedy = (constrain(x, 'batch', 'length') for x in written)
    return likelihoods, greedy

  empty = jnp.zeros(columns.shape, jnp.float32), jnp.zeros(columns.shape, bool)
  likelihoods, greedy = jax.lax.fori_loop(0, n_pieces, add_piece, empty)
  return constrain(likelihoods, None, None), constrain(greedy, None, None)  # whole on every device: the host reads them


def _prepared(params: Params, config: TransformerConfig, mesh: Mesh | None) -> Params:
  """Parameters on their devices; what `linear` would cast in every call is cast once. Nothing is copied that is in place."""
  if mesh is not None:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)['params']
    params = jax.device_put(params, match_shardings(shardings_of(boxed, mesh), params))
  return decoding_params(params, dataclasses.replace(config, scan_layers=False))  # stacked layers stay stacked


class Scorer:
  """A transformer ready to judge.

  Compiled programs. Shapes come in powers of two: rows up to `max_batch_size`, tokens from 32 to `max_seq_len`. One program per
  (rows, tokens) that occurs: at most (1 + log2 max_batch_size) (1 + ceil(log2(max_seq_len / 32))), 40 for 16 rows and a context
  of 4,096. How many tokens of a row are scored is data. Requests of like length run together, whatever their order.
  """

  def __init__(
    self,
    config: TransformerConfig,
    params: Params,
    vocabulary: Vocabulary,
    *,
    max_batch_size: int = 16,
    projected_at_once: int = 512,
    mesh: Mesh | None = None,
  ):
    """Casts and places the parameters.

    Args:
      config: of the transformer; its `scan_layers` says how `params` are stacked.
      params: plain arrays. Those that lie on the devices in `config.dtype` are shared, not copied.
      vocabulary: meaning of the ids.
      max_batch_size: rows run together at most, rounded up to a power of two.
      projected_at_once: columns of all rows together whose logits exist at a time, float32 [projected_at_once, V]; one a row at least.
      mesh: devices to spread parameters and rows over; without one, a mesh that is set around `score` counts.

    Raises:
      CheckpointError: vocabulary and transformer do not match.
      ConfigError: a size is not positive.
    """
    if config.vocab_size != vocabulary.size:
      raise CheckpointError(f'the vocabulary has {vocabulary.size} ids and the transformer {config.vocab_size}: they are not of one model')
    if max_batch_size < 1 or projected_at_once < 1:
      raise ConfigError(f'max_batch_size {max_batch_size} and projected_at_once {projected_at_once} must be positive')
    self.config = dataclasses.replace(config, remat='none', dropout=0.0)
    self.params = _prepared(params, config, mesh)
    self.vocabulary = vocabulary
    self.max_batch_size = _bucket(max_batch_size)
    self.projected_at_once = projected_at_once
    self.mesh = mesh

  def score(self, prompts: Sequence[np.ndarray], continuations: Sequence[np.ndarray]) -> list[Score]:
    """Scores each continuation after the prompt at the same place; requests do not influence one another.

    Args:
      prompts: int arrays [T], at least one token each; usually they open with begin_sequence.
      continuations: int arrays [n]. An empty one has the likelihood 1: a score of 0 without tokens.

    Returns:
      One score a request, in their order; none for none.

    Raises:
      PromptError: there are more of one than of the other; a prompt is empty; a prompt or continuation is no list of ids or holds
        one outside the vocabulary; or both together, without the last token, which is not fed, are longer than the context.
    """
    if len(prompts) != len(continuations):
      raise PromptError(f'there are {len(prompts)} prompts and {len(continuations)} continuations; give one continuation a prompt')
    requests = [self._check(index, *pair) for index, pair in enumerate(zip(prompts, continuations))]
    results = {request.index: _score(np.zeros(0, np.float32), np.zeros(0, bool)) for request in requests}
    rows = _share_rows([request for request in requests if len(request.continuation)], self.config.max_seq_len)
    rows.sort(key=lambda row: (row.width, row.n_columns))
    with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
      for width, group in itertools.groupby(rows, key=lambda row: row.width):
        alike = list(group)
        for start in range(0, len(alike), self.max_batch_size):
          results.update(self._run(alike[start : start + self.max_batch_size], width))
    return [results[index] for index in range(len(requests))]

  def _check(self, index: int, prompt: np.ndarray, continuation: np.ndarray) -> _Request:
    prompt, continuation = np.asarray(prompt), np.asarray(continuation)
    if prompt.ndim == 1 and prompt.size == 0:
      raise PromptError(f'prompt {index} is empty, nothing predicts its continuation; give at least {self.vocabulary.begin_sequence}')
    for name, ids in (('prompt', prompt), ('continuation', continuation)):
      if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise PromptError(f'{name} {index} is no list of token ids but {ids.dtype} {list(ids.shape)}')
      outside = ids[(ids < 0) | (ids >= self.vocabulary.size)]
      if outside.size:
        raise PromptError(f'{name} {index} holds token id {outside[0]}, outside the vocabulary of {self.vocabulary.size}')
    inputs = np.concatenate([prompt, continuation[:-1]]).astype(np.int32)
    context = self.config.max_seq_len
    if len(inputs) > context:
      lengths = f'{len(prompt)} and {len(continuation)} tokens'
      raise PromptError(f'prompt and continuation {index} have {lengths}: {len(inputs)} are fed, the context is {context}; shorten them')
    return _Request(index, inputs, continuation.astype(np.int32))

  def _run(self, rows: list[_Row], width: int) -> dict[int, Score]:
    """Runs one batch; returns the scores by the requests' places."""
    sizes = dict((self.mesh or jax.sharding.get_abstract_mesh()).shape)
    shards = sizes.get('data', 1) * sizes.get('fsdp', 1)
    batch = shards * _bucket(-(-len(rows) // shards))  # rows that a mesh can divide
    piece = min(max(self.projected_at_once // batch, 1), width)
    room = -(-width // piece) * piece
    tokens = np.full((batch, width), self.vocabulary.pad, np.int32)
    columns, targets = np.zeros((2, batch, room), np.int32)
    for i, row in enumerate(rows):
      longest = row.requests[0].inputs
      tokens[i, : len(longest)] = longest
      # Attention is causal, so neither the padding nor what belongs to another request reaches the columns of a request.
      columns[i, : row.n_columns] = np.concatenate([np.arange(r.first_column, len(r.inputs)) for r in row.requests])
      targets[i, : row.n_columns] = np.concatenate([r.continuation for r in row.requests])
    n_pieces = np.int32(-(-max(row.n_columns for row in rows) // piece))
    found = _likelihoods(self.params, tokens, columns, targets, n_pieces, config=self.config, piece=piece)
    likelihoods, greedy = jax.device_get(found)
    results = {}
    for i, row in enumerate(rows):
      ends = np.cumsum([len(request.continuation) for request in row.requests])
      for request, end in zip(row.requests, ends):
        own = slice(end - len(request.continuation), end)
        results[request.index] = _score(likelihoods[i, own], greedy[i, own])
    return results


def _score(likelihoods: Float[np.ndarray, ' n'], greedy: Bool[np.ndarray, ' n']) -> Score:
  known = np.isfinite(likelihoods).all()
  return Score(float(likelihoods.sum(dtype=np.float64)), likelihoods.copy(), bool(known and greedy.all()))
