"""What the worst routing costs: all tokens at the experts of one device.

Shapes are fixed when a program is compiled, so its memory is that of any routing. Under `dropless`, what does not fit
into a buffer is served in further rounds through it; under `capacity` it is dropped; `dense` computes all of it anyway.
"""

import math

from qwen_moe_jax.config.execution import BUFFER_FACTOR
from qwen_moe_jax.moe.dispatch.dropless import WORST_CASE_ROWS, device_rows
from qwen_moe_jax.plan.result import Plan
from qwen_moe_jax.plan.roofline import token_axes


def is_dropless(plan: Plan) -> bool:
    """Whether the plan is of a model with experts under `dropless`."""
    return bool(plan.model.experts) and plan.work.execution.get("dispatch") == "dropless"


def worst_rounds(plan: Plan) -> int:
    """Rounds of a `dropless` layer if all tokens choose the experts of one device; 1 where its buffer takes them all.

    Raises:
        ValueError: the plan is of another dispatcher.
    """
    execution, model, ways = plan.work.execution, plan.model, plan.mesh["expert"]
    if not is_dropless(plan):
        raise ValueError(f"rounds of a dropless layer: found dispatch {execution.get('dispatch')!r}.")
    shards = math.prod(plan.mesh.get(axis, 1) for axis in token_axes(plan.work))
    tokens = plan.work.tokens // plan.work.accumulation_steps // shards
    senders = ways if execution.get("exchange") == "all_gather" else 1
    chosen = min(model.experts_per_token, model.experts // ways)
    factor = execution.get("buffer_factor")
    if factor is None and tokens * ways * chosen > WORST_CASE_ROWS:
        factor = BUFFER_FACTOR
    rows = device_rows(tokens * senders, model.experts_per_token, model.experts, ways, factor)
    return math.ceil(tokens * senders * chosen / rows)


def worst_case(plan: Plan) -> str:
    """A sentence about memory and time under the worst routing; "" without experts."""
    if is_dropless(plan):
        rounds = worst_rounds(plan)
        how = "a layer's buffers take them all at once"
        if rounds > 1:
            how = f"a layer takes {rounds} rounds through the same buffers"
        return f"This is the memory of any routing: if all tokens choose the experts of one device, {how}."
    if plan.model.experts and plan.work.execution.get("dispatch") == "capacity":
        return "This is the memory of any routing: what exceeds an expert's slots is dropped."
    return ""
