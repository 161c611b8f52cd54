"""The two compiled functions of training: one step of the optimizer, one look at the held-out loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_moe_jax.model.balancing import update_balancing_biases
from qwen_moe_jax.moe.stats import RouterStats
from train.config import LossConfig
from train.data import Batch
from train.loss import Loss, cross_entropy_sum, training_loss

Params = dict[str, Any]
"""Nested dict of arrays, named as the model's attributes; `nnx.merge(graphdef, params)` is the model again."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes from step to step. `step` counts the finished ones, int32 scalar."""

    step: jax.Array
    params: Params
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMetrics:
    """What one step has to say: float32 scalars, and int32 for the counts.

    `loss` is what is minimised: `cross_entropy`, and the losses of the router times their coefficients. `balance_loss`
    and `router_z` are unscaled. `assignments` counts (token, expert) pairs over all layers that the router asked for,
    `dropped` those of them that found no room; `load_imbalance` is the largest load of an expert over the mean load, in
    the layer where that is largest. All of these are 0 for a dense model. `router` is where they come from, layer by
    layer; a dense model has none.
    """

    loss: jax.Array
    cross_entropy: jax.Array
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


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
EvalStep = Callable[[Params, Batch], HeldoutSum]


def state_shardings(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where everything lies: moments as their parameters, counters on every device.

    Left to itself, a jitted `optimizer.init` puts the moments wherever it likes, since zeros depend on no input.

    Args:
        params: placed arrays, or shapes with shardings.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
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


def describe_state(params: Params, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, for `Checkpoints.restore_latest`; nothing is allocated.

    Args:
        params: shapes with shardings.
    """
    step = jax.ShapeDtypeStruct((), jnp.int32)
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
) -> TrainStep:
    """The jitted step `(state, batch) → (state, metrics)`.

    The old state's memory is reused for the new one: after the call the old state is gone.

    Args:
        graphdef: of the model in training mode, `nnx.split(model)[0]`.
        loss_config: with nothing left open (`train.loss.resolve_loss`).
        shardings: as `state_shardings` gives them; the new state keeps them.
        seed: of the noise that the model draws, if it does; another one each step, the same after a restart.
    """

    def loss_and_stats(
        params: Params, batch: Batch, noise_key: jax.Array
    ) -> tuple[jax.Array, tuple[Loss, RouterStats | None]]:
        model = nnx.merge(graphdef, params)
        out = model(
            batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT, noise_key=noise_key
        )
        losses, stats = (None, None) if out.router is None else (out.router.losses, out.router.stats)
        loss = training_loss(out.logits, batch, losses, loss_config)
        return loss.total, (loss, stats)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        noise_key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, (loss, stats) = jax.grad(loss_and_stats, has_aux=True)(state.params, batch, noise_key)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        metrics = StepMetrics(
            loss=loss.total,
            cross_entropy=loss.cross_entropy,
            balance_loss=loss.balance,
            router_z=loss.router_z,
            gradient_norm=optax.tree_utils.tree_norm(gradients),
            tokens=jnp.sum(batch.segment_ids_BT > 0, dtype=jnp.int32),
            assignments=jnp.int32(0) if stats is None else jnp.sum(stats.tokens_per_expert),
            dropped=jnp.int32(0) if stats is None else jnp.sum(stats.dropped_per_expert),
            load_imbalance=jnp.float32(0) if stats is None else jnp.max(stats.load_imbalance),
            router=stats,
        )
        params = optax.apply_updates(state.params, updates)
        if loss_config.balancing_bias_rate > 0:
            model = update_balancing_biases(nnx.merge(graphdef, params), stats, loss_config.balancing_bias_rate)
            params = nnx.to_pure_dict(nnx.state(model))
        return TrainState(step=state.step + 1, params=params, optimizer=moments), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def make_eval_step(graphdef: nnx.GraphDef) -> EvalStep:
    """The jitted `(params, batch) → HeldoutSum`; `graphdef` is of the model in eval mode, which drops no token."""

    @jax.jit
    def eval_step(params: Params, batch: Batch) -> HeldoutSum:
        model = nnx.merge(graphdef, params)
        out = model(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT)
        return HeldoutSum(*cross_entropy_sum(out.logits, batch))

    return eval_step


def heldout_loss(eval_step: EvalStep, params: Params, batches: list[Batch]) -> float:
    """The mean cross entropy per target, in nats, over all batches."""
    sums = [jax.device_get(eval_step(params, batch)) for batch in batches]
    return float(sum(part.loss for part in sums) / sum(part.targets for part in sums))
