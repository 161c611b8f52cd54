"""The two jitted functions of training: the train step, and the eval step of the held-out loss."""

import dataclasses
import functools
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
from qwen_moe_jax.moe.stats import RouterStats, sum_stats
from train import adamw_by_layer, adamw_cpu
from train.config import LossConfig
from train.ema import first_average, next_average
from train.objectives import language_modelling
from train.objectives.contract import LossTerms, Objective, WholeBatch
from train.offload import as_stored, on_devices
from train.parameters import Params, merge, select
from train.per_matrix import PerMatrixState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; it is what a checkpoint holds.

    Attributes:
        step: the number of finished steps, int32 scalar.
        params: the trained parameters.
        optimizer: the optimizer's state, the moments of the trained parameters.
        ema: the moving average of the trained parameters (`train.ema`), float32; None in a run without one.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState
    ema: Params | None = None

    @property
    def evaluated(self) -> Params:
        """What is evaluated, sampled from and exported: the average in the parameters' dtypes, or without one they."""
        if self.ema is None:
            return self.params
        return jax.tree.map(lambda mean, param: mean.astype(param.dtype), self.ema, self.params)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step: float32 scalars, int32 counts, and a bool. Those of experts are 0 for a dense model.

    Attributes:
        finite: whether loss and gradient norm are finite; if not, the step changed nothing but the step number.
        loss: what is minimised: the terms times their coefficients.
        terms: those of the objective by name, without coefficients; of language modelling, `cross_entropy` (the mean
            over the targets, in nats), `z_loss` (the mean squared logsumexp of the logits), `balance_loss`, `router_z`
            (the z-loss of the router's logits) and, where it is trained, `mtp_loss` (the next-token head's) and
            `mtp_balance_loss` (of its router).
        gradient_norm: over all trained parameters, before clipping.
        tokens: real tokens, without padding.
        learned_tokens: the targets of the loss; a step without any changes nothing but the step number.
        assignments: (token, expert) pairs that the routers chose, over all layers.
        dropped: the assignments without a capacity slot.
        load_imbalance: the largest load of an expert over the mean load, in the layer where that is largest.
        router: the statistics of each layer; None for a dense model.
    """

    finite: jax.Array
    loss: jax.Array
    terms: dict[str, jax.Array]
    gradient_norm: jax.Array
    tokens: jax.Array
    learned_tokens: jax.Array
    assignments: jax.Array
    dropped: jax.Array
    load_imbalance: jax.Array
    router: RouterStats | None


TrainStep = Callable[[TrainState, Params, Any], tuple[TrainState, StepMetrics]]
EvalStep = Callable[[Params, Any], Any]


def state_shardings(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shardings of a train state: moments are sharded as their parameters, counters are replicated.

    Without them, a jitted `optimizer.init` would choose other shardings, since zeros depend on no input.

    Args:
        params: the trained parameters: arrays, or `jax.ShapeDtypeStruct`s with shardings.
    """
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda array: array.sharding, params)
    moments = jax.eval_shape(optimizer.init, params)

    def is_own(state: Any) -> bool:
        return isinstance(state, PerMatrixState)

    if any(map(is_own, jax.tree.leaves(moments, is_leaf=is_own))):
        moments = jax.tree.map(
            lambda state: state.shardings(params) if is_own(state) else replicated, moments, is_leaf=is_own
        )
    else:
        moments = optax.tree_utils.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            moments,
            shardings,
            transform_non_params=lambda _: replicated,
        )
    return TrainState(step=replicated, params=shardings, optimizer=moments)


def abstract_state(params: Params, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """The abstract state, for `Checkpoints.restore` and for compilation; nothing is allocated.

    Args:
        params: the trained parameters, as `jax.ShapeDtypeStruct`s with shardings.
    """
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    ema = None if shardings.ema is None else jax.eval_shape(first_average, params)
    shapes = TrainState(step=step, params=params, optimizer=jax.eval_shape(optimizer.init, params), ema=ema)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, shardings)


