"""The settings of an execution that were None, chosen for the model, its mesh and its mode."""

import dataclasses

from qwen_moe_jax.config import (
    CapacityBy,
    ContextParallel,
    Exchange,
    ExecutionConfig,
    GroupedMatmul,
    LinearAttentionConfig,
    MoEConfig,
)
from qwen_moe_jax.config.execution import BUFFER_FACTOR
from qwen_moe_jax.errors import ConfigError, ShardingError
from qwen_moe_jax.rounding import previous_power_of_two

#: Splash kernels take blocks in multiples of a TPU's vector register.
SPLASH_MULTIPLE = 128

#: The kernel of the gated delta rule takes heads in multiples of a TPU's matrix unit.
RULE_MULTIPLE = 128

#: "einsum" is chosen where its masks cost at most this share of the experts' own matmuls.
EINSUM_SHARE = 1 / 3
#: Groups the einsum is worth having for: below 128 tokens, drops are frequent; above 2048, they are gone.
SMALLEST_GROUP, LARGEST_GROUP = 128, 2048
#: By index, groups cost nothing, and all tokens of a device are one.
WHOLE_DEVICE = 2**31 - 1


def einsum_cost(group_size: int, moe_intermediate_size: int) -> float:
    """FLOPs of the dispatch and combine einsums over those of the experts' matmuls; no E, A or D in it."""
    return 2 * group_size / (3 * moe_intermediate_size)


def resolve(
    execution: ExecutionConfig,
    moe: MoEConfig | None,
    *,
    expert_shards: int,
    platform: str,
    training: bool,
    linear: LinearAttentionConfig | None = None,
    context_shards: int = 1,
    queries_per_key: int = 1,
) -> ExecutionConfig:
    """The same execution with no setting None.

    In eval mode `capacity_factor` becomes `eval_capacity_factor`, so that no layer needs to know the mode.

    Args:
        execution: with its dtype.
        moe: of the model; None where no layer is sparse.
        expert_shards: size of the mesh axis `expert`.
        platform: of the devices (`jax.Device.platform`).
        training: whether the model is in training mode.
        linear: linear attention of the model; None where no layer has it.
        context_shards: size of the mesh axis `context`.
        queries_per_key: query heads that share a key head.

    Raises:
        ShardingError: the exchange needs a collective that CPUs do not have.
        ConfigError: the attention kernels do not run on these devices.
    """
    execution = resolve_attention(execution, platform, context_shards)
    execution = resolve_linear_attention(execution, linear, platform, context_shards)
    if context_shards > 1:
        gathers = context_shards <= queries_per_key or execution.attention == "splash"
        cheaper: ContextParallel = "all_gather" if gathers else "ring"
        execution = dataclasses.replace(execution, context_parallel=execution.context_parallel or cheaper)
    if not training:
        execution = dataclasses.replace(execution, capacity_factor=execution.eval_capacity_factor)
    if moe is None:
        return execution
    if execution.exchange == "ragged_all_to_all" and platform == "cpu":
        raise ShardingError(
            "exchange='ragged_all_to_all' is not implemented by XLA for CPUs: use 'all_to_all', which computes the "
            "same, or leave it open."
        )
    group_size, capacity_by = _groups(execution, moe.moe_intermediate_size)
    if execution.capacity_by is None and platform == "cpu" and expert_shards == 1:
        capacity_by = "index"  # the same tokens to the same slots: a processor gathers faster than it multiplies
    return dataclasses.replace(
        execution,
        dispatch=execution.dispatch or ("capacity" if training else "dropless"),
        group_size=group_size,
        capacity_by=capacity_by,
        exchange=execution.exchange or _exchange(execution, moe, expert_shards, platform),
        grouped_matmul=execution.grouped_matmul or backend_for(platform),
    )


def _groups(execution: ExecutionConfig, width: int) -> tuple[int, CapacityBy]:
    """The largest group whose einsums cost little, if there is a reasonable one; otherwise no einsums."""
    group_size = execution.group_size
    if group_size is None and execution.capacity_by != "index":
        affordable = max(1, int(EINSUM_SHARE * 3 * width / 2))
        group_size = min(previous_power_of_two(affordable), LARGEST_GROUP)
        if execution.capacity_by == "einsum":
            group_size = max(group_size, SMALLEST_GROUP)
        elif group_size < SMALLEST_GROUP:
            return WHOLE_DEVICE, "index"
    group_size = group_size or WHOLE_DEVICE
    by: CapacityBy = "einsum" if einsum_cost(group_size, width) <= EINSUM_SHARE else "index"
    return group_size, execution.capacity_by or by


