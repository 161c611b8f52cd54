"""Capacity-based dispatch: every expert has a fixed number of slots per group of tokens, the one dispatcher that drops.

GShard (Lepikhin et al., 2020, arXiv 2006.16668): tokens are routed in groups; in each group every expert has `capacity`
slots. Over the `expert` axis the exchange is one all-to-all there and one back. Assignments that find their expert
full are dropped (the token's other experts still count), and are counted. Groups never span devices, and padding takes
no slot.

Which are dropped (`drop_policy`): slots go to the tokens of a group in order, so that its last tokens are dropped
("position"), or to those whose weight for the expert is largest ("probs"; Riquelme et al., 2021, arXiv 2106.05974).

How tokens move (`capacity_by`): by einsums with one-hot masks, which every device multiplies at full speed and which
cost 2/3 * group_size / F of the experts' own matmuls; or by index, as gathers, at no FLOPs. Same slots, same result.
Slots keep shapes fixed, for exchanges and batched matmuls. A single CPU has the one and needs not the other: by index,
its experts multiply the rows that found a slot, as in `dropless`, and no empty slots.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import DropPolicy, ExecutionConfig
from qwen_moe_jax.moe.dispatch import dropless
from qwen_moe_jax.moe.dispatch.rows import (
    EXCHANGED,
    RowPlan,
    SingleToken,
    Slots,
    SortedRows,
    from_rows,
    plan_rows,
    ranks,
    slots_spec,
    to_rows,
)
from qwen_moe_jax.moe.router import Routing
from qwen_moe_jax.moe.stats import Drops, no_drops
from qwen_moe_jax.nn.kernels import matmul
from qwen_moe_jax.sharding.rules import BATCH, group_axes, position_shards, token_shards, tokens_spec


def expert_capacity(
    group_size: int, num_experts_per_tok: int, num_experts: int, capacity_factor: float, min_capacity: int
) -> int:
    """Slots per expert and group: a balanced share times the factor, from `min_capacity` to one for every token."""
    share = math.ceil(group_size * num_experts_per_tok / num_experts * capacity_factor)
    return min(max(share, min_capacity), group_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EinsumPlan:
    """One-hot masks of the assignments; a row of zeros is one without a slot.

    Attributes:
        expert_GgAE, slot_GgAC: the expert and the slot of each.
    """

    expert_GgAE: jax.Array
    slot_GgAC: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CapacityPlan:
    """What `combine` needs.

    Attributes:
        moved: how tokens were moved to slots, or those with a slot to sorted rows.
        routing: of the tokens.
        full_BTA: bool; assignments that found their expert full.
    """

    moved: EinsumPlan | RowPlan | dropless.DroplessPlan
    routing: Routing
    full_BTA: jax.Array


def dispatch(
    hidden_BTD: jax.Array, routing: Routing, execution: ExecutionConfig
) -> tuple[Slots | SortedRows | SingleToken, CapacityPlan]:
    """Moves tokens to their experts' slots, as far as there are any.

    Args:
        hidden_BTD: tokens, sharded as `tokens_spec` says.
        routing: their experts and weights.
        execution: `capacity_factor`, `min_capacity`, `group_size`, `drop_policy` and `capacity_by` are read. Fewer
            tokens on a device than `group_size` are one group.
    """
    batch, length, _ = hidden_BTD.shape
    num_experts, chosen = routing.probs_BTE.shape[-1], routing.experts_BTA.shape[-1]
    local_tokens = batch * length // token_shards()
    group_size = min(execution.group_size, local_tokens)
    capacity = expert_capacity(group_size, chosen, num_experts, execution.capacity_factor, execution.min_capacity)
    slot_GgA = _assign(
        _into_groups(routing.experts_BTA, group_size),
        _into_groups(routing.weights_BTA, group_size),
        _into_groups(routing.token_mask_BT, group_size),
        num_experts,
        execution.drop_policy,
    )
    full_BTA = routing.token_mask_BT[..., None] & (_out_of_groups(slot_GgA, batch, length) >= capacity)
    if execution.capacity_by == "index" and _multiplies_sorted_rows(hidden_BTD, execution):
        with_slot = dataclasses.replace(routing, experts_BTA=jnp.where(full_BTA, num_experts, routing.experts_BTA))
        worst_case = dataclasses.replace(execution, buffer_factor=None)
        rows, plan = dropless.dispatch(hidden_BTD, with_slot, worst_case)
        return rows, CapacityPlan(moved=plan, routing=routing, full_BTA=full_BTA)
    move = _fill_by_einsum if execution.capacity_by == "einsum" else _fill_by_index
    x_EGCD, moved = move(hidden_BTD, routing, slot_GgA, capacity=capacity)
    x_EGCD = checkpoint_name(jax.sharding.reshard(x_EGCD, slots_spec()), EXCHANGED)  # an all-to-all
    return Slots(x_EGCD=x_EGCD), CapacityPlan(moved=moved, routing=routing, full_BTA=full_BTA)


def combine(rows: Slots | SortedRows | SingleToken, plan: CapacityPlan) -> tuple[jax.Array, Drops]:
    """Each token's weighted sum over the experts that had a slot for it [B, T, D], and what was dropped."""
    drops = dataclasses.replace(no_drops(plan.routing), dropped_BTA=plan.full_BTA)
    if isinstance(plan.moved, dropless.DroplessPlan):
        assert not isinstance(rows, Slots)  # dispatch
        return dropless.combine(rows, plan.moved)[0], drops
    assert isinstance(rows, Slots)
    y_EGCD = checkpoint_name(jax.sharding.reshard(rows.x_EGCD, _token_slots()), EXCHANGED)  # an all-to-all
    if isinstance(plan.moved, EinsumPlan):
        combined_BTD = _empty_by_einsum(y_EGCD, plan.routing.weights_BTA, plan.moved)
    else:
        combined_BTD = _empty_by_index(y_EGCD, plan.routing.weights_BTA, plan.moved)
    return combined_BTD, drops


