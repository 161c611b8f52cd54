"""The loss's C functions on CPUs against XLA's operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_moe_jax.model.cross_entropy_cpu import is_worth_it, target_and_logsumexp

pytest.importorskip("llvmlite")


@jax.jit
def by_xla(logits_BCV, targets_BC):
    is_target_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
    return jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0), axis=-1), jax.nn.logsumexp(logits_BCV, axis=-1)


@pytest.mark.parametrize("width", [16, 272, 8208])
def test_targets_and_logsumexp_and_their_gradients_are_those_of_xlas_operations(width):
    numbers = np.random.default_rng(width)
    logits_BCV = jnp.asarray(20 * numbers.standard_normal((3, 35, width)), jnp.float32)
    logits_BCV = logits_BCV.at[0, 0, 5:].set(-3.4e38).at[0, 1].set(88.5)  # most of them masked; large and the same
    targets_BC = jnp.asarray(numbers.integers(-2, width + 2, (3, 35)), jnp.int32)  # some in another shard
    gradients = tuple(jnp.asarray(numbers.standard_normal((2, 3, 35)), jnp.float32))
    found, pull = jax.vjp(lambda x_BCV: jax.jit(target_and_logsumexp)(x_BCV, targets_BC), logits_BCV)
    expected, pull_expected = jax.vjp(lambda x_BCV: by_xla(x_BCV, targets_BC), logits_BCV)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
    np.testing.assert_allclose(pull(gradients)[0], pull_expected(gradients)[0], atol=2e-5)


@pytest.mark.parametrize("logit", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_makes_its_tokens_loss_not_finite(logit):
    logits_BCV = jnp.zeros((1, 2, 8192)).at[0, 0, 4711].set(logit)
    logsumexp_BC = jax.jit(target_and_logsumexp)(logits_BCV, jnp.zeros((1, 2), jnp.int32))[1]
    assert not np.isfinite(logsumexp_BC[0, 0]) and np.isclose(logsumexp_BC[0, 1], np.log(8192))


def test_it_is_asked_for_what_it_can_read():
    logits_BCV = jnp.zeros((1, 8, 1024))
    assert is_worth_it(logits_BCV)
    assert not is_worth_it(logits_BCV[..., :1000]) and not is_worth_it(logits_BCV[:, :4])
    assert not is_worth_it(logits_BCV.astype(jnp.bfloat16))
