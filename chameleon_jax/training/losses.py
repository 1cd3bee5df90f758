"""Next-token loss of mixed-modal rows (arXiv 2405.09818, section 2.3).

    loss = sum(w ce) / sum(w) + z_loss * sum(w logZ^2) / sum(w)

over positions, with ce the cross entropy of the target, Z the softmax denominator over the vocabulary and
w = loss_weight * (image_weight if the target is an image code else text_weight). Everything is float32.

Knows the vocabulary only as the half-open id range of the image codes. Sums are returned, not means, so that
microbatches and hosts add up to exactly the whole batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from chameleon_jax.array_types import Activations, AnyArray, Array, Logits, LossWeights, PyTree, Tokens
from chameleon_jax.errors import ConfigError
from chameleon_jax.partitioning import on_one_cpu


@flax.struct.dataclass
class LossSums:
  """Sums over the positions of one or more batches, float32 scalars; `a + b` joins two.

  The fields are arrays; they are annotated loosely because a tree map may put anything in their place.
  """

  cross_entropy: PyTree  # sum(w ce)
  z_squared: PyTree  # sum(w logZ^2)
  weight: PyTree  # sum(w)
  text: PyTree  # sum(loss_weight ce) where the target is not an image code
  text_weight: PyTree
  image: PyTree  # the same where it is
  image_weight: PyTree
  z: PyTree  # sum(loss_weight logZ)
  logit_norm: PyTree  # sum(loss_weight |logits|)

  @classmethod
  def zeros(cls) -> 'LossSums':
    return cls(*(jnp.zeros((), jnp.float32) for _ in range(9)))

  def __add__(self, other: 'LossSums') -> 'LossSums':
    return jax.tree.map(jnp.add, self, other)

  def objective(self, z_loss: float) -> Array:
    """What is minimised, before it is divided by the weight of the whole batch."""
    return self.cross_entropy + z_loss * self.z_squared

  def loss(self, z_loss: float) -> Array:
    """The training loss."""
    return self.objective(z_loss) / jnp.maximum(self.weight, 1e-9)

  def metrics(self) -> dict[str, Array]:
    """Means per modality (nats per token; NaN for a modality without targets), mean log Z and logit norm."""
    positions = self.text_weight + self.image_weight
    return {
        'loss_text': self.text / self.text_weight,
        'loss_image': self.image / self.image_weight,
        'z': self.z / positions,
        'logit_norm': self.logit_norm / positions,
    }


@dataclasses.dataclass(frozen=True)
class Modalities:
  """Which targets are image codes (first id, and the id after the last), and what the two kinds weigh."""

  image_range: tuple[int, int]
  text_weight: float = 1.0
  image_weight: float = 1.0

  def is_image(self, targets: Tokens) -> AnyArray:
    """Boolean [B, T]."""
    return (targets >= self.image_range[0]) & (targets < self.image_range[1])


def effective_weights(targets: Tokens, loss_weights: LossWeights, modalities: Modalities) -> AnyArray:
  """w of the module docstring, float32 [B, T]."""
  return loss_weights.astype(jnp.float32) * jnp.where(modalities.is_image(targets), modalities.image_weight, modalities.text_weight)


def sums_of_logits(logits: Logits, targets: Tokens, loss_weights: LossWeights, modalities: Modalities) -> LossSums:
  """Sums of one piece of rows whose logits are at hand."""
  logits = logits.astype(jnp.float32)
  return _sums(logits, jax.nn.logsumexp(logits, axis=-1), targets, loss_weights, modalities)


def _sums(logits: Logits, log_z: Array, targets: Tokens, loss_weights: LossWeights, modalities: Modalities) -> LossSums:
  """The sums of float32 logits whose log Z [B, T] is known."""
  cross_entropy = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  weights = effective_weights(targets, loss_weights, modalities)
  is_image, plain = modalities.is_image(targets), loss_weights.astype(jnp.float32)
  on_text, on_image = jnp.where(is_image, 0.0, plain), jnp.where(is_image, plain, 0.0)
  return LossSums(
      cross_entropy=jnp.sum(weights * cross_entropy),
      z_squared=jnp.sum(weights * log_z**2),
      weight=jnp.sum(weights),
      text=jnp.sum(on_text * cross_entropy),
      text_weight=jnp.sum(on_text),
      image=jnp.sum(on_image * cross_entropy),
      image_weight=jnp.sum(on_image),
      z=jnp.sum(plain * jax.lax.stop_gradient(log_z)),
      logit_norm=jnp.sum(plain * jnp.linalg.norm(jax.lax.stop_gradient(logits), axis=-1)),
  )


def next_token_loss(
    unembed: Callable[[Activations], Logits],
    hidden: Activations,
    targets: Tokens,
    loss_weights: LossWeights,
    *,
    modalities: Modalities,
    z_loss: float = 0.0,
    chunks: int = 1,
) -> tuple[Array, LossSums]:
  """What is minimised, and loss sums, from the last hidden states.

  With `chunks` > 1 every row is cut into that many pieces which are projected one after the other, so at most
  T / chunks positions have logits at a time:

      row    | t0 t1 t2 t3 | t4 t5 t6 t7 |      chunks = 2
      logits   [B, 4, V]  then [B, 4, V]        never [B, 8, V]

  A piece's gradients are taken while its logits are at hand (`_gradients_on_the_way`), so nothing is projected a second
  time in the backward pass.

  Args:
    unembed: the projection to the vocabulary.
    hidden: what `unembed` takes.
    targets: token ids to predict.
    loss_weights: 0 where nothing is predicted.
    modalities: tells image codes and weighs both kinds.
    z_loss: weight of the second term.
    chunks: pieces of a row; must divide T.

  Returns:
    sum(w ce) + z_loss * sum(w logZ^2), which is what to differentiate; and the sums, which have no gradient where `chunks` > 1.

  Raises:
    ConfigError: `chunks` does not divide T.
  """
  batch, length, _ = hidden.shape
  if chunks == 1:
    sums = sums_of_logits(unembed(hidden), targets, loss_weights, modalities)
    return sums.objective(z_loss), sums
  if length % chunks:
    raise ConfigError(f'loss_chunks {chunks} does not divide rows of {length} tokens; choose a divisor of data.seq_len')

  def pieces(x: AnyArray) -> Array:
    return jnp.moveaxis(jnp.asarray(x).reshape(batch, chunks, length // chunks, *x.shape[2:]), 1, 0)

  cut = pieces(hidden)
  project, captured = jax.closure_convert(unembed, cut[0])
  return _gradients_on_the_way(project, modalities, z_loss)(captured, cut, pieces(targets), pieces(loss_weights))


def _gradients_on_the_way(
    project: Callable[..., Logits], modalities: Modalities, z_loss: float
) -> Callable[[list[Array], Array, Array, Array], tuple[Array, LossSums]]:
  """The objective and the sums of pieces, as a function with a gradient of its own, which exists when the last piece is done.

  With p the softmax of a position's logits, y the target and E the objective,

      dE / dlogits = w (p (1 + 2 z_loss logZ) - onehot(y))

  needs nothing but the logits, so the forward pass makes it and multiplies it on to the projection's operands at once. The
  backward pass scales what is there.

  Args:
    project: (hidden of a piece [B, t, D], *captured) -> logits.
    modalities, z_loss: as in `next_token_loss`.

  Returns:
    f(captured, hidden [n, B, t, D], targets [n, B, t], loss_weights [n, B, t]).
  """

  @jax.custom_vjp
  def total(captured: list[Array], hidden: Array, targets: Array, loss_weights: Array) -> tuple[Array, LossSums]:
    def add_piece(sums: LossSums, piece: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
      part, part_targets, part_weights = piece
      return sums + sums_of_logits(project(part, *captured), part_targets, part_weights, modalities), None

    sums, _ = jax.lax.scan(add_piece, LossSums.zeros(), (hidden, targets, loss_weights))
    return sums.objective(z_loss), sums

  def forward(*inputs: Any) -> tuple[tuple[Array, LossSums], tuple[Any, ...]]:
    captured, hidden, targets, loss_weights = jax.tree.map(lambda leaf: leaf.value, inputs, is_leaf=_is_input)
    trained = [leaf.perturbed for leaf in inputs[0]]
    moving = [leaf for leaf, is_trained in zip(captured, trained) if is_trained]

    def add_piece(carry: tuple[LossSums, list[Array]], piece: tuple[Array, Array, Array]) -> tuple[Any, Array]:
      (sums, gradients), (part, part_targets, part_weights) = carry, piece

      def projected(part: Array, moving: list[Array]) -> Logits:
        given = iter(moving)
        return project(part, *(next(given) if is_trained else leaf for leaf, is_trained in zip(captured, trained)))

      logits, pull_back = jax.vjp(projected, part, moving)
      dtype, logits = logits.dtype, logits.astype(jnp.float32)
      top = jnp.max(logits, axis=-1)
      powers = jnp.exp(logits - top[..., None])
      if on_one_cpu():  # where an exponential costs more than storing it: else it is taken once for the sum and once for the gradient
        powers = jax.lax.optimization_barrier(powers)
      total = jnp.sum(powers, axis=-1)
      log_z = top + jnp.log(total)
      more = _sums(logits, log_z, part_targets, part_weights, modalities)
      weights = effective_weights(part_targets, part_weights, modalities)
      by_logits = (weights * (1 + 2 * z_loss * log_z) / total)[..., None] * powers
      is_target = jnp.arange(logits.shape[-1]) == part_targets[..., None]
      by_part, by_moving = pull_back((by_logits - jnp.where(is_target, weights[..., None], 0.0)).astype(dtype))
      return (sums + more, jax.tree.map(jnp.add, gradients, by_moving)), by_part

    start = LossSums.zeros(), jax.tree.map(jnp.zeros_like, moving)
    (sums, gradients), by_hidden = jax.lax.scan(add_piece, start, (hidden, targets, loss_weights))
    given = iter(gradients)
    return (sums.objective(z_loss), sums), ([next(given) if is_trained else None for is_trained in trained], by_hidden)

  def backward(gradients: tuple[Any, ...], cotangents: tuple[Array, LossSums]) -> tuple[Any, ...]:
    scale = cotangents[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
      scale = jnp.zeros(())
    by_captured, by_hidden = jax.tree.map(lambda leaf: (leaf * scale).astype(leaf.dtype), gradients)
    return by_captured, by_hidden, None, None

  total.defvjp(forward, backward, symbolic_zeros=True)
  return total


def _is_input(leaf: Any) -> bool:
  """Whether a leaf is an argument as a rule with symbolic zeros gets it."""
  return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
