"""The gated delta rule in chunks and by tokens: held to the recurrence in float64, each run of a row by itself."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.attention_kernels.delta_rule import (
    chunk_gated_delta_rule,
    chunk_size_for,
    recurrent_gated_delta_rule,
)
from qwen_moe_jax.sharding.mesh import make_mesh
from tests.attention_kernels.rows_with_runs import layouts, separate_runs
from tests.distance import assert_near

HEADS, KEY_SIZE, VALUE_SIZE = 2, 16, 12
RULES = {
    "chunks": jax.jit(chunk_gated_delta_rule, static_argnames="chunk_size"),
    "tokens": jax.jit(recurrent_gated_delta_rule),
}


class Case(NamedTuple):
    """Arguments of the rule, in their order, float32."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    beta: np.ndarray
    ids: np.ndarray
    state: np.ndarray


def case(length: int, shared: int = 2, batch: int = 1, decay: float = 2.0, correlation: float = 0.0, seed=0) -> Case:
    """Random inputs of one unpadded segment a row; most decay is weak, the strongest exp(-decay)."""
    numbers = np.random.default_rng(seed)
    heads = HEADS * shared
    q, k = numbers.normal(size=(2, batch, length, HEADS, KEY_SIZE))
    common = numbers.normal(size=(batch, 1, HEADS, KEY_SIZE))
    k = correlation**0.5 * common + (1 - correlation) ** 0.5 * k
    v = numbers.normal(size=(batch, length, heads, VALUE_SIZE))
    g = -decay * numbers.uniform(size=(batch, length, heads)) ** 4
    beta = numbers.uniform(size=(batch, length, heads))
    state = numbers.normal(size=(batch, heads, KEY_SIZE, VALUE_SIZE))
    q, k, v, g, beta, state = (x.astype(np.float32) for x in (q, k, v, g, beta, state))
    return Case(q, k, v, g, beta, np.ones((batch, length), np.int32), state)


def recurrence(q, k, v, g, beta, state) -> tuple[np.ndarray, np.ndarray]:
    """One run of one row [T, ...], as hybrid models define it, in float64."""
    q, k, v, g, beta, state = (np.asarray(x, np.float64) for x in (q, k, v, g, beta, state))
    shared = v.shape[1] // k.shape[1]
    q, k = (np.repeat(x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6), shared, axis=1) for x in (q, k))
    out = np.zeros(v.shape)
    for t in range(len(v)):
        state = state * np.exp(g[t])[:, None, None]
        difference = beta[t][:, None] * (v[t] - np.einsum("nh,nhp->np", k[t], state))
        state = state + k[t][:, :, None] * difference[:, None, :]
        out[t] = np.einsum("nh,nhp->np", q[t] * q.shape[-1] ** -0.5, state)
    return out, state


def expected(arguments: Case) -> tuple[np.ndarray, np.ndarray]:
    """Every run by itself, the first of a row from the initial state; zeros at padding."""
    out, states = np.zeros(arguments.v.shape), arguments.state.astype(np.float64)
    for row, ids in enumerate(arguments.ids):
        for number, run in enumerate(separate_runs(ids)):
            start = arguments.state[row] if number == 0 else np.zeros_like(arguments.state[row])
            inputs = (x[row, run] for x in arguments[:5])
            out[row, run], states[row] = recurrence(*inputs, start)
    return out, states


def assert_right(found, arguments: Case, tolerance: float = 5e-6) -> None:
    out, state = expected(arguments)
    assert_near(found[0], out, tolerance, "results")
    assert_near(found[1], state, tolerance, "final state")


