"""Routing and its counts, from scratch in NumPy; and what may be done to it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import qwen_moe_jax as qmj
from qwen_moe_jax.config import MoEConfig
from qwen_moe_jax.config.resolve import resolve
from qwen_moe_jax.moe.router import route, update_balancing_bias
from qwen_moe_jax.moe.stats import count, no_drops
from qwen_moe_jax.sharding.explicit import with_explicit_axes
from qwen_moe_jax.sharding.rules import BATCH
from tests.moe.blocks import block_config, build_block, relative, run_block

E, A = 6, 2
FLOAT32 = qmj.ExecutionConfig(dtype="float32", dispatch="dense")
MESHES = {"one device": {}, "data=2·expert=4": dict(data=2, expert=4)}


@functools.cache
def compiled_router(moe: MoEConfig, routing, dtype):
    """`route` and `count`, compiled once per config: (logits, real, bias) → (Routing, RouterStats)."""
    mesh = qmj.make_mesh()

    def inside(logits_BTE, token_mask_BT, bias_E):
        routed = route(logits_BTE, token_mask_BT, moe, bias_E=bias_E, routing=routing, dtype=dtype)
        return routed, count(logits_BTE, routed, no_drops(routed))

    def run(logits_BTE, token_mask_BT, bias_E):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            specs = (P(BATCH, None, None), P(BATCH, None), P())
            return jax.sharding.explicit_axes(inside, in_sharding=specs)(logits_BTE, token_mask_BT, bias_E)

    return jax.jit(run)


def routed(logits_BTE, token_mask_BT, bias_E=None, routing="learned", dtype=None, **moe):
    moe = MoEConfig(**(dict(num_experts=E, num_experts_per_tok=A, moe_intermediate_size=4, norm_topk_prob=True) | moe))
    placed = jax.device_put(logits_BTE, jax.sharding.NamedSharding(qmj.make_mesh(), P()))
    return compiled_router(moe, routing, dtype)(placed, token_mask_BT, bias_E)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1.0, 10.0]), renormalise=st.booleans())
def test_routing_is_softmax_then_top_k(seed, scale, renormalise):
    rng = np.random.default_rng(seed)
    logits_BTE = (scale * rng.normal(size=(2, 5, E))).astype(np.float32)
    token_mask_BT = rng.random((2, 5)) < 0.7
    routing, stats = routed(logits_BTE, token_mask_BT, norm_topk_prob=renormalise)
    probs_BTE = softmax(logits_BTE.astype(np.float64))
    experts_BTA = np.argsort(-probs_BTE, axis=-1, kind="stable")[..., :A]
    weights_BTA = np.take_along_axis(probs_BTE, experts_BTA, -1)
    if renormalise:
        weights_BTA = weights_BTA / weights_BTA.sum(-1, keepdims=True)
    np.testing.assert_array_equal(routing.experts_BTA, experts_BTA)
    np.testing.assert_allclose(routing.weights_BTA, weights_BTA * token_mask_BT[..., None], rtol=2e-6, atol=1e-7)

    chosen_E = np.bincount(experts_BTA[token_mask_BT].ravel(), minlength=E)
    np.testing.assert_array_equal(stats.tokens_per_expert, chosen_E)
    assert int(stats.tokens) == token_mask_BT.sum()
    assert int(stats.sequences) == token_mask_BT.any(1).sum()
    if token_mask_BT.any():
        real = probs_BTE[token_mask_BT]
        assert float(stats.entropy) == pytest.approx(-(real * np.log(real)).sum(-1).mean(), rel=1e-4)
        assert float(stats.max_logit) == logits_BTE[token_mask_BT].max()


def test_weights_have_the_dtype_asked_for_or_the_logits_unless_the_config_keeps_float32():
    logits_BTE = np.random.default_rng(0).normal(size=(1, 4, E)).astype(jnp.bfloat16)
    token_mask_BT = np.ones((1, 4), bool)
    assert routed(logits_BTE, token_mask_BT)[0].weights_BTA.dtype == jnp.bfloat16
    assert routed(logits_BTE.astype(np.float32), token_mask_BT, dtype="bfloat16")[0].weights_BTA.dtype == jnp.bfloat16
    assert routed(logits_BTE, token_mask_BT, float32_weights=True)[0].weights_BTA.dtype == np.float32


def test_among_equal_scores_the_lower_expert_wins():
    routing, _ = routed(np.zeros((1, 3, E), np.float32), np.ones((1, 3), bool))
    np.testing.assert_array_equal(routing.experts_BTA, np.broadcast_to([0, 1], (1, 3, A)))


# Balancing bias


def test_the_bias_decides_who_is_chosen_and_not_what_they_count():
    rng = np.random.default_rng(0)
    logits_BTE, token_mask_BT = rng.normal(size=(2, 8, E)).astype(np.float32), np.ones((2, 8), bool)
    bias_E = rng.normal(size=E).astype(np.float32) / 10
    routing, _ = routed(logits_BTE, token_mask_BT, bias_E, norm_topk_prob=False)
    probs_BTE = softmax(logits_BTE.astype(np.float64))
    experts_BTA = np.argsort(-(probs_BTE + bias_E), axis=-1)[..., :A]
    assert (experts_BTA != np.argsort(-probs_BTE, axis=-1)[..., :A]).any(), "the case is meant to change a choice"
    np.testing.assert_array_equal(routing.experts_BTA, experts_BTA)
    np.testing.assert_allclose(routing.weights_BTA, np.take_along_axis(probs_BTE, experts_BTA, -1), rtol=2e-6)
    np.testing.assert_allclose(routing.probs_BTE, probs_BTE, rtol=2e-6)


def test_no_gradient_reaches_the_bias():
    logits_BTE = np.random.default_rng(0).normal(size=(1, 4, E)).astype(np.float32)

    def weighted(bias_E):
        routing, stats = routed(logits_BTE, np.ones((1, 4), bool), bias_E, norm_topk_prob=False)
        return jnp.sum(routing.weights_BTA**2) + jnp.sum(stats.probs_per_expert**2) + stats.sequence_balance

    assert not jax.grad(weighted)(jnp.full(E, 0.01)).any()


def test_the_bias_moves_by_the_rate_towards_an_even_load():
    loads_LE = np.array([[4, 0, 2, 2], [3, 3, 3, 3]], np.int32)
    bias_LE = np.array([[0.5, 0, 0, -0.5], [1, 2, 3, 4]], np.float32)
    moved_LE = update_balancing_bias(bias_LE, loads_LE, 0.25)
    np.testing.assert_array_equal(moved_LE, [[0.25, 0.25, 0, -0.5], [1, 2, 3, 4]])
    assert moved_LE.dtype == np.float32


def test_an_even_load_of_millions_of_tokens_counts_as_even():
    loads_E = np.full(64, 12_345_677, np.int32)
    assert not update_balancing_bias(np.zeros(64, np.float32), loads_E, 1.0).any()


def test_moving_the_bias_evens_the_load():
    """The loop of training without training: the router stays, and the bias alone spreads the tokens."""
    rng = np.random.default_rng(0)
    logits_BTE = (rng.normal(size=(1, 512, E)) + np.linspace(-2, 2, E)).astype(np.float32)
    bias_E, imbalance = np.zeros(E, np.float32), []
    for _ in range(400):
        _, stats = routed(logits_BTE, np.ones((1, 512), bool), bias_E)
        imbalance.append(float(stats.load_imbalance))
        bias_E = update_balancing_bias(bias_E, stats.tokens_per_expert, 0.002)
    assert imbalance[0] > 2 and imbalance[-1] < 1.15


# The dtype of the router, and routing by turns


def test_a_float32_router_in_a_bfloat16_block_does_not_round():
    rng = np.random.default_rng(0)
    hidden_BTD = rng.normal(size=(8, 6, 16)).astype(jnp.bfloat16)
    config, mesh = block_config(), qmj.make_mesh()
    weight_ED = np.asarray(build_block(config, mesh).gate.weight.get_value(), np.float64)
    exact_BTE = hidden_BTD.astype(np.float64) @ weight_ED.T
    for router_dtype, precise in ((None, False), ("float32", True)):
        execution = qmj.ExecutionConfig(dtype="bfloat16", dispatch="dense", router_dtype=router_dtype)
        found = run_block(config, mesh, hidden_BTD, np.ones((8, 6), bool), execution)
        assert found.trace.logits.dtype == (router_dtype or "bfloat16")
        assert found.trace.weights.dtype == "bfloat16", "what the experts' results are multiplied with is the model's"
        assert (relative(found.trace.logits.astype(np.float64), exact_BTE) < 1e-6) is precise


@pytest.mark.parametrize("dispatch", ["dense", "capacity", "dropless"])
@pytest.mark.parametrize("axes", MESHES.values(), ids=list(MESHES))
def test_balanced_routing_is_even_drops_nothing_and_still_trains_the_router(axes, dispatch):
    """Two rows of six tokens on every device, two experts a token: each of the 8 experts gets 3 of 24 assignments."""
    config, mesh = block_config(), qmj.make_mesh(**axes)
    devices = mesh.size
    hidden_BTD = np.random.default_rng(0).normal(size=(2 * devices, 6, 16)).astype(np.float32)
    execution = dataclasses.replace(FLOAT32, dispatch=dispatch, routing="balanced", capacity_factor=1.0)
    seed_BTD = np.random.default_rng(1).normal(size=hidden_BTD.shape).astype(np.float32)
    found = run_block(config, mesh, hidden_BTD, np.ones(hidden_BTD.shape[:2], bool), execution, seed_BTD)
    np.testing.assert_array_equal(found.tokens_per_expert, np.full(8, 3 * devices))
    assert not found.dropped_per_expert.any()
    local = np.arange(12 * 2).reshape(12, 2) % 8
    np.testing.assert_array_equal(found.trace.experts.reshape(devices, 12, 2), np.broadcast_to(local, (devices, 12, 2)))
    probs_BTE = softmax(found.trace.logits.astype(np.float64))
    weights_BTA = np.take_along_axis(probs_BTE, found.trace.experts, -1)
    np.testing.assert_allclose(found.trace.weights, weights_BTA / weights_BTA.sum(-1, keepdims=True), rtol=1e-5)
    of_router = [leaf for leaf in found.weight_gradients if leaf.shape == (8, 16)]
    assert len(of_router) == 1 and np.linalg.norm(of_router[0]) > 1e-2


# Jitter


@functools.cache
def compiled_block(mesh):
    """(block, hidden, real, key of the noise) → what the block returns."""

    def inside(block, hidden_BTD, token_mask_BT, noise_key):
        return block(
            hidden_BTD,
            token_mask_BT,
            resolve(FLOAT32, block.moe, expert_shards=mesh.shape["expert"], platform="cpu", training=True),
            noise_key,
        )

    specs = [P(BATCH, None, None), P(BATCH, None), P()]
    return jax.jit(lambda *inputs: with_explicit_axes(inside, mesh, specs)(*inputs))


def block_output(config, axes, hidden_BTD, noise_key):
    mesh = qmj.make_mesh(**axes)
    token_mask_BT = np.ones(hidden_BTD.shape[:2], bool)
    mixed_BTD, _, trace = compiled_block(mesh)(build_block(config, mesh), hidden_BTD, token_mask_BT, noise_key)
    return np.asarray(mixed_BTD), np.asarray(trace.logits)


@pytest.mark.parametrize("axes", MESHES.values(), ids=list(MESHES))
def test_jitter_multiplies_what_router_and_experts_see(axes):
    """transformers: `hidden_states *= empty_like(hidden_states).uniform_(1 - j, 1 + j)` before both."""
    config = block_config(router_jitter_noise=0.25)
    hidden_BTD = np.random.default_rng(0).normal(size=(8, 6, 16)).astype(np.float32)
    key = jax.random.key(7)
    noise_BTD = np.asarray(jax.random.uniform(key, hidden_BTD.shape, jnp.float32, 0.75, 1.25))
    assert noise_BTD.min() < 0.76 and noise_BTD.max() > 1.24
    found, logits = block_output(config, axes, hidden_BTD, key)
    expected, expected_logits = block_output(config, {}, hidden_BTD * noise_BTD, None)
    still, _ = block_output(config, {}, hidden_BTD, None)
    assert relative(found, expected) < 1e-6 and relative(logits, expected_logits) < 1e-6
    assert relative(found, still) > 0.05
