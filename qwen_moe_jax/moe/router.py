"""Scores to routing: which experts each token chose, and how much each counts."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import MoEConfig
from qwen_moe_jax.sharding.rules import BATCH


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """The router's choice for every token, the strongest expert first.

    Attributes:
        experts_BTA: int32 expert of each assignment.
        weights_BTA: what its result counts, in the dtype the combination is done in; 0 for padding.
        probs_BTE: float32 softmax over all experts; 0 for padding.
        real_BT: bool, False for padding, which is routed nowhere.
    """

    experts_BTA: jax.Array
    weights_BTA: jax.Array
    probs_BTE: jax.Array
    real_BT: jax.Array


def route(logits_BTE: jax.Array, real_BT: jax.Array, moe: MoEConfig) -> Routing:
    """Softmax over all experts in float32, then the top `num_experts_per_tok`.

    Weights are renormalised in float32 where the config says so, then cast to the logits' dtype unless it keeps them in
    float32. Among equal probabilities the lower expert wins.

    Source: `Qwen3MoeTopKRouter`, `Qwen2MoeTopKRouter`, `MixtralTopKRouter` of transformers 5.
    """

    def local(logits_BTE: jax.Array, real_BT: jax.Array) -> Routing:
        probs_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
        weights_BTA, experts_BTA = jax.lax.top_k(probs_BTE, moe.num_experts_per_tok)
        if moe.norm_topk_prob:
            weights_BTA = weights_BTA / jnp.sum(weights_BTA, axis=-1, keepdims=True)
        if not moe.float32_weights:
            weights_BTA = weights_BTA.astype(logits_BTE.dtype)
        return Routing(
            experts_BTA=experts_BTA,
            weights_BTA=jnp.where(real_BT[..., None], weights_BTA, 0),
            probs_BTE=jnp.where(real_BT[..., None], probs_BTE, 0),
            real_BT=real_BT,
        )

    # Every device routes its own tokens: partitioning top_k over tokens would gather the scores instead.
    tokens, choices = P(BATCH, None), P(BATCH, None, None)
    out = Routing(experts_BTA=choices, weights_BTA=choices, probs_BTE=choices, real_BT=tokens)
    return jax.shard_map(local, in_specs=(choices, tokens), out_specs=out)(logits_BTE, real_BT)