@pytest.mark.parametrize("length, shared", [(1, 2), (2, 1), (63, 3), (64, 8), (65, 2), (130, 1), (200, 3)])
@pytest.mark.parametrize("rule", RULES)
def test_results_are_those_of_the_recurrence(rule, length, shared):
    arguments = case(length, shared)
    assert_right(RULES[rule](*arguments), arguments)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "words", [{"decay": 30.0}, {"decay": 0.01, "correlation": 0.95}], ids=lambda words: "-".join(words)
)
def test_strong_decay_and_keys_alike_cost_no_digits(rule, words):
    arguments = case(200, shared=3, **words)
    assert_right(RULES[rule](*arguments), arguments, tolerance=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_published_numbers(rule):
    """Of transformers 5.23, one head of two dimensions, from nothing and from a state."""
    q, k = ([(1, 0), (0, 1), (1, 1), (2, -1)], [(1, 0), (1, 1), (0, 1), (-1, 3)])
    v, g, beta = [1, 2, 3, 4], [-0.1, -0.2, -0.3, -0.4], [0.5, 0.25, 0.75, 0.6]
    q, k, v = (np.array(x, np.float32).reshape(1, 4, 1, -1) for x in (q, k, v))
    g, beta = (np.array(x, np.float32).reshape(1, 4, 1) for x in (g, beta))
    ids = np.ones((1, 4), np.int32)
    out, state = RULES[rule](q, k, v, g, beta, ids, None)
    np.testing.assert_allclose(out.ravel(), [0.3535530, 0.2138167, 1.4166384, -1.0588742], rtol=1e-6)
    np.testing.assert_allclose(state.ravel(), [-0.1484731, 3.0515089], rtol=1e-6)
    start = np.array([1, -1], np.float32).reshape(1, 1, 2, 1)
    out, state = RULES[rule](q, k, v, g, beta, ids, start)
    np.testing.assert_allclose(out.ravel(), [0.6734615, -0.2772808, 1.5066776, -0.9449036], rtol=1e-6)
    np.testing.assert_allclose(state.ravel(), [0.0305234, 3.0490949], atol=2e-7)


@pytest.mark.parametrize("rule", RULES)
def test_results_are_those_of_transformers(rule):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    arguments = case(70, batch=2)
    *inputs, _, state = (torch.tensor(x) for x in arguments)
    name = {"chunks": "torch_chunk_gated_delta_rule", "tokens": "torch_recurrent_gated_delta_rule"}[rule]
    run = getattr(theirs, name)
    out, state = run(*inputs, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    found = RULES[rule](*arguments)
    assert_near(found[0], out, 5e-6, "results")
    assert_near(found[1], state, 5e-6, "final state")


def packed() -> Case:
    """Rows whose segments end within chunks and at their ends, with padding before, between and behind."""
    arguments = case(70, shared=3, batch=3)
    ids = arguments.ids.copy()
    ids[0, :32], ids[0, 32:45], ids[0, 50:52], ids[0, 52:] = 1, 2, 0, 3
    ids[1, :40], ids[1, 60:] = 0, 2
    ids[2] = 0
    ids[2, 5:20], ids[2, 30:34], ids[2, 34:37] = 4, 4, 2
    return arguments._replace(ids=ids)


@pytest.mark.parametrize("rule", RULES)
def test_packed_and_padded_rows_are_their_runs_by_themselves(rule):
    arguments = packed()
    assert_right(RULES[rule](*arguments), arguments)


@pytest.mark.parametrize("rule", RULES)
def test_padding_may_hold_anything(rule):
    arguments = packed()
    padding = arguments.ids == 0
    dirty = [np.where(padding.reshape(padding.shape + (1,) * (x.ndim - 2)), np.nan, x) for x in arguments[:5]]
    clean = RULES[rule](*arguments)
    for found, right in zip(RULES[rule](*dirty, *arguments[5:]), clean, strict=True):
        np.testing.assert_array_equal(found, right)
    assert not np.any(np.asarray(clean[0])[padding])


@settings(max_examples=40, deadline=None)
@given(layouts(20))
def test_any_layout_of_segments_is_its_runs_by_themselves(ids):
    arguments = case(20)._replace(ids=ids[None])
    assert_right(RULES["chunks"](*arguments, chunk_size=8), arguments)


@pytest.mark.parametrize("rule", RULES)
def test_a_row_continued_from_its_state_is_the_whole_row(rule):
    """Cut within a segment, within padding that a segment goes on behind, and before the first token of a row."""
    arguments = packed()
    whole_out, whole_state = RULES["chunks"](*arguments)
    first, rest = ([x[:, part] for x in arguments[:6]] for part in (np.s_[:25], np.s_[25:]))
    out, state = RULES["chunks"](*first, arguments.state)
    rest_out, state = RULES[rule](*rest, state)
    assert_near(np.concatenate([out, rest_out], 1), whole_out, 1e-6, "results")
    assert_near(state, whole_state, 1e-6, "final state")


def test_a_new_row_starts_from_zeros_whatever_its_state_holds():
    """A row of text, one whose first token is padding, and one that is not new."""
    arguments = case(3, batch=3)
    arguments.ids[1, 0] = 0
    new = np.array([True, True, False])
    stale, zeros = (np.where(new[:, None, None, None], x, arguments.state) for x in (np.nan, np.float32(0)))
    right = RULES["tokens"](*arguments._replace(state=zeros))
    for found, expected in zip(RULES["tokens"](*arguments._replace(state=stale), new), right, strict=True):
        np.testing.assert_array_equal(found, expected)
    first, state = RULES["tokens"](*(x[:, :1] for x in arguments[:6]), stale, new)  # one token, no scan
    assert_near(first, right[0][:, :1], 1e-6, "results")
    assert np.isnan(state[1]).all() and np.isfinite(state[0]).all()


def test_chunks_of_a_tpu_give_the_same_results():
    arguments = packed()
    assert_right(RULES["chunks"](*arguments, chunk_size=chunk_size_for("tpu")), arguments)


def test_no_tokens_are_no_results_and_the_same_state():
    arguments = case(0, batch=2)
    for rule in RULES.values():
        out, state = rule(*arguments)
        assert out.shape == arguments.v.shape
        np.testing.assert_array_equal(state, arguments.state)


@pytest.mark.parametrize("size", [0, 4, 48])
def test_a_chunk_size_that_blocks_cannot_be_merged_to_is_refused(size):
    with pytest.raises(ValueError, match=f"chunk_size is {size}: give a power of two, at least 8"):
        chunk_gated_delta_rule(*case(3), chunk_size=size)


@functools.partial(jax.jit, static_argnames="rule")
def gradients(rule, arguments: Case, of_out, of_state):
    """Of all inputs but the segments, through results and final state."""

    def weighted(*inputs):
        out, state = rule(*inputs[:5], arguments.ids, inputs[5])
        return jnp.sum(out * of_out) + jnp.sum(state * of_state)

    return jax.grad(weighted, argnums=range(6))(*arguments[:5], arguments.state)


def differentiable(q, k, v, g, beta, ids, state):
    """The recurrence of whole rows in the dtype of the inputs, by operations that JAX differentiates."""
    shared = v.shape[2] // k.shape[2]
    q, k = (jnp.repeat(x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6), shared, axis=2) for x in (q, k))

    def step(carry, token):
        (state, last), (q, k, v, g, beta, ids) = carry, token
        keep = ((last == 0) | (ids == last) | (ids == 0))[:, None, None, None]
        real = (ids != 0)[:, None, None, None]
        old = jnp.where(keep, state, 0)
        new = old * jnp.exp(g)[..., None, None]
        difference = beta[..., None] * (v - jnp.einsum("bnh,bnhp->bnp", k, new))
        new = new + k[..., None] * difference[..., None, :]
        out = jnp.einsum("bnh,bnhp->bnp", q * q.shape[-1] ** -0.5, new)
        return (jnp.where(real, new, old), jnp.where(ids != 0, ids, last)), jnp.where(real[..., 0], out, 0)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta, ids))
    (state, _), out = jax.lax.scan(step, (state, jnp.zeros_like(ids[:, 0])), tokens)
    return jnp.moveaxis(out, 0, 1), state


