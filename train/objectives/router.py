"""The losses of the routers, which every objective adds to its own."""

import dataclasses

import jax
import jax.numpy as jnp

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.model.output import RouterOutput
from qwen_moe_jax.moe.losses import global_batch_loss, load_balancing_loss, router_z_loss, sequence_loss
from qwen_moe_jax.moe.stats import RouterStats
from train.config import LossConfig
from train.objectives.contract import WholeBatch


@dataclasses.dataclass(frozen=True)
class RouterLosses:
    """Float32 scalars of a micro-batch.

    Attributes:
        balance: the load-balancing loss of kind `loss.load_balancing_type`; 0 for a dense model.
        router_z: the z-loss of the router's logits; 0 for a dense model.
        total: both times their coefficients.
    """

    balance: jax.Array
    router_z: jax.Array
    total: jax.Array

    @property
    def terms(self) -> dict[str, jax.Array]:
        """By their names in the metrics."""
        return {"balance_loss": self.balance, "router_z": self.router_z}


def router_losses(router: RouterOutput | None, whole: WholeBatch, config: LossConfig) -> RouterLosses:
    """The losses of a micro-batch's routers.

    They are means over the whole batch. The exception is the pooled load-balancing loss, a product of means: it is
    averaged over the micro-batches, as in transformers with gradient accumulation.

    Args:
        router: of the micro-batch's forward pass; None for a dense model.
        whole: the counts of the whole batch.
        config: resolved by `resolve_router_losses`.
    """
    balance = router_z = jnp.float32(0)
    if router is not None:
        balance = _balance_loss(router.stats, whole, config.load_balancing_type)
        router_z = router_z_loss(_of_whole(router.stats, whole))
    total = config.router_aux_loss_coef * balance + config.router_z_loss_coef * router_z
    return RouterLosses(balance, router_z, total)


def mtp_balance_loss(stats: RouterStats, whole: WholeBatch, kind: str) -> jax.Array:
    """The load-balancing loss of the next-token head's router, over the tokens that have another after them.

    It is weighed with `router_aux_loss_coef` by itself, and not with the head's own coefficient: in Megatron-LM, which
    sums over layers, the head's is one more of them (`moe/router.py`, `attach_and_log_load_balancing_loss`).
    transformers does not train the head. Over micro-batches, the losses of pooled and global_batch are averaged.
    """
    if kind == "sequence":
        return sequence_loss(dataclasses.replace(stats, sequences=whole.sequences))
    return load_balancing_loss(stats) / whole.micro_batches  # of one layer, pooled or not is the same


def resolve_router_losses(config: LossConfig, model: ModelConfig) -> LossConfig:
    """The same settings with the model's coefficient filled in.

    Raises:
        ConfigError: a setting is given for routers, and the model has none.
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


def _balance_loss(stats: RouterStats, whole: WholeBatch, kind: str) -> jax.Array:
    if kind == "sequence":
        return sequence_loss(_of_whole(stats, whole))
    if kind == "global_batch":
        return global_batch_loss(stats, whole.router) / (whole.micro_batches if whole.router is None else 1)
    return load_balancing_loss(stats) / whole.micro_batches


def _of_whole(stats: RouterStats, whole: WholeBatch) -> RouterStats:
    """A micro-batch's sums with the counts of the whole batch: means that add up over the micro-batches."""
    return dataclasses.replace(stats, tokens=whole.tokens, sequences=whole.sequences)