def initial_state(params: Params, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """The state at step 0: the given parameters, moments of zero sharded by `shardings`, and their average there."""
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(params)
    ema = None if shardings.ema is None else jax.jit(first_average, out_shardings=shardings.ema)(params)
    return TrainState(step=jax.device_put(jnp.int32(0), shardings.step), params=params, optimizer=moments, ema=ema)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss_config: LossConfig,
    shardings: TrainState,
    seed: int,
    accumulation_steps: int = 1,
    objective: Objective = language_modelling,
    ema_decay: float | None = None,
    compiler_options: dict[str, str] | None = None,
) -> TrainStep:
    """The jitted step `(state, fixed, batch) → (state, metrics)`.

    The state is donated: its memory is reused for the new one. `fixed` are the parameters that are not trained
    (`train.parameters.partition`); no gradient is taken with respect to them. It is empty where all are trained.

    Args:
        graphdef: of the model in training mode, `nnx.split(model)[0]`.
        optimizer: of the trained parameters.
        loss_config: resolved by the objective's `resolve_loss`.
        shardings: of the old and the new state, from `state_shardings`.
        seed: of the router's jitter, which depends on (seed, step) only, and so is the same after a restart.
        accumulation_steps: the number of micro-batches, which are in memory one after the other.
        objective: what is minimised (`train.objectives`).
        ema_decay: of the average, where the state has one.
        compiler_options: of XLA, by name; None leaves all of them as they are.
    """

    def loss_and_stats(
        trained: Params, fixed: Params, batch: Any, whole: WholeBatch, noise_key: jax.Array
    ) -> tuple[jax.Array, tuple[LossTerms, RouterStats | None]]:
        out = forward(merge(trained, fixed), batch, noise_key)
        loss = objective.training_loss(out, batch, whole, loss_config)
        return loss.total, (loss, None if out.router is None else out.router.stats)

    def forward(params: Params, batch: Any, noise_key: jax.Array) -> Any:
        return objective.forward(nnx.merge(graphdef, params), batch, noise_key)

    def accumulated(
        trained: Params, fixed: Params, batch: Any, whole: WholeBatch, noise_key: jax.Array
    ) -> tuple[Params, tuple[LossTerms, RouterStats | None]]:
        """Gradients, losses and router statistics of the whole batch, summed over its micro-batches."""
        parts = (_micro_batches(batch, accumulation_steps), jax.random.split(noise_key, accumulation_steps))
        if loss_config.load_balancing_type == "global_batch" and loss_config.router_aux_loss_coef > 0:
            # The load of the whole batch must be known before any micro-batch is differentiated: one more forward pass
            # through the layers. XLA removes the head, since its result is not used.
            counts = jax.lax.map(lambda part: forward(merge(trained, fixed), *part).router.stats, parts)
            whole = dataclasses.replace(whole, router=_summed(counts))

        def add(total: Params, part: tuple[Any, jax.Array]) -> tuple[Params, tuple[LossTerms, RouterStats | None]]:
            micro_batch, key = part
            gradients, seen = jax.grad(loss_and_stats, has_aux=True)(trained, fixed, micro_batch, whole, key)
            return jax.tree.map(lambda total, new: total + new.astype(jnp.float32), total, gradients), seen

        zeros = jax.tree.map(lambda param: jnp.zeros(param.shape, jnp.float32), trained)
        zeros = jax.lax.with_sharding_constraint(zeros, shardings.params)
        total, (losses, stats) = jax.lax.scan(add, zeros, parts)
        gradients = jax.tree.map(lambda total, param: total.astype(param.dtype), total, trained)
        return gradients, (jax.tree.map(lambda shares: jnp.sum(shares, axis=0), losses), _summed(stats))

    gradients_of = jax.grad(loss_and_stats, has_aux=True) if accumulation_steps == 1 else accumulated

    def train_step(state: TrainState, fixed: Params, batch: Any) -> tuple[TrainState, StepMetrics]:
        noise_key = jax.random.fold_in(jax.random.key(seed), state.step)
        whole = objective.whole_batch(batch, accumulation_steps)
        gradients, (loss, stats) = gradients_of(state.params, fixed, batch, whole, noise_key)
        gradient_norm = optax.tree_utils.tree_norm(gradients)
        metrics = StepMetrics(
            finite=jnp.isfinite(loss.total) & jnp.isfinite(gradient_norm),
            loss=loss.total,
            terms=loss.terms,
            gradient_norm=gradient_norm,
            tokens=whole.tokens,
            learned_tokens=whole.targets,
            assignments=jnp.int32(0) if stats is None else jnp.sum(stats.tokens_per_expert, dtype=jnp.int32),
            dropped=jnp.int32(0) if stats is None else jnp.sum(stats.dropped_per_expert, dtype=jnp.int32),
            load_imbalance=jnp.float32(0) if stats is None else jnp.max(stats.load_imbalance),
            router=stats,
        )
        is_update = metrics.finite & (whole.targets > 0)
        in_place = adamw_cpu.in_place(optimizer, shardings.params, state.params)
        arrays = gradients, gradient_norm, state.params
        is_kept = any(jax.tree.leaves(in_place))
        by_layer = not is_kept and adamw_by_layer.offloaded(optimizer, shardings.optimizer)
        if not by_layer:
            state = dataclasses.replace(state, optimizer=on_devices(state.optimizer, shardings.optimizer))
        if is_kept:
            params, moments = adamw_cpu.step(optimizer, *arrays, state.optimizer, is_update, in_place)
        elif by_layer:
            params, moments = adamw_by_layer.step(optimizer, *arrays, state.optimizer, is_update, shardings.optimizer)
            in_place, is_kept = optimizer.moves(params), True
        else:
            updates, moments = optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        if loss_config.router_bias_update_rate > 0:
            model = nnx.merge(graphdef, merge(params, fixed))
            model = update_balancing_biases(model, stats, loss_config.router_bias_update_rate)
            params = select(nnx.to_pure_dict(nnx.state(model)), like=params)
        ema = None if ema_decay is None else next_average(state.ema, params, state.step + 1, ema_decay)
        new = TrainState(step=state.step, params=params, optimizer=moments, ema=ema)
        # What was moved in place is the old array where there is no update.
        is_done = dataclasses.replace(
            jax.tree.map(lambda _: False, new), params=in_place, optimizer=jax.tree.map(lambda _: is_kept, moments)
        )
        kept = jax.tree.map(lambda done, new, old: new if done else jnp.where(is_update, new, old), is_done, new, state)
        stored = kept.optimizer if by_layer else as_stored(kept.optimizer, shardings.optimizer)
        return dataclasses.replace(kept, step=state.step + 1, optimizer=stored), metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, shardings.step),
        compiler_options=compiler_options,
    )


