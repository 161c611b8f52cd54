"""What training minimises: next-token cross entropy, plus the losses of the router for sparse models."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.moe.losses import RouterLosses
from train.config import BALANCE_LOSSES, LossConfig
from train.data import Batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """Float32 scalars. `total` is what is differentiated; `balance` and `router_z`, unscaled, are 0 for a dense model.

    Which balance loss that is says `loss.balance` of the config.
    """

    total: jax.Array
    cross_entropy: jax.Array
    balance: jax.Array
    router_z: jax.Array


def resolve_loss(config: LossConfig, model: ModelConfig) -> LossConfig:
    """The same with nothing left open.

    Raises:
        ConfigError: something is asked of the router of a model without one.
    """
    if model.num_sparse_layers:
        model_coef = model.moe.router_aux_loss_coef
        return dataclasses.replace(
            config, balance_coef=model_coef if config.balance_coef is None else config.balance_coef
        )
    for key in ("balance_coef", "router_z_coef", "balancing_bias_rate"):
        found = getattr(config, key)
        if found:
            raise ConfigError(f"loss.{key}: found {found}, and the model has no router. Leave it out.")
    return dataclasses.replace(config, balance_coef=0.0)


def cross_entropy_sum(logits_BTV: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sums -log p(target) over the real targets.

    Args:
        logits_BTV: any float dtype; the log-softmax is taken in float32.
        batch: `targets_BT` and `target_mask_BT` are read.

    Returns:
        the sum, float32 scalar in nats, and the number of targets, int32 scalar.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    target_logits_BT = jnp.take_along_axis(logits_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_logits_BT
    return jnp.sum(losses_BT, where=batch.target_mask_BT), jnp.sum(batch.target_mask_BT, dtype=jnp.int32)


def training_loss(logits_BTV: jax.Array, batch: Batch, router: RouterLosses | None, config: LossConfig) -> Loss:
    """The mean cross entropy over real targets, plus the balance loss and the z-loss times their coefficients.

    The mean is over the whole batch, on however many devices it lies; a batch of padding only has loss 0.

    Args:
        logits_BTV: see `cross_entropy_sum`.
        batch: what they are the logits of.
        router: the model's losses; None for a dense model.
        config: with nothing left open (`resolve_loss`).
    """
    total, count = cross_entropy_sum(logits_BTV, batch)
    cross_entropy = total / jnp.maximum(count, 1)
    balance = jnp.float32(0) if router is None else getattr(router, BALANCE_LOSSES[config.balance])
    router_z = jnp.float32(0) if router is None else router.router_z
    return Loss(
        total=cross_entropy + config.balance_coef * balance + config.router_z_coef * router_z,
        cross_entropy=cross_entropy,
        balance=balance,
        router_z=router_z,
    )
