"""The loss is the formula."""

import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.moe.losses import RouterLosses
from train.config import LossConfig
from train.data import batch_at, pack
from train.loss import cross_entropy_sum, resolve_loss, training_loss

ROUTER = RouterLosses(
    load_balancing=jnp.float32(4), global_batch=jnp.float32(5), sequence=jnp.float32(6), router_z=jnp.float32(7)
)


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


def test_cross_entropy_is_the_plain_formula_over_real_targets():
    batch, logits_BTV, losses = example()
    total, count = cross_entropy_sum(jnp.asarray(logits_BTV), batch)
    assert count == len(losses) < 12
    np.testing.assert_allclose(total, np.sum(losses), rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    batch, logits_BTV, _ = example()
    rounded = jnp.asarray(logits_BTV, jnp.bfloat16)
    total, _ = cross_entropy_sum(rounded, batch)
    expected, _ = cross_entropy_sum(rounded.astype(jnp.float32), batch)
    assert total.dtype == jnp.float32 and total == expected


@pytest.mark.parametrize(("balance", "value"), [("pooled", 4), ("global_batch", 5), ("sequence", 6)])
def test_training_loss_is_the_mean_plus_the_weighted_losses_of_the_router(balance, value):
    batch, logits_BTV, losses = example()
    config = LossConfig(balance=balance, balance_coef=0.01, router_z_coef=0.1)
    loss = training_loss(jnp.asarray(logits_BTV), batch, ROUTER, config)
    np.testing.assert_allclose(loss.cross_entropy, np.mean(losses), rtol=1e-6)
    np.testing.assert_allclose(loss.total, np.mean(losses) + 0.01 * value + 0.1 * 7, rtol=1e-6)
    assert loss.balance == value and loss.router_z == 7


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
    assert resolve_loss(LossConfig(), SPARSE).balance_coef == 0.03
    assert resolve_loss(LossConfig(balance_coef=0.0), SPARSE).balance_coef == 0.0
    assert resolve_loss(LossConfig(), DENSE).balance_coef == 0.0


@pytest.mark.parametrize("key", ["balance_coef", "router_z_coef", "balancing_bias_rate"])
def test_a_dense_model_has_no_router_to_ask_anything_of(key):
    with pytest.raises(qmj.ConfigError, match=f"loss.{key}: found 0.5, and the model has no router"):
        resolve_loss(LossConfig(**{key: 0.5}), DENSE)


def test_a_batch_of_padding_has_loss_zero():
    batch, logits_BTV, _ = example()
    for field in vars(batch).values():
        field[...] = 0
    assert training_loss(jnp.asarray(logits_BTV), batch, None, LossConfig(balance_coef=0.0)).total == 0
