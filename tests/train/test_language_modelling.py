"""The loss is the formula."""

import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.model.output import RouterOutput, TokenLosses
from qwen_moe_jax.moe.losses import router_losses
from qwen_moe_jax.moe.stats import RouterStats
from train.config import LossConfig
from train.data.batches import batch_at
from train.data.rows import pack
from train.objectives.language_modelling import resolve_loss, training_loss, whole_batch

STATS = RouterStats(
    tokens=jnp.array([12, 12]),
    tokens_per_expert=jnp.array([[20, 4], [9, 15]]),
    dropped_per_expert=jnp.zeros((2, 2), jnp.int32),
    rounds=jnp.ones(2, jnp.int32),
    probs_per_expert=jnp.array([[8.0, 4.0], [5.0, 7.0]]),
    squared_logsumexp=jnp.array([30.0, 20.0]),
    sequences=jnp.array([3, 3]),
    sequence_balance=jnp.array([3.5, 4.5]),
    entropy=jnp.array([0.5, 0.6]),
    max_logit=jnp.array([1.0, 2.0]),
)
ROUTER = RouterOutput(stats=STATS, losses=router_losses(STATS))


def example():
    batch = batch_at(pack([np.arange(1, 8), np.arange(2, 7)], 5), step=0, batch_size=3, seed=0)
    logits_BTV = np.random.default_rng(0).normal(size=(3, 5, 11)).astype(np.float32) * 4
    log_probs_BTV = logits_BTV - np.log(np.exp(logits_BTV.astype(np.float64)).sum(-1, keepdims=True))
    losses = [
        -log_probs_BTV[row, column, batch.tokens_BT[row, column + 1]]
        for row in range(3)
        for column in range(4)
        if batch.segment_ids_BT[row, column] == batch.segment_ids_BT[row, column + 1] > 0
    ]
    return batch, logits_BTV, losses


def scored(batch, logits_BTV, router=None):
    """What a model with these logits says."""
    logsumexp_BT = np.log(np.exp(logits_BTV.astype(np.float64)).sum(-1))
    target_BT = np.take_along_axis(logits_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
    losses_BT = jnp.asarray(logsumexp_BT - target_BT, jnp.float32)
    return TokenLosses(losses=losses_BT, logsumexp=jnp.asarray(logsumexp_BT, jnp.float32), router=router)


@pytest.mark.parametrize(
    ("balance", "field"), [("pooled", "load_balancing"), ("global_batch", "global_batch"), ("sequence", "sequence")]
)
def test_training_loss_is_the_mean_over_real_targets_plus_the_weighted_other_losses(balance, field):
    batch, logits_BTV, losses = example()
    config = LossConfig(
        load_balancing_type=balance, router_aux_loss_coef=0.01, router_z_loss_coef=0.1, z_loss_coef=0.001
    )
    out = scored(batch, logits_BTV, ROUTER)
    loss = training_loss(out, batch, whole_batch(batch, 1), config)
    z = np.mean(np.asarray(out.logsumexp)[batch.target_mask_BT] ** 2)
    expected_balance, router_z = float(getattr(ROUTER.losses, field)), float(ROUTER.losses.router_z)
    assert len(losses) < 12
    np.testing.assert_allclose(loss.cross_entropy, np.mean(losses), rtol=1e-6)
    np.testing.assert_allclose([loss.z, loss.balance, loss.router_z], [z, expected_balance, router_z], rtol=1e-6)
    total = np.mean(losses) + 0.001 * z + 0.01 * expected_balance + 0.1 * router_z
    np.testing.assert_allclose(loss.total, total, rtol=1e-6)


SPARSE = qmj.ModelConfig.from_pretrained(
    {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.03,
    }
)
DENSE = qmj.ModelConfig.from_pretrained({"model_type": "qwen3", "num_hidden_layers": 2})


def test_a_coefficient_that_is_left_out_is_the_models():
    assert resolve_loss(LossConfig(), SPARSE).router_aux_loss_coef == 0.03
    assert resolve_loss(LossConfig(router_aux_loss_coef=0.0), SPARSE).router_aux_loss_coef == 0.0
    assert resolve_loss(LossConfig(), DENSE).router_aux_loss_coef == 0.0


@pytest.mark.parametrize("key", ["router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"])
def test_a_dense_model_has_no_router_to_ask_anything_of(key):
    with pytest.raises(qmj.ConfigError, match=f"loss.{key}: found 0.5, and the model has no router"):
        resolve_loss(LossConfig(**{key: 0.5}), DENSE)


def test_a_batch_of_padding_has_loss_zero():
    batch, logits_BTV, _ = example()
    for field in vars(batch).values():
        field[...] = 0
    config = LossConfig(router_aux_loss_coef=0.0, z_loss_coef=0.1)
    assert training_loss(scored(batch, logits_BTV), batch, whole_batch(batch, 1), config).total == 0
