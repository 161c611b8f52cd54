"""Every expert on every token: the reference the other methods are held to. Drops nothing, costs E / A times more.

Over the `expert` axis the tokens are gathered, each device runs its own experts on them, and the results are summed.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.moe.experts import GATHERED_TOKENS, Experts
from qwen_moe_jax.moe.router import Routing
from qwen_moe_jax.sharding.rules import BATCH


def run(hidden_BTD: jax.Array, routing: Routing, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """Applies the chosen experts.

    Args:
        hidden_BTD: tokens, B over `BATCH`.
        routing: their experts and weights.
        experts: the layer's experts.

    Returns:
        The weighted sum [B, T, D] in the dtype of `hidden_BTD`, and the dropped tokens per expert [E]: none.
    """
    num_experts = routing.probs_BTE.shape[-1]
    chosen_BTAE = jax.nn.one_hot(routing.experts_BTA, num_experts, dtype=routing.weights_BTA.dtype)
    weights_BTE = jnp.sum(chosen_BTAE * routing.weights_BTA[..., None], axis=2)
    hidden_BTD = jax.sharding.reshard(hidden_BTD, GATHERED_TOKENS)
    weights_BTE = jax.sharding.reshard(weights_BTE, P(("data", "fsdp"), None, "expert"))
    combined_BTD = experts.every_expert(hidden_BTD, weights_BTE)
    return jax.sharding.reshard(combined_BTD, P(BATCH, None, None)), jnp.zeros(num_experts, jnp.int32)
