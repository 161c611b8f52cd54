"""A fresh model starts as transformers' does: normal weights, zero biases, norms of one."""

import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from tests.cases import CASES
from tests.subject import hub_arrays


def fresh(name: str, seed: int = 0, **settings) -> dict[str, np.ndarray]:
    config = qmj.ModelConfig.from_pretrained({**CASES[name].config, **settings})
    return dict(hub_arrays(qmj.CausalLM(config, rngs=nnx.Rngs(seed))))


@pytest.mark.parametrize(
    "name", ["qwen2-plain", "qwen2_moe-mlp_only_layers", "qwen3-attention_bias", "qwen3_moe-plain", "mixtral-plain"]
)
def test_weights_are_normal_biases_zero_and_norms_one(name):
    tensors = fresh(name, initializer_range=0.05)
    assert len(tensors) > 20
    for tensor_name, values in tensors.items():
        if tensor_name.endswith("norm.weight"):
            np.testing.assert_array_equal(values, np.ones_like(values), tensor_name)
        elif tensor_name.endswith("bias"):
            np.testing.assert_array_equal(values, np.zeros_like(values), tensor_name)
        else:
            # The standard error of a standard deviation over n values is 1/sqrt(2n) of it; five of them never fail.
            room = 5 * 0.05 / np.sqrt(2 * values.size)
            assert abs(values.std() - 0.05) < room, tensor_name
            assert abs(values.mean()) < 5 * 0.05 / np.sqrt(values.size), tensor_name


def test_layers_and_experts_start_different_from_each_other():
    tensors = fresh("qwen3_moe-plain")
    matrices = {name: values for name, values in tensors.items() if values.ndim == 2}
    assert len({values.tobytes() for values in matrices.values()}) == len(matrices)


def test_the_seed_decides_the_weights():
    first, again, other = fresh("mixtral-plain"), fresh("mixtral-plain"), fresh("mixtral-plain", seed=1)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name], name)
        assert name.endswith("norm.weight") or not np.array_equal(values, other[name]), name


def test_the_pad_tokens_embedding_starts_at_zero():
    table = fresh("qwen2_moe-pad_token")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(np.flatnonzero(~table.any(-1)), [5])


def test_a_tied_model_has_no_head_of_its_own():
    assert "lm_head.weight" in fresh("qwen2-plain")
    assert "lm_head.weight" not in fresh("qwen2-tied")