@pytest.mark.parametrize("rule", [chunk_gated_delta_rule, recurrent_gated_delta_rule], ids=RULES)
def test_gradients_are_those_of_the_recurrence_in_float64(rule):
    arguments = packed()
    numbers = np.random.default_rng(1)
    weights = [numbers.normal(size=x.shape).astype(np.float32) for x in (arguments.v, arguments.state)]
    found = gradients(rule, arguments, *weights)
    with jax.enable_x64():
        wide = (x if x.dtype == np.int32 else x.astype(np.float64) for x in arguments)
        exact = gradients(differentiable, Case(*wide), *(x.astype(np.float64) for x in weights))
    for name, ours, theirs in zip(("q", "k", "v", "g", "beta", "state"), found, exact, strict=True):
        assert theirs.dtype == np.float64
        assert_near(ours, theirs, 2e-6, name)


def test_gradients_are_finite_whatever_decays_and_padding_holds():
    arguments = packed()
    padding = arguments.ids == 0
    dirty = (np.where(padding.reshape(padding.shape + (1,) * (x.ndim - 2)), np.nan, x) for x in arguments[:5])
    arguments = Case(*dirty, *arguments[5:])
    for strongest in (0.0, -200.0):
        steep = arguments._replace(g=np.where(np.isnan(arguments.g), np.nan, np.float32(strongest)))
        for name, found in zip(Case._fields, gradients(chunk_gated_delta_rule, steep, 1.0, 1.0), strict=False):
            assert np.isfinite(found).all(), (name, strongest)
            if name != "ids":
                assert not np.any(found[padding]), name


def test_bfloat16_inputs_are_computed_in_float32():
    """The results are those of the same numbers in float32, rounded once."""
    arguments = packed()
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in arguments[:3]] + [
        arguments.g,
        jnp.asarray(arguments.beta, jnp.bfloat16),
    ]
    wide = [x.astype(jnp.float32) for x in narrow]
    for rule in RULES.values():
        (out, state), (wide_out, wide_state) = rule(*narrow, *arguments[5:]), rule(*wide, *arguments[5:])
        assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
        np.testing.assert_array_equal(out.astype(jnp.float32), wide_out.astype(jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_array_equal(state, wide_state)


def test_memory_of_the_gradient_grows_with_a_row_and_not_faster():
    """Twice the tokens take twice the temporary memory."""

    def temporaries(tokens: int) -> int:
        shapes = [jax.ShapeDtypeStruct((x.shape[0], tokens, *x.shape[2:]), x.dtype) for x in case(1)[:6]]
        arguments = Case(*shapes, jax.ShapeDtypeStruct(case(1).state.shape, np.float32))
        compiled = gradients.lower(chunk_gated_delta_rule, arguments, 1.0, 1.0).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 2.1 * temporaries(1024)


def test_heads_may_be_divided_among_devices():
    arguments = packed()
    heads = P(None, None, "tensor")
    divided = jax.shard_map(
        chunk_gated_delta_rule,
        mesh=make_mesh(tensor=2, devices=jax.devices()[:2]),
        in_specs=(heads, heads, heads, heads, heads, P(), P(None, "tensor")),
        out_specs=(heads, P(None, "tensor")),
        check_vma=False,
    )
    assert_right(jax.jit(divided)(*arguments), arguments)
