"""Next-token loss of mixed-modal rows (arXiv 2405.09818, section 2.3).

    loss = sum(w ce) / sum(w) + z_loss * sum(w logZ^2) / sum(w)

over positions, with ce the cross entropy of the target, Z the softmax denominator over the vocabulary and
w = loss_weight * (image_weight if the target is an image code else text_weight). Everything is float32.

Knows the vocabulary only as the half-open id range of the image codes. Sums are returned, not means, so that
microbatches and hosts add up to exactly the whole batch.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from chameleon_jax.array_types import Activations, AnyArray, Array, Logits, LossWeights, PyTree, Tokens
from chameleon_jax.errors import ConfigError


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

  def loss(self, z_loss: float) -> Array:
    """The training loss."""
    return (self.cross_entropy + z_loss * self.z_squared) / jnp.maximum(self.weight, 1e-9)

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
  log_z = jax.nn.logsumexp(logits, axis=-1)
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
    chunks: int = 1,
) -> LossSums:
  """Loss sums from the last hidden states.

  With `chunks` > 1 every row is cut into that many pieces which are projected one after the other, and again
  in the backward pass, so at most T / chunks positions have logits at a time:

      row    | t0 t1 t2 t3 | t4 t5 t6 t7 |      chunks = 2
      logits   [B, 4, V]  then [B, 4, V]        never [B, 8, V]

  Args:
    unembed: the projection to the vocabulary.
    hidden: what `unembed` takes.
    targets: token ids to predict.
    loss_weights: 0 where nothing is predicted.
    modalities: tells image codes and weighs both kinds.
    chunks: pieces of a row; must divide T.

  Raises:
    ConfigError: `chunks` does not divide T.
  """
  batch, length, _ = hidden.shape
  if chunks == 1:
    return sums_of_logits(unembed(hidden), targets, loss_weights, modalities)
  if length % chunks:
    raise ConfigError(f'loss_chunks {chunks} does not divide rows of {length} tokens; choose a divisor of data.seq_len')

  def pieces(x: AnyArray) -> Array:
    return jnp.moveaxis(jnp.asarray(x).reshape(batch, chunks, length // chunks, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def add_piece(total: LossSums, piece: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
    part, part_targets, part_weights = piece
    return total + sums_of_logits(unembed(part), part_targets, part_weights, modalities), None

  total, _ = jax.lax.scan(add_piece, LossSums.zeros(), (pieces(hidden), pieces(targets), pieces(loss_weights)))
  return total
