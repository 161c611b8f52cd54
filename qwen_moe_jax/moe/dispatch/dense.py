"""Every expert on every token: the reference the other dispatchers are compared with. Costs E / A times more.

Over the `expert` axis the tokens are gathered, each device runs its own experts on them, and the results are summed.
"""

import jax
import jax.numpy as jnp

from qwen_moe_jax.config import ExecutionConfig
from qwen_moe_jax.moe.dispatch.rows import AllTokens, gathered_spec
from qwen_moe_jax.moe.router import Routing
from qwen_moe_jax.moe.stats import Drops, no_drops
from qwen_moe_jax.sharding.rules import tokens_spec


def dispatch(hidden_BTD: jax.Array, routing: Routing, execution: ExecutionConfig) -> tuple[AllTokens, Routing]:
    """Gathers the tokens [B, T, D] over `expert`; nothing of the execution is read."""
    num_experts = routing.probs_BTE.shape[-1]
    chosen_BTAE = jax.nn.one_hot(routing.experts_BTA, num_experts, dtype=routing.weights_BTA.dtype)
    weights_BTE = jnp.sum(chosen_BTAE * routing.weights_BTA[..., None], axis=2)
    rows = AllTokens(
        x_BTD=jax.sharding.reshard(hidden_BTD, gathered_spec(None)),
        weights_BTE=jax.sharding.reshard(weights_BTE, gathered_spec("expert")),
    )
    return rows, routing


def combine(rows: AllTokens, plan: Routing) -> tuple[jax.Array, Drops]:
    """The weighted sums [B, T, D], each on its token's device. Nothing is dropped."""
    return jax.sharding.reshard(rows.x_BTD, tokens_spec(None)), no_drops(plan)
