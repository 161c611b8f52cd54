"""Attention by the C function of `nn.kernels.functions.flash`, against sums in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_moe_jax.attention_kernels import cached
from qwen_moe_jax.attention_kernels.flash_cpu import attend_rows, attend_stored, attends_many, attends_rows

pytest.importorskip("llvmlite")

ROWS, KV_HEADS, SLOTS = 3, 2, 300
#: Tokens of each row before the new ones, and how many of these are tokens.
LENGTHS, COUNTS = [5, 0, 290], [100, 0, 150]
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def attention(q_TNH, k_SKH, v_SKH, seen_TS):
    """Of one row, in float64."""
    weights_NTS, v_SNH = weights(q_TNH, k_SKH, seen_TS), by_query_head(v_SKH, q_TNH)
    return np.einsum("NTS,SNH->TNH", weights_NTS, v_SNH)


def by_query_head(x_SKH, q_TNH):
    return np.repeat(x_SKH, q_TNH.shape[1] // x_SKH.shape[1], axis=1)


def weights(q_TNH, k_SKH, seen_TS):
    """Those of a query that sees nothing are zeros."""
    scores_NTS = np.einsum("TNH,SNH->NTS", q_TNH, by_query_head(k_SKH, q_TNH)) * q_TNH.shape[-1] ** -0.5
    scores_NTS = np.where(seen_TS, scores_NTS, -np.inf)
    exp_NTS = np.exp(scores_NTS - np.maximum(scores_NTS.max(-1, keepdims=True), -1e30))
    return exp_NTS / np.maximum(exp_NTS.sum(-1, keepdims=True), 1e-300)


def gradients(q_TNH, k_SKH, v_SKH, seen_TS, of_out_TNH):
    """Those of queries, keys and values, in float64."""
    weights_NTS, k_SNH, v_SNH = weights(q_TNH, k_SKH, seen_TS), *(by_query_head(x, q_TNH) for x in (k_SKH, v_SKH))
    of_weights_NTS = np.einsum("TNH,SNH->NTS", of_out_TNH, v_SNH)
    mean_NT1 = np.sum(of_weights_NTS * weights_NTS, -1, keepdims=True)
    of_scores_NTS = weights_NTS * (of_weights_NTS - mean_NT1) * q_TNH.shape[-1] ** -0.5
    of_q_TNH = np.einsum("NTS,SNH->TNH", of_scores_NTS, k_SNH)
    of_k_SNH = np.einsum("NTS,TNH->SNH", of_scores_NTS, q_TNH)
    of_v_SNH = np.einsum("NTS,TNH->SNH", weights_NTS, of_out_TNH)
    of_k_SKH, of_v_SKH = (x.reshape(*k_SKH.shape[:2], -1, k_SKH.shape[-1]).sum(2) for x in (of_k_SNH, of_v_SNH))
    return of_q_TNH, of_k_SKH, of_v_SKH


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


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("heads", "head_dim", "window"), [(4, 16, None), (2, 80, 130)])
def test_rows_of_packed_segments_and_their_gradients(heads, head_dim, window, dtype):
    tokens, shapes = 300, [(2, 300, count, head_dim) for count in (heads, KV_HEADS, KV_HEADS, heads)]
    (q, q64), (k, k64), (v, v64), (of_out, of_out64) = (
        rounded(normal(*shape, seed=seed), dtype) for seed, shape in enumerate(shapes)
    )
    segments_BT = np.repeat([[1, 2, 5, 0], [3, 0, 4, 0]], [tokens // 3, 1, tokens // 2, 49], axis=1)
    assert attends_rows(q, k, v)

    @jax.jit
    def run(q, k, v, of_out):
        out, backward = jax.vjp(lambda *x: attend_rows(*x, jnp.asarray(segments_BT), window), q, k, v)
        return out, *backward(of_out)

    found = [np.asarray(x.astype(jnp.float32)) for x in run(q, k, v, of_out)]
    distance_TS = np.arange(tokens)[:, None] - np.arange(tokens)
    near_TS = (distance_TS >= 0) & (distance_TS < (window or tokens))
    for row, segments_T in enumerate(segments_BT):
        seen_TS = near_TS & (segments_T[:, None] == segments_T) & (segments_T != 0)
        arrays = [x[row] for x in (q64, k64, v64)]
        expected = attention(*arrays, seen_TS), *gradients(*arrays, seen_TS, of_out64[row])
        for x, like in zip(found, expected, strict=True):
            np.testing.assert_allclose(x[row], like, atol=5 * TOLERANCES[dtype], rtol=2 * TOLERANCES[dtype])


def test_other_numbers_are_left_to_xla():
    q, keys = jnp.zeros((1, 9, 2, 16)), jnp.zeros((1, 1, 16, 2, 16))
    assert attends_many(q, keys)
    assert not attends_many(q.astype(jnp.bfloat16), keys)
    assert not attends_many(q.astype(jnp.float16), keys.astype(jnp.float16))
    assert not attends_many(q[..., :8], keys[..., :8])
