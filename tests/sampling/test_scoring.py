"""Log-likelihoods against a plain softmax in float64; independence of batch, padding, chunks and mesh; every error."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import MeshConfig
from chameleon_jax.errors import CheckpointError, ConfigError, PromptError
from chameleon_jax.models.transformer.model import Transformer, stack_layers
from chameleon_jax.partitioning import make_mesh
from chameleon_jax.presets import tiny_transformer, tiny_vocabulary
from chameleon_jax.sampling import scoring
from chameleon_jax.sampling.scoring import Score, Scorer, best_of
from chameleon_jax.tokens.vocabulary import Vocabulary

CONFIG = tiny_transformer(max_seq_len=80, init_std=0.3, scan_layers=False)  # weights large enough that the context decides
V = Vocabulary(tiny_vocabulary())
TOLERANCE = 2e-5  # nats; float32 sums of another order


@functools.cache
def params():
  return nn.meta.unbox(Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params'])


@functools.cache
def scorer(max_batch_size=4, projected_at_once=512):
  return Scorer(CONFIG, params(), V, max_batch_size=max_batch_size, projected_at_once=projected_at_once)


@functools.cache
def _full():
  model = Transformer(CONFIG)
  return jax.jit(lambda params, tokens: model.apply({'params': params}, tokens)[0])


def plain(prompt, continuation):
  """(log-likelihood of each token in float64, whether each is the most likely): the whole row, all logits, one request."""
  row = np.full((1, CONFIG.max_seq_len + 1), V.pad, np.int32)
  row[0, : len(prompt) + len(continuation)] = [*prompt, *continuation]
  logits = np.asarray(_full()(params(), row[:, :-1]))[0].astype(np.float64)
  logits = logits[len(prompt) - 1 : len(prompt) - 1 + len(continuation)]
  peak = logits.max(-1, keepdims=True)
  log_softmax = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
  return log_softmax[np.arange(len(continuation)), continuation], logits.argmax(-1) == continuation


def ragged(seed=0, n=11):
  """Requests of 1 to 60 prompt tokens and 0 to 20 continuation tokens, any ids of the vocabulary."""
  rng = np.random.default_rng(seed)
  ids = lambda n: rng.integers(0, V.size, n).astype(np.int32)
  return [ids(rng.integers(1, 61)) for _ in range(n)], [ids(rng.integers(0, 21)) for _ in range(n)]


def assert_equal(found, expected):
  assert [score.n_tokens for score in found] == [score.n_tokens for score in expected]
  for one, other in zip(found, expected):
    np.testing.assert_allclose(one.token_log_likelihoods, other.token_log_likelihoods, rtol=0, atol=TOLERANCE)
    assert abs(one.log_likelihood - other.log_likelihood) < TOLERANCE * max(one.n_tokens, 1)
    assert one.is_greedy == other.is_greedy


def test_equals_the_plain_softmax():
  prompts, continuations = ragged()
  continuations[3] = continuations[3][:0]
  for score, prompt, continuation in zip(scorer().score(prompts, continuations), prompts, continuations):
    expected, greedy = plain(prompt, continuation)
    assert score.token_log_likelihoods.dtype == np.float32 and score.token_log_likelihoods.shape == continuation.shape
    np.testing.assert_allclose(score.token_log_likelihoods, expected, rtol=0, atol=TOLERANCE)
    assert abs(score.log_likelihood - expected.sum()) < TOLERANCE * len(expected) + 1e-9
    assert score.is_greedy == greedy.all()


def test_probabilities_of_all_tokens_sum_to_one():
  """The softmax is over the whole vocabulary; 128 one-token answers to one prompt come from few rows."""
  prompt = np.array([V.begin_sequence, V.text_start, 9], np.int32)
  scores = scorer().score([prompt] * V.size, [np.array([token]) for token in range(V.size)])
  assert abs(sum(math.exp(score.log_likelihood) for score in scores) - 1) < 1e-5
  assert [score.is_greedy for score in scores].count(True) == 1
  assert max(scores, key=lambda score: score.log_likelihood).is_greedy


def test_a_batch_equals_singles():
  prompts, continuations = ragged(seed=1)
  singles = [scorer().score([prompt], [continuation])[0] for prompt, continuation in zip(prompts, continuations)]
  assert_equal(scorer().score(prompts, continuations), singles)
  assert_equal(scorer().score(prompts[::-1], continuations[::-1]), singles[::-1])


@pytest.mark.parametrize('projected_at_once', [1, 20])
def test_chunks_change_nothing(projected_at_once):
  """One column of each row at a time, and five; the other tests take all columns together."""
  prompts, continuations = ragged(seed=2)
  assert_equal(scorer(projected_at_once=projected_at_once).score(prompts, continuations), scorer().score(prompts, continuations))


def test_logits_of_all_columns_never_exist_together():
  rows, columns = np.zeros((4, 64), np.int32), np.zeros((4, 64), np.int32)
  lowered = scoring._likelihoods.lower(params(), rows, columns, columns, np.int32(8), config=CONFIG, piece=8).as_text()
  assert 'tensor<4x8x128xf32>' in lowered and 'tensor<4x64x128xf32>' not in lowered


def test_padding_changes_nothing():
  """32 columns with nothing to fill up, against the same request in a batch of eight rows of which three are padding."""
  prompt, continuation = np.arange(20, 45, dtype=np.int32), np.arange(60, 68, dtype=np.int32)  # 32 are fed
  tight = Scorer(dataclasses.replace(CONFIG, max_seq_len=32), params(), V)
  loose = Scorer(CONFIG, params(), V, max_batch_size=8)
  filler = np.arange(40, 44, dtype=np.int32)
  crowd = loose.score([filler] * 4 + [prompt], [filler, filler + 1, filler + 2, filler + 3, continuation])
  assert_equal(crowd[-1:], tight.score([prompt], [continuation]))


def test_a_context_filled_to_the_last_column():
  """The last token is predicted and not fed: 80 columns predict 81 tokens but the first."""
  row = np.random.default_rng(5).integers(0, V.size, CONFIG.max_seq_len + 1).astype(np.int32)
  (score,) = scorer().score([row[:1]], [row[1:]])
  np.testing.assert_allclose(score.token_log_likelihoods, plain(row[:1], row[1:])[0], rtol=0, atol=TOLERANCE)


def test_greedy_flag():
  """The continuation that takes the most likely token every time is greedy; with any one token changed it is not."""
  prompt = np.array([V.begin_sequence, 70, 50], np.int32)
  written: list[int] = []
  for _ in range(4):
    logits = np.asarray(_full()(params(), np.array([[*prompt, *written] + [V.pad] * (CONFIG.max_seq_len - 3 - len(written))])))
    written.append(int(logits[0, 2 + len(written)].argmax()))
  spoilt = [[(token + 1) % V.size if i == place else token for i, token in enumerate(written)] for place in range(4)]
  scores = scorer().score([prompt] * 5, [np.array(row) for row in (written, *spoilt)])
  assert [score.is_greedy for score in scores] == [True, False, False, False, False]


def test_of_equally_likely_tokens_the_smallest_is_greedy():
  even = jax.tree.map(lambda leaf: leaf, params()) | {'lm_head': jnp.zeros_like(params()['lm_head'])}
  scores = Scorer(CONFIG, even, V).score([np.array([0])] * 2, [np.array([0, 0]), np.array([0, 1])])
  assert [score.is_greedy for score in scores] == [True, False]
  assert all(abs(score.per_token + math.log(V.size)) < 1e-6 for score in scores)


def test_empty_continuations_and_empty_batches():
  assert scorer().score([], []) == []
  empty, one = scorer().score([np.array([0, 3])] * 2, [np.zeros(0), np.array([5])])
  assert (empty.log_likelihood, empty.n_tokens, empty.is_greedy, empty.per_token) == (0.0, 0, True, 0.0)
  assert one.n_tokens == 1 and one.log_likelihood < 0


def _request(index, prompt, continuation):
  return scoring._Request(index, np.array([*prompt, *continuation[:-1]], np.int32), np.array(continuation, np.int32))


def test_sharing_example():
  """s a b | c d e carries s a b | c and s a b | x; s a | x b does not, and s alone goes with whatever it begins."""
  s, a, b, c, d, e, x = 0, 40, 41, 42, 43, 44, 300
  requests = [
    _request(0, [s, a, b], [c]),
    _request(1, [s, a, b], [c, d, e]),
    _request(2, [s, a, b], [x]),
    _request(3, [s, a], [x, b]),
    _request(4, [s], [x]),
  ]
  shared = {tuple(sorted(request.index for request in row.requests)) for row in scoring._share_rows(requests, 80)}
  assert shared == {(0, 1, 2, 4), (3,)}
  carried = next(row for row in scoring._share_rows(requests, 80) if len(row.requests) > 1)
  assert carried.requests[0].index == 1 and carried.n_columns == 6
  assert {request.index: request.first_column for request in carried.requests} == {0: 2, 1: 2, 2: 2, 4: 0}


def test_a_row_takes_no_more_columns_than_its_width():
  requests = [_request(index, [0, 5], [index]) for index in range(70)]
  rows = scoring._share_rows(requests, 80)
  assert [row.n_columns for row in rows] == [32, 32, 6]
  assert sorted(request.index for row in rows for request in row.requests) == list(range(70))


def test_sharing_changes_no_score():
  stem = np.array([V.begin_sequence, 60, 61, 62, 4, 9], np.int32)
  row = np.array([77, 50, 51, 90], np.int32)
  prompts = [stem, stem, stem, np.append(stem, row[:1]), stem[:1], stem[:3]]
  continuations = [row, row[:2], np.array([33], np.int32), row[1:], stem[1:], np.append(stem[3:], row)]
  singles = [scorer().score([prompt], [continuation])[0] for prompt, continuation in zip(prompts, continuations)]
  together = scorer().score(prompts, continuations)
  assert_equal(together, singles)
  # The chain rule: the same tokens, cut elsewhere into prompt and continuation.
  whole = together[4].log_likelihood + together[0].log_likelihood
  head = scorer().score([stem[:1]], [np.append(stem[1:], row)])[0]
  assert abs(head.log_likelihood - whole) < 10 * TOLERANCE


def test_number_of_programs():
  """Rows 1, 2, 4 and columns 32, 64, 80: nine at most, whatever the requests; and what has run compiles nothing again."""
  before = scoring._likelihoods._cache_size()
  config = dataclasses.replace(CONFIG, rope_theta=9_999.0)  # programs of its own
  own = Scorer(config, params(), V, max_batch_size=3)
  rng = np.random.default_rng(3)
  for n in (1, 2, 3, 5, 9):
    prompts, continuations = ragged(seed=n, n=n)
    own.score(prompts, continuations)
  for length in (20, 50, 79):
    for n in (1, 2, 4):
      own.score([rng.integers(0, V.size, length) for _ in range(n)], [rng.integers(0, V.size, 2) for _ in range(n)])
  limit = (1 + int(math.log2(4))) * (1 + math.ceil(math.log2(80 / 32)))
  assert scoring._likelihoods._cache_size() - before == limit == 9
  for n in (3, 7, 12):
    own.score(*ragged(seed=10 * n, n=n))
  assert scoring._likelihoods._cache_size() - before == 9


@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_a_mesh_changes_nothing(sizes):
  prompts, continuations = ragged(seed=4, n=5)
  config = dataclasses.replace(CONFIG, d_ff=64)
  own = Scorer(config, params(), V, max_batch_size=4, projected_at_once=24, mesh=make_mesh(MeshConfig(*sizes), jax.devices()[:8]))
  spread = own.params['layers_0']['feed_forward']['up_proj']
  assert len(spread.sharding.device_set) == 8
  assert_equal(own.score(prompts, continuations), scorer().score(prompts, continuations))


def test_a_mesh_set_around_the_call():
  prompts, continuations = ragged(seed=4, n=3)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
  with jax.set_mesh(mesh):
    found = Scorer(CONFIG, jax.tree.map(np.asarray, params()), V, max_batch_size=4).score(prompts, continuations)
  assert_equal(found, scorer().score(prompts, continuations))


def test_stacked_layers_and_half_precision():
  """Stacked layers give the same; bfloat16 weights are cast once and give nearly the same."""
  prompts, continuations = ragged(seed=6, n=4)
  expected = scorer().score(prompts, continuations)
  stacked = Scorer(dataclasses.replace(CONFIG, scan_layers=True), stack_layers(params()), V)
  assert_equal(stacked.score(prompts, continuations), expected)
  half = Scorer(dataclasses.replace(CONFIG, dtype='bfloat16'), params(), V)
  assert half.params['lm_head'].dtype == jnp.bfloat16 and half.params['final_norm']['weight'].dtype == jnp.float32
  for one, other in zip(half.score(prompts, continuations), expected):
    assert abs(one.per_token - other.per_token) < 0.05


def test_weights_in_place_are_shared():
  assert scorer().params['lm_head'] is params()['lm_head']


def test_broken_weights_give_nan_and_no_greedy():
  broken = params() | {'lm_head': jnp.full_like(params()['lm_head'], jnp.nan)}
  (score,) = Scorer(CONFIG, broken, V).score([np.array([0])], [np.array([0])])
  assert math.isnan(score.log_likelihood) and not score.is_greedy


def _score(*likelihoods):
  return Score(float(sum(likelihoods)), np.array(likelihoods, np.float32), False)


def test_best_of():
  short, long, worse = _score(-2.0), _score(-1.0, -1.5), _score(-4.0)
  assert best_of([worse, short, long]) == best_of([worse, short, long], by='mean') == 2
  assert best_of([worse, short, long], by='sum') == 1
  assert best_of([worse, short, _score(-2.0)]) == 1  # of equal ones the first
  assert best_of([_score(), worse]) == 1 and best_of([_score(), _score()]) == 0
  assert best_of([_score(math.nan), worse]) == 1 and best_of([_score(math.nan), _score()]) == 1
  assert best_of([_score(math.nan), _score(-math.inf)]) == 1


def test_best_of_errors():
  with pytest.raises(PromptError, match='best_of got no scores'):
    best_of([])
  with pytest.raises(ConfigError, match="by is 'mean' or 'sum', got 'max'"):
    best_of([_score(-1.0)], by='max')


@pytest.mark.parametrize(
  ('prompt', 'continuation', 'message'),
  [
    ([], [1], 'prompt 1 is empty, nothing predicts its continuation; give at least 0'),
    ([0.5], [1], r'prompt 1 is no list of token ids but float64 \[1\]'),
    ([[0, 1]], [1], r'prompt 1 is no list of token ids but int64 \[1, 2\]'),
    ([0, 128], [1], 'prompt 1 holds token id 128, outside the vocabulary of 128'),
    ([0, -1], [1], 'prompt 1 holds token id -1'),
    ([0], [0.5], 'continuation 1 is no list of token ids'),
    ([0], [[]], 'continuation 1 is no list of token ids'),
    ([0], [3, 128], 'continuation 1 holds token id 128'),
    ([0] * 80, [1, 2], 'prompt and continuation 1 have 80 and 2 tokens: 81 are fed, the context is 80; shorten them'),
    ([0] * 81, [], '81 are fed'),
  ],
)
def test_errors_name_the_request(prompt, continuation, message):
  good = np.array([0, 1])
  with pytest.raises(PromptError, match=message) as error:
    scorer().score([good, np.array(prompt)], [good, np.array(continuation)])
  assert '\n' not in str(error.value)


def test_as_many_prompts_as_continuations():
  with pytest.raises(PromptError, match='there are 2 prompts and 1 continuations'):
    scorer().score([np.array([0])] * 2, [np.array([0])])


def test_settings_that_cannot_be():
  with pytest.raises(CheckpointError, match='128 ids and the transformer 64'):
    Scorer(dataclasses.replace(CONFIG, vocab_size=64), params(), V)
  for sizes in ({'max_batch_size': 0}, {'projected_at_once': 0}):
    with pytest.raises(ConfigError, match='must be positive'):
      Scorer(CONFIG, params(), V, **sizes)
