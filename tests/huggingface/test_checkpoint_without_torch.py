"""Saving and loading where torch is not installed: the same facts, held by the package against itself."""

import json

import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from tests.cases import CASES
from tests.subject import hub_arrays, run

NAMES = ["qwen2-tied", "qwen2_moe-mlp_only_layers", "qwen3-attention_bias", "qwen3_moe-plain", "mixtral-plain"]


def fresh(name: str, dtype: str = "float32"):
    config = qmj.ModelConfig.from_pretrained({**CASES[name].config, "torch_dtype": dtype})
    return qmj.CausalLM(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_loaded_bit_equal(name, dtype, tmp_path):
    model = fresh(name, dtype)
    qmj.save_pretrained(model, tmp_path, max_shard_size=60_000)
    again = qmj.from_pretrained(tmp_path)
    expected, found = dict(hub_arrays(model)), dict(hub_arrays(again))
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert value.dtype == found[tensor].dtype == dtype
        assert value.tobytes() == found[tensor].tobytes(), tensor


def test_every_tensor_has_its_name_and_shape_on_the_hub():
    shapes = {name: value.shape for name, value in hub_arrays(fresh("qwen2_moe-mlp_only_layers"))}
    layers = {int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")}
    assert layers == {0, 1, 2, 3}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (97, 32)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (48, 32)  # a dense layer among sparse ones
    assert shapes["model.layers.1.mlp.gate.weight"] == (8, 32)
    assert shapes["model.layers.1.mlp.experts.7.gate_proj.weight"] == (24, 32)
    assert shapes["model.layers.3.mlp.experts.0.down_proj.weight"] == (32, 24)
    assert shapes["model.layers.3.mlp.shared_expert.up_proj.weight"] == (40, 32)
    assert shapes["model.layers.3.mlp.shared_expert_gate.weight"] == (1, 32)
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (16, 32)
    assert shapes["model.layers.2.self_attn.k_proj.bias"] == (16,)
    assert "model.layers.2.self_attn.o_proj.bias" not in shapes
    mixtral = {name for name, _ in hub_arrays(fresh("mixtral-plain"))}
    assert {f"model.layers.2.block_sparse_moe.experts.5.{word}.weight" for word in ("w1", "w2", "w3")} <= mixtral
    assert "model.layers.2.block_sparse_moe.gate.weight" in mixtral


def test_generation_config_is_kept(tmp_path):
    source, saved = tmp_path / "source", tmp_path / "saved"
    qmj.save_pretrained(fresh("qwen3_moe-plain"), source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4], "temperature": 0.6}))
    qmj.save_pretrained(qmj.from_pretrained(source), saved)
    written = json.loads((saved / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["temperature"]) == ([3, 4], 0.6)


def test_a_saved_model_gives_equal_logits(tmp_path):
    model = fresh("qwen3_moe-plain")
    tokens = np.random.default_rng(0).integers(0, 97, (2, 12)).astype(np.int32)
    before = np.asarray(run(model, tokens).logits)
    qmj.save_pretrained(model, tmp_path)
    np.testing.assert_array_equal(np.asarray(run(qmj.from_pretrained(tmp_path), tokens).logits), before)
