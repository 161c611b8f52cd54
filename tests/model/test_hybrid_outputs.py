"""Optional outputs and balancing biases of hybrids are in layer order, whatever mixes a layer's tokens."""

import dataclasses

import jax
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.model.balancing import update_balancing_biases
from qwen_moe_jax.model.decoder import sparse_blocks
from tests.distance import assert_near
from tests.model.hybrid_configs import hybrid_config, hybrid_model
from tests.subject import on_mesh, run

#: A period of three layers, twice, the first of them without experts.
CONFIG = hybrid_config("LlfLlf")
SPARSE = [1, 2, 4, 5]
TOKENS_BT = np.random.default_rng(0).integers(0, 98, (3, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def model() -> qmj.CausalLM:
    moe = dataclasses.replace(CONFIG.moe, balancing_bias=True)
    return hybrid_model(dataclasses.replace(CONFIG, moe=moe))


@pytest.fixture(scope="module")
def output(model):
    return run(model, TOKENS_BT, output_router_logits=True, output_hidden_states=True)


def test_every_layer_has_hidden_states_and_every_sparse_one_a_trace_of_its_router(output):
    assert output.hidden_states.shape == (7, 3, 9, CONFIG.hidden_size)
    assert output.router.trace.experts.shape == (4, 3, 9, 3)
    assert output.router.stats.tokens_per_expert.shape == (4, 8)
    scores = np.asarray(output.router.trace.logits)
    chosen = np.sort(np.argsort(-scores, axis=-1)[..., :3], axis=-1)
    np.testing.assert_array_equal(np.sort(output.router.trace.experts, axis=-1), chosen)


@pytest.mark.parametrize("axes", [dict(expert=2, tensor=2), dict(data=2, fsdp=2)], ids=str)
def test_every_output_has_the_rows_that_were_given_on_any_mesh(model, output, axes):
    found = run(on_mesh(model, qmj.make_mesh(**axes)), TOKENS_BT, output_router_logits=True, output_hidden_states=True)
    for name in ("logits", "hidden_states"):
        assert_near(getattr(found, name), getattr(output, name), 1e-5, name)
    assert_near(found.router.trace.logits, output.router.trace.logits, 1e-5, "router logits")
    np.testing.assert_array_equal(found.router.stats.tokens_per_expert, output.router.stats.tokens_per_expert)


def test_every_layers_balancing_bias_moves_by_its_own_load(model, output):
    moved = jax.jit(update_balancing_biases, static_argnames="rate")(model, output.router.stats, rate=0.5)
    loads_LE = np.asarray(output.router.stats.tokens_per_expert)
    expected_LE = 0.5 * np.sign(loads_LE.mean(axis=1, keepdims=True) - loads_LE)
    blocks = list(sparse_blocks(moved.model.layers, expected_LE))
    assert sum(len(expected) for _, expected in blocks) == len(SPARSE)
    for block, expected in blocks:
        np.testing.assert_array_equal(block.e_score_correction_bias[...], expected)
