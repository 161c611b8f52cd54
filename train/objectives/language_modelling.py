"""Language modelling: next-token cross entropy, its z-loss, and the router losses of sparse models."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.model.mtp import following
from qwen_moe_jax.model.output import TokenLosses
from qwen_moe_jax.moe.losses import global_batch_loss, load_balancing_loss, router_z_loss, sequence_loss
from qwen_moe_jax.moe.stats import RouterStats
from train.config import LossConfig
from train.data.batches import Batch
from train.objectives.contract import HeldoutSum, WholeBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """Float32 scalars of a micro-batch; those of all micro-batches add up to the losses of the step.

    Attributes:
        total: the cross entropy plus the other terms times their coefficients; it is what is differentiated.
        cross_entropy: the mean over the targets, in nats.
        z: the mean of logsumexp(logits)² over the targets.
        balance: the load-balancing loss of kind `loss.load_balancing_type`; 0 for a dense model.
        router_z: the z-loss of the router's logits; 0 for a dense model.
        mtp: the mean cross entropy of the next-token head over its targets; 0 where it is not trained.
    """

    total: jax.Array
    cross_entropy: jax.Array
    z: jax.Array
    balance: jax.Array
    router_z: jax.Array
    mtp: jax.Array


def whole_batch(batch: Batch, micro_batches: int) -> WholeBatch:
    """The counts of a batch [B,T], which need no forward pass."""
    token_mask_BT = batch.segment_ids_BT > 0
    return WholeBatch(
        targets=jnp.sum(batch.target_mask_BT, dtype=jnp.int32),
        mtp_targets=jnp.sum(mtp_mask(batch), dtype=jnp.int32),
        tokens=jnp.sum(token_mask_BT, dtype=jnp.int32),
        sequences=jnp.sum(jnp.any(token_mask_BT, axis=1), dtype=jnp.int32),
        micro_batches=jnp.int32(micro_batches),
    )


def resolve_loss(config: LossConfig, model: ModelConfig) -> LossConfig:
    """The same settings with the model's defaults filled in.

    Raises:
        ConfigError: a setting is given for a part that the model does not have: routers, a next-token head.
    """
    if config.mtp_coef and not model.num_mtp_layers:
        raise ConfigError(
            f"loss.mtp_coef: found {config.mtp_coef}, and the model has no next-token head (mtp_num_hidden_layers in "
            "its config, mtp.* in its files). Leave it out."
        )
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
    """The sum over the real targets, a scalar."""
    return jnp.sum(x_BT, where=batch.target_mask_BT)


def mtp_mask(batch: Batch) -> jax.Array:
    """Whether the next-token head has a target at each token, bool [B,T]: the next token's, in the same segment."""
    target_mask_BT, follows_BT = following(jnp.asarray(batch.target_mask_BT), jnp.asarray(batch.segment_ids_BT))
    return target_mask_BT & follows_BT


def forward(model: CausalLM, batch: Batch, noise_key: jax.Array | None = None) -> TokenLosses:
    """The losses of all tokens of a micro-batch, float32 [B,T]; `noise_key` is for router jitter in training mode.

    Those of the next-token head come along where there is one; where nothing uses them, XLA removes them.
    """
    return model.token_losses(
        batch.tokens_BT,
        batch.targets_BT,
        segment_ids=batch.segment_ids_BT,
        positions=batch.positions_BT,
        noise_key=noise_key,
        mtp=model.mtp is not None,
    )


def heldout_sum(out: TokenLosses, batch: Batch) -> HeldoutSum:
    """The summed cross entropy of a batch, in nats, and its number of targets."""
    return HeldoutSum(loss=sum_over_targets(out.losses, batch), targets=jnp.sum(batch.target_mask_BT, dtype=jnp.int32))


def training_loss(out: TokenLosses, batch: Batch, whole: WholeBatch, config: LossConfig) -> Loss:
    """The mean cross entropy over real targets, plus the other losses times their coefficients.

    All means are over the whole batch, independent of the number of devices and micro-batches; a batch of padding has
    loss 0. The exception is the pooled load-balancing loss, a product of means: it is averaged over the micro-batches,
    as in transformers with gradient accumulation.

    Args:
        out: the output of `forward` on the micro-batch.
        batch: the micro-batch.
        whole: the counts of the whole batch.
        config: the settings, resolved by `resolve_loss`.
    """
    targets = jnp.maximum(whole.targets, 1)
    cross_entropy = sum_over_targets(out.losses, batch) / targets
    z = sum_over_targets(out.logsumexp**2, batch) / targets
    balance = router_z = jnp.float32(0)
    if out.router is not None:
        balance = _balance_loss(out.router.stats, whole, config.load_balancing_type)
        router_z = router_z_loss(_of_whole(out.router.stats, whole))
    total = (
        cross_entropy
        + config.z_loss_coef * z
        + config.router_aux_loss_coef * balance
        + config.router_z_loss_coef * router_z
    )
    mtp = jnp.float32(0)
    if config.mtp_coef:
        mtp = jnp.sum(out.mtp_losses, where=mtp_mask(batch)) / jnp.maximum(whole.mtp_targets, 1)
        total += config.mtp_coef * mtp
    return Loss(total=total, cross_entropy=cross_entropy, z=z, balance=balance, router_z=router_z, mtp=mtp)


def _balance_loss(stats: RouterStats, whole: WholeBatch, kind: str) -> jax.Array:
    if kind == "sequence":
        return sequence_loss(_of_whole(stats, whole))
    if kind == "global_batch":
        return global_batch_loss(stats, whole.router) / (whole.micro_batches if whole.router is None else 1)
    return load_balancing_loss(stats) / whole.micro_batches


def _of_whole(stats: RouterStats, whole: WholeBatch) -> RouterStats:
    """A micro-batch's sums with the counts of the whole batch: means that add up over the micro-batches."""
    return dataclasses.replace(stats, tokens=whole.tokens, sequences=whole.sequences)
