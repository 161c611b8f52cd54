"""What training minimises: next-token cross entropy, plus the router's balance loss for sparse models."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from train.data import Batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """Float32 scalars. `total` is what is differentiated; `balance` is 0 for a dense model."""

    total: jax.Array
    cross_entropy: jax.Array
    balance: jax.Array


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


def training_loss(logits_BTV: jax.Array, batch: Batch, balance: jax.Array, balance_coef: float) -> Loss:
    """The mean cross entropy over real targets plus `balance_coef` times the float32 scalar `balance`.

    The mean is over the whole batch, on however many devices it lies; a batch of padding only has loss 0.
    """
    total, count = cross_entropy_sum(logits_BTV, batch)
    cross_entropy = total / jnp.maximum(count, 1)
    return Loss(total=cross_entropy + balance_coef * balance, cross_entropy=cross_entropy, balance=balance)
