"""The layouts of rows that `Experts` multiplies, and moving tokens to rows and back by index.

A `RowPlan` holds the two inverse maps. With both at hand every movement is a gather, forward and backward: a scatter
would serialise on most devices.

Arrays that belong to one device each have a leading axis X, one entry per device of the whole mesh, sharded over all
mesh axes (`per_device`).
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.nn.bits import as_bits, from_bits
from qwen_moe_jax.nn.kernels import sorting
from qwen_moe_jax.sharding.rules import group_axes, positions_axis

#: The name that remat policies know the arrays by that came over the `expert` axis.
EXCHANGED = "exchanged"


def slots_spec(width: str | None = None) -> P:
    """The partition spec of slots [E, G, C, D] on their experts' devices, in the program that is traced."""
    return P("expert", group_axes(without_expert=True), None, width)


def gathered_spec(*rest: str | None) -> P:
    """That of tokens [B, T, …] gathered over `expert`, for dispatchers that bring every token to every expert."""
    return P(("data", "fsdp"), positions_axis(), *rest)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """A fixed number of slots per expert and group of tokens.

    Attributes:
        x_EGCD: what is in them, E sharded over `expert` and G as `slots_spec` says; zeros in empty ones.
    """

    x_EGCD: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AllTokens:
    """Every token for every expert.

    Attributes:
        x_BTD: tokens, sharded as `gathered_spec` says; after the experts, the weighted sums.
        weights_BTE: what each expert counts for a token, E sharded over `expert`; 0 for one that it did not choose.
    """

    x_BTD: jax.Array
    weights_BTE: jax.Array


class Exchange(Protocol):
    """What serves the rounds after the first; see `overflow.serve_overflow`."""

    def send(self, turn: jax.Array, tokens: "Assignments") -> tuple["SortedRows", object]:
        """One device's tokens to the rows of round `turn`, inside a shard_map."""

    def receive(self, y_RD: jax.Array, plan: Any) -> jax.Array:
        """The experts' results back to the tokens' weighted sums [T, D], inside a shard_map."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignments:
    """One device's tokens and the experts they chose; between shard_maps, each with a leading axis X.

    Attributes:
        x_TD: tokens.
        experts_TA: int32; the number of experts for padding.
        weights_TA: what each expert counts.
    """

    x_TD: jax.Array
    experts_TA: jax.Array
    weights_TA: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Overflow:
    """The rounds after the first, for assignments beyond the buffers.

    Attributes:
        tokens: of each device.
        rounds_X: int32; how many rounds there are, the first included; the same on all devices.
        exchange: how a round sends and receives.
    """

    tokens: Assignments
    rounds_X: jax.Array
    exchange: Exchange = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SortedRows:
    """Rows sorted by expert, on the device of their expert. Inside a shard_map, without the axis X.

    Attributes:
        x_XRD: R of `buffer_rows`; rows past the sum of the sizes mean nothing.
        sizes_XE: int32; rows of each of the device's experts.
        weights_XR: what each row counts, for the backward pass (`combine_rows`); None where `from_rows` weights them.
        overflow: the rounds after the first; None where one always suffices.
        served_XTD: after the experts, the sums of those rounds for the device's own tokens; None without `overflow`.
    """

    x_XRD: jax.Array
    sizes_XE: jax.Array
    weights_XR: jax.Array | None = None
    overflow: Overflow | None = None
    served_XTD: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleToken:
    """One token per device and the experts it chose, unsorted: how CPUs decode one text.

    Attributes:
        x_XTD: the token, T is 1; after the experts, its weighted sum.
        experts_XA: int32; the number of experts for none.
        weights_XA: what each counts.
    """

    x_XTD: jax.Array
    experts_XA: jax.Array
    weights_XA: jax.Array


Rows = Slots | AllTokens | SortedRows | SingleToken


def per_device() -> P:
    """The partition spec of arrays with a leading axis X."""
    return P(jax.sharding.get_abstract_mesh().axis_names)


def add_device_axis(tree):
    """Arrays of one device, inside a shard_map, as they leave it under `per_device`."""
    return jax.tree.map(lambda x: x[None], tree)


def drop_device_axis(tree):
    """The inverse of `add_device_axis`."""
    return jax.tree.map(lambda x: x[0], tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Which assignment is in which row.

    Attributes:
        assignment_R: int32; the assignment (token * A + choice) in each row; T * A for an empty row.
        row_TA: int32; the row of each assignment; R for one that has none.
    """

    assignment_R: jax.Array
    row_TA: jax.Array


