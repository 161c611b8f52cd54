"""A fresh model starts as transformers' does: normal weights, zero biases, norms of one."""

import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.nn.parameters import parameters_with_paths
from tests.cases import CASES
from tests.model.hybrid_configs import hybrid_config
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


def test_linear_layers_start_as_transformers_does():
    """Rates exp(A_log) uniform from 0.01 to 16, time steps of one, zero-centred norms of zero, gated norms of one."""
    sizes = dict(num_key_heads=16, num_value_heads=64, key_head_dim=4)
    model = qmj.CausalLM(hybrid_config("Lf", linear=sizes, initializer_range=0.05), rngs=nnx.Rngs(0))
    for path, param in parameters_with_paths(model):
        values = np.asarray(param.get_value())
        if path.endswith("A_log"):
            rates = np.exp(values)
            assert rates.min() >= 0.01 - 1e-6 and rates.max() < 16 and abs(rates.mean() - 8) < 5 * 16 / np.sqrt(12 * 64)
        elif path.endswith(("dt_bias", "norm.weight")):
            constant = 1 if "linear_attn" in path else 0
            np.testing.assert_array_equal(values, np.full_like(values, constant), path)
        else:
            assert abs(values.std() - 0.05) < 5 * 0.05 / np.sqrt(2 * values.size), path


@pytest.mark.parametrize("float32", [False, True])
def test_rates_and_gated_norms_are_float32_where_the_checkpoint_has_them_so(float32):
    config = hybrid_config("Lf", linear=dict(float32_parameters=float32), dtype="bfloat16")
    dtypes = {path: param.get_value().dtype for path, param in parameters_with_paths(qmj.CausalLM(config, rngs=None))}
    wide = {path for path, dtype in dtypes.items() if dtype == "float32"}
    layer = "model.layers.segments.0.0.linear_attn."
    assert wide == ({layer + "A_log", layer + "norm.weight"} if float32 else set())
    assert set(map(str, dtypes.values())) <= {"bfloat16", "float32"}
