"""Auxiliary losses of the router."""

import dataclasses

import jax
import jax.numpy as jnp

from qwen_moe_jax.moe.stats import RouterStats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterLosses:
    """Unscaled losses, float32 scalars; multiply by the config's coefficients.

    Attributes:
        load_balancing: see `load_balancing_loss`; add it times `config.moe.router_aux_loss_coef`.
    """

    load_balancing: jax.Array


def load_balancing_loss(stats: RouterStats) -> jax.Array:
    """`E * sum_e f_e P_e` over all sparse layers together; `num_experts_per_tok` when perfectly balanced.

    f_e is the mean number of choices of expert e per token, P_e its mean probability, both over the real tokens of all
    layers. The gradient flows through P alone. Equal to transformers' `load_balancing_loss_func` with an attention
    mask (Switch Transformer, arXiv 2101.03961, equations 4 to 6); in bfloat16 transformers recomputes the
    probabilities in that dtype, while these are the float32 ones that routed.

    Args:
        stats: of all sparse layers, stacked [L, …].
    """
    tokens = jnp.maximum(jnp.sum(stats.tokens), 1).astype(jnp.float32)
    chosen_E = jnp.sum(stats.tokens_per_expert, axis=0).astype(jnp.float32) / tokens
    probs_E = jnp.sum(stats.probs_per_expert, axis=0) / tokens
    return chosen_E.shape[0] * jnp.sum(chosen_E * probs_E)