def ranks(keys_N: jax.Array, num_keys: int, priority_N: jax.Array | None = None) -> jax.Array:
    """Each item's rank among those with its key, int32 [N].

    Args:
        keys_N: int32 in [0, num_keys].
        num_keys: K; items with the key K are of no interest.
        priority_N: smaller comes first; ties, and None, go by position.
    """
    if priority_N is None and sorting.is_available():
        _, row_N, sizes_K = sorting.counting_sort(keys_N, num_keys + 1, len(keys_N))
        return row_N - (jnp.cumsum(sizes_K, dtype=jnp.int32) - sizes_K)[keys_N]
    position_N = jnp.arange(len(keys_N), dtype=jnp.int32)
    operands = (keys_N, position_N) if priority_N is None else (keys_N, priority_N, position_N)
    sorted_N, *_, from_N = jax.lax.sort(operands, num_keys=len(operands) - 1, is_stable=True)
    starts_K = jnp.searchsorted(sorted_N, jnp.arange(num_keys + 1), side="left").astype(jnp.int32)
    return jnp.zeros_like(position_N).at[from_N].set(position_N - starts_K[sorted_N], unique_indices=True)


def sort_rows(keys_TA: jax.Array, num_keys: int, num_rows: int) -> tuple[RowPlan, jax.Array]:
    """Rows sorted by key, for one key in the order of the assignments.

    Args:
        keys_TA: int32 in [0, num_keys]; an assignment with the key `num_keys` gets no row.
        num_keys: K.
        num_rows: R, at least the number of assignments that get one.

    Returns:
        The plan, and int32 [K]: how many rows each key has.
    """
    keys_N = keys_TA.reshape(-1)
    if sorting.is_available():
        assignment_R, row_N, sizes_K = sorting.counting_sort(keys_N, num_keys, num_rows)
        return RowPlan(assignment_R=assignment_R, row_TA=row_N.reshape(keys_TA.shape)), sizes_K
    position_N = jnp.arange(len(keys_N), dtype=jnp.int32)
    sorted_N, order_N = jax.lax.sort((keys_N, position_N), num_keys=1, is_stable=True)
    starts_K = jnp.searchsorted(sorted_N, jnp.arange(num_keys + 1), side="left").astype(jnp.int32)
    row_N = jnp.zeros_like(position_N).at[order_N].set(position_N, unique_indices=True)
    row_N = jnp.where(keys_N < num_keys, row_N, num_rows)
    used_N = jnp.where(sorted_N < num_keys, order_N, len(keys_N))
    missing = max(0, num_rows - len(keys_N))
    assignment_R = jnp.pad(used_N, (0, missing), constant_values=len(keys_N))[:num_rows]
    return RowPlan(assignment_R=assignment_R, row_TA=row_N.reshape(keys_TA.shape)), jnp.diff(starts_K)


def plan_rows(row_TA: jax.Array, num_rows: int) -> RowPlan:
    """The plan in which each assignment is in the given row, `num_rows` meaning none."""
    assignments = jnp.arange(row_TA.size, dtype=jnp.int32)
    empty_R = jnp.full(num_rows, row_TA.size, jnp.int32)
    assignment_R = empty_R.at[row_TA.reshape(-1)].set(assignments, mode="drop")
    return RowPlan(assignment_R=assignment_R, row_TA=row_TA)


