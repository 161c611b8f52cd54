"""Auxiliary losses of the router."""

import dataclasses

import jax
import jax.numpy as jnp

from qwen_moe_jax.moe.stats import RouterStats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterLosses:
    """Unscaled losses, float32 scalars, to be multiplied by coefficients; without real tokens, 0.

    The first three are three ways to keep the load of the experts even: choose one.

    Attributes:
        load_balancing: see `load_balancing_loss`; add it times `config.moe.router_aux_loss_coef` to train as
            transformers does.
        global_batch: see `global_batch_loss`.
        sequence: see `sequence_loss`.
        router_z: see `router_z_loss`.
    """

    load_balancing: jax.Array
    global_batch: jax.Array
    sequence: jax.Array
    router_z: jax.Array


def router_losses(stats: RouterStats) -> RouterLosses:
    """All losses of one batch. `stats` are of all sparse layers, stacked [L, …], as in all functions below."""
    return RouterLosses(
        load_balancing=load_balancing_loss(stats),
        global_batch=global_batch_loss(stats),
        sequence=sequence_loss(stats),
        router_z=router_z_loss(stats),
    )


def load_balancing_loss(stats: RouterStats) -> jax.Array:
    """`E * sum_e f_e P_e` over all sparse layers together; `num_experts_per_tok` when perfectly balanced.

    f_e is the mean number of choices of expert e per token, P_e its mean probability, both over the real tokens of all
    layers. The gradient flows through P alone. Equal to transformers' `load_balancing_loss_func` with an attention
    mask since about version 5.5; 4.57 and 5.2 apply the softmax twice, to the router's probabilities (Switch
    Transformer, arXiv 2101.03961, equations 4 to 6). In bfloat16 transformers recomputes the probabilities in that
    dtype, while these are the float32 ones that routed.
    """
    tokens = _at_least_one(jnp.sum(stats.tokens))
    chosen_E = jnp.sum(stats.tokens_per_expert, axis=0).astype(jnp.float32) / tokens
    probs_E = jnp.sum(stats.probs_per_expert, axis=0) / tokens
    return chosen_E.shape[0] * jnp.sum(chosen_E * probs_E)


def global_batch_loss(stats: RouterStats, whole: RouterStats | None = None) -> jax.Array:
    """`E * sum_e f_e P_e` of each layer, averaged over the layers; `num_experts_per_tok` when perfectly balanced.

    f_e is the share of the global batch's tokens that chose expert e, P_e its mean probability. A batch over many
    devices is one batch: each sequence may favour its experts as long as all of them together are even (Demons in the
    Detail, arXiv 2501.11873). f sums to `num_experts_per_tok`; where it is normalised to 1, as in Megatron-LM, the
    coefficient is that many times larger. The gradient flows through P alone.

    Args:
        stats: of this micro-step.
        whole: where a step accumulates gradients over several micro-steps, the stats of all of them (`sum_stats`). The
            losses of the micro-steps, and their gradients, then *sum* to those of one large batch. None: this
            micro-step is the whole step.
    """
    whole = stats if whole is None else whole
    tokens_L1 = _at_least_one(whole.tokens)[:, None]
    chosen_LE = whole.tokens_per_expert.astype(jnp.float32) / tokens_L1
    probs_LE = stats.probs_per_expert / tokens_L1
    return chosen_LE.shape[-1] * jnp.mean(jnp.sum(chosen_LE * probs_LE, axis=-1))


def sequence_loss(stats: RouterStats) -> jax.Array:
    """`E / A * sum_e f_e P_e` of each row of the batch, averaged over rows and layers; 1 when perfectly balanced.

    A row is a sequence, whatever segments it is packed from; f_e is the mean number of choices of expert e per real
    token of the row, P_e its mean probability. The gradient flows through P alone. Source: DeepSeek-V3, arXiv
    2412.19437, equations 17 to 20; there f counts the highest probabilities, here the experts that were chosen, which
    is another thing under a balancing bias.
    """
    return jnp.mean(stats.sequence_balance / _at_least_one(stats.sequences))


def router_z_loss(stats: RouterStats) -> jax.Array:
    """The mean over real tokens and layers of `logsumexp(logits)²`: it keeps the router's logits small.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    return jnp.mean(stats.squared_logsumexp / _at_least_one(stats.tokens))


def _at_least_one(count: jax.Array) -> jax.Array:
    return jnp.maximum(count, 1).astype(jnp.float32)
