"""Dropless dispatch: rows sorted by expert, ragged groups multiplied, the results weighted and put back.

Over the `expert` axis there are two ways to bring a token to its experts, with the same result:

- *gather*: every token goes to every device of the axis, each device runs its own experts, a reduce-scatter sums what
  they return. It sends X - 1 times the tokens of a device (X the size of the axis), however many experts they chose.
- *all-to-all*: every row goes to its expert's device and back. It sends A * buffer_factor * (X - 1) / X times the
  tokens, so it is the cheaper one on a long axis.

Shapes are fixed when the program is compiled, so a device has room for a fixed number of rows: `buffer_factor` times a
balanced load, or the worst case. Rows beyond it are dropped, the last tokens first, and reported. On one device the
worst case is the balanced load, and nothing is ever dropped.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import Exchange, ExecutionConfig
from qwen_moe_jax.moe.dispatch.rows import from_rows, plan_rows, ranks, sort_rows, to_rows
from qwen_moe_jax.moe.experts import EXCHANGED, Experts, ExpertWeights
from qwen_moe_jax.moe.kernels.grouped_matmul import buffer_rows
from qwen_moe_jax.moe.router import Routing
from qwen_moe_jax.moe.stats import Drops, no_drops
from qwen_moe_jax.sharding.rules import BATCH, with_single_axes


def run(
    hidden_BTD: jax.Array, routing: Routing, experts: Experts, execution: ExecutionConfig
) -> tuple[jax.Array, Drops]:
    """Applies the chosen experts.

    Args:
        hidden_BTD: tokens, B over `BATCH`.
        routing: their experts and weights.
        experts: the layer's experts.
        execution: `buffer_factor`, `exchange` and `grouped_matmul` are read.

    Returns:
        The weighted sum [B, T, D], and what did not fit into the buffers.
    """
    batch, length, width = hidden_BTD.shape
    chosen = routing.experts_BTA.shape[-1]
    local = functools.partial(
        _gathered if execution.exchange == "all_gather" else _exchanged,
        num_experts=routing.probs_BTE.shape[-1],
        execution=execution,
    )

    def per_device(hidden_BTD, experts_BTA, weights_BTA, token_mask_BT, expert_weights):
        mixed_TD, fits_TA = local(
            hidden_BTD.reshape(-1, width),
            jnp.where(token_mask_BT[..., None], experts_BTA, routing.probs_BTE.shape[-1]).reshape(-1, chosen),
            weights_BTA.reshape(-1, chosen),
            expert_weights,
        )
        return mixed_TD.reshape(1, -1, length, width), fits_TA.reshape(-1, length, chosen)

    tokens = P(BATCH, None, None)
    weights = experts.weights()
    inputs = (hidden_BTD, routing.experts_BTA, routing.weights_BTA, routing.token_mask_BT, weights)
    specs = jax.tree.map(with_single_axes, (tokens, tokens, tokens, P(BATCH, None), weights.specs()))
    # Partial sums over `tensor` leave as a leading axis and are summed outside, where the sum and its gradient are in
    # the types. Kernels do not say over which axes their results vary, so that is not checked.
    mixed_XBTD, fits_BTA = jax.shard_map(
        per_device,
        in_specs=specs,
        out_specs=(P("tensor", BATCH, None, None), tokens),
        check_vma=False,
    )(*jax.tree.map(jax.sharding.reshard, inputs, specs))
    no_room_BTA = routing.token_mask_BT[..., None] & ~fits_BTA
    return jnp.sum(mixed_XBTD, axis=0), Drops(
        by_capacity_BTA=no_drops(routing).by_capacity_BTA, by_buffer_BTA=no_room_BTA
    )


def device_rows(tokens: int, chosen: int, num_experts: int, num_shards: int, buffer_factor: float | None) -> int:
    """Rows that a device of an `expert` axis of `num_shards` makes room for, of those that `tokens` tokens may send it."""
    worst = tokens * min(chosen, num_experts // num_shards)
    if buffer_factor is None:
        return worst
    return min(worst, math.ceil(buffer_factor * tokens * chosen / num_shards))


def _gathered(
    x_TD: jax.Array,
    experts_TA: jax.Array,
    weights_TA: jax.Array,
    experts: ExpertWeights,
    *,
    num_experts: int,
    execution: ExecutionConfig,
) -> tuple[jax.Array, jax.Array]:
    """One device's tokens through experts anywhere: all tokens of the axis come here, and their sums go back.

    Padding has the expert `num_experts`. Returns the sums [T, D] and which assignments fit, bool [T, A].
    """
    num_shards, here = jax.lax.axis_size("expert"), jax.lax.axis_index("expert")
    own = num_experts // num_shards
    tokens, chosen = experts_TA.shape
    x_TD, experts_TA, weights_TA = (checkpoint_name(_from_all(x), EXCHANGED) for x in (x_TD, experts_TA, weights_TA))

    room = device_rows(tokens * num_shards, chosen, num_experts, num_shards, execution.buffer_factor)
    fits_TA = _within(room, experts_TA // own, num_shards, worst=tokens * num_shards * min(chosen, own))
    expert_here_TA = experts_TA - here * own
    mine_TA = fits_TA & (expert_here_TA >= 0) & (expert_here_TA < own)
    expert_here_TA = jnp.where(mine_TA, expert_here_TA, own)
    if len(x_TD) == 1 and execution.grouped_matmul == "blocks" and experts.lies_ready(x_TD):
        return experts.on_token(x_TD, expert_here_TA[0], weights_TA[0]), fits_TA
    plan, sizes_E = sort_rows(expert_here_TA, own, buffer_rows(room))
    y_RD = experts.on_rows(to_rows(x_TD, plan), sizes_E, execution.grouped_matmul)
    mixed_TD = _to_all(from_rows(y_RD, weights_TA, plan))
    return mixed_TD, jax.lax.dynamic_slice_in_dim(fits_TA, here * tokens, tokens)


def _exchanged(
    x_TD: jax.Array,
    experts_TA: jax.Array,
    weights_TA: jax.Array,
    experts: ExpertWeights,
    *,
    num_experts: int,
    execution: ExecutionConfig,
) -> tuple[jax.Array, jax.Array]:
    """The same, each row sent to its expert's device and back."""
    num_shards = jax.lax.axis_size("expert")
    own = num_experts // num_shards
    tokens, chosen = experts_TA.shape
    send = functools.partial(exchange_rows, kind=execution.exchange)

    # Rows [X, S]: those for device x, sorted by expert, in the x-th stretch.
    room = device_rows(tokens, chosen, num_experts, num_shards, execution.buffer_factor)
    fits_TA = _within(room, experts_TA // own, num_shards, worst=tokens * min(chosen, own))
    kept_TA = jnp.where(fits_TA, experts_TA, num_experts)
    sorted_plan, sizes_E = sort_rows(kept_TA, num_experts, experts_TA.size)
    sizes_XE = sizes_E.reshape(num_shards, own)
    sent_X = jnp.sum(sizes_XE, axis=1)
    first_X = jnp.cumsum(sent_X) - sent_X
    device_TA = jnp.minimum(kept_TA // own, num_shards - 1)
    row_TA = device_TA * room + sorted_plan.row_TA - first_X[device_TA]
    outgoing = plan_rows(jnp.where(kept_TA < num_experts, row_TA, num_shards * room), num_shards * room)
    arriving_XE = checkpoint_name(jax.lax.all_to_all(sizes_XE, "expert", 0, 0, tiled=True), EXCHANGED)
    arriving_X = jnp.sum(arriving_XE, axis=1)
    rows_RD = checkpoint_name(send(to_rows(x_TD, outgoing), sent_X, arriving_X), EXCHANGED)

    # Each stretch that arrived is sorted by expert: sort them together.
    place_S = jnp.arange(room)
    last_XE = jnp.cumsum(arriving_XE, axis=1)
    expert_XS = jnp.sum(place_S[None, :, None] >= last_XE[:, None, :], axis=-1, dtype=jnp.int32)
    together, own_sizes_E = sort_rows(expert_XS.reshape(-1, 1), own, buffer_rows(num_shards * room))
    y_RD = experts.on_rows(to_rows(rows_RD, together), own_sizes_E, execution.grouped_matmul)
    y_RD = from_rows(y_RD, jnp.ones((num_shards * room, 1), y_RD.dtype), together)
    y_RD = checkpoint_name(send(y_RD, arriving_X, sent_X), EXCHANGED)
    return from_rows(y_RD, weights_TA, outgoing), fits_TA


def exchange_rows(rows_RD: jax.Array, sent_X: jax.Array, arriving_X: jax.Array, *, kind: Exchange) -> jax.Array:
    """Sends stretch x of the rows to device x of the `expert` axis; stretch x of the result came from device x.

    Args:
        rows_RD: [X * S, D]; of stretch x, the first `sent_X[x]` rows mean something.
        sent_X, arriving_X: int32; how many rows go to, and come from, each device.
        kind: "ragged_all_to_all" puts only those on the wire; what lies behind them is then zero.
    """
    if kind == "all_to_all":
        return jax.lax.all_to_all(rows_RD, "expert", 0, 0, tiled=True)
    room = len(rows_RD) // len(sent_X)
    starts_X = jnp.arange(len(sent_X), dtype=jnp.int32) * room
    there_X = jnp.full_like(starts_X, room) * jax.lax.axis_index("expert")
    return jax.lax.ragged_all_to_all(
        rows_RD, jnp.zeros_like(rows_RD), starts_X, sent_X, there_X, arriving_X, axis_name="expert"
    )


def _from_all(x_TD: jax.Array) -> jax.Array:
    """The tokens of all devices of the `expert` axis. XLA would copy them where there is only one."""
    alone = jax.lax.axis_size("expert") == 1
    return x_TD if alone else jax.lax.all_gather(x_TD, "expert", axis=0, tiled=True)


def _to_all(x_TD: jax.Array) -> jax.Array:
    """The sum over the devices of the `expert` axis, to each its own tokens'."""
    alone = jax.lax.axis_size("expert") == 1
    return x_TD if alone else jax.lax.psum_scatter(x_TD, "expert", scatter_dimension=0, tiled=True)


def _within(room: int, device_TA: jax.Array, num_shards: int, *, worst: int) -> jax.Array:
    """Which assignments are among the first `room` for their device, in the order of the tokens; padding is not."""
    if room >= worst:
        return device_TA < num_shards
    rank_TA = ranks(device_TA.reshape(-1), num_shards).reshape(device_TA.shape)
    return (device_TA < num_shards) & (rank_TA < room)
