"""Moving tokens to rows and back by index, and multiplying ragged groups, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_moe_jax.config.resolve import backend_for
from qwen_moe_jax.moe.dispatch.rows import (
    combine_rows,
    from_rows,
    plan_rows,
    ranks,
    sort_rows,
    to_rows,
    weights_to_rows,
)
from qwen_moe_jax.moe.experts import with_weights_in_gradient
from qwen_moe_jax.moe.kernels.grouped_matmul import BACKENDS, buffer_rows, grouped_matmul

K, T, A, D = 5, 7, 3, 4
any_keys = st.lists(st.integers(0, K), min_size=T * A, max_size=T * A)
# One compilation each, whatever the data: hypothesis varies the values, not the shapes.
ranks_of = jax.jit(ranks, static_argnums=1)
sort_of = jax.jit(sort_rows, static_argnums=(1, 2))


@settings(deadline=None, max_examples=100)
@given(keys=any_keys)
def test_a_rank_is_the_number_of_earlier_items_with_the_key(keys):
    found = ranks_of(jnp.array(keys, jnp.int32), K)
    np.testing.assert_array_equal(found, [keys[:i].count(key) for i, key in enumerate(keys)])


@settings(deadline=None, max_examples=100)
@given(keys=any_keys, priorities=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=T * A, max_size=T * A))
def test_a_rank_by_priority_counts_the_smaller_and_breaks_ties_by_position(keys, priorities):
    found = ranks_of(jnp.array(keys, jnp.int32), K, jnp.array(priorities, jnp.float32))
    items = list(zip(keys, priorities, range(T * A), strict=True))
    wanted = [sum(other[0] == key and other[1:] < (p, i) for other in items) for key, p, i in items]
    np.testing.assert_array_equal(found, wanted)


@settings(deadline=None, max_examples=100)
@given(keys=any_keys, extra=st.sampled_from([0, 9]))
def test_sorted_rows_hold_every_keyed_assignment_once_in_order(keys, extra):
    num_rows = T * A + extra
    plan, sizes_K = sort_of(jnp.array(keys, jnp.int32).reshape(T, A), K, num_rows)
    keyed = sorted((key, i) for i, key in enumerate(keys) if key < K)
    np.testing.assert_array_equal(plan.assignment_R[: len(keyed)], [i for _, i in keyed])
    assert (np.asarray(plan.assignment_R[len(keyed) :]) == T * A).all()
    np.testing.assert_array_equal(sizes_K, np.bincount(keys, minlength=K + 1)[:K])
    row_N = np.asarray(plan.row_TA).reshape(-1)
    for row, (_, i) in enumerate(keyed):
        assert row_N[i] == row
    assert (row_N[np.array(keys) == K] == num_rows).all()


def test_rows_there_and_back_are_a_weighted_sum_with_the_gradient_of_one():
    rng = np.random.default_rng(0)
    x_TD, weights_TA = rng.normal(size=(T, D)), rng.normal(size=(T, A))
    num_rows = T * A + 2
    row_TA = rng.permutation(num_rows)[: T * A].reshape(T, A)
    row_TA[2, 1] = row_TA[4] = num_rows  # these have no row
    plan = plan_rows(jnp.array(row_TA, jnp.int32), num_rows)
    scale_R = rng.normal(size=num_rows)
    seed_TD = rng.normal(size=(T, D))

    def by_index(x_TD, weights_TA, scale_R):
        return jnp.sum(from_rows(to_rows(x_TD, plan) * scale_R[:, None], weights_TA, plan) * seed_TD)

    def plainly(x_TD, weights_TA, scale_R):
        scale_TA = jnp.append(scale_R, 0)[row_TA]  # a gather that JAX differentiates itself
        return jnp.sum(jnp.einsum("TD,TA,TA->TD", x_TD, weights_TA, scale_TA) * seed_TD)

    arguments = tuple(jnp.array(x, jnp.float32) for x in (x_TD, weights_TA, scale_R))
    for found, wanted in zip(
        jax.grad(by_index, (0, 1, 2))(*arguments), jax.grad(plainly, (0, 1, 2))(*arguments), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_weights_that_are_known_to_the_experts_have_the_gradients_of_a_weighted_sum():
    rng = np.random.default_rng(2)
    num_rows = T * A + 2
    row_TA = rng.permutation(num_rows)[: T * A].reshape(T, A)
    row_TA[2, 1] = row_TA[4] = num_rows
    plan = plan_rows(jnp.array(row_TA, jnp.int32), num_rows)
    shapes = (T, D), (T, A), (D, D), (T, D)
    *arguments, seed_TD = (jnp.array(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def linear(x_RD, matrix_DD):
        return x_RD @ matrix_DD

    def by_the_experts(x_TD, weights_TA, matrix_DD):
        weights_R = weights_to_rows(weights_TA, plan)
        y_RD = with_weights_in_gradient(linear, to_rows(x_TD, plan), weights_R, matrix_DD)
        return jnp.sum(combine_rows(y_RD, weights_TA, plan) * seed_TD)

    def after_them(x_TD, weights_TA, matrix_DD):
        return jnp.sum(from_rows(linear(to_rows(x_TD, plan), matrix_DD), weights_TA, plan) * seed_TD)

    results = jax.jit(jax.value_and_grad(by_the_experts, (0, 1, 2)))(*arguments)
    wanted = jax.jit(jax.value_and_grad(after_them, (0, 1, 2)))(*arguments)
    assert results[0] == wanted[0], "the results themselves are weighted as ever"
    for found, expected in zip(results[1], wanted[1], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


E, INNER, OUTER, ROWS = 4, 6, 8, 300


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(0, ROWS), min_size=E, max_size=E), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_grouped_matmul_and_its_gradient_equal_a_loop_over_experts(dtype, tolerance, sizes, seed):
    """Empty experts, one that has it all, and room that nobody needed, in which there is rubbish."""
    sizes = np.array(sizes) * min(1.0, ROWS / max(1, sum(sizes)))
    sizes_E = sizes.astype(np.int32)
    rng = np.random.default_rng(seed)
    rows_RI = rng.normal(size=(buffer_rows(ROWS), INNER))
    weights_EOI = rng.normal(size=(E, OUTER, INNER))
    seed_RO = rng.normal(size=(len(rows_RI), OUTER))
    total = sizes_E.sum()
    rows_RI[total:] = np.nan
    rows_RI, weights_EOI, seed_RO = (jnp.array(x, dtype) for x in (rows_RI, weights_EOI, seed_RO))

    results = product_and_gradients(rows_RI, weights_EOI, sizes_E, seed_RO)
    found_RO, of_rows_RI, of_weights_EOI = (np.asarray(x, np.float64) for x in results)
    rows, weights, seeds = (np.asarray(x, np.float64) for x in (rows_RI, weights_EOI, seed_RO))
    start = 0
    for expert, size in enumerate(sizes_E):
        own = slice(start, start + size)
        np.testing.assert_allclose(found_RO[own], rows[own] @ weights[expert].T, rtol=tolerance, atol=10 * tolerance)
        np.testing.assert_allclose(of_rows_RI[own], seeds[own] @ weights[expert], rtol=tolerance, atol=10 * tolerance)
        of_weight_OI = seeds[own].T @ rows[own]
        np.testing.assert_allclose(of_weights_EOI[expert], of_weight_OI, rtol=tolerance, atol=30 * tolerance)
        start += size


@jax.jit
def product_and_gradients(rows_RI, weights_EOI, sizes_E, seed_RO):
    product_RO, pull_back = jax.vjp(
        lambda rows, weights: grouped_matmul(rows, weights, sizes_E, "blocks"), rows_RI, weights_EOI
    )
    return product_RO, *pull_back(seed_RO)


def test_every_platform_has_a_backend():
    for platform in ("cpu", "tpu", "gpu", "something new"):
        assert backend_for(platform) in BACKENDS
