"""Products of ragged groups of rows by the C functions of `nn.kernels.matmul`, and what calls them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.nn import many_rows
from qwen_moe_jax.nn.kernels import matmul
from tests.moe.blocks import block_config, build_block

compiled = pytest.importorskip("qwen_moe_jax.nn.kernels.compiled", exc_type=ImportError)

#: What is multiplied how, and the relative error that is allowed.
WAYS = {
    "float32": ("float32", None, 2e-6),
    "bfloat16": ("bfloat16", None, 6e-3),
    "bfloat16 pairs": ("bfloat16", ("bfloat16 pairs", 14, 2), 6e-3),
    "float32, small tiles": ("float32", ("float32", 6, 1), 2e-6),
}
#: Rows of the buffer, outputs, inputs, and rows of each group: one with several parts, and contractions in two blocks.
SHAPES = [(37, 32, 64, [5, 0, 30]), (700, 544, 32, [13, 570]), (3, 32, 544, [3])]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    dtype, tiles, tolerance = WAYS[request.param]
    if request.param == "bfloat16 pairs" and "avx512bf16" not in compiled._features():
        pytest.skip("this processor has no instruction for pairs of bfloat16")
    if tiles is not None:
        monkeypatch.setattr(compiled, "tiles_of", lambda _: tiles)
    return dtype, tolerance


@pytest.mark.parametrize(("rows", "outputs", "inputs", "sizes"), SHAPES)
def test_rows_meet_their_groups_matrix_and_so_do_both_gradients(way, rows, outputs, inputs, sizes):
    dtype, tolerance = way
    numbers = np.random.default_rng(rows)
    x_RI, g_RO, w_MOI = (
        jnp.asarray(numbers.standard_normal(shape), dtype)
        for shape in [(rows, inputs), (rows, outputs), (len(sizes) + 2, outputs, inputs)]
    )
    # Nothing is read past the last row that belongs to a group.
    x_RI, g_RO = (array.at[sum(sizes) :].set(jnp.nan) for array in (x_RI, g_RO))
    sizes_G = jnp.asarray(sizes, jnp.int32)

    @jax.jit
    def products(x_RI, g_RO, w_MOI, sizes_G):
        return (
            matmul.ragged_matmul(x_RI, w_MOI, sizes_G, transposed=True, first=2),
            matmul.ragged_matmul(g_RO, w_MOI, sizes_G, transposed=False, first=1),
            matmul.ragged_outer(g_RO, x_RI, sizes_G),
        )

    found = [np.asarray(array, np.float64) for array in products(x_RI, g_RO, w_MOI, sizes_G)]
    x, g, w = (np.asarray(array, np.float64) for array in (x_RI, g_RO, w_MOI))
    expected = [np.zeros_like(array) for array in found]
    start = 0
    for group, size in enumerate(sizes):
        own = slice(start, start + size)
        expected[0][own], expected[1][own] = x[own] @ w[group + 2].T, g[own] @ w[group + 1]
        expected[2][group] = g[own].T @ x[own]
        start += size
    for result, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(result, right, atol=tolerance * np.abs(right).max(), rtol=0)


def test_it_is_asked_for_what_it_can_multiply():
    assert matmul.is_available("float32", 16, 48) and matmul.is_available("bfloat16", 32, 64)
    assert not matmul.is_available("float32", 24, 48)
    assert not matmul.is_available("bfloat16", 16, 64)
    assert not matmul.is_available("float16", 32, 64)
    assert not matmul.is_worth_it("float32", 16, 16)


@pytest.fixture(scope="module")
def block():
    """Experts and a shared expert of 128 × 64, which are large enough."""
    config = block_config(moe_intermediate_size=64, num_experts=4, shared_expert_intermediate_size=64)
    return build_block(dataclasses.replace(config, hidden_size=128), qmj.make_mesh(devices=jax.devices()[:1]))


def loss_and_gradients(block, execution):
    """Of 2 × 64 tokens, and how many products are made by the C functions."""

    def loss(block, x_BTD):
        return jnp.vdot(block(x_BTD, None, execution)[0], seed_BTD)

    x_BTD, seed_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 64, 128)), jnp.float32)
    step = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(block, x_BTD).lower()
    return step.compile()(block, x_BTD), step.as_text().count("_matmul_float32_")


def test_a_block_and_its_gradients_are_those_of_xlas_products(block, monkeypatch):
    settings = {"dropless": {}, "capacity": {"capacity_factor": 4.0}}
    found = {
        dispatch: loss_and_gradients(block, qmj.ExecutionConfig(dispatch=dispatch, dtype="float32", **more))
        for dispatch, more in settings.items()
    }
    monkeypatch.setattr(matmul, "on_cpu", lambda: False)
    expected, calls = loss_and_gradients(block, qmj.ExecutionConfig(dispatch="dense", dtype="float32"))
    assert calls == 0
    for dispatch, (results, calls) in found.items():
        assert calls == 18, f"{dispatch}: three products of the experts and of the shared one, with two gradients each"
        for result, right in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(result, right, atol=1e-5 * max(1, np.abs(right).max()))


def test_a_product_of_one_device_has_the_gradients_of_xlas():
    numbers = np.random.default_rng(0)
    shapes = (2, 17, 64), (160, 64), (2, 17, 160)
    x, table, of_y = (jnp.asarray(numbers.standard_normal(shape), jnp.float32) for shape in shapes)
    assert many_rows.multiplies_local(x, table)
    found, pull = jax.vjp(jax.jit(many_rows.local_matmul), x, table)
    expected, pull_expected = jax.vjp(lambda x, table: x @ table.T, x, table)
    for result, right in zip((found, *pull(of_y)), (expected, *pull_expected(of_y)), strict=True):
        np.testing.assert_allclose(result, right, atol=1e-4)
