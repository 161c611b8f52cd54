"""Adapters of hybrids in PEFT's layout give PEFT's logits, though files and model have other matrices and rows."""

import json

import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.convert import convert
from qwen_moe_jax.model.lora import is_adapter, matrices
from qwen_moe_jax.nn.parameters import parameters_with_paths
from tests.distance import assert_near

peft = pytest.importorskip("peft", reason="the referee of adapters is PEFT, which is not installed here")
from tests.huggingface.test_peft import adapted  # noqa: E402
from tests.huggingface.test_peft_layouts import EXECUTION, logits, saved, with_peft  # noqa: E402
from tests.referee import load_file, save_file  # noqa: E402

#: Two layers, a linear and a full one.
NEXT, DENSE, SPARSE = "qwen3_next-norm_topk_prob_off", "qwen3_5-tied", "qwen3_5_moe-attention_bias"
TENSORS = "adapter_model.safetensors"
LINEAR = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
CONFIGS = {
    "all-linear of Qwen3-Next": (NEXT, {"target_modules": "all-linear"}),
    "all-linear of Qwen3.5": (DENSE, {"target_modules": "all-linear"}),
    "all-linear of Qwen3.5-MoE": (SPARSE, {"target_modules": "all-linear"}),
    "one projection with a rank of its own": (
        NEXT,
        {"target_modules": ["in_proj_qkvz", "q_proj"], "rank_pattern": {"in_proj_qkvz": 6}, "use_rslora": True},
    ),
    "alphas by pattern": (
        DENSE,
        {"target_modules": ["in_proj_qkv", "in_proj_a"], "alpha_pattern": {"linear_attn.in_proj_qkv": 20}},
    ),
}


def plain_logits(reference) -> np.ndarray:
    return logits(qmj.from_pretrained(reference.folder, execution=EXECUTION))


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_saves_gives_its_logits_read_written_again_and_merged(references, kind, tmp_path):
    name, settings = CONFIGS[kind]
    reference = references[name]
    wanted = saved(reference, tmp_path / "adapter", **settings)
    model = qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / "adapter")
    assert np.abs(wanted - plain_logits(reference)).max() > 0.01
    assert_near(logits(model), wanted, 1e-5, kind)
    qmj.save_adapter(model, tmp_path / "written")
    assert_near(with_peft(reference.model, tmp_path / "written"), wanted, 1e-5, f"{kind}, PEFT reads")
    convert(reference.folder, tmp_path / "merged", adapter=tmp_path / "adapter")
    assert_near(logits(qmj.from_pretrained(tmp_path / "merged", execution=EXECUTION)), wanted, 1e-5, f"{kind}, merged")


@pytest.mark.parametrize("name", [NEXT, DENSE])
def test_what_peft_saved_is_written_as_it_was(references, name, tmp_path):
    """The A that two matrices of the model have in common is one again, of the same rank."""
    reference = references[name]
    targets = ["in_proj_qkvz", "in_proj_ba", "out_proj"] if name == NEXT else list(LINEAR)
    saved(reference, tmp_path / "adapter", target_modules=targets)
    model = qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / "adapter")
    qmj.save_adapter(model, tmp_path / "again")
    expected, found = load_file(tmp_path / "adapter" / TENSORS), load_file(tmp_path / "again" / TENSORS)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(found[tensor], value)
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (written["r"], written["rank_pattern"], written["alpha_pattern"]) == (4, {}, {})
    assert sorted(written["target_modules"]) == sorted(targets)


def test_all_linear_is_every_projection_of_a_linear_layer(references):
    model = qmj.from_pretrained(references[NEXT].folder)
    qmj.add_lora(model, qmj.LoraConfig(target_modules=("all-linear",)), rngs=None)
    found = {matrix.name for matrix in matrices(model) if matrix.lora is not None and "linear_attn" in matrix.path}
    assert found == set(LINEAR)


@pytest.mark.parametrize(
    ("name", "targets"),
    [(NEXT, LINEAR), (NEXT, ("in_proj_qkv", "in_proj_a")), (NEXT, ("in_proj_z", "q_proj")), (DENSE, LINEAR)],
)
def test_peft_over_transformers_gives_our_logits(references, name, targets, tmp_path):
    reference = references[name]
    model = adapted(reference.folder, targets, rank_pattern={"in_proj_z": 3}, alpha_pattern={"in_proj_qkv": 9.0})
    qmj.save_adapter(model, tmp_path / "adapter")
    wanted = logits(model)
    assert np.abs(wanted - plain_logits(reference)).max() > 0.01
    assert_near(with_peft(reference.model, tmp_path / "adapter"), wanted, 1e-5, "PEFT")
    again = qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / "adapter")
    assert_near(logits(again), wanted, 1e-5, "read back")


def test_adapters_of_equal_rank_come_back_bit_equal(references, tmp_path):
    """Of a matrix of the files that is two of the model, B is block-diagonal, and is taken apart again."""
    reference = references[NEXT]
    model = adapted(reference.folder, LINEAR)
    qmj.save_adapter(model, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {r"linear_attn\.in_proj_qkvz": 8, r"linear_attn\.in_proj_ba": 8}
    again = qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / "adapter")
    expected = {path: param.get_value() for path, param in parameters_with_paths(model) if is_adapter(path)}
    found = {path: param.get_value() for path, param in parameters_with_paths(again) if is_adapter(path)}
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_an_adapter_of_a_multimodal_model_is_read_without_that_of_its_vision_tower(references, tmp_path, capsys):
    reference = references[DENSE]
    wanted = saved(reference, tmp_path / "adapter", target_modules=["in_proj_qkv", "down_proj"])
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    named = {
        name.replace("model.model.", "model.model.language_model."): value.clone() for name, value in tensors.items()
    }
    one = next(iter(tensors.values()))
    vision = {f"base_model.model.model.visual.blocks.0.attn.qkv.lora_{side}.weight": one.clone() for side in "AB"}
    save_file(named | vision, tmp_path / "adapter" / TENSORS)
    model = qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / "adapter")
    assert_near(logits(model), wanted, 1e-5, "multimodal")
    assert "2 tensors are adapters of the vision tower, and are skipped" in capsys.readouterr().err


def test_an_adapter_of_another_size_is_refused_by_the_name_in_its_file(references, tmp_path):
    reference = references[NEXT]
    saved(reference, tmp_path / "adapter", target_modules=["in_proj_qkvz"])
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    name = "base_model.model.model.layers.0.linear_attn.in_proj_qkvz.lora_B.weight"
    save_file(tensors | {name: tensors[name][:100].contiguous()}, tmp_path / "adapter" / TENSORS)
    with pytest.raises(
        qmj.CheckpointError, match=r"layers\.0\.linear_attn\.in_proj_qkvz\.weight is for \[100, 32\], ex"
    ):
        qmj.from_pretrained(reference.folder, adapter=tmp_path / "adapter")
