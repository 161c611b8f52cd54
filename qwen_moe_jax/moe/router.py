"""Scores to routing: which experts each token chose, and how much each counts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import MoEConfig, RoutingMode
from qwen_moe_jax.sharding.rules import tokens_spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """The router's choice for every token, the strongest expert first.

    Attributes:
        experts_BTA: int32 expert of each assignment.
        weights_BTA: what its result counts, in the dtype the combination is done in; 0 for padding.
        probs_BTE: float32 softmax over all experts; 0 for padding.
        token_mask_BT: bool, False for padding, which is routed nowhere.
    """

    experts_BTA: jax.Array
    weights_BTA: jax.Array
    probs_BTE: jax.Array
    token_mask_BT: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ForcedRouting:
    """What is prescribed to the router, for one sparse layer, or stacked [L, …] for all of them.

    Attributes:
        experts: integers [B, T, A]; the expert of each assignment, negative where the router chooses: the strongest of
            those that the token has not been given. Those of padding are not read. None: the router chooses all.
        without: bool [E]; experts that are never chosen, given or not: the next best are. None: all may be.
    """

    experts: jax.Array | None = None
    without: jax.Array | None = None


def route(
    logits_BTE: jax.Array,
    token_mask_BT: jax.Array,
    moe: MoEConfig,
    *,
    bias_E: jax.Array | None = None,
    routing: RoutingMode = "learned",
    dtype: jax.typing.DTypeLike | None = None,
    forced: ForcedRouting | None = None,
) -> Routing:
    """Softmax over all experts in float32, then the top `num_experts_per_tok`.

    Weights are renormalised in float32 where the config says so, then cast to `dtype` unless it keeps them in float32.
    Among equal scores the lower expert wins.

    Source: `Qwen3MoeTopKRouter`, `Qwen2MoeTopKRouter`, `MixtralTopKRouter` of transformers 5; the bias is DeepSeek-V3's
    (arXiv 2412.19437, equation 16).

    Args:
        logits_BTE: of the router, in any dtype.
        token_mask_BT: False for padding.
        moe: how many are chosen, and what they count.
        bias_E: float32, added to the probabilities for the choice alone; weights and gradients know nothing of it.
        routing: see `ExecutionConfig`. Under "balanced", the order of a token's experts means nothing, and the bias is
            not read.
        dtype: of the weights, which is that of the hidden states they multiply; None is that of the logits.
        forced: experts that are prescribed, or ruled out. Their weights are those of the present logits all the same.
    """
    dtype = logits_BTE.dtype if dtype is None else dtype
    choose = CHOICES[routing]

    def local(
        logits_BTE: jax.Array, token_mask_BT: jax.Array, bias_E: jax.Array | None, forced: ForcedRouting | None
    ) -> Routing:
        probs_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
        choice_probs_BTE = jax.lax.stop_gradient(probs_BTE)
        if forced is None:
            experts_BTA = choose(choice_probs_BTE, bias_E, moe.num_experts_per_tok)
        else:
            preferred_BTE = PREFERENCES[routing](choice_probs_BTE, bias_E, moe.num_experts_per_tok)
            experts_BTA = _with_forced(preferred_BTE, token_mask_BT, forced, moe.num_experts_per_tok)
        weights_BTA = jnp.take_along_axis(probs_BTE, experts_BTA, axis=-1)
        if moe.norm_topk_prob:
            weights_BTA = weights_BTA / jnp.sum(weights_BTA, axis=-1, keepdims=True)
        if not moe.float32_weights:
            weights_BTA = weights_BTA.astype(dtype)
        return Routing(
            experts_BTA=experts_BTA,
            weights_BTA=jnp.where(token_mask_BT[..., None], weights_BTA, 0),
            probs_BTE=jnp.where(token_mask_BT[..., None], probs_BTE, 0),
            token_mask_BT=token_mask_BT,
        )

    # Every device routes its own tokens: partitioning top_k over tokens would gather the scores instead.
    tokens: Any = tokens_spec()
    choices: Any = tokens_spec(None)
    out = Routing(experts_BTA=choices, weights_BTA=choices, probs_BTE=choices, token_mask_BT=tokens)
    specs = (choices, tokens, P(), forced_specs(forced))
    return jax.shard_map(local, in_specs=specs, out_specs=out)(logits_BTE, token_mask_BT, bias_E, forced)


def forced_specs(forced: ForcedRouting | None, *, stacked: bool = False, mesh: Mesh | None = None) -> Any:
    """How what is prescribed is sharded: tokens as all tokens are. `stacked`: it has a leading axis of layers.

    `mesh` is that of the tokens; None is the mesh of the program that is traced.
    """
    if forced is None:
        return None
    layers = (None,) if stacked else ()
    return ForcedRouting(
        experts=None if forced.experts is None else _spec(*layers, *tokens_spec(None, mesh=mesh)),
        without=None if forced.without is None else _spec(),
    )


def _spec(*axes: Any) -> Any:
    return P(*axes)


def _with_forced(preferred_BTE: jax.Array, token_mask_BT: jax.Array, forced: ForcedRouting, chosen: int) -> jax.Array:
    """The experts that are given, and for the remaining slots the most preferred of the others, [B, T, A]."""
    if forced.without is not None:
        preferred_BTE = jnp.where(forced.without, -jnp.inf, preferred_BTE)
    if forced.experts is None:
        return jax.lax.top_k(preferred_BTE, chosen)[1]
    given_BTA = jnp.where(token_mask_BT[..., None], forced.experts.astype(jnp.int32), -1)
    experts_E = jnp.arange(preferred_BTE.shape[-1], dtype=jnp.int32)
    given_BTAE = given_BTA[..., None] == experts_E
    if forced.without is not None:
        given_BTA = jnp.where(jnp.any(given_BTAE & forced.without, axis=-1), -1, given_BTA)
    preferred_BTE = jnp.where(jnp.any(given_BTAE, axis=-2), -jnp.inf, preferred_BTE)
    others_BTA = jax.lax.top_k(preferred_BTE, chosen)[1]
    open_BTA = given_BTA < 0
    # The first open place takes the first of the others.
    place_BTA = jnp.maximum(jnp.cumsum(open_BTA, axis=-1, dtype=jnp.int32) - 1, 0)
    return jnp.where(open_BTA, jnp.take_along_axis(others_BTA, place_BTA, axis=-1), given_BTA)


def _scores(probs_BTE: jax.Array, bias_E: jax.Array | None, chosen: int) -> jax.Array:
    """Probabilities, bias included."""
    return probs_BTE if bias_E is None else probs_BTE + jax.lax.stop_gradient(bias_E)


def _strongest(probs_BTE: jax.Array, bias_E: jax.Array | None, chosen: int) -> jax.Array:
    """The experts with the highest probability, bias included, [B, T, A]."""
    return jax.lax.top_k(_scores(probs_BTE, bias_E, chosen), chosen)[1]


def _in_turn(probs_BTE: jax.Array, bias_E: jax.Array | None, chosen: int) -> jax.Array:
    """Token t of a device, counting padding, takes the experts after those of token t - 1, [B, T, A]."""
    batch, length, num_experts = probs_BTE.shape
    assignment_BTA = jnp.arange(batch * length * chosen, dtype=jnp.int32).reshape(batch, length, chosen)
    return assignment_BTA % num_experts


def _turn_scores(probs_BTE: jax.Array, bias_E: jax.Array | None, chosen: int) -> jax.Array:
    """Highest for the experts that `_in_turn` chooses, falling from there on."""
    first_BT1 = _in_turn(probs_BTE, bias_E, chosen)[..., :1]
    num_experts = probs_BTE.shape[-1]
    return -((jnp.arange(num_experts, dtype=jnp.int32) - first_BT1) % num_experts).astype(jnp.float32)


#: Each takes one device's probabilities, the bias and A, and returns experts.
CHOICES = {"learned": _strongest, "balanced": _in_turn}
#: Likewise, the scores whose highest are these experts, for what is prescribed in part.
PREFERENCES = {"learned": _scores, "balanced": _turn_scores}


def jitter(hidden_BTD: jax.Array, noise_key: jax.Array, amount: float) -> jax.Array:
    """Multiplies every number by one drawn from U(1 - amount, 1 + amount); the same numbers on every mesh.

    Source: `MixtralSparseMoeBlock` of transformers 5 in training mode.
    """
    spec = tokens_spec(None)
    noise_BTD = jax.random.uniform(noise_key, hidden_BTD.shape, jnp.float32, 1 - amount, 1 + amount, out_sharding=spec)
    return hidden_BTD * noise_BTD.astype(hidden_BTD.dtype)


def update_balancing_bias(bias_LE: jax.Array, tokens_per_expert_LE: jax.Array, rate: float) -> jax.Array:
    """Makes experts with less than the mean load likelier by `rate`, and those with more less likely.

    Source: Wang et al., 2024, arXiv 2408.15664, algorithm 1 (DeepSeek-V3 trains with a rate of 0.001).

    Args:
        bias_LE: float32, of any number of layers [..., E].
        tokens_per_expert_LE: int32, as in `RouterStats`; of the whole batch of a step.
        rate: the same for all experts, however uneven the load is.
    """
    # Summed as integers: at millions of tokens, float32 would call an even load uneven.
    mean_L1 = jnp.sum(tokens_per_expert_LE, axis=-1, keepdims=True) / tokens_per_expert_LE.shape[-1]
    return bias_LE + rate * jnp.sign(mean_L1 - tokens_per_expert_LE)
