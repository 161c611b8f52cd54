"""Rotary frequencies: golden numbers of yarn, and every scaled type against transformers to the last bits."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.model.rotary import inverse_frequencies
from tests.cases import CASES

PUBLISHED = Path(__file__).parents[2] / "configs" / "models"


def yarn_of_qwen3(**scaling) -> qmj.ModelConfig:
    """The long-context setting of Qwen3's model cards."""
    settings = json.loads((PUBLISHED / "qwen3-30b-a3b.json").read_text())
    return qmj.ModelConfig.from_pretrained(
        {**settings, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, **scaling}}
    )


def test_yarn_of_qwen3_has_the_frequencies_observed_in_transformers():
    """theta 1e6, head 128, factor 4, pretrained 32768: the ramp goes from dimension 23 to 40."""
    config = yarn_of_qwen3(original_max_position_embeddings=32_768)
    inv_freq, scaling = inverse_frequencies(config.rope, 128)
    plain = 1e6 ** -(np.arange(0, 128, 2) / 128)
    ratio = np.asarray(inv_freq, np.float64) / plain
    assert scaling == pytest.approx(1.138629436111989, rel=1e-15)
    expected = {0: 1, 22: 1, 23: 1, 24: 0.95588, 30: 0.69118, 38: 0.33824, 39: 0.29412, 40: 0.25, 63: 0.25}
    for dimension, value in expected.items():
        assert ratio[dimension] == pytest.approx(value, abs=5e-6), dimension  # given to five decimals


def test_yarn_without_pretraining_length_scales_from_the_longest_position():
    given, _ = inverse_frequencies(yarn_of_qwen3(original_max_position_embeddings=40_960).rope, 128)
    absent, _ = inverse_frequencies(yarn_of_qwen3().rope, 128)
    np.testing.assert_array_equal(absent, given)


def test_under_a_dynamic_rope_a_text_does_not_depend_on_its_batch():
    """The base grows beyond 8 positions: with the row's own length, not with that of a longer row."""
    config = qmj.ModelConfig.from_pretrained(
        {**CASES["qwen3_moe-dynamic_past_maximum"].config, "vocab_size": 96, "initializer_range": 0.3}
    )
    model = qmj.CausalLM(config, rngs=nnx.Rngs(0))
    short, long = np.arange(10), np.arange(10, 40)
    tokens_BT = np.stack([np.pad(short, (0, 20)), long])
    mask_BT = np.stack([np.arange(30) < 10, np.ones(30, bool)])
    together = np.asarray(model(tokens_BT, mask_BT).logits)
    np.testing.assert_allclose(together[0, :10], model(short[None]).logits[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together[1], model(long[None]).logits[0], rtol=1e-4, atol=1e-5)
