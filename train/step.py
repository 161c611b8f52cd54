"""The two compiled functions of training: one step of the optimizer, one look at the held-out loss."""

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_moe_jax.model.balancing import update_balancing_biases
from qwen_moe_jax.model.output import TokenLosses
from qwen_moe_jax.moe.stats import RouterStats, sum_stats
from train.config import LossConfig
from train.data.batches import Batch
from train.objectives.language_modelling import Loss, WholeBatch, sum_over_targets, training_loss, whole_batch
from train.parameters import Params, merge, select


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes from step to step: what a checkpoint holds.

    Attributes:
        step: how many are finished, int32 scalar.
        params: those that are trained.
        optimizer: what it remembers of them.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMetrics:
    """What one step has to say: float32 scalars, int32 for the counts, and a bool.

    `finite` is False where the loss or the gradient's norm is no finite number: then the step changed nothing but the
    count of steps. `loss` is what is minimised: `cross_entropy`, and the other losses times their coefficients.
    `z_loss`, the mean squared logsumexp of the logits, `balance_loss` and `router_z` are unscaled. `assignments` counts
    (token, expert) pairs over all layers that the router asked for, `dropped` those of them that found no room;
    `load_imbalance` is the largest load of an expert over the mean load, in the layer where that is largest. All that
    tells of experts is 0 for a dense model. `router` is where it comes from, layer by layer; a dense model has none.
    """

    finite: jax.Array
    loss: jax.Array
    cross_entropy: jax.Array
    z_loss: jax.Array
    balance_loss: jax.Array
    router_z: jax.Array
    gradient_norm: jax.Array
    tokens: jax.Array
    assignments: jax.Array
    dropped: jax.Array
    load_imbalance: jax.Array
    router: RouterStats | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeldoutSum:
    """The summed cross entropy (float32 scalar) of this many targets (int32 scalar); sums of batches add up."""

    loss: jax.Array
    targets: jax.Array


TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]
EvalStep = Callable[[Params, Batch], HeldoutSum]


def state_shardings(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where everything lies: moments as their parameters, counters on every device.

    Left to itself, a jitted `optimizer.init` puts the moments wherever it likes, since zeros depend on no input.

    Args:
        params: that are trained: placed arrays, or shapes with shardings.
    """
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda array: array.sharding, params)
    return TrainState(
        step=everywhere,
        params=shardings,
        optimizer=optax.tree_utils.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            jax.eval_shape(optimizer.init, params),
            shardings,
            transform_non_params=lambda _: everywhere,
        ),
    )


def abstract_state(params: Params, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, for `Checkpoints.restore_latest`; nothing is allocated.

    Args:
        params: that are trained: shapes with shardings.
    """
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(step=step, params=params, optimizer=jax.eval_shape(optimizer.init, params))
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, shardings)


