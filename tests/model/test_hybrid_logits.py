"""Float32 logits of hybrid models are those of transformers: padded on either side, at any length."""

import functools

import numpy as np
import pytest

from tests.distance import relative_l2
from tests.model.hybrids import FAMILIES, Hybrid, hybrid
from tests.subject import run

#: By the standard deviation of the matrices. The states of strong decays forget by exp of differences of sums in the
#: thousands, so that transformers' own chunks differ from its recurrence, and from float64, by up to 1.3e-7 at .02,
#: 6e-6 at .1, 9e-5 at .3, four layers deep. A wrong formula moves the logits by more than 1e-2.
TOLERANCES = {0.02: 1e-5, 0.1: 3e-5, 0.3: 3e-4}

#: Lengths around the borders of chunks of 64 tokens, and the side of the row they are padded on.
ROWS = (("left", 200), ("left", 63), ("right", 64), ("right", 65), ("left", 127), ("right", 129), ("left", 1))
NEXT = functools.partial(dict, family="qwen3_next")
DENSE = functools.partial(dict, family="qwen3_5_text")
SPARSE = functools.partial(dict, family="qwen3_5_moe_text")
FULL, LINEAR = "full_attention", "linear_attention"
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}

#: What is odd about a config: r value heads share a key head.
ODD = {
    "r1-kernel2-two-dense-layers": NEXT(
        linear_num_key_heads=4, linear_num_value_heads=4, linear_conv_kernel_dim=2, mlp_only_layers=[0, 3]
    ),
    "r8-kernel5-every-second-layer-sparse": NEXT(
        linear_num_key_heads=1, linear_num_value_heads=8, linear_conv_kernel_dim=5, decoder_sparse_step=2
    ),
    "not-renormalised-all-rotated-bias": NEXT(
        norm_topk_prob=False,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0},
    ),
    "r3-kernel3-first-layer-full-tied": DENSE(
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_conv_kernel_dim=3,
        layer_types=[FULL, LINEAR, LINEAR, LINEAR],
        tie_word_embeddings=True,
    ),
    "yarn-on-half-of-a-head-large-eps": DENSE(
        rope_parameters={**YARN, "partial_rotary_factor": 0.5}, layer_types=[LINEAR, FULL] * 2, rms_norm_eps=1e-3
    ),
    "gelu-kernel1-equal-head-sizes": DENSE(
        hidden_act="gelu", linear_conv_kernel_dim=1, linear_key_head_dim=8, linear_value_head_dim=8
    ),
    "eight-layers-top-1-one-kv-head": SPARSE(
        num_hidden_layers=8, num_experts_per_tok=1, num_key_value_heads=1, linear_value_head_dim=4
    ),
    "one-linear-layer-among-full-ones": SPARSE(layer_types=[FULL, FULL, LINEAR, FULL], linear_key_head_dim=16),
}


def batch(rows=ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask; the last row is empty."""
    longest = max(length for _, length in rows)
    mask_BT = np.zeros((len(rows) + 1, longest), np.int64)
    for row, (side, length) in enumerate(rows):
        mask_BT[row, longest - length :] = 1
        if side == "right":
            mask_BT[row] = mask_BT[row, ::-1]
    tokens_BT = np.random.default_rng(0).integers(1, 97, mask_BT.shape)
    return np.where(mask_BT, tokens_BT, 0), mask_BT


def assert_transformers_logits(model: Hybrid, rows, tolerance: float) -> None:
    """By row, so that a short one counts as much as a long one; what padding gives is finite."""
    tokens_BT, mask_BT = batch(rows)
    found_BTV, expected_BTV = (
        np.asarray(run(model.model, tokens_BT, mask_BT).logits),
        model.hub_logits(tokens_BT, mask_BT),
    )
    real_BT = mask_BT.astype(bool)
    distances = {
        name: relative_l2(found_BTV[row, real_BT[row]], expected_BTV[row, real_BT[row]])
        for row, name in enumerate(rows)
    }
    assert max(distances.values()) <= tolerance, distances
    assert np.isfinite(found_BTV).all()


@pytest.mark.parametrize("scale", TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_around_the_borders_of_chunks(family, scale):
    model = hybrid(family, scale=scale, batch=batch())
    assert_transformers_logits(model, ROWS, TOLERANCES[scale])


@pytest.mark.parametrize("name", ODD)
def test_logits_of_odd_configs_equal_transformers(name):
    rows = (("left", 70), ("right", 64), ("left", 9), ("right", 2))
    model = hybrid(**ODD[name], scale=0.1, batch=batch(rows))
    assert_transformers_logits(model, rows, TOLERANCES[0.1])


def test_logits_without_segment_ids_equal_transformers_without_a_mask():
    model, tokens_BT = hybrid("qwen3_5_text", scale=0.1), batch()[0][:1]
    distance = relative_l2(run(model.model, tokens_BT).logits, model.hub_logits(tokens_BT))
    assert distance <= TOLERANCES[0.1]


def test_hidden_states_of_every_layer_equal_transformers():
    """[L+1, B, T, D]: what enters each layer, and the last layer's result after the final norm."""
    rows = (("left", 70), ("right", 9))
    tokens_BT, mask_BT = batch(rows)
    model = hybrid("qwen3_5_text", scale=0.1, num_hidden_layers=8)
    found = np.asarray(run(model.model, tokens_BT, mask_BT, output_hidden_states=True).hidden_states)
    expected = model.hub_hidden_states(tokens_BT, mask_BT)
    assert found.shape == expected.shape
    real_BT = mask_BT.astype(bool)
    distances = [relative_l2(a[real_BT], b[real_BT]) for a, b in zip(found, expected, strict=True)]
    assert max(distances) <= TOLERANCES[0.1], distances
