"""The counting sort of `nn.kernels`, against NumPy's stable sort."""

import jax
import numpy as np
import pytest

from qwen_moe_jax.nn.kernels import sorting

pytest.importorskip("llvmlite")


@pytest.mark.parametrize(("items", "keys", "rows"), [(1, 1, 1), (50, 7, 50), (50, 7, 64), (3, 40, 9)])
def test_items_are_sorted_by_key_and_in_their_order(items, keys, rows):
    keys_N = np.random.default_rng(items + rows).integers(0, keys + 1, items).astype(np.int32)
    assert sorting.is_available()
    item_R, row_N, sizes_K = jax.jit(sorting.counting_sort, static_argnums=(1, 2))(keys_N, keys, rows)
    order = np.argsort(keys_N, kind="stable")[: np.sum(keys_N < keys)]
    np.testing.assert_array_equal(item_R, np.concatenate([order, np.full(rows - len(order), items)]))
    expected_N = np.full(items, rows)
    expected_N[order] = np.arange(len(order))
    np.testing.assert_array_equal(row_N, expected_N)
    np.testing.assert_array_equal(sizes_K, np.bincount(keys_N, minlength=keys + 1)[:keys])
