"""Attention in blocks is attention: held to `jax.nn.dot_product_attention`, which has all scores in memory at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_moe_jax.attention_kernels.blockwise import Blocks, attend_in_blocks

B, T, N, K, H = 2, 23, 4, 2, 8


def arrays(dtype: str = "float32") -> tuple[jax.Array, ...]:
    """Queries, keys, values, the gradient of the result; segments with padding in the middle and at the end."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    q, k, v, gradient = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    ids = np.ones((B, T), np.int32)
    ids[0, 9:] = 2
    ids[0, 20:] = 0
    ids[1, 5:7] = 0
    return q, k, v, gradient, jnp.asarray(ids)


def whole(q, k, v, ids, window: int | None) -> jax.Array:
    """The reference, zeros for padding queries."""
    seen = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, None, :]
    window = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], is_causal=True, local_window_size=window)
    return jnp.where((ids != 0)[..., None, None], out, 0)


def in_blocks(q, k, v, ids, window: int | None, longest: int) -> jax.Array:
    out = attend_in_blocks(q, k, v, ids, Blocks.of(T, longest, window))
    return jnp.where((ids != 0)[..., None, None], out, 0)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("longest", [T + 1, 8, 5, 1], ids=lambda longest: f"blocks-of-{longest}")
def test_results_and_gradients_are_those_of_whole_rows(window, longest):
    """To 1e-5 of numbers of the order of one: the same sums of at most 23 terms in another order."""
    q, k, v, gradient, ids = arrays()
    expected, pull = jax.vjp(functools.partial(whole, ids=ids, window=window), q, k, v)
    found, pull_in_blocks = jax.vjp(functools.partial(in_blocks, ids=ids, window=window, longest=longest), q, k, v)
    for name, ours, theirs in zip(
        ("result", "queries", "keys", "values"),
        (found, *pull_in_blocks(gradient)),
        (expected, *pull(gradient)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)


def test_bfloat16_costs_about_a_rounding():
    """Weights and the gradients of scores are rounded before they are multiplied, results after: by 2^-9 at most."""
    q, k, v, gradient, ids = arrays("bfloat16")
    attend = functools.partial(in_blocks, ids=ids, window=None, longest=8)
    exact, exact_pull = jax.vjp(attend, *(x.astype(jnp.float32) for x in (q, k, v)))
    found, pull = jax.vjp(attend, q, k, v)
    expected = (exact, *exact_pull(gradient.astype(jnp.float32)))
    for ours, wide in zip((found, *pull(gradient)), expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert jnp.linalg.norm(ours.astype(jnp.float32) - wide) <= 2**-8 * jnp.linalg.norm(wide)


def test_padding_gives_finite_numbers_and_passes_no_gradient_on():
    q, k, v, gradient, ids = arrays()
    padding = (ids == 0)[..., None, None]
    out, pull = jax.vjp(lambda *x: attend_in_blocks(*x, ids, Blocks.of(T, 8, None)), q, k, v)
    assert np.isfinite(out).all()
    for of_input in pull(jnp.where(padding, 1e3 * gradient, 0)):
        assert not np.any(of_input)


def test_pairs_of_blocks_that_nobody_sees_are_left_out():
    """Eight blocks of four. With a window of 5, the first query of a block sees itself and the four keys before it; one
    more lies in the block before those.
    """
    assert Blocks.of(32, 4, None).pairs().tolist() == [[i, j] for i in range(8) for j in range(i + 1)]
    assert Blocks.of(32, 4, 5).pairs().tolist() == [[i, j] for i in range(8) for j in range(max(0, i - 1), i + 1)]
    assert Blocks.of(32, 4, 6).pairs().tolist() == [[i, j] for i in range(8) for j in range(max(0, i - 2), i + 1)]


@pytest.mark.parametrize("tokens, count, length", [(1, 1, 1), (8, 1, 8), (9, 2, 5), (23, 3, 8)])
def test_blocks_are_even(tokens, count, length):
    blocks = Blocks.of(tokens, 8, None)
    assert (blocks.count, blocks.length) == (count, length)


def test_memory_does_not_grow_with_the_square_of_a_row():
    """Twice the tokens take twice the temporary memory, forward and backward; the scores would take four times."""

    def temporaries(tokens: int) -> int:
        shapes = [(1, tokens, heads, H) for heads in (N, K, K)]
        q, k, v = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        ids, blocks = jnp.ones((1, tokens), jnp.int32), Blocks.of(tokens, 16, None)
        gradient = jax.grad(lambda *x: jnp.sum(attend_in_blocks(*x, ids, blocks) ** 2), (0, 1, 2))
        return jax.jit(gradient).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1024) < 2.2 * temporaries(512)
