"""What the router did, counted exactly over the whole mesh."""

import dataclasses

import jax
import jax.numpy as jnp

from qwen_moe_jax.moe.router import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterStats:
    """Counts over the real tokens of a batch, for one sparse layer, or stacked [L, …] for all of them.

    Attributes:
        tokens: int32 []; real tokens routed.
        tokens_per_expert: int32 [E]; tokens that chose the expert. Sums to `tokens * num_experts_per_tok`.
        dropped_per_expert: int32 [E]; of those, the ones it had no place for.
        probs_per_expert: float32 [E]; sum of the router's probabilities (differentiable).
        entropy: float32 []; mean entropy of the router's distribution, in nats; log(E) is uniform.
    """

    tokens: jax.Array
    tokens_per_expert: jax.Array
    dropped_per_expert: jax.Array
    probs_per_expert: jax.Array
    entropy: jax.Array


def count(routing: Routing, dropped_per_expert: jax.Array) -> RouterStats:
    """Counts one layer's routing."""
    num_experts = routing.probs_BTE.shape[-1]
    chosen_BTAE = routing.experts_BTA[..., None] == jnp.arange(num_experts)
    chosen_BTAE = chosen_BTAE & routing.real_BT[..., None, None]
    tokens = jnp.sum(routing.real_BT, dtype=jnp.int32)
    entropy_BT = -jnp.sum(jax.scipy.special.xlogy(routing.probs_BTE, routing.probs_BTE), axis=-1)
    return RouterStats(
        tokens=tokens,
        tokens_per_expert=jnp.sum(chosen_BTAE, axis=(0, 1, 2), dtype=jnp.int32),
        dropped_per_expert=dropped_per_expert,
        probs_per_expert=jnp.sum(routing.probs_BTE, axis=(0, 1)),
        entropy=jax.lax.stop_gradient(jnp.sum(entropy_BT) / jnp.maximum(tokens, 1)),
    )
