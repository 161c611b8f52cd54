"""Capacity-based dispatch: tokens are carried to a fixed number of places per expert, and back.

GShard (Lepikhin et al., 2020, arXiv 2006.16668): tokens are routed in groups; in each group every expert has `capacity`
places. Over the `expert` axis the exchange is one all-to-all there and one back. Assignments that find their expert
full are dropped (the token's other experts still count), and are counted. Groups never span devices, and padding takes
no place.

Who is dropped (`drop_policy`): places go to the tokens of a group in order, so that its last tokens go without ("position"),
or to those whose weight for the expert is largest ("probs"; Riquelme et al., 2021, arXiv 2106.05974).

How tokens move (`capacity_by`): by einsums with one-hot masks, which every device multiplies at full speed and which
cost 2/3 * group_size / F of the experts' own matmuls; or by index, as gathers, at no FLOPs. Same places, same result.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import DropPolicy, ExecutionConfig
from qwen_moe_jax.moe.dispatch.rows import RowPlan, from_rows, plan_rows, ranks, to_rows
from qwen_moe_jax.moe.experts import EXCHANGED, SLOTS, Experts
from qwen_moe_jax.moe.router import Routing
from qwen_moe_jax.moe.stats import Drops, no_drops
from qwen_moe_jax.sharding.rules import BATCH

#: Places [E, G, C, D] as the devices of the tokens fill them.
TOKEN_SLOTS = P(None, BATCH, None, None)


def expert_capacity(
    group_size: int, num_experts_per_tok: int, num_experts: int, capacity_factor: float, min_capacity: int
) -> int:
    """Places per expert and group: a balanced share times the factor, from `min_capacity` to one for every token."""
    share = math.ceil(group_size * num_experts_per_tok / num_experts * capacity_factor)
    return min(max(share, min_capacity), group_size)


def run(
    hidden_BTD: jax.Array, routing: Routing, experts: Experts, execution: ExecutionConfig
) -> tuple[jax.Array, Drops]:
    """Applies the chosen experts, as far as they have places.

    Args:
        hidden_BTD: tokens, B over `BATCH`.
        routing: their experts and weights.
        experts: the layer's experts.
        execution: `capacity_factor`, `min_capacity`, `group_size`, `drop_policy` and `capacity_by` are read. Fewer tokens on
            a device than `group_size` are one group.

    Returns:
        The weighted sum [B, T, D], and who found no place.
    """
    batch, length, _ = hidden_BTD.shape
    num_experts, chosen = routing.probs_BTE.shape[-1], routing.experts_BTA.shape[-1]
    local_tokens = batch * length // _num_shards(hidden_BTD)
    group_size = min(execution.group_size, local_tokens)
    capacity = expert_capacity(group_size, chosen, num_experts, execution.capacity_factor, execution.min_capacity)
    slot_GgA = _assign(
        _into_groups(routing.experts_BTA, group_size),
        _into_groups(routing.weights_BTA, group_size),
        _into_groups(routing.token_mask_BT, group_size),
        num_experts,
        execution.drop_policy,
    )
    slot_BTA = _out_of_groups(slot_GgA, batch, length)
    carry = _by_einsum if execution.capacity_by == "einsum" else _by_index
    combined_BTD = carry(hidden_BTD, routing, slot_GgA, experts, capacity=capacity)
    full_BTA = routing.token_mask_BT[..., None] & (slot_BTA >= capacity)
    return combined_BTD, dataclasses.replace(no_drops(routing), by_capacity_BTA=full_BTA)


def _assign(
    experts_GgA: jax.Array, weights_GgA: jax.Array, token_mask_Gg: jax.Array, num_experts: int, drop_policy: DropPolicy
) -> jax.Array:
    """The place of every assignment within its expert, int32 [G, g, A]: how many assignments go before it.

    Whether it is one of the expert's `capacity` places is for the caller to see.
    """

    def of_group(experts_gA: jax.Array, weights_gA: jax.Array, token_mask_g: jax.Array) -> jax.Array:
        keys_gA = jnp.where(token_mask_g[:, None], experts_gA, num_experts)
        first_gA = None if drop_policy == "position" else -weights_gA.astype(jnp.float32).reshape(-1)
        return ranks(keys_gA.reshape(-1), num_experts, first_gA).reshape(experts_gA.shape)

    tokens, choices = P(BATCH, None), P(BATCH, None, None)
    local = jax.shard_map(jax.vmap(of_group), in_specs=(choices, choices, tokens), out_specs=choices, check_vma=False)
    return local(experts_GgA, jax.lax.stop_gradient(weights_GgA), token_mask_Gg)


def _by_einsum(
    hidden_BTD: jax.Array, routing: Routing, slot_GgA: jax.Array, experts: Experts, *, capacity: int
) -> jax.Array:
    """Dispatch and combine as products with masks [G, g, E, C]."""
    batch, length, _ = hidden_BTD.shape
    groups, group_size, _ = slot_GgA.shape
    dtype, num_experts = hidden_BTD.dtype, routing.probs_BTE.shape[-1]

    def group(x: jax.Array) -> jax.Array:
        return _into_groups(x, group_size)

    # A one-hot row of zeros is an assignment without a place. Two small masks make the large one in a single matmul:
    # an integer mask [tokens, experts, capacity + 1], as the textbook has it, is many times larger.
    expert_GgAE = jax.nn.one_hot(group(routing.experts_BTA), num_experts, dtype=dtype)
    expert_GgAE = expert_GgAE * group(routing.token_mask_BT)[..., None, None]
    slot_GgAC = jax.nn.one_hot(slot_GgA, capacity, dtype=dtype)

    # The dispatch einsum multiplies every token with zeros: a NaN or infinity would reach its whole group. The token's
    # own result is NaN all the same, through the router's weights.
    sound_BT1 = jnp.isfinite(hidden_BTD).all(axis=-1, keepdims=True)
    x_GgD = group(jnp.where(sound_BT1, hidden_BTD, 0))
    mask_GgEC = jnp.einsum("GgAE,GgAC->GgEC", expert_GgAE, slot_GgAC)
    y_EGCD = _through_experts(jnp.einsum("GgEC,GgD->EGCD", mask_GgEC, x_GgD), experts)

    weights_GgA = group(routing.weights_BTA)
    weighted_GgAE = expert_GgAE.astype(weights_GgA.dtype) * weights_GgA[..., None]
    mask_GgEC = jnp.einsum("GgAE,GgAC->GgEC", weighted_GgAE, slot_GgAC.astype(weights_GgA.dtype))
    combined_GgD = jnp.einsum("GgEC,EGCD->GgD", mask_GgEC, y_EGCD)
    return _out_of_groups(combined_GgD, batch, length)


def _by_index(
    hidden_BTD: jax.Array, routing: Routing, slot_GgA: jax.Array, experts: Experts, *, capacity: int
) -> jax.Array:
    """Dispatch and combine as gathers: the same places, as rows [E * G * C] of each device."""
    batch, length, width = hidden_BTD.shape
    num_experts, chosen = routing.probs_BTE.shape[-1], routing.experts_BTA.shape[-1]
    groups_here = slot_GgA.shape[0] // _num_shards(hidden_BTD)
    rows = num_experts * groups_here * capacity

    def fill(hidden_BTD, experts_BTA, token_mask_BT, slot_GgA):
        slot_TA = slot_GgA.reshape(-1, chosen)[: token_mask_BT.size]
        group_T1 = (jnp.arange(token_mask_BT.size) // slot_GgA.shape[1])[:, None]
        row_TA = (experts_BTA.reshape(-1, chosen) * groups_here + group_T1) * capacity + slot_TA
        has_place_TA = token_mask_BT.reshape(-1, 1) & (slot_TA < capacity)
        plan = plan_rows(jnp.where(has_place_TA, row_TA, rows), rows)
        x_RD = to_rows(hidden_BTD.reshape(-1, width), plan)
        return x_RD.reshape(num_experts, groups_here, capacity, width), plan

    def empty(y_EGCD, weights_BTA, plan):
        combined_TD = from_rows(y_EGCD.reshape(rows, width), weights_BTA.reshape(-1, chosen), plan)
        return combined_TD.reshape(-1, length, width)

    tokens = P(BATCH, None, None)
    plan_spec = RowPlan(assignment_R=P(BATCH), row_TA=P(BATCH, None))
    x_EGCD, plan = jax.shard_map(
        fill, in_specs=(tokens, tokens, P(BATCH, None), tokens), out_specs=(TOKEN_SLOTS, plan_spec)
    )(hidden_BTD, routing.experts_BTA, routing.token_mask_BT, slot_GgA)
    y_EGCD = _through_experts(x_EGCD, experts)
    return jax.shard_map(empty, in_specs=(TOKEN_SLOTS, tokens, plan_spec), out_specs=tokens)(
        y_EGCD, routing.weights_BTA, plan
    )


def _through_experts(x_EGCD: jax.Array, experts: Experts) -> jax.Array:
    """The places to the devices of their experts (an all-to-all), through them, and back (another)."""
    x_EGCD = checkpoint_name(jax.sharding.reshard(x_EGCD, SLOTS), EXCHANGED)
    y_EGCD = experts.per_expert(x_EGCD)
    return checkpoint_name(jax.sharding.reshard(y_EGCD, TOKEN_SLOTS), EXCHANGED)


def _num_shards(x: jax.Array) -> int:
    """Over how many devices the tokens are split."""
    shape = jax.typeof(x).sharding.mesh.shape
    return math.prod(shape[axis] for axis in BATCH)


def _into_groups(x: jax.Array, group_size: int) -> jax.Array:
    """[B, T, …] to [G, g, …]: each device fills groups with its own tokens, the last one up with zeros (padding)."""

    def local(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, *x.shape[2:])
        missing = -len(rows) % group_size
        rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
        return rows.reshape(-1, group_size, *rows.shape[1:])

    spec = P(BATCH, *[None] * (x.ndim - 1))
    return jax.shard_map(local, in_specs=spec, out_specs=spec)(x)


def _out_of_groups(x_GgD: jax.Array, batch: int, length: int) -> jax.Array:
    """The inverse of `_into_groups`."""
    local_batch = batch // _num_shards(x_GgD)

    def local(x_GgD: jax.Array) -> jax.Array:
        rows = x_GgD.reshape(-1, x_GgD.shape[-1])
        return rows[: local_batch * length].reshape(local_batch, length, -1)

    spec = P(BATCH, None, None)
    return jax.shard_map(local, in_specs=spec, out_specs=spec)(x_GgD)
