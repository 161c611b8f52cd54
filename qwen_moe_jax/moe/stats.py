"""What the router did, counted exactly over the whole mesh."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qwen_moe_jax.moe.router import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drops:
    """What a dispatcher reports.

    Attributes:
        dropped_BTA: bool; assignments of real tokens that did not reach their expert.
        rounds: int32 []; how often buffers were filled until every row was served, on the fullest device of the mesh.
            1 except under dropless, where a load exceeded its buffer.
    """

    dropped_BTA: jax.Array
    rounds: jax.Array


def no_drops(routing: Routing) -> Drops:
    """Every token reached its experts, in one round."""
    return Drops(dropped_BTA=jnp.zeros_like(routing.experts_BTA, dtype=bool), rounds=jnp.int32(1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterStats:
    """Counts over the real tokens of a batch, for one sparse layer, or stacked [L, …] for all of them.

    Attributes:
        tokens: int32 []; real tokens routed.
        tokens_per_expert: int32 [E]; tokens that chose the expert. Sums to `tokens * num_experts_per_tok`.
        dropped_per_expert: int32 [E]; of those, the ones it had no slot for (`dispatch="capacity"`).
        rounds: int32 []; rounds of the fullest device (`Drops.rounds`), above 1 where dropless exceeded its buffers.
        probs_per_expert: float32 [E]; sum of the router's probabilities (differentiable).
        squared_logsumexp: float32 []; sum over the tokens of logsumexp(logits)² (differentiable).
        sequences: int32 []; rows of the batch that hold a real token.
        sequence_balance: float32 []; sum over those rows of `E * sum_e f_e P_e / A`, where f_e is the mean number of
            choices of expert e per token of the row, and P_e its mean probability (differentiable).
        entropy: float32 []; mean entropy of the router's distribution, in nats; log(E) is uniform.
        max_logit: float32 []; the largest router logit. One that keeps growing foretells trouble in bfloat16.
    """

    tokens: jax.Array
    tokens_per_expert: jax.Array
    dropped_per_expert: jax.Array
    rounds: jax.Array
    probs_per_expert: jax.Array
    squared_logsumexp: jax.Array
    sequences: jax.Array
    sequence_balance: jax.Array
    entropy: jax.Array
    max_logit: jax.Array

    @property
    def load_imbalance(self) -> jax.Array:
        """float32 []; the largest load of an expert over the mean load: 1 is perfect balance."""
        load = self.tokens_per_expert.astype(jnp.float32)
        return jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1e-9)


def count(logits_BTE: jax.Array, routing: Routing, drops: Drops) -> RouterStats:
    """Counts one layer's routing.

    Args:
        logits_BTE: of the router.
        routing: of these logits.
        drops: of the dispatcher.
    """
    num_experts, chosen = routing.probs_BTE.shape[-1], routing.experts_BTA.shape[-1]

    def per_row(counted_BTA: jax.Array) -> jax.Array:
        chosen_BTAE = routing.experts_BTA[..., None] == jnp.arange(num_experts, dtype=jnp.int32)
        return jnp.sum(chosen_BTAE & counted_BTA[..., None], axis=(1, 2), dtype=jnp.int32)

    token_mask_BT1 = routing.token_mask_BT[..., None]
    tokens_B = jnp.sum(routing.token_mask_BT, axis=1, dtype=jnp.int32)
    tokens = jnp.sum(tokens_B, dtype=jnp.int32)
    assigned_BE = per_row(jnp.broadcast_to(token_mask_BT1, routing.experts_BTA.shape))
    probs_BE = jnp.sum(routing.probs_BTE, axis=1)
    logits_BTE = jnp.where(token_mask_BT1, logits_BTE.astype(jnp.float32), 0)
    squared_BT = jnp.where(routing.token_mask_BT, jax.nn.logsumexp(logits_BTE, axis=-1) ** 2, 0)
    per_token_B = 1 / jnp.maximum(tokens_B, 1).astype(jnp.float32)
    balance_B = num_experts / chosen * per_token_B**2 * jnp.sum(assigned_BE * probs_BE, axis=-1)
    entropy_BT = -jnp.sum(jax.scipy.special.xlogy(routing.probs_BTE, routing.probs_BTE), axis=-1)
    return RouterStats(
        tokens=tokens,
        tokens_per_expert=jnp.sum(assigned_BE, axis=0, dtype=jnp.int32),
        dropped_per_expert=jnp.sum(per_row(drops.dropped_BTA), axis=0, dtype=jnp.int32),
        rounds=drops.rounds,
        probs_per_expert=jnp.sum(probs_BE, axis=0),
        squared_logsumexp=jnp.sum(squared_BT),
        sequences=jnp.sum(tokens_B > 0, dtype=jnp.int32),
        sequence_balance=jnp.sum(balance_B),
        entropy=jax.lax.stop_gradient(jnp.sum(entropy_BT) / jnp.maximum(tokens, 1)),
        max_logit=jax.lax.stop_gradient(jnp.max(jnp.where(token_mask_BT1, logits_BTE, -jnp.inf))),
    )


def sum_stats(steps: Sequence[RouterStats]) -> RouterStats:
    """The stats of several batches as if they had been one, for example of the micro-steps of one optimizer step.

    Args:
        steps: at least one; of one layer each, or all stacked [L, …].
    """
    tokens = sum(step.tokens for step in steps)
    summed = jax.tree.map(lambda *parts: sum(parts), *steps)
    return dataclasses.replace(
        summed,
        rounds=jnp.stack([step.rounds for step in steps]).max(axis=0),
        entropy=sum(step.entropy * step.tokens for step in steps) / jnp.maximum(tokens, 1),
        max_logit=jnp.stack([step.max_logit for step in steps]).max(axis=0),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterTrace:
    """The router's decisions about every token, for one sparse layer, or stacked [L, …] for all of them.

    Attributes:
        logits: [B, T, E] in the dtype of the router.
        experts: int32 [B, T, A]; the chosen experts, the strongest first.
        weights: [B, T, A]; what each counts; 0 for padding.
        dropped: bool [B, T, A]; choices that did not reach their expert.
    """

    logits: jax.Array
    experts: jax.Array
    weights: jax.Array
    dropped: jax.Array
