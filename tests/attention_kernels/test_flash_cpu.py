"""Attention by the C function of `nn.kernels.flash`, against sums in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_moe_jax.attention_kernels import cached
from qwen_moe_jax.attention_kernels.flash_cpu import attend_stored, attends_many

pytest.importorskip("llvmlite")

ROWS, KV_HEADS, SLOTS = 3, 2, 300
#: Tokens of each row before the new ones, and how many of these are tokens.
LENGTHS, COUNTS = [5, 0, 290], [100, 0, 150]
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def attention(q_TNH, k_SKH, v_SKH, seen_TS):
    """Of one row, in float64; a query sees some key."""
    heads = [np.arange(q_TNH.shape[1]) // (q_TNH.shape[1] // k_SKH.shape[1])]
    k_SNH, v_SNH = k_SKH[:, heads[0]], v_SKH[:, heads[0]]
    scores_NTS = np.einsum("TNH,SNH->NTS", q_TNH, k_SNH) * q_TNH.shape[-1] ** -0.5
    scores_NTS = np.where(seen_TS, scores_NTS, -np.inf)
    weights_NTS = np.exp(scores_NTS - scores_NTS.max(-1, keepdims=True))
    return np.einsum("NTS,SNH->TNH", weights_NTS / weights_NTS.sum(-1, keepdims=True), v_SNH)


def rounded(x, dtype):
    """Arrays of a dtype, and the same numbers in float64."""
    x = jnp.asarray(x, dtype)
    return x, np.asarray(x.astype(jnp.float32), np.float64)


@functools.partial(jax.jit, static_argnames="sliding_window")
def attend(*arguments, sliding_window=None, table_BM=None):
    return attend_stored(*arguments, sliding_window=sliding_window, table_BM=table_BM)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("heads", "head_dim", "window", "stored"), [
    (4, 16, None, "slots"), (2, 80, 40, "ring"), (6, 64, None, "blocks"),
])  # fmt: skip
def test_new_tokens_attend_to_their_row_where_it_is_stored(heads, head_dim, window, stored, dtype):
    tokens = max(COUNTS)
    q, q64 = rounded(normal(ROWS, tokens, heads, head_dim), dtype)
    rows, table_BM, size = 2 * ROWS if stored == "blocks" else ROWS, None, SLOTS
    if stored == "blocks":  # of 160 tokens, three a row
        table_BM, size, rows = jnp.array([[4, 2, 0], [1, 1, 1], [3, 5, 6]], jnp.int32), 160, 7
    size = {"slots": max(LENGTHS) + tokens, "ring": window and window + tokens - 1, "blocks": 160}[stored]
    keys, values = (rounded(normal(2, rows, size, KV_HEADS, head_dim, seed=seed), dtype) for seed in (1, 2))
    like = jnp.zeros(0, cached.stored_dtype(dtype, "cpu"))
    arrays = [cached.as_stored(x, like) for x, _ in (keys, values)]
    mask_BT = jnp.arange(tokens) < jnp.array(COUNTS)[:, None]
    assert attends_many(q, arrays[0])
    found = attend(
        q, *arrays, jnp.int32(1), jnp.array(LENGTHS), mask_BT, sliding_window=window, table_BM=table_BM
    )  # fmt: skip
    found = np.asarray(found.astype(jnp.float32))
    for row, (length, count) in enumerate(zip(LENGTHS, COUNTS, strict=True)):
        assert not found[row, count:].any()
        if count == 0:
            continue
        # Positions from the first that the first query sees on.
        position_S = np.arange(0 if window is None else max(length - window + 1, 0), length + count)
        row_S = np.full_like(position_S, row) if table_BM is None else np.asarray(table_BM)[row, position_S // size]
        distance_TS = length + np.arange(count)[:, None] - position_S
        seen_TS = (distance_TS >= 0) & (distance_TS < (window or tokens + SLOTS))
        slot_S = position_S % size
        expected = attention(q64[row, :count], keys[1][1, row_S, slot_S], values[1][1, row_S, slot_S], seen_TS)
        np.testing.assert_allclose(found[row, :count], expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_other_numbers_are_left_to_xla():
    q, keys = jnp.zeros((1, 9, 2, 16)), jnp.zeros((1, 1, 16, 2, 16))
    assert attends_many(q, keys)
    assert not attends_many(q.astype(jnp.bfloat16), keys)
    assert not attends_many(q.astype(jnp.float16), keys.astype(jnp.float16))
    assert not attends_many(q[..., :8], keys[..., :8])