def _micro_batches(batch: Any, count: int) -> Any:
    """[B, …] to [count, B / count, …]. A micro-batch has every `count`-th row, so that no row changes its device."""
    return jax.tree.map(lambda x_B: jnp.swapaxes(x_B.reshape(-1, count, *x_B.shape[1:]), 0, 1), batch)


def _summed(stats: RouterStats | None) -> RouterStats | None:
    """Statistics that are stacked over micro-batches, as those of one batch."""
    if stats is None:
        return None
    return sum_stats([jax.tree.map(operator.itemgetter(part), stats) for part in range(len(stats.tokens))])


def make_eval_step(graphdef: nnx.GraphDef, objective: Objective = language_modelling) -> EvalStep:
    """The jitted `(params, batch) → sums`; `graphdef` is of the model in eval mode, which drops no token."""

    @jax.jit
    def eval_step(params: Params, batch: Any) -> Any:
        return objective.heldout_sum(objective.forward(nnx.merge(graphdef, params), batch), batch)

    return eval_step


def heldout_metrics(
    eval_step: EvalStep, params: Params, batches: list[Any], objective: Objective = language_modelling
) -> dict[str, float]:
    """The objective's metrics over all batches by name; `loss` is one of them."""
    sums = [jax.device_get(eval_step(params, batch)) for batch in batches]
    return objective.heldout_metrics(functools.reduce(lambda one, other: jax.tree.map(operator.add, one, other), sums))
