"""The TPU's kernel of the gated delta rule, run as ordinary operations: held to the recurrence in float64; and lowered.

Most cases are in chunks of 16 tokens in place of 128: the same code, smaller programs, and more chunks of a short row.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.attention_kernels import delta_rule_tpu
from qwen_moe_jax.attention_kernels.delta_rule_tpu import pallas_gated_delta_rule
from qwen_moe_jax.config.resolve import RULE_MULTIPLE, resolve_linear_attention
from qwen_moe_jax.model.remat import remat_policy
from tests.attention_kernels.test_delta_rule import (
    Case,
    assert_right,
    case,
    differentiable,
    gradients,
    packed,
)
from tests.distance import assert_near, relative_l2
from tests.model.hybrid_configs import LINEAR, hybrid_config, hybrid_model

interpreted = functools.partial(pallas_gated_delta_rule, interpret=True)


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(delta_rule_tpu, "LANES", 16)


@jax.jit
def results_and_gradients(arguments: Case, of_out, of_state):
    """Results, final state, and the gradients of all inputs but the segments."""

    def run(*inputs):
        return interpreted(*inputs[:5], arguments.ids, inputs[5])

    found, pull = jax.vjp(run, *arguments[:5], arguments.state)
    return found, pull((of_out.astype(found[0].dtype), of_state))


def weights_of(arguments: Case) -> list[np.ndarray]:
    numbers = np.random.default_rng(1)
    return [numbers.normal(size=x.shape).astype(np.float32) for x in (arguments.v, arguments.state)]


def assert_results_and_gradients_are_right(arguments: Case) -> None:
    weights = weights_of(arguments)
    found, pulled = results_and_gradients(arguments, *weights)
    assert_right(found, arguments, tolerance=1e-6)
    with jax.enable_x64():
        wide = (x if x.dtype == np.int32 else x.astype(np.float64) for x in arguments)
        exact = gradients(differentiable, Case(*wide), *(x.astype(np.float64) for x in weights))
    for name, ours, theirs in zip(("q", "k", "v", "g", "beta", "state"), pulled, exact, strict=True):
        assert_near(ours, theirs, 2e-6, name)


def test_packed_and_padded_rows_and_their_gradients_are_those_of_the_recurrence(short_chunks, monkeypatch):
    """Three value heads a key head, one after the other; whatever padding holds, nothing changes."""
    monkeypatch.setattr(delta_rule_tpu, "TOGETHER", 1)
    arguments = packed()
    assert_results_and_gradients_are_right(arguments)
    padding = arguments.ids == 0
    dirty = [np.where(padding.reshape(padding.shape + (1,) * (x.ndim - 2)), np.nan, x) for x in arguments[:5]]
    weights = weights_of(arguments)
    clean, found = (results_and_gradients(Case(*x, *arguments[5:]), *weights) for x in (arguments[:5], dirty))
    for ours, right in zip(*map(jax.tree.leaves, (found, clean)), strict=True):
        np.testing.assert_array_equal(ours, right)
    assert not np.any(np.asarray(clean[0][0])[padding]) and not np.any(np.asarray(clean[1][0])[padding])


def test_eight_value_heads_share_a_key_head(short_chunks):
    arguments = case(37, shared=8)
    assert_right(jax.jit(interpreted)(*arguments), arguments, tolerance=1e-6)


def test_one_token_is_enough(short_chunks):
    arguments = case(1, shared=1)
    assert_right(jax.jit(interpreted)(*arguments), arguments, tolerance=1e-6)


@pytest.mark.parametrize("words", [{"decay": 30.0}, {"decay": 0.01, "correlation": 0.95}], ids=["decay", "keys"])
def test_strong_decay_and_keys_alike_cost_no_digits_in_chunks_of_128(words):
    """The second chunk is short."""
    arguments = case(200, shared=1, **words)
    found, pulled = results_and_gradients(arguments, *weights_of(arguments))
    assert_right(found, arguments, tolerance=1e-6)
    assert all(np.isfinite(x).all() for x in pulled)


def test_bfloat16_inputs_are_computed_in_float32(short_chunks):
    """The results are those of the same numbers in float32, rounded once; gradients have the dtype of their input."""
    arguments = case(37, shared=1)
    narrow = Case(*(jnp.asarray(x, jnp.bfloat16) for x in arguments[:3]), *arguments[3:])
    wide = Case(*(np.asarray(x, np.float32) for x in narrow[:3]), *arguments[3:])
    weights = weights_of(arguments)
    (found, pulled), (right, exact) = (results_and_gradients(x, *weights) for x in (narrow, wide))
    assert found[0].dtype == jnp.bfloat16 and [x.dtype for x in pulled[:3]] == [jnp.bfloat16] * 3
    np.testing.assert_array_equal(
        np.asarray(found[0], np.float32), np.asarray(right[0].astype(jnp.bfloat16), np.float32)
    )
    np.testing.assert_array_equal(found[1], right[1])
    for ours, theirs in zip(pulled, exact, strict=True):
        assert relative_l2(np.asarray(ours, np.float32), theirs) < 2**-7


def test_no_tokens_are_no_results_and_the_same_state():
    arguments = case(0, batch=2)
    out, state = interpreted(*arguments)
    assert out.shape == arguments.v.shape
    np.testing.assert_array_equal(state, arguments.state)


def test_a_model_learns_the_same(short_chunks, monkeypatch):
    """The loss of packed rows and the gradient of every parameter, through remat and explicit axes."""
    tokens = np.random.default_rng(0).integers(1, 98, (2, 33))
    segments = np.where(np.arange(33) < 20, 1, 2) * (np.arange(33) < np.array([[33], [30]]))
    monkeypatch.setattr(delta_rule_tpu, "pallas_gated_delta_rule", interpreted)  # the model imports it where it runs

    def loss_and_gradient(kernel: str):
        model = hybrid_model(hybrid_config("L"), execution=qmj.ExecutionConfig(remat="dots"))
        monkeypatch.setattr(
            qmj.config.resolve,
            "resolve_linear_attention",
            lambda execution, *_: qmj.ExecutionConfig(**vars(execution) | {"linear_attention": kernel}),
        )
        assert model.execution_in_use.linear_attention == kernel

        def loss(model):
            return jnp.sum(jnp.where(segments != 0, model.token_losses(tokens, tokens, segments).losses, 0))

        return jax.jit(jax.value_and_grad(loss))(model)

    (ours, our_gradient), (theirs, their_gradient) = loss_and_gradient("pallas"), loss_and_gradient("chunks")
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    for found, right in zip(*map(jax.tree.leaves, (our_gradient, their_gradient)), strict=True):
        assert relative_l2(found, right) < 1e-5


def shapes(shared: int, dtype=jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    """Arguments of heads of 128, as published models have them."""
    B, T, K, H = 2, 300, 2, 128
    sizes = [(B, T, K, H)] * 2 + [(B, T, K * shared, H)] + [(B, T, K * shared)] * 2 + [(B, T)]
    dtypes = [dtype, dtype, dtype, jnp.float32, dtype, jnp.int32]
    return [jax.ShapeDtypeStruct(size, dtype) for size, dtype in zip(sizes, dtypes, strict=True)]


def traced(remat: str, shared: int = 1, dtype=jnp.bfloat16):
    """The gradient of a rule that is recomputed as `remat` says, without weights."""

    def gradients(q, k, v, g, beta, ids):
        def rule(q, k, v, g, beta):
            return pallas_gated_delta_rule(q, k, v, g, beta, ids, None)[0]

        policy = remat_policy(qmj.ExecutionConfig(remat=remat))
        out, pull = jax.vjp(jax.checkpoint(rule, policy=policy), q, k, v, g, beta)
        return pull(out)

    return jax.jit(gradients).trace(*shapes(shared, dtype))


@pytest.mark.parametrize("remat, kernels", [("none", 2), ("dots", 2), ("full", 3)])
def test_dots_keeps_what_the_kernel_made(remat, kernels):
    assert str(traced(remat).jaxpr).count("name=gated_delta_rule") == kernels


def test_float32_means_float32_in_all_products():
    program = str(traced("none").jaxpr)
    products = program.count("dot_general[")
    assert products > 40
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


@pytest.mark.parametrize("shared, dtype", [(1, jnp.float32), (8, jnp.bfloat16)])
def test_lowers_for_tpus(shared, dtype):
    """What XLA then makes of it needs its compiler."""
    assert traced("none", shared, dtype).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 2


class TestChoice:
    execution = qmj.ExecutionConfig(dtype="bfloat16")
    whole = qmj.config.LinearAttentionConfig(
        num_key_heads=16, num_value_heads=32, key_head_dim=128, value_head_dim=128, conv_kernel_dim=4
    )

    @pytest.mark.parametrize("platform, kernel", [("tpu", "pallas"), ("gpu", "chunks"), ("cpu", "chunks")])
    def test_takes_the_kernel_where_it_runs(self, platform, kernel):
        assert resolve_linear_attention(self.execution, self.whole, platform).linear_attention == kernel

    @pytest.mark.parametrize("linear", [LINEAR, None])
    def test_heads_that_do_not_fill_a_matrix_unit_take_chunks(self, linear):
        assert resolve_linear_attention(self.execution, linear, "tpu").linear_attention == "chunks"

    def test_what_is_asked_for_is_taken(self):
        asked = qmj.ExecutionConfig(dtype="bfloat16", linear_attention="chunks")
        assert resolve_linear_attention(asked, self.whole, "tpu") == asked

    @pytest.mark.parametrize(
        "platform, dtype, linear, found",
        [
            ("cpu", "bfloat16", whole, "platform 'cpu'"),
            ("tpu", "float16", whole, "dtype='float16'"),
            ("tpu", "bfloat16", LINEAR, r"heads of 8 \(keys\) and 12 \(values\)"),
        ],
    )
    def test_refuses_what_it_does_not_run_on(self, platform, dtype, linear, found):
        asked = qmj.ExecutionConfig(dtype=dtype, linear_attention="pallas")
        with pytest.raises(qmj.ConfigError, match=f"{found}.*use 'chunks'"):
            resolve_linear_attention(asked, linear, platform)

    def test_the_multiple_is_the_kernels_own(self):
        assert RULE_MULTIPLE == delta_rule_tpu.LANES
