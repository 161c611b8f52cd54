"""One step of a model as plain data: `Work` from the model's execution in use."""

import dataclasses
import math
from collections.abc import Mapping

from qwen_moe_jax.config import SHARDING_RULES, ShardingRules
from qwen_moe_jax.errors import ShardingError
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.plan.result import Purpose, Work
from qwen_moe_jax.sharding.rules import BATCH


def work_of(
    model: Model,
    purpose: Purpose,
    *,
    rows: int,
    tokens_per_row: int,
    context: int = 0,
    accumulation_steps: int = 1,
) -> Work:
    """What a step does, with the execution that the model's mode and mesh resolve to. Arguments as `Work`."""
    execution = dataclasses.asdict(model.execution_in_use)
    del execution["sharding"]  # nested; in words below
    return Work(
        purpose=purpose,
        rows=rows,
        tokens_per_row=tokens_per_row,
        context=context,
        accumulation_steps=accumulation_steps,
        dtype=execution.pop("dtype"),
        param_dtype=execution.pop("param_dtype"),
        sharding=format_sharding(model.execution.rules),
        execution=execution,
    )


def check_rows(rows: int, mesh: Mapping[str, int], accumulation_steps: int = 1) -> None:
    """Refuses a batch that the devices do not share evenly.

    Args:
        rows: of a step, over all devices.
        mesh: sizes of the axes.
        accumulation_steps: micro-batches of the step.

    Raises:
        ShardingError: `rows` is no multiple of the devices that share them, times the micro-batches.
    """
    shards = math.prod(mesh[axis] for axis in BATCH) * accumulation_steps
    if rows % shards:
        micro = f" and {accumulation_steps} micro-batches" if accumulation_steps > 1 else ""
        over = ", ".join(f"{axis}={mesh[axis]}" for axis in BATCH)
        raise ShardingError(
            f"a batch of {rows} rows does not divide over {over}{micro}: expected a multiple of {shards}."
        )


def format_sharding(rules: ShardingRules | str) -> str:
    """The name of a table of rules, or its rows: "vocab over tensor; …; embed over nothing"."""
    if isinstance(rules, str):
        return rules
    for name, table in SHARDING_RULES.items():
        if table == rules:
            return name
    rows = dataclasses.asdict(rules).items()
    return "; ".join(f"{axis} over {'+'.join(mesh_axes) or 'nothing'}" for axis, mesh_axes in rows)
