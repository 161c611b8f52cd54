"""Routing, its counts and its loss, from scratch in NumPy."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import qwen_moe_jax as qmj
from qwen_moe_jax.config import MoEConfig
from qwen_moe_jax.moe.losses import load_balancing_loss
from qwen_moe_jax.moe.router import route
from qwen_moe_jax.moe.stats import RouterStats, count
from qwen_moe_jax.sharding.rules import BATCH

E, A = 6, 2


def routed(logits_BTE, real_BT, **moe):
    """`route` and `count` behind one compilation per config."""
    config = MoEConfig(
        num_experts=E, num_experts_per_tok=A, moe_intermediate_size=4, **({"norm_topk_prob": True} | moe)
    )
    mesh = qmj.make_mesh()

    @jax.jit
    def run(logits_BTE, real_BT):
        def inside(logits_BTE, real_BT):
            routing = route(logits_BTE, real_BT, config)
            return routing, count(routing, np.zeros(E, np.int32))

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            specs = (P(BATCH, None, None), P(BATCH, None))
            return jax.sharding.explicit_axes(inside, in_sharding=specs)(logits_BTE, real_BT)

    placed = jax.device_put(logits_BTE, jax.sharding.NamedSharding(mesh, P()))
    return run(placed, real_BT)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1.0, 10.0]), renormalise=st.booleans())
def test_routing_is_softmax_then_top_k(seed, scale, renormalise):
    rng = np.random.default_rng(seed)
    logits_BTE = (scale * rng.normal(size=(2, 5, E))).astype(np.float32)
    real_BT = rng.random((2, 5)) < 0.7
    routing, stats = routed(logits_BTE, real_BT, norm_topk_prob=renormalise)
    probs_BTE = softmax(logits_BTE.astype(np.float64))
    experts_BTA = np.argsort(-probs_BTE, axis=-1, kind="stable")[..., :A]
    weights_BTA = np.take_along_axis(probs_BTE, experts_BTA, -1)
    if renormalise:
        weights_BTA = weights_BTA / weights_BTA.sum(-1, keepdims=True)
    np.testing.assert_array_equal(routing.experts_BTA, experts_BTA)
    np.testing.assert_allclose(routing.weights_BTA, weights_BTA * real_BT[..., None], rtol=2e-6, atol=1e-7)

    chosen_E = np.bincount(experts_BTA[real_BT].ravel(), minlength=E)
    np.testing.assert_array_equal(stats.tokens_per_expert, chosen_E)
    assert int(stats.tokens) == real_BT.sum()
    if real_BT.any():
        real = probs_BTE[real_BT]
        assert float(stats.entropy) == pytest.approx(-(real * np.log(real)).sum(-1).mean(), rel=1e-4)


def test_weights_are_rounded_to_the_logits_dtype_unless_the_config_keeps_float32():
    logits_BTE = np.random.default_rng(0).normal(size=(1, 4, E)).astype(jax.numpy.bfloat16)
    real_BT = np.ones((1, 4), bool)
    assert routed(logits_BTE, real_BT)[0].weights_BTA.dtype == jax.numpy.bfloat16
    assert routed(logits_BTE, real_BT, float32_weights=True)[0].weights_BTA.dtype == np.float32


def test_among_equal_scores_the_lower_expert_wins():
    routing, _ = routed(np.zeros((1, 3, E), np.float32), np.ones((1, 3), bool))
    np.testing.assert_array_equal(routing.experts_BTA, np.broadcast_to([0, 1], (1, 3, A)))


def test_load_balancing_loss_pools_layers_before_the_product():
    """Two layers that are unbalanced in opposite ways are balanced together, as in transformers."""
    stats = RouterStats(
        tokens=np.array([4, 4]),
        tokens_per_expert=np.array([[8, 0], [0, 8]]),
        dropped_per_expert=np.zeros((2, 2), np.int32),
        probs_per_expert=np.array([[3.0, 1.0], [1.0, 3.0]], np.float32),
        entropy=np.zeros(2, np.float32),
    )
    # f = [8/8, 8/8], P = [4/8, 4/8], E * sum = 2 * (0.5 + 0.5)
    assert float(load_balancing_loss(stats)) == pytest.approx(2.0)
