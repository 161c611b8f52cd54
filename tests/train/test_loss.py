"""The loss is the formula."""

import jax.numpy as jnp
import numpy as np

from train.data import batch_at, pack
from train.loss import cross_entropy_sum, training_loss


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


def test_training_loss_is_the_mean_plus_the_weighted_balance_loss():
    batch, logits_BTV, losses = example()
    loss = training_loss(jnp.asarray(logits_BTV), batch, balance=jnp.float32(4.0), balance_coef=0.01)
    np.testing.assert_allclose(loss.cross_entropy, np.mean(losses), rtol=1e-6)
    np.testing.assert_allclose(loss.total, np.mean(losses) + 0.04, rtol=1e-6)
    assert loss.balance == 4.0


def test_a_batch_of_padding_has_loss_zero():
    batch, logits_BTV, _ = example()
    for field in vars(batch).values():
        field[...] = 0
    assert training_loss(jnp.asarray(logits_BTV), batch, jnp.float32(0), 0.0).total == 0
