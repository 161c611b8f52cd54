"""What a user left open about running the experts, chosen for the model, its mesh and its mode."""

import dataclasses

from jax.sharding import Mesh

from qwen_moe_jax.config import CapacityBy, ExecutionConfig, MoEConfig
from qwen_moe_jax.errors import ShardingError
from qwen_moe_jax.moe.grouped_matmul import backend_for

#: "einsum" is chosen where its masks cost at most this share of the experts' own matmuls.
EINSUM_SHARE = 1 / 3
#: Groups the einsum is worth having for: below 128 tokens, drops are frequent; above 2048, they are gone.
SMALLEST_GROUP, LARGEST_GROUP = 128, 2048
#: By index, groups cost nothing, and all tokens of a device are one.
WHOLE_DEVICE = 2**31 - 1


def einsum_cost(group_size: int, moe_intermediate_size: int) -> float:
    """FLOPs of the dispatch and combine einsums over those of the experts' matmuls; no E, A or D in it."""
    return 2 * group_size / (3 * moe_intermediate_size)


def choose(execution: ExecutionConfig, moe: MoEConfig | None, mesh: Mesh, *, training: bool) -> ExecutionConfig:
    """The same execution with nothing left open.

    What belongs to eval mode (`eval_capacity_factor`, `eval_buffer_factor`) takes the place of its training
    counterpart, so that the dispatch methods know of no mode.

    Raises:
        ShardingError: the exchange needs a network that CPUs do not have.
    """
    if not training:
        execution = dataclasses.replace(
            execution,
            capacity_factor=execution.eval_capacity_factor,
            buffer_factor=execution.eval_buffer_factor,
        )
    if moe is None:
        return execution
    platform = mesh.devices.flat[0].platform
    if execution.exchange == "ragged_all_to_all" and platform == "cpu":
        raise ShardingError(
            "exchange='ragged_all_to_all' is not implemented by XLA for CPUs: use 'all_to_all', which drops the same "
            "rows, or leave it open."
        )
    group_size, capacity_by = _groups(execution, moe.moe_intermediate_size)
    return dataclasses.replace(
        execution,
        dispatch=execution.dispatch or ("capacity" if training else "dropless"),
        group_size=group_size,
        capacity_by=capacity_by,
        exchange=execution.exchange or _exchange(execution, moe, mesh.shape["expert"], platform),
        grouped_matmul=execution.grouped_matmul or backend_for(platform),
    )


def _groups(execution: ExecutionConfig, width: int) -> tuple[int, CapacityBy]:
    """The largest group whose einsums cost little, if there is a reasonable one; otherwise no einsums."""
    group_size = execution.group_size
    if group_size is None and execution.capacity_by != "index":
        affordable = max(1, int(EINSUM_SHARE * 3 * width / 2))
        group_size = min(1 << (affordable.bit_length() - 1), LARGEST_GROUP)
        if execution.capacity_by == "einsum":
            group_size = max(group_size, SMALLEST_GROUP)
        elif group_size < SMALLEST_GROUP:
            return WHOLE_DEVICE, "index"
    group_size = group_size or WHOLE_DEVICE
    by = "einsum" if einsum_cost(group_size, width) <= EINSUM_SHARE else "index"
    return group_size, execution.capacity_by or by


def _exchange(execution: ExecutionConfig, moe: MoEConfig, ways: int, platform: str):
    """Gathering sends X - 1 times a device's tokens, all-to-all A * buffer_factor * (X - 1) / X times."""
    if execution.buffer_factor is None or ways <= moe.num_experts_per_tok * execution.buffer_factor:
        return "gather"
    return "all_to_all" if platform == "cpu" else "ragged_all_to_all"
