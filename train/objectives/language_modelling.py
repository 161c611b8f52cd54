"""Language modelling: next-token cross entropy, its z-loss, and the router losses of sparse models."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.model.mtp import following
from qwen_moe_jax.model.output import TokenLosses
from train.config import LossConfig, TrainConfig
from train.data.batches import Batch, blank_batch
from train.data.corpus import Corpus
from train.data.corpus import load_corpus as load_text_corpus
from train.data.feed import BatchFeed, make_feed
from train.objectives.contract import Description, HeldoutSum, WholeBatch, abstract
from train.objectives.router import mtp_balance_loss, resolve_router_losses, router_losses

description = Description(name="language modelling", table="", model_class=CausalLM, loss="cross_entropy")


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
        mtp: the mean cross entropy of the next-token head over its targets; None where it is not trained.
        mtp_balance: the load-balancing loss of its router; None where it is not trained or dense.
    """

    total: jax.Array
    cross_entropy: jax.Array
    z: jax.Array
    balance: jax.Array
    router_z: jax.Array
    mtp: jax.Array | None
    mtp_balance: jax.Array | None

    @property
    def terms(self) -> dict[str, jax.Array]:
        """The terms by their names in the metrics."""
        head = {"mtp_loss": self.mtp, "mtp_balance_loss": self.mtp_balance}
        trained = {name: value for name, value in head.items() if value is not None}
        router = {"balance_loss": self.balance, "router_z": self.router_z}
        return {"cross_entropy": self.cross_entropy, "z_loss": self.z, **router, **trained}


def load_corpus(folder: Path, config: TrainConfig) -> Corpus:
    """The documents of the run in `folder`, made there at its first start."""
    return load_text_corpus(folder, config.data)


def feed(config: TrainConfig, corpus: Corpus, mesh: Mesh, sharding: NamedSharding) -> BatchFeed:
    """The batches of packed rows."""
    return make_feed(config.data, corpus, mesh, sharding, config.run.seed)


def abstract_batch(config: TrainConfig, model: ModelConfig) -> Batch:
    """The shapes of a batch."""
    return abstract(blank_batch(config.data.batch_size, config.data.seq_len))


def model_config(model: ModelConfig, corpus: Corpus) -> ModelConfig:
    """The model's config, which the objective does not change."""
    return model


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
    return resolve_router_losses(config, model)


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


def heldout_metrics(sums: HeldoutSum) -> dict[str, float]:
    """The mean cross entropy per target, in nats."""
    return {"loss": float(sums.loss / sums.targets)}


def training_loss(out: TokenLosses, batch: Batch, whole: WholeBatch, config: LossConfig) -> Loss:
    """The mean cross entropy over real targets, plus the other losses times their coefficients.

    All means are over the whole batch, independent of the number of devices and micro-batches; a batch of padding has
    loss 0. The pooled load-balancing loss is an exception: see `router_losses`.

    Args:
        out: the output of `forward` on the micro-batch.
        batch: the micro-batch.
        whole: the counts of the whole batch.
        config: the settings, resolved by `resolve_loss`.
    """
    targets = jnp.maximum(whole.targets, 1)
    cross_entropy = sum_over_targets(out.losses, batch) / targets
    z = sum_over_targets(out.logsumexp**2, batch) / targets
    router = router_losses(out.router, whole, config)
    total = cross_entropy + config.z_loss_coef * z + router.total
    mtp = mtp_balance = None
    if config.mtp_coef:
        mtp = jnp.sum(out.mtp_losses, where=mtp_mask(batch)) / jnp.maximum(whole.mtp_targets, 1)
        total += config.mtp_coef * mtp
        if out.mtp_router is not None:
            mtp_balance = mtp_balance_loss(out.mtp_router, whole, config.load_balancing_type)
            total += config.router_aux_loss_coef * mtp_balance
    return Loss(
        total=total,
        cross_entropy=cross_entropy,
        z=z,
        balance=router.balance,
        router_z=router.router_z,
        mtp=mtp,
        mtp_balance=mtp_balance,
    )
