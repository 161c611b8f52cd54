"""Attention that reads the cache where it is stored, by the C function of `nn.kernels`, against XLA's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_moe_jax.attention_kernels import cached
from qwen_moe_jax.attention_kernels.cached_cpu import attends_in_place, write_and_attend
from qwen_moe_jax.nn.bits import from_bits

pytest.importorskip("llvmlite")

LAYERS, ROWS, KV_HEADS = 2, 3, 2
#: Query heads, size of a head, new tokens of a row.
SIZES = [(2, 16, 1), (6, 80, 1), (16, 64, 3)]


def new_tokens(heads, head_dim, tokens, dtype, seed=0):
    """Queries, keys and values, and which tokens are padding: of the first row all, of the last one none."""
    numbers = np.random.default_rng(seed)
    arrays = (numbers.standard_normal((ROWS, tokens, count, head_dim)) for count in (heads, KV_HEADS, KV_HEADS))
    count_B = np.array([0, max(tokens - 1, 1), tokens])
    return *(jnp.asarray(x, dtype) for x in arrays), jnp.asarray(np.arange(tokens) < count_B[:, None])


def stores(shape, dtype, seed=1):
    numbers = np.random.default_rng(seed)
    made = (cached.as_stored(jnp.asarray(numbers.standard_normal(shape)), jnp.zeros(0, dtype)) for _ in range(2))
    return tuple(made)


@functools.partial(jax.jit, static_argnames="sliding_window")
def in_place(*arguments, sliding_window=None, table_BM=None):
    return write_and_attend(*arguments, sliding_window=sliding_window, table_BM=table_BM)


def assert_same(found, expected, mask_BT, dtype):
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    real = np.asarray(mask_BT)
    mixed, keys, values = (np.asarray(x.astype(jnp.float32)) for x in found)
    np.testing.assert_allclose(mixed[real], np.asarray(expected[0], np.float32)[real], atol=tolerance, rtol=tolerance)
    assert not mixed[~real].any()
    np.testing.assert_array_equal(keys, np.asarray(expected[1], np.float32))
    np.testing.assert_array_equal(values, np.asarray(expected[2], np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("sizes", SIZES)
def test_rows_of_any_length_attend_to_their_slots_and_to_rings(sizes, window, dtype):
    heads, head_dim, tokens = sizes
    slots = 40 if window is None else window + tokens - 1
    q, k, v, mask_BT = new_tokens(heads, head_dim, tokens, dtype)
    stored = cached.stored_dtype(dtype, "cpu")
    keys, values = stores((LAYERS, ROWS, slots, KV_HEADS, head_dim), stored)
    layer, lengths_B = jnp.int32(1), jnp.array([5, 0, 33], jnp.int32)
    assert attends_in_place(q, keys)
    found = in_place(q, k, v, keys, values, layer, lengths_B, mask_BT, sliding_window=window)
    keys = cached.write_slots(keys, k, layer, lengths_B, mask_BT)
    values = cached.write_slots(values, v, layer, lengths_B, mask_BT)
    mixed = cached.attend_cached(q, keys, values, layer, lengths_B, mask_BT, window)
    assert_same(found, (mixed, keys, values), mask_BT, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_attend_to_their_blocks(dtype):
    heads, head_dim, tokens = SIZES[-1]
    q, k, v, mask_BT = new_tokens(heads, head_dim, tokens, dtype)
    keys, values = stores((LAYERS, 9, 16, KV_HEADS, head_dim), cached.stored_dtype(dtype, "cpu"))
    layer, lengths_B = jnp.int32(0), jnp.array([5, 0, 33], jnp.int32)
    table_BM = jnp.array([[1, 0, 0], [3, 0, 0], [8, 2, 5]], jnp.int32)
    found = in_place(q, k, v, keys, values, layer, lengths_B, mask_BT, table_BM=table_BM)
    keys = cached.write_blocks(keys, k, layer, lengths_B, mask_BT, table_BM)
    values = cached.write_blocks(values, v, layer, lengths_B, mask_BT, table_BM)
    mixed = cached.attend_blocks(q, keys, values, layer, lengths_B, mask_BT, table_BM)
    assert_same(found, (mixed, keys, values), mask_BT, dtype)


def test_several_threads_give_the_same_results_every_time():
    """Of 4,000 tokens in float32, in the order of the positions and large enough for two threads."""
    q, k, v, mask_BT = new_tokens(4, 32, 1, "float32")
    keys, values = stores((1, ROWS, 4096, KV_HEADS, 32), "float32")
    arguments = q, k, v, keys, values, jnp.int32(0), jnp.array([4000, 10, 4095], jnp.int32), mask_BT
    first = in_place(*arguments)
    keys, values = (np.asarray(from_bits(x), np.float64)[0] for x in first[1:])
    for row, count in ((1, 11), (2, 4096)):
        queries = np.asarray(q, np.float64)[row, 0].reshape(KV_HEADS, 2, 32)
        scores = np.einsum("kgh,skh->kgs", queries, keys[row, :count]) / np.sqrt(32)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("kgs,skh->kgh", weights, values[row, :count]).reshape(4, 32)
        np.testing.assert_allclose(first[0][row, 0], expected, atol=1e-6)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, in_place(*arguments), first)
