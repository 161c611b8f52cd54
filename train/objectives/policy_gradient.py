"""The losses of GRPO and its variants on per-token log-probabilities: pure functions of arrays.

Names and meanings are those of TRL's `GRPOConfig`. Sources: GRPO, arXiv 2402.03300; DAPO, arXiv 2503.14476; Dr. GRPO,
arXiv 2503.20783; GSPO (ratios of sequences), arXiv 2507.18071; the factor of the KL term, arXiv 2512.02556.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

#: What is added to a standard deviation of rewards before it divides, as in TRL.
_LEAST_SPREAD = 1e-4


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The settings of a policy-gradient loss; `train.config.GRPOConfig` describes them.

    Attributes:
        loss_type: how the tokens' losses become one number.
        epsilon, epsilon_high: the ratio is clipped to [1 - epsilon, 1 + epsilon_high].
        beta: weight of the KL divergence to the reference; 0 is none.
        importance_sampling_level: whether a ratio is of a token or of a sequence.
        use_bias_correction_kl: whether the KL term is multiplied by the ratio.
        max_completion_length: the constant that dr_grpo divides by.
    """

    loss_type: Literal["grpo", "dapo", "dr_grpo"]
    epsilon: float
    epsilon_high: float
    beta: float
    importance_sampling_level: Literal["token", "sequence"]
    use_bias_correction_kl: bool
    max_completion_length: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PolicyTerms:
    """Float32 scalars of a micro-batch; those of all micro-batches add up to those of the step.

    Attributes:
        loss: what is minimised.
        kl: the mean of k3, the estimate of the KL divergence to the reference, over the tokens; 0 without a reference.
        clipped_low, clipped_high: the share of the tokens, or of the sequences with ratios of sequences, whose ratio is
            below the lower bound with a negative advantage, or above the upper one with a positive advantage.
    """

    loss: jax.Array
    kl: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array


def group_advantages(
    rewards: np.ndarray, num_generations: int, scale_rewards: Literal["group", "batch", "none"]
) -> np.ndarray:
    """The advantage of each completion over those of the same prompt, float32 [R]: its reward less the group's mean.

    Args:
        rewards: float [R]; the completions of a prompt next to each other.
        num_generations: completions of a prompt, at least 2.
        scale_rewards: what the difference is divided by: the standard deviation (n - 1) within the group, that of all
            rewards, or nothing.
    """
    groups = np.asarray(rewards, np.float64).reshape(-1, num_generations)
    advantages = groups - groups.mean(axis=1, keepdims=True)
    if scale_rewards == "group":
        advantages /= groups.std(axis=1, ddof=1, keepdims=True) + _LEAST_SPREAD
    elif scale_rewards == "batch":
        advantages /= groups.std(ddof=1) + _LEAST_SPREAD
    return advantages.reshape(-1).astype(np.float32)


def policy_loss(
    log_probs_BT: jax.Array,
    old_log_probs_BT: jax.Array,
    reference_log_probs_BT: jax.Array | None,
    advantages_B: jax.Array,
    mask_BT: jax.Array,
    config: PolicyLoss,
    *,
    tokens: jax.Array | float,
    sequences: jax.Array | float,
) -> PolicyTerms:
    """The loss of a micro-batch, divided by the counts of the whole batch.

    Args:
        log_probs_BT: of the sampled tokens under the model that is trained, float32.
        old_log_probs_BT: under the model that sampled them.
        reference_log_probs_BT: under the reference; needed where `config.beta` is not 0.
        advantages_B: float32.
        mask_BT: bool; the completions' tokens that count.
        config: the settings.
        tokens: of the whole batch that count.
        sequences: rows of the whole batch with a completion, whether its tokens count or not.
    """
    tokens, sequences = jnp.maximum(tokens, 1), jnp.maximum(sequences, 1)
    length_B1 = jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1)
    by_sequence = config.importance_sampling_level == "sequence"
    # Masked before it is used: a log-probability of padding may be anything, and 0 times NaN is NaN.
    log_ratio_BT = jnp.where(mask_BT, log_probs_BT - old_log_probs_BT, 0)
    if by_sequence:
        log_ratio_BT = jnp.sum(log_ratio_BT, axis=1, keepdims=True) / length_B1
    ratio_BT = jnp.exp(log_ratio_BT)
    advantages_B1 = advantages_B[:, None]
    low, high = 1 - config.epsilon, 1 + config.epsilon_high
    losses_BT = -jnp.minimum(ratio_BT * advantages_B1, jnp.clip(ratio_BT, low, high) * advantages_B1)
    kl = jnp.float32(0)
    if config.beta:
        assert reference_log_probs_BT is not None
        difference_BT = jnp.where(mask_BT, reference_log_probs_BT - log_probs_BT, 0)
        kl_BT = jnp.exp(difference_BT) - difference_BT - 1
        if config.use_bias_correction_kl:
            kl_BT *= ratio_BT
        losses_BT += config.beta * kl_BT
        kl = jnp.sum(kl_BT, where=mask_BT) / tokens
    losses_BT = jnp.where(mask_BT, losses_BT, 0)
    if config.loss_type == "grpo":
        loss = jnp.sum(losses_BT / length_B1) / sequences
    elif config.loss_type == "dr_grpo":
        loss = jnp.sum(losses_BT) / (sequences * config.max_completion_length)
    else:
        loss = jnp.sum(losses_BT) / tokens
    counted, of_all = (jnp.any(mask_BT, axis=1, keepdims=True), sequences) if by_sequence else (mask_BT, tokens)
    is_low, is_high = (ratio_BT < low) & (advantages_B1 < 0), (ratio_BT > high) & (advantages_B1 > 0)
    return PolicyTerms(
        loss=loss,
        kl=kl,
        clipped_low=jnp.sum(is_low & counted, dtype=jnp.float32) / of_all,
        clipped_high=jnp.sum(is_high & counted, dtype=jnp.float32) / of_all,
    )
