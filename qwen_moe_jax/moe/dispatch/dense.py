"""Every expert on every token: the reference the other methods are held to. Drops nothing, costs E / A times more.

Over the `expert` axis the tokens are gathered, each device runs its own experts on them, and the results are summed.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import ExecutionConfig
from qwen_moe_jax.moe.experts import GATHERED_TOKENS, Experts
from qwen_moe_jax.moe.router import Routing
from qwen_moe_jax.moe.stats import Drops, no_drops
from qwen_moe_jax.sharding.rules import BATCH


def run(
    hidden_BTD: jax.Array, routing: Routing, experts: Experts, execution: ExecutionConfig
) -> tuple[jax.Array, Drops]:
    """Applies the chosen experts.

    Args:
        hidden_BTD: tokens, B over `BATCH`.
        routing: their experts and weights.
        experts: the layer's experts.
        execution: nothing of it is read.

    Returns:
        The weighted sum [B, T, D], and what was dropped: nothing.
    """
    num_experts = routing.probs_BTE.shape[-1]
    chosen_BTAE = jax.nn.one_hot(routing.experts_BTA, num_experts, dtype=routing.weights_BTA.dtype)
    weights_BTE = jnp.sum(chosen_BTAE * routing.weights_BTA[..., None], axis=2)
    hidden_BTD = jax.sharding.reshard(hidden_BTD, GATHERED_TOKENS)
    weights_BTE = jax.sharding.reshard(weights_BTE, P(("data", "fsdp"), None, "expert"))
    combined_BTD = experts.every_expert(hidden_BTD, weights_BTE)
    return jax.sharding.reshard(combined_BTD, P(BATCH, None, None)), no_drops(routing)
