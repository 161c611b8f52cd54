"""What training minimises: next-token cross entropy, its z-loss, and the losses of the router for sparse models."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.model.output import TokenLosses
from qwen_moe_jax.moe.losses import global_batch_loss, load_balancing_loss, router_z_loss, sequence_loss
from qwen_moe_jax.moe.stats import RouterStats
from train.config import LossConfig
from train.data.batches import Batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """Float32 scalars. `total` is what is differentiated; the others are unscaled, the last two 0 for a dense model.

    Of a micro-batch they are its share: the shares of all micro-batches sum to the losses of the step.

    Attributes:
        total: the cross entropy, plus the others times their coefficients.
        cross_entropy: the mean over the targets.
        z: the mean over the targets of logsumexp(logits)².
        balance: which balance loss that is says `loss.load_balancing_type` of the config.
        router_z: of the router's logits.
    """

    total: jax.Array
    cross_entropy: jax.Array
    z: jax.Array
    balance: jax.Array
    router_z: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class WholeBatch:
    """What the sums of a micro-batch are divided by: counts of the whole batch that a step reads, int32 scalars.

    Attributes:
        targets: real targets.
        tokens: real tokens.
        sequences: rows that hold a real token.
        micro_batches: parts it is cut into.
        router: counts of all micro-batches, where they are to be balanced together; None where each counts for itself.
    """

    targets: jax.Array
    tokens: jax.Array
    sequences: jax.Array
    micro_batches: jax.Array
    router: RouterStats | None = None


def whole_batch(batch: Batch, micro_batches: int) -> WholeBatch:
    """The counts that a batch tells before any model has seen it."""
    token_mask_BT = batch.segment_ids_BT > 0
    return WholeBatch(
        targets=jnp.sum(batch.target_mask_BT, dtype=jnp.int32),
        tokens=jnp.sum(token_mask_BT, dtype=jnp.int32),
        sequences=jnp.sum(jnp.any(token_mask_BT, axis=1), dtype=jnp.int32),
        micro_batches=jnp.int32(micro_batches),
    )


def resolve_loss(config: LossConfig, model: ModelConfig) -> LossConfig:
    """The same with nothing left open.

    Raises:
        ConfigError: something is asked of the router of a model without one.
    """
    if model.num_sparse_layers:
        model_coef = model.moe.router_aux_loss_coef
        return dataclasses.replace(
            config,
            router_aux_loss_coef=model_coef if config.router_aux_loss_coef is None else config.router_aux_loss_coef,
        )
    for key in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"):
        found = getattr(config, key)
        if found:
            raise ConfigError(f"loss.{key}: found {found}, and the model has no router. Leave it out.")
    return dataclasses.replace(config, router_aux_loss_coef=0.0)


def sum_over_targets(x_BT: jax.Array, batch: Batch) -> jax.Array:
    """The sum over the real targets alone."""
    return jnp.sum(x_BT, where=batch.target_mask_BT)


def training_loss(out: TokenLosses, batch: Batch, whole: WholeBatch, config: LossConfig) -> Loss:
    """The mean cross entropy over real targets, plus the other losses times their coefficients.

    The mean is over the whole batch, on however many devices and in however many micro-batches it lies; a batch of
    padding only has loss 0. So it is for all losses but one: the pooled balance loss reads products of means, and is
    averaged over the micro-batches, as transformers does where it accumulates gradients.

    Args:
        out: what the model says of the micro-batch.
        batch: the micro-batch.
        whole: what it is a part of.
        config: with nothing left open (`resolve_loss`).
    """
    targets = jnp.maximum(whole.targets, 1)
    cross_entropy = sum_over_targets(out.losses, batch) / targets
    z = sum_over_targets(out.logsumexp**2, batch) / targets
    balance = router_z = jnp.float32(0)
    if out.router is not None:
        balance = _balance_loss(out.router.stats, whole, config.load_balancing_type)
        router_z = router_z_loss(_of_whole(out.router.stats, whole))
    return Loss(
        total=cross_entropy
        + config.z_loss_coef * z
        + config.router_aux_loss_coef * balance
        + config.router_z_loss_coef * router_z,
        cross_entropy=cross_entropy,
        z=z,
        balance=balance,
        router_z=router_z,
    )


def _balance_loss(stats: RouterStats, whole: WholeBatch, kind: str) -> jax.Array:
    if kind == "sequence":
        return sequence_loss(_of_whole(stats, whole))
    if kind == "global_batch":
        return global_batch_loss(stats, whole.router) / (whole.micro_batches if whole.router is None else 1)
    return load_balancing_loss(stats) / whole.micro_batches


def _of_whole(stats: RouterStats, whole: WholeBatch) -> RouterStats:
    """A micro-batch's sums over the counts of the whole: means that add up over the micro-batches."""
    return dataclasses.replace(stats, tokens=whole.tokens, sequences=whole.sequences)
