"""Moving tokens to rows that lie with their experts, and back, by index.

A `RowPlan` holds the two inverse maps. With both at hand every movement is a gather, forward and backward: a scatter
would serialise on most devices.
"""

import dataclasses

import jax
import jax.numpy as jnp

from qwen_moe_jax.nn.bits import as_bits, from_bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Which assignment stands in which row.

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
    """The plan in which each assignment stands in the given row, `num_rows` meaning none."""
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
    return sum(_take(gradient_RD, row_T) for row_T in plan.row_TA.T), None


to_rows.defvjp(_to_rows_forward, _to_rows_backward)


@jax.custom_vjp
def from_rows(y_RD: jax.Array, weights_TA: jax.Array, plan: RowPlan) -> jax.Array:
    """Each token's weighted sum over its rows, [T, D] in the wider of the two dtypes; without rows, zeros."""
    return sum(_take(y_RD, row_T) * weight_T[:, None] for row_T, weight_T in _choices(plan, weights_TA))


def _from_rows_forward(y_RD: jax.Array, weights_TA: jax.Array, plan: RowPlan):
    return from_rows(y_RD, weights_TA, plan), (y_RD, weights_TA, plan)


def _from_rows_backward(saved: tuple[jax.Array, jax.Array, RowPlan], gradient_TD: jax.Array):
    y_RD, weights_TA, plan = saved
    weight_R = weights_TA.reshape(-1).at[plan.assignment_R].get(mode="fill", fill_value=0)
    of_rows_RD = _take(gradient_TD, plan.assignment_R // plan.row_TA.shape[1]) * weight_R[:, None]
    of_weights_TA = jnp.stack([jnp.sum(gradient_TD * _take(y_RD, row_T), axis=-1) for row_T in plan.row_TA.T], axis=-1)
    return of_rows_RD.astype(y_RD.dtype), of_weights_TA.astype(weights_TA.dtype), None


from_rows.defvjp(_from_rows_forward, _from_rows_backward)


def _choices(plan: RowPlan, weights_TA: jax.Array):
    """Pairs (row of each token, its weight), choice by choice: A gathers are far cheaper than one einsum over A."""
    return zip(plan.row_TA.T, weights_TA.T, strict=True)


def _take(x_ND: jax.Array, index_M: jax.Array) -> jax.Array:
    """`x[index]`, zeros where the index is N."""
    return from_bits(as_bits(x_ND).at[index_M].get(mode="fill", fill_value=0))