def _multiplies_sorted_rows(hidden_BTD: jax.Array, execution: ExecutionConfig) -> bool:
    """Whether experts multiply sorted rows of any number as fast as slots: by C functions, on a single CPU."""
    width = hidden_BTD.shape[-1]
    alone = jax.sharding.get_abstract_mesh().size == 1 and execution.grouped_matmul == "blocks"
    return alone and matmul.is_available(hidden_BTD.dtype, width, width)


def _assign(
    experts_GgA: jax.Array, weights_GgA: jax.Array, token_mask_Gg: jax.Array, num_experts: int, drop_policy: DropPolicy
) -> jax.Array:
    """The rank of every assignment within its expert, int32 [G, g, A]: those below the capacity are slots."""

    def of_group(experts_gA: jax.Array, weights_gA: jax.Array, token_mask_g: jax.Array) -> jax.Array:
        keys_gA = jnp.where(token_mask_g[:, None], experts_gA, num_experts)
        first_gA = None if drop_policy == "position" else -weights_gA.astype(jnp.float32).reshape(-1)
        return ranks(keys_gA.reshape(-1), num_experts, first_gA).reshape(experts_gA.shape)

    tokens, choices = _groups_spec(2), _groups_spec(3)
    local = jax.shard_map(jax.vmap(of_group), in_specs=(choices, choices, tokens), out_specs=choices, check_vma=False)
    return local(experts_GgA, jax.lax.stop_gradient(weights_GgA), token_mask_Gg)


def _fill_by_einsum(
    hidden_BTD: jax.Array, routing: Routing, slot_GgA: jax.Array, *, capacity: int
) -> tuple[jax.Array, EinsumPlan]:
    """Slots [E, G, C, D] as a product with a mask [G, g, E, C]."""
    group_size = slot_GgA.shape[1]
    dtype, num_experts = hidden_BTD.dtype, routing.probs_BTE.shape[-1]
    # Two small masks make the large one in a single matmul: an integer mask [tokens, experts, capacity + 1], as the
    # textbook has it, is many times larger.
    expert_GgAE = jax.nn.one_hot(_into_groups(routing.experts_BTA, group_size), num_experts, dtype=dtype)
    expert_GgAE = expert_GgAE * _into_groups(routing.token_mask_BT, group_size)[..., None, None]
    slot_GgAC = jax.nn.one_hot(slot_GgA, capacity, dtype=dtype)

    # The einsum multiplies every token with zeros: a NaN or infinity would reach its whole group. The token's own
    # result is NaN all the same, through the router's weights.
    finite_BT1 = jnp.isfinite(hidden_BTD).all(axis=-1, keepdims=True)
    x_GgD = _into_groups(jnp.where(finite_BT1, hidden_BTD, 0), group_size)
    mask_GgEC = jnp.einsum("GgAE,GgAC->GgEC", expert_GgAE, slot_GgAC)
    x_EGCD = jnp.einsum("GgEC,GgD->EGCD", mask_GgEC, x_GgD)
    return x_EGCD, EinsumPlan(expert_GgAE=expert_GgAE, slot_GgAC=slot_GgAC)