@jax.custom_vjp
def to_rows(x_TD: jax.Array, plan: RowPlan) -> jax.Array:
    """The token of each row, [R, D]; zeros in empty rows."""
    return _take(x_TD, plan.assignment_R // plan.row_TA.shape[1])


def _to_rows_forward(x_TD: jax.Array, plan: RowPlan):
    return to_rows(x_TD, plan), plan


def _to_rows_backward(plan: RowPlan, gradient_RD: jax.Array):
    return _row_major(_sum(_take(gradient_RD, row_T) for row_T in plan.row_TA.T)), None


to_rows.defvjp(_to_rows_forward, _to_rows_backward)


@jax.custom_vjp
def from_rows(y_RD: jax.Array, weights_TA: jax.Array, plan: RowPlan) -> jax.Array:
    """Each token's weighted sum over its rows, [T, D] in the wider of the two dtypes; without rows, zeros."""
    across = (slice(None), *(None,) * (y_RD.ndim - 1))
    return _row_major(_sum(_take(y_RD, row_T) * weight_T[across] for row_T, weight_T in _choices(plan, weights_TA)))


def _from_rows_forward(y_RD: jax.Array, weights_TA: jax.Array, plan: RowPlan):
    return from_rows(y_RD, weights_TA, plan), (y_RD, weights_TA, plan)


def _from_rows_backward(saved: tuple[jax.Array, jax.Array, RowPlan], gradient_TD: jax.Array):
    y_RD, weights_TA, plan = saved
    gradient_TD = _row_major(gradient_TD)
    weight_R = weights_TA.reshape(-1).at[plan.assignment_R].get(mode="fill", fill_value=0)
    of_rows_RD = _take(gradient_TD, plan.assignment_R // plan.row_TA.shape[1]) * weight_R[:, None]
    of_weights_TA = jnp.stack([jnp.sum(gradient_TD * _take(y_RD, row_T), axis=-1) for row_T in plan.row_TA.T], axis=-1)
    return of_rows_RD.astype(y_RD.dtype), of_weights_TA.astype(weights_TA.dtype), None


from_rows.defvjp(_from_rows_forward, _from_rows_backward)


@jax.custom_vjp
def combine_rows(y_RD: jax.Array, weights_TA: jax.Array, plan: RowPlan) -> jax.Array:
    """`from_rows`, which leaves the weights' part of the backward pass to the experts.

    The gradient of y is that of the unweighted sum, and the weights have none here. The experts know what each of their
    rows counts, and have both gradients from their transposed product (`experts.with_weights_in_gradient`). So y has no
    part in the backward pass: it is not kept, nor computed again, nor sent again.
    """
    return from_rows(y_RD, weights_TA, plan)


def _combine_rows_forward(y_RD: jax.Array, weights_TA: jax.Array, plan: RowPlan):
    return from_rows(y_RD, weights_TA, plan), (jnp.zeros((), y_RD.dtype), plan)


def _combine_rows_backward(saved: tuple[jax.Array, RowPlan], gradient_TD: jax.Array):
    like, plan = saved
    return to_rows(_row_major(gradient_TD.astype(like.dtype)), plan), None, None


combine_rows.defvjp(_combine_rows_forward, _combine_rows_backward)


@jax.custom_vjp
def weights_to_rows(weights_TA: jax.Array, plan: RowPlan) -> jax.Array:
    """The weight of the assignment in each row, [R]; 0 in empty rows."""
    return _take(weights_TA.reshape(-1), plan.assignment_R)


def _weights_to_rows_forward(weights_TA: jax.Array, plan: RowPlan):
    return weights_to_rows(weights_TA, plan), plan


def _weights_to_rows_backward(plan: RowPlan, gradient_R: jax.Array):
    return _take(gradient_R, plan.row_TA), None


weights_to_rows.defvjp(_weights_to_rows_forward, _weights_to_rows_backward)


def _choices(plan: RowPlan, weights_TA: jax.Array):
    """Pairs (row of each token, its weight), choice by choice: A gathers are far cheaper than one einsum over A."""
    return zip(plan.row_TA.T, weights_TA.T, strict=True)


def _sum(arrays: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, arrays)


def _row_major(x_TD: jax.Array) -> jax.Array:
    """The same array, on TPUs in the layout of gathered rows.

    XLA there lays activations out by columns where the layer's matmuls like it, and would copy each of the A gathered
    arrays into that layout before it sums them; so it copies the sum.
    """

    def constrained(x_TD: jax.Array) -> jax.Array:
        return with_layout_constraint(x_TD, Layout(tuple(range(x_TD.ndim))))

    return jax.lax.platform_dependent(x_TD, tpu=constrained, default=lambda x_TD: x_TD)


def _take(x_ND: jax.Array, index_M: jax.Array) -> jax.Array:
    """`x[index]`, zeros where the index is N."""

    def take(x_ND: jax.Array, index_M: jax.Array) -> jax.Array:
        return x_ND.at[index_M].get(mode="fill", fill_value=0)

    def take_bits(x_ND: jax.Array, index_M: jax.Array) -> jax.Array:
        return from_bits(take(as_bits(x_ND), index_M))

    # TPUs would copy all of x to read its bits as another type.
    return jax.lax.platform_dependent(x_ND, index_M, cpu=take_bits, default=take)