def initial_state(params: Params, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Step 0: the given parameters and fresh moments, placed by `shardings`."""
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(params)
    return TrainState(step=jax.device_put(jnp.int32(0), shardings.step), params=params, optimizer=moments)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss_config: LossConfig,
    shardings: TrainState,
    seed: int,
    accumulation_steps: int = 1,
) -> TrainStep:
    """The jitted step `(state, fixed, batch) → (state, metrics)`.

    The old state's memory is reused for the new one: after the call the old state is gone. `fixed` are the parameters
    that the model has beside the trained ones (`train.parameters.apart`): they are read, no gradient is taken of them,
    and they stay. Where all are trained it is empty.

    Args:
        graphdef: of the model in training mode, `nnx.split(model)[0]`.
        loss_config: with nothing left open (`train.objectives.language_modelling.resolve_loss`).
        shardings: as `state_shardings` gives them; the new state keeps them.
        seed: of the noise that the model draws, if it does; another one each step, the same after a restart.
        accumulation_steps: micro-batches that a batch is cut into, one after the other in memory.
    """

    def loss_and_stats(
        trained: Params, fixed: Params, batch: Batch, whole: WholeBatch, noise_key: jax.Array
    ) -> tuple[jax.Array, tuple[Loss, RouterStats | None]]:
        out = token_losses(merge(trained, fixed), batch, noise_key)
        loss = training_loss(out, batch, whole, loss_config)
        return loss.total, (loss, None if out.router is None else out.router.stats)

    def token_losses(params: Params, batch: Batch, noise_key: jax.Array) -> TokenLosses:
        return nnx.merge(graphdef, params).token_losses(
            batch.tokens_BT,
            batch.targets_BT,
            segment_ids=batch.segment_ids_BT,
            positions=batch.positions_BT,
            noise_key=noise_key,
        )

    def accumulated(
        trained: Params, fixed: Params, batch: Batch, whole: WholeBatch, noise_key: jax.Array
    ) -> tuple[Params, tuple[Loss, RouterStats | None]]:
        """Gradients, losses and counts of the whole batch, from one micro-batch after the other."""
        parts = (_cut(batch, accumulation_steps), jax.random.split(noise_key, accumulation_steps))
        if loss_config.load_balancing_type == "global_batch" and loss_config.router_aux_loss_coef > 0:
            # How even the load of the whole batch is must be known before any part of it is differentiated. The layers
            # run once more for it; the head, whose result is not read, does not.
            counts = jax.lax.map(lambda part: token_losses(merge(trained, fixed), *part).router.stats, parts)
            whole = dataclasses.replace(whole, router=_summed(counts))

        def add(total: Params, part: tuple[Batch, jax.Array]) -> tuple[Params, tuple[Loss, RouterStats | None]]:
            micro_batch, key = part
            gradients, seen = jax.grad(loss_and_stats, has_aux=True)(trained, fixed, micro_batch, whole, key)
            return jax.tree.map(lambda total, new: total + new.astype(jnp.float32), total, gradients), seen

        zeros = jax.tree.map(lambda param: jnp.zeros(param.shape, jnp.float32), trained)
        zeros = jax.lax.with_sharding_constraint(zeros, shardings.params)
        total, (losses, stats) = jax.lax.scan(add, zeros, parts)
        gradients = jax.tree.map(lambda total, param: total.astype(param.dtype), total, trained)
        return gradients, (jax.tree.map(lambda shares: jnp.sum(shares, axis=0), losses), _summed(stats))

    gradients_of = jax.grad(loss_and_stats, has_aux=True) if accumulation_steps == 1 else accumulated

    def train_step(state: TrainState, fixed: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        noise_key = jax.random.fold_in(jax.random.key(seed), state.step)
        whole = whole_batch(batch, accumulation_steps)
        gradients, (loss, stats) = gradients_of(state.params, fixed, batch, whole, noise_key)
        gradient_norm = optax.tree_utils.tree_norm(gradients)
        metrics = StepMetrics(
            finite=jnp.isfinite(loss.total) & jnp.isfinite(gradient_norm),
            loss=loss.total,
            cross_entropy=loss.cross_entropy,
            z_loss=loss.z,
            balance_loss=loss.balance,
            router_z=loss.router_z,
            gradient_norm=gradient_norm,
            tokens=whole.tokens,
            assignments=jnp.int32(0) if stats is None else jnp.sum(stats.tokens_per_expert),
            dropped=jnp.int32(0) if stats is None else jnp.sum(stats.dropped_per_expert),
            load_imbalance=jnp.float32(0) if stats is None else jnp.max(stats.load_imbalance),
            router=stats,
        )
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if loss_config.router_bias_update_rate > 0:
            model = nnx.merge(graphdef, merge(params, fixed))
            model = update_balancing_biases(model, stats, loss_config.router_bias_update_rate)
            params = select(nnx.to_pure_dict(nnx.state(model)), like=params)
        params, moments = jax.tree.map(
            lambda new, old: jnp.where(metrics.finite, new, old), (params, moments), (state.params, state.optimizer)
        )
        return TrainState(step=state.step + 1, params=params, optimizer=moments), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def _cut(batch: Batch, parts: int) -> Batch:
    """[B,T] to [parts, B / parts, T]: every `parts`-th row, so that each device cuts the rows it has."""
    return jax.tree.map(lambda x_BT: jnp.swapaxes(x_BT.reshape(-1, parts, x_BT.shape[1]), 0, 1), batch)


def _summed(stats: RouterStats | None) -> RouterStats | None:
    """Stats that are stacked over micro-batches as those of one batch."""
    if stats is None:
        return None
    return sum_stats([jax.tree.map(operator.itemgetter(part), stats) for part in range(len(stats.tokens))])


def make_eval_step(graphdef: nnx.GraphDef) -> EvalStep:
    """The jitted `(params, batch) → HeldoutSum`; `graphdef` is of the model in eval mode, which drops no token."""

    @jax.jit
    def eval_step(params: Params, batch: Batch) -> HeldoutSum:
        model = nnx.merge(graphdef, params)
        out = model.token_losses(
            batch.tokens_BT, batch.targets_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT
        )
        return HeldoutSum(
            loss=sum_over_targets(out.losses, batch), targets=jnp.sum(batch.target_mask_BT, dtype=jnp.int32)
        )

    return eval_step


def heldout_loss(eval_step: EvalStep, params: Params, batches: list[Batch]) -> float:
    """The mean cross entropy per target, in nats, over all batches."""
    sums = [jax.device_get(eval_step(params, batch)) for batch in batches]
    return float(sum(part.loss for part in sums) / sum(part.targets for part in sums))
