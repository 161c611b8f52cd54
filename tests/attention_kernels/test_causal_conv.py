"""The causal convolution before the gated delta rule: held to a sum over the tokens that each token may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from qwen_moe_jax.attention_kernels.causal_conv import causal_conv1d
from tests.attention_kernels.rows_with_runs import layouts, separate_runs
from tests.distance import assert_near

CHANNELS, LENGTH = 6, 12
convolve = jax.jit(causal_conv1d)


def arrays(taps: int = 4, batch: int = 1, length: int = LENGTH):
    numbers = np.random.default_rng(0)
    shapes = (batch, length, CHANNELS), (CHANNELS, taps), (batch, taps - 1, CHANNELS)
    return [numbers.normal(size=shape).astype(np.float32) for shape in shapes]


def sources(ids_T: np.ndarray, taps: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in (columns, row) each tap of each token reads, [W, T, W - 1 + T], and each last column, [W - 1, ...].

    Ones and zeros: no one is where nothing is read.
    """
    before, length = taps - 1, len(ids_T)
    reads, kept = np.zeros((taps, length, before + length)), np.zeros((before, before + length))
    for number, run in enumerate(separate_runs(ids_T)):
        seen = np.concatenate([np.arange(before) if number == 0 else np.full(before, -1), run + before])
        for place, position in enumerate(run):
            for tap in range(taps):
                if seen[place + tap] >= 0:
                    reads[tap, position, seen[place + tap]] = 1
        last = seen[len(run) :]
    kept[np.arange(before)[last >= 0], last[last >= 0]] = 1
    return reads, kept


def expected(x, weight, ids, columns):
    """One matmul for each tap with the matrices above."""
    reads, kept = (np.stack(each) for each in zip(*(sources(row, weight.shape[1]) for row in ids), strict=True))
    seen = jnp.concatenate([columns, x], axis=1)
    return jnp.einsum("bwts,bsc,cw->btc", reads, seen, weight), jnp.einsum("bws,bsc->bwc", kept, seen)


def padded() -> np.ndarray:
    """Rows without padding, with padding behind, before and between, and of padding alone."""
    rows = [[1] * 5 + [2] * 2 + [3] * 5, [1] * 9 + [0] * 3, [0] * 4 + [1] * 4 + [2] * 4]
    return np.array(
        [*rows, [1, 1, 0, 0, 0, 1, 2, 0, 2, 2, 0, 0], [1, 0, 2, 0, 2, 0, 0, 0, 0, 0, 0, 0], [0] * 12], np.int32
    )


@pytest.mark.parametrize("taps", [1, 2, 4, 5])
@pytest.mark.parametrize("rows", [[0, 1, 0, 1, 0, 1], range(6)], ids=["padding-behind", "padding-anywhere"])
def test_a_token_sums_over_the_last_tokens_of_its_run(taps, rows):
    ids = padded()[rows]
    x, weight, columns = arrays(taps, len(ids))
    for start in (columns, None):
        found = convolve(x, weight, ids, start)
        for ours, theirs in zip(found, expected(x, weight, ids, 0 * columns if start is None else start), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(layouts(LENGTH))
def test_any_layout_of_segments_is_its_runs_by_themselves(ids):
    x, weight, columns = arrays()
    found = convolve(x, weight, ids[None], columns)
    for ours, theirs in zip(found, expected(x, weight, ids[None], columns), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def long_rows() -> np.ndarray:
    """Of several blocks of the backward pass, with a run that begins and padding that does where a block ends."""
    rows = [[1] * 64 + [2] * 70 + [3] * 16, [1] * 63 + [2] * 65 + [0] * 22, [0] * 2 + [1] * 130 + [0] * 9 + [1] * 9]
    return np.array(rows, np.int32)


@functools.partial(jax.jit, static_argnums=0)
def gradients(run, x, weight, columns, ids, of_y, of_columns):
    """Of inputs, weights and columns, through sums and last columns."""

    def weighted(x, weight, columns):
        y, last = run(x, weight, ids, columns)
        return jnp.sum(y * of_y) + jnp.sum(last * of_columns)

    return jax.grad(weighted, (0, 1, 2))(x, weight, columns)


@pytest.mark.parametrize(
    "ids, taps",
    [
        (padded()[[0, 1, 0, 1, 0, 1]], 4),
        (padded(), 4),
        (padded()[:, :2], 4),
        (padded(), 1),
        (long_rows()[[0, 1, 1]], 5),
        (long_rows(), 5),
    ],
    ids=["padding-behind", "padding-anywhere", "fewer-tokens-than-taps", "one-tap", "blocks", "blocks-and-padding"],
)
def test_gradients_are_those_of_the_sum(ids, taps):
    inputs = arrays(taps, *ids.shape)
    of_y, _, of_columns = (array[::-1] for array in inputs)
    found = gradients(causal_conv1d, *inputs, ids, of_y, of_columns)
    right = jax.vjp(lambda *inputs: expected(*inputs[:2], ids, inputs[2]), *inputs)[1]((of_y, of_columns))
    for name, ours, theirs in zip(("x", "weight", "columns"), found, right, strict=True):
        assert_near(ours, theirs, 1e-6, name)
    assert not np.any(np.asarray(found[0])[ids == 0])


def test_token_by_token_is_the_whole_row():
    """Also where a token of padding comes between: it leaves the columns as they are."""
    x, weight, columns = arrays(batch=2)
    ids = np.ones((2, LENGTH), np.int32)
    ids[1, 3:5] = 0
    whole, last = convolve(x, weight, ids, columns)
    for t in range(LENGTH):
        y, columns = convolve(x[:, t : t + 1], weight, ids[:, t : t + 1], columns)
        np.testing.assert_allclose(y[:, 0], whole[:, t], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(columns, last)


def test_padding_may_hold_anything():
    ids = padded()
    x, weight, columns = arrays(batch=len(ids))
    dirty = np.where((ids == 0)[..., None], np.nan, x)
    for found, clean in zip(convolve(dirty, weight, ids, columns), convolve(x, weight, ids, columns), strict=True):
        np.testing.assert_array_equal(found, clean)
    of_x, of_weight = jax.jit(jax.grad(lambda x, weight: jnp.sum(convolve(x, weight, ids, columns)[0]), (0, 1)))(
        dirty, weight
    )
    assert np.isfinite(of_x).all() and np.isfinite(of_weight).all()


def test_bfloat16_sums_are_rounded_once():
    ids = padded()
    x, weight, columns = (jnp.asarray(x, jnp.bfloat16) for x in arrays(batch=len(ids)))
    (y, last), wide = (
        convolve(*(a.astype(dtype) for a in (x, weight)), ids, columns.astype(dtype))
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert y.dtype == last.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, wide[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(last, wide[1].astype(jnp.bfloat16))


def test_no_tokens_are_no_sums_and_the_same_columns():
    x, weight, columns = arrays(length=0)
    y, last = convolve(x, weight, np.zeros((1, 0), np.int32), columns)
    assert y.shape == x.shape
    np.testing.assert_array_equal(last, columns)