def _exchange(execution: ExecutionConfig, moe: MoEConfig, num_shards: int, platform: str) -> Exchange:
    """Gathering sends X - 1 times a device's tokens, all-to-all A * buffer_factor * (X - 1) / X times."""
    if num_shards <= moe.num_experts_per_tok * (execution.buffer_factor or BUFFER_FACTOR):
        return "all_gather"
    return "all_to_all" if platform == "cpu" else "ragged_all_to_all"


def backend_for(platform: str) -> GroupedMatmul:
    """The fastest grouped matmul on devices of this platform (`jax.Device.platform`)."""
    backends: dict[str, GroupedMatmul] = {"tpu": "megablox", "gpu": "triton", "cuda": "triton"}
    return backends.get(platform, "blocks")


def attention_block(platform: str) -> int:
    """Tokens of a block of queries or keys where no length is asked for.

    On a CPU the scores of a block should stay in its cache: of 64 to 512, 64 and 128 were the fastest (rows of 512,
    8 heads of 64). Other devices are better used by larger products; their number is a guess.
    """
    return 128 if platform == "cpu" else 512


def resolve_attention(execution: ExecutionConfig, platform: str, context_shards: int = 1) -> ExecutionConfig:
    """The same execution with no setting of attention None.

    Args:
        execution: with its dtype.
        platform: of the devices (`jax.Device.platform`).
        context_shards: size of the mesh axis `context`.

    Raises:
        ConfigError: the splash kernels do not run on this platform, in this dtype, over this mesh or with such short
            blocks.
    """
    if context_shards > 1 and execution.context_parallel == "ring":
        if execution.attention == "splash":
            raise ConfigError(
                f"attention='splash' found with context_parallel='ring' over context={context_shards}, expected "
                "'all_gather', which brings the kernels of splash the keys of whole rows: leave one of the two open."
            )
        execution = dataclasses.replace(execution, attention="blocks")
    kernels = _has_tpu_kernels(execution, platform)
    block = execution.attention_block or attention_block(platform)
    attention = execution.attention or ("splash" if kernels and block >= SPLASH_MULTIPLE else "blocks")
    if attention == "splash":
        if not kernels:
            raise ConfigError(
                f"attention='splash' found devices of the platform {platform!r} and dtype={execution.dtype!r}, "
                "expected TPUs, and bfloat16 or float32: use 'blocks', which computes the same, or leave it open."
            )
        if block < SPLASH_MULTIPLE:
            raise ConfigError(
                f"attention_block={block} found with attention='splash', expected at least {SPLASH_MULTIPLE}, of which "
                "its blocks are multiples: leave it open, or use attention='blocks'."
            )
    return dataclasses.replace(execution, attention=attention, attention_block=block)


def resolve_linear_attention(
    execution: ExecutionConfig, linear: LinearAttentionConfig | None, platform: str, context_shards: int = 1
) -> ExecutionConfig:
    """The same execution with the kernel of the gated delta rule chosen.

    Args:
        execution: with its dtype.
        linear: linear attention of the model; None where no layer has it.
        platform: of the devices (`jax.Device.platform`).
        context_shards: size of the mesh axis `context`.

    Raises:
        ConfigError: the Pallas kernel does not run on this platform, in this dtype, over this mesh or with heads of
            these sizes.
    """
    if context_shards > 1 and execution.linear_attention == "pallas":
        raise ConfigError(
            f"linear_attention='pallas' found with context={context_shards} in the mesh, expected 'chunks', which "
            "computes the same and passes states over that axis: leave it open."
        )
    kernels = _has_tpu_kernels(execution, platform)
    sizes = (linear.key_head_dim, linear.value_head_dim) if linear else ()
    fits = kernels and context_shards == 1 and bool(sizes) and not any(size % RULE_MULTIPLE for size in sizes)
    chosen = execution.linear_attention or ("pallas" if fits else "chunks")
    if chosen == "pallas" and sizes and not fits:
        raise ConfigError(
            f"linear_attention='pallas' found devices of the platform {platform!r}, dtype={execution.dtype!r} and "
            f"heads of {sizes[0]} (keys) and {sizes[1]} (values), expected TPUs, bfloat16 or float32, and multiples "
            f"of {RULE_MULTIPLE}: use 'chunks', which computes the same, or leave it open."
        )
    return dataclasses.replace(execution, linear_attention=chosen)


def _has_tpu_kernels(execution: ExecutionConfig, platform: str) -> bool:
    """Whether attention kernels of TPUs run there in the dtype of the execution."""
    return platform == "tpu" and execution.dtype in ("bfloat16", "float32")