def _empty_by_einsum(y_EGCD: jax.Array, weights_BTA: jax.Array, plan: EinsumPlan) -> jax.Array:
    """The weighted sums [B, T, D], as a product with a weighted mask."""
    batch, length, _ = weights_BTA.shape
    weights_GgA = _into_groups(weights_BTA, plan.slot_GgAC.shape[1])
    weighted_GgAE = plan.expert_GgAE.astype(weights_GgA.dtype) * weights_GgA[..., None]
    mask_GgEC = jnp.einsum("GgAE,GgAC->GgEC", weighted_GgAE, plan.slot_GgAC.astype(weights_GgA.dtype))
    return _out_of_groups(jnp.einsum("GgEC,EGCD->GgD", mask_GgEC, y_EGCD), batch, length)


def _fill_by_index(
    hidden_BTD: jax.Array, routing: Routing, slot_GgA: jax.Array, *, capacity: int
) -> tuple[jax.Array, RowPlan]:
    """The same slots by a gather, as rows [E * G * C] of each device."""
    width = hidden_BTD.shape[-1]
    num_experts, chosen = routing.probs_BTE.shape[-1], routing.experts_BTA.shape[-1]
    groups_here = slot_GgA.shape[0] // token_shards()
    rows = num_experts * groups_here * capacity

    def fill(hidden_BTD, experts_BTA, token_mask_BT, slot_GgA):
        slot_TA = slot_GgA.reshape(-1, chosen)[: token_mask_BT.size]
        group_T1 = (jnp.arange(token_mask_BT.size, dtype=jnp.int32) // slot_GgA.shape[1])[:, None]
        row_TA = (experts_BTA.reshape(-1, chosen) * groups_here + group_T1) * capacity + slot_TA
        has_slot_TA = token_mask_BT.reshape(-1, 1) & (slot_TA < capacity)
        plan = plan_rows(jnp.where(has_slot_TA, row_TA, rows), rows)
        x_RD = to_rows(hidden_BTD.reshape(-1, width), plan)
        return x_RD.reshape(num_experts, groups_here, capacity, width), plan

    tokens = tokens_spec(None)
    in_specs, out_specs = (tokens, tokens, tokens_spec(), _groups_spec(3)), (_token_slots(), _row_plan_spec())
    return jax.shard_map(fill, in_specs=in_specs, out_specs=out_specs)(
        hidden_BTD, routing.experts_BTA, routing.token_mask_BT, slot_GgA
    )


def _empty_by_index(y_EGCD: jax.Array, weights_BTA: jax.Array, plan: RowPlan) -> jax.Array:
    """The weighted sums [B, T, D], by gathers."""
    chosen, width = weights_BTA.shape[-1], y_EGCD.shape[-1]

    def empty(y_EGCD, weights_BTA, plan):
        combined_TD = from_rows(y_EGCD.reshape(-1, width), weights_BTA.reshape(-1, chosen), plan)
        return combined_TD.reshape(*weights_BTA.shape[:2], width)

    tokens = tokens_spec(None)
    in_specs = (_token_slots(), tokens, _row_plan_spec())
    return jax.shard_map(empty, in_specs=in_specs, out_specs=tokens)(y_EGCD, weights_BTA, plan)


def _groups_spec(ndim: int) -> P:
    """The partition spec of an array [G, …]."""
    return P(group_axes(), *[None] * (ndim - 1))


def _token_slots() -> P:
    """The partition spec of slots [E, G, C, D] on the devices of their tokens, which fill them."""
    return P(None, group_axes(), None, None)


def _row_plan_spec() -> Any:
    """That of a `RowPlan` of the tokens of each device."""
    rows: Any = _groups_spec(1)
    tokens: Any = _groups_spec(2)
    return RowPlan(assignment_R=rows, row_TA=tokens)


def _into_groups(x: jax.Array, group_size: int) -> jax.Array:
    """[B, T, …] to [G, g, …]: each device fills groups with its own tokens, the last one up with zeros (padding)."""

    def local(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, *x.shape[2:])
        missing = -len(rows) % group_size
        rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
        return rows.reshape(-1, group_size, *rows.shape[1:])

    specs = tokens_spec(*[None] * (x.ndim - 2)), _groups_spec(x.ndim)
    return jax.shard_map(local, in_specs=specs[0], out_specs=specs[1])(x)


def _out_of_groups(x_GgD: jax.Array, batch: int, length: int) -> jax.Array:
    """The inverse of `_into_groups`."""
    shape = jax.sharding.get_abstract_mesh().shape
    local_batch, local_length = batch // math.prod(shape[axis] for axis in BATCH), length // position_shards()

    def local(x_GgD: jax.Array) -> jax.Array:
        rows = x_GgD.reshape(-1, x_GgD.shape[-1])
        return rows[: local_batch * local_length].reshape(local_batch, local_length, -1)

    return jax.shard_map(local, in_specs=_groups_spec(3), out_specs=tokens_spec(None))(x_GgD)
