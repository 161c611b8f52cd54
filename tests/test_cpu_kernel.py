"""Products with matrices picked out of a stack by the C function of `nn.kernels`, against NumPy."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_moe_jax.nn.kernels import cpu
from qwen_moe_jax.nn.quantised import quantise

pytest.importorskip("llvmlite")

#: Groups, outputs and inputs; each combination is compiled once.
SIZES = st.tuples(st.sampled_from([1, 3, 9]), st.sampled_from([1, 2, 7, 130]), st.sampled_from([16, 48, 512]))


@jax.jit
def multiplied(x_RI, stacks, matrices_G, sizes_G):
    return cpu.picked_matmul(x_RI, [(stack,) for stack in stacks], matrices_G, sizes_G)


def expected(x_RI, stack, matrices_G, sizes_G):
    wide = np.asarray(stack, np.float64)
    chosen = wide[np.repeat(matrices_G, sizes_G)]
    used = np.einsum("ri,roi->ro", x_RI[: len(chosen)].astype(np.float64), chosen)
    return np.pad(used, [(0, len(x_RI) - len(chosen)), (0, 0)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=15, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**32 - 1))
def test_each_row_meets_the_matrix_of_its_group(dtype, sizes, seed):
    groups, outputs, inputs = sizes
    numbers = np.random.default_rng(seed)
    rows, count = 11, 5
    ends = np.sort(numbers.integers(0, rows + 1, groups))
    sizes_G = np.diff(ends, prepend=0).astype(np.int32)
    matrices_G = numbers.integers(0, count, groups).astype(np.int32)
    x_RI = numbers.standard_normal((rows, inputs)).astype(np.float32)
    stacks = [jnp.asarray(numbers.standard_normal((count, width, inputs)), dtype) for width in (outputs, outputs + 2)]
    found = multiplied(x_RI, stacks, matrices_G, sizes_G)
    for result, stack in zip(found, stacks, strict=True):
        np.testing.assert_allclose(result, expected(x_RI, stack, matrices_G, sizes_G), atol=1e-4)


def test_a_product_large_enough_for_several_threads_is_the_same_every_time():
    numbers = np.random.default_rng(0)
    stack = jnp.asarray(numbers.standard_normal((3, 1000, 256)), jnp.float32)
    x_RI = numbers.standard_normal((6, 256)).astype(np.float32)
    arguments = x_RI, [stack], np.array([2, 0], np.int32), np.array([2, 4], np.int32)
    first = multiplied(*arguments)[0]
    np.testing.assert_allclose(first, expected(x_RI, stack, *arguments[2:]), atol=1e-4)
    for _ in range(50):
        np.testing.assert_array_equal(multiplied(*arguments)[0], first)


def test_without_llvmlite_it_is_not_available(monkeypatch):
    assert cpu.is_available("float32", 32)
    assert not cpu.is_available("float32", 24), "I is no multiple of 16"
    assert not cpu.is_available("float16", 32)
    cpu.target.cache_clear()
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert not cpu.is_available("float32", 32)
    cpu.target.cache_clear()


@pytest.mark.parametrize(("bits", "group"), [(8, 48), (4, 16), (4, 48)])
def test_rows_meet_integers_as_they_meet_the_dequantised_floats(bits, group):
    """Of [8, 7, 48] matrices; int4 in groups of 48 has no function."""
    numbers = np.random.default_rng(1)
    groups = 1 if bits == 8 else 48 // group
    matrix = jax.tree.map(jnp.asarray, quantise(numbers.standard_normal((2, 4, 7, 48), np.float32), bits, groups, np))
    assert cpu.is_available(cpu.format_of(matrix), 48) == (group == 16 or bits == 8)
    if group == 48 and bits == 4:
        return
    x_RI = numbers.standard_normal((5, 48), np.float32)
    matrices_G, sizes_G = np.array([6, 1], np.int32), np.array([2, 3], np.int32)
    stacks = [cpu.arrays_of(matrix)]
    [found] = cpu.picked_matmul(x_RI, stacks, jnp.asarray(matrices_G), jnp.asarray(sizes_G), cpu.format_of(matrix))
    floats = np.asarray(matrix.dequantised("float32")).reshape(8, 7, 48)
    np.testing.assert_allclose(found, expected(x_RI, floats, matrices_G, sizes_G), atol=1e-4)
