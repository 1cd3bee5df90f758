"""One update, and one evaluation, as jitted functions of explicit values.

Mixed precision is the model's affair (`model.dtype` over float32 masters). The keys of dropout are derived
from the run's key and the step, so nothing random has to be saved.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chameleon_jax.array_types import Array, Params, PyTree
from chameleon_jax.config import TrainConfig
from chameleon_jax.errors import ConfigError
from chameleon_jax.partitioning import batch_sharding, constrain
from chameleon_jax.training import diagnostics as layers
from chameleon_jax.training.losses import LossSums, Modalities, effective_weights, next_token_loss
from chameleon_jax.training.optimizer import make_schedule
from chameleon_jax.training.state import TrainState, abstract_frozen, state_shardings
from chameleon_jax.training.trainable import Tuning

Batch = dict[str, Array]  # tokens, targets, loss_weights, positions and, where rows are packed, segment_ids, each [B, T]
Metrics = dict[str, PyTree]  # float32 scalars, but for what diagnostics add

_PER_LAYER = 'per_layer'  # the model's diagnostics as they are, [L] each


def modalities_of(config: TrainConfig) -> Modalities:
  """Where the image codes lie among the token ids (from 4 on, see `VocabularyConfig`) and what both kinds of targets weigh."""
  return Modalities((4, 4 + config.vocabulary.n_codes), text_weight=config.text_loss_weight, image_weight=config.image_loss_weight)


def _loss_sums(
    model: nn.Module, config: TrainConfig, variables: dict[str, Params], batch: Batch, key: Array | None
) -> tuple[Array, LossSums, Metrics]:
  """(what is minimised, sums, diagnostics) of a batch."""
  hidden, _, diagnostics = model.apply(
      variables,
      batch['tokens'],
      positions=batch['positions'],
      segment_ids=batch.get('segment_ids'),  # without them a row is one document
      deterministic=key is None,
      rngs=None if key is None else {'dropout': key},
      method='hidden',
  )
  objective, sums = next_token_loss(
      lambda piece: model.apply(variables, piece, method='unembed'),
      hidden,
      batch['targets'],
      batch['loss_weights'],
      modalities=modalities_of(config),
      z_loss=config.z_loss,
      chunks=config.loss_chunks,
  )
  return objective, sums, _summary(diagnostics) | ({_PER_LAYER: jax.lax.stop_gradient(diagnostics)} if config.diagnostics_every else {})


def _summary(diagnostics: Mapping[str, Array]) -> Metrics:
  """Per-layer diagnostics as scalars: the output of the last layer, the largest of everything else."""
  return {name: jax.lax.stop_gradient(value[-1] if name.startswith('output') else jnp.max(value)) for name, value in diagnostics.items()}


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, config: TrainConfig, mesh: Mesh
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns `step(state, batch, key) -> (state, metrics)`; call it under `jax.set_mesh(mesh)`.

  Where `config.fine_tune` freezes parameters the step takes them as a fourth argument; gradients and moments are of the others.

  The batch is cut into `optimizer.accumulate_steps` microbatches of rows that run one after the other; their
  gradients add up to the gradient of the whole batch, since every microbatch is divided by the loss weight of
  all of them. An update whose loss or gradient is not finite is not applied: state and step stay, and
  `metrics['finite']` is 0. The state is donated.

  Metrics (float32 scalars): loss, loss_text, loss_image, z (mean log Z), logit_norm, gradient_norm (before
  clipping), parameter_norm, learning_rate, n_text, n_image (predicted tokens), finite, and the model's diagnostics;
  with `config.diagnostics_every` also 'diagnostics', what `diagnostics.measure` returns.

  Raises:
    ConfigError: the batch size is not a multiple of accumulate_steps times the devices that share a batch.
  """
  n_micro = config.optimizer.accumulate_steps
  n_batch_shards = mesh.shape['data'] * mesh.shape['fsdp']
  if config.data.batch_size % (n_micro * n_batch_shards):
    parts = f'optimizer.accumulate_steps {n_micro} times {n_batch_shards} devices (data x fsdp)'
    raise ConfigError(f'data.batch_size {config.data.batch_size} is not a multiple of {parts}')
  schedule = make_schedule(config.optimizer, config.n_steps)
  tuning = Tuning(config.fine_tune)
  shardings = state_shardings(model, optimizer, mesh, tuning)
  replicated = NamedSharding(mesh, PartitionSpec())

  def total_weight(batch: Batch) -> Array:
    return jnp.maximum(jnp.sum(effective_weights(batch['targets'], batch['loss_weights'], modalities_of(config))), 1e-9)

  def gradient(params: Params, frozen: Params | None, batch: Batch, key: Array, weight: Array) -> tuple[PyTree, tuple[LossSums, Metrics]]:
    def objective(params: Params) -> tuple[Array, tuple[LossSums, Metrics]]:
      summed, sums, diagnostics = _loss_sums(model, config, tuning.variables(params, frozen), batch, key)
      return summed / weight, (sums, diagnostics)

    gradients, aux = jax.grad(objective, has_aux=True)(params)
    return gradients, aux

  def accumulated(params: Params, frozen: Params | None, batch: Batch, key: Array) -> tuple[PyTree, LossSums, Metrics]:
    weight = total_weight(batch)
    if n_micro == 1:
      gradients, (sums, diagnostics) = gradient(params, frozen, batch, key, weight)
      return gradients, sums, diagnostics

    def split(x: Array) -> Array:
      # Row r goes to microbatch r % n_micro, so each device keeps its own rows.
      return constrain(jnp.moveaxis(x.reshape(-1, n_micro, *x.shape[1:]), 1, 0), None, 'batch', None)

    def add(carry: tuple[PyTree, LossSums], inputs: tuple[Array, Batch]) -> tuple[tuple[PyTree, LossSums], Metrics]:
      index, micro = inputs
      gradients, (sums, diagnostics) = gradient(params, frozen, micro, jax.random.fold_in(key, index), weight)
      return (jax.tree.map(jnp.add, carry[0], gradients), carry[1] + sums), diagnostics

    zeros = jax.tree.map(jnp.zeros_like, params)
    (gradients, sums), diagnostics = jax.lax.scan(add, (zeros, LossSums.zeros()), (jnp.arange(n_micro), jax.tree.map(split, batch)))
    return gradients, sums, jax.tree.map(lambda x: jnp.mean(x, axis=0), diagnostics)

  def step(state: TrainState, batch: Batch, key: Array, frozen: Params | None = None) -> tuple[TrainState, Metrics]:
    gradients, sums, diagnostics = accumulated(state.params, frozen, batch, jax.random.fold_in(key, state.step))
    loss, gradient_norm = sums.loss(config.z_loss), optax.global_norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    updated = TrainState(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    per_layer = diagnostics.pop(_PER_LAYER, None)
    metrics = {
        'loss': loss,
        **sums.metrics(),
        'gradient_norm': gradient_norm,
        'parameter_norm': optax.global_norm(kept.params),
        'learning_rate': schedule(state.step),
        'n_text': sums.text_weight,
        'n_image': sums.image_weight,
        'finite': finite.astype(jnp.float32),
        **diagnostics,
    }
    if config.diagnostics_every:
      metrics['diagnostics'] = layers.measure(
          gradients=gradients, updates=updates, params=kept.params, sums=sums, z_loss=config.z_loss, per_layer=per_layer
      )
    return kept, metrics

  inputs = (shardings, batch_sharding(mesh), replicated, *_frozen_shardings(model, tuning, mesh))
  return jax.jit(step, in_shardings=inputs, out_shardings=(shardings, replicated), donate_argnums=0)


def _frozen_shardings(model: nn.Module, tuning: Tuning, mesh: Mesh) -> tuple[PyTree, ...]:
  """Of the argument with the frozen parameters, where there is one."""
  return (jax.tree.map(lambda leaf: leaf.sharding, abstract_frozen(model, mesh, tuning)),) if tuning.freezes else ()


def make_eval_step(model: nn.Module, config: TrainConfig, mesh: Mesh, params_shardings: PyTree) -> Callable[..., LossSums]:
  """Returns `evaluate(params, batch) -> LossSums` without dropout; call it under `jax.set_mesh(mesh)`.

  Frozen parameters are its third argument, as in `make_train_step`.
  """
  tuning = Tuning(config.fine_tune)

  def evaluate(params: Params, batch: Batch, frozen: Params | None = None) -> LossSums:
    return _loss_sums(model, config, tuning.variables(params, frozen), batch, None)[1]

  inputs = (params_shardings, batch_sharding(mesh), *_frozen_shardings(model, tuning, mesh))
  return jax.jit(evaluate, in_shardings=inputs, out_shardings=NamedSharding(mesh, PartitionSpec()))
