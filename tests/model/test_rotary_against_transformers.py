"""Rotary frequencies of full-sized heads are transformers' own to the last bits."""

import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.model.rotary import inverse_frequencies
from tests.referee import transformers

# Two roundings of float32. At position 32768 the angles then differ by less than 0.01 of a radian for the fastest pair.
LAST_BITS = 2.5e-7

ROPES = {
    "default-1e4": dict(rope_theta=1e4),
    "default-1e6": dict(rope_theta=1e6),
    "default-1e7": dict(rope_theta=10_000_000),
    "linear": dict(rope_theta=1e6, rope_scaling={"rope_type": "linear", "factor": 3.0}),
    "yarn": dict(
        rope_theta=1e6, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    ),
    "yarn-no-truncation": dict(
        rope_theta=1e6,
        rope_scaling={"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8, "truncate": False},
    ),
    "llama3": dict(
        rope_theta=5e5,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name):
    settings = {"model_type": "qwen3", "hidden_size": 256, "head_dim": 128, "num_attention_heads": 2} | ROPES[name]
    reference = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(
        transformers.AutoConfig.for_model(**settings, num_key_value_heads=2)
    )
    config = qmj.ModelConfig.from_pretrained({**settings, "num_key_value_heads": 2})
    inv_freq, scaling = inverse_frequencies(config.rope, 128)
    assert inv_freq.dtype == np.float32
    np.testing.assert_allclose(inv_freq, reference.inv_freq.numpy(), rtol=LAST_BITS)
    assert scaling == pytest.approx(reference.attention_scaling, rel=1e-12)
