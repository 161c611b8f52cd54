"""Hub folder → model → Hub folder, bit for bit, and the refusals of folders that are not whole."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import qwen_moe_jax as qmj
from tests.cases import CASES, FAMILIES, SPARSE_FAMILIES
from tests.distance import assert_near
from tests.referee import load_file, logits_of, save_file, torch, transformers
from tests.subject import hub_arrays, run

INDEX = "model.safetensors.index.json"


def read_tensors(folder: Path) -> dict:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(path)
        assert not tensors.keys() & found.keys(), "a tensor is in two files"
        tensors |= found
    return tensors


def assert_bit_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def edited_copy(source: Path, folder: Path, edit) -> Path:
    """A copy of a single-file checkpoint whose tensors `edit` has changed in place."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_bit_equal_in_their_own_dtype(references, family, dtype, tmp_path):
    hub, saved = tmp_path / "hub", tmp_path / "saved"
    source = references[f"{family}-plain"].folder
    transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).save_pretrained(hub)
    qmj.save_pretrained(qmj.from_pretrained(hub), saved)
    assert sorted(path.name for path in saved.iterdir() if path.suffix == ".safetensors") == ["model.safetensors"]
    assert_bit_equal(read_tensors(saved), read_tensors(hub))
    with safe_open(saved / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_we_save_completely_and_with_equal_logits(references, name, tmp_path):
    reference = references[name]
    qmj.save_pretrained(qmj.from_pretrained(reference.folder), tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    if reference.num_sparse_layers:
        again.set_experts_implementation("eager")
    # The same weights in the same program: not a bit may differ.
    np.testing.assert_array_equal(logits_of(again, reference.batch), reference.logits)


@pytest.mark.parametrize("name", ["qwen2_moe-plain", "mixtral-plain", "qwen3_moe-tied"])
def test_shards_of_limited_size_with_an_index_are_written_and_read(references, name, tmp_path):
    reference = references[name]
    limit = 40_000
    qmj.save_pretrained(qmj.from_pretrained(reference.folder), tmp_path / "saved", max_shard_size=limit)
    shards = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(re.fullmatch(rf"model-\d{{5}}-of-{len(shards):05d}\.safetensors", shard) for shard in shards)

    expected = read_tensors(reference.folder)
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    sizes = {tensor: value.nbytes for tensor, value in expected.items()}
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for shard in shards:
        with safe_open(tmp_path / "saved" / shard, "np") as file:
            inside = list(file.keys())
        assert all(index["weight_map"][tensor] == shard for tensor in inside)
        assert sum(sizes[tensor] for tensor in inside) <= limit or len(inside) == 1
    assert_bit_equal(read_tensors(tmp_path / "saved"), expected)

    again = qmj.from_pretrained(tmp_path / "saved")
    for tensor, value in hub_arrays(again):
        np.testing.assert_array_equal(value, expected[tensor].numpy(), tensor)
    assert not any(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)[1].values()
    )


def test_shards_written_by_transformers_are_read(references, tmp_path):
    reference = references["qwen3_moe-plain"]
    reference.model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / INDEX).exists()
    for tensor, value in hub_arrays(qmj.from_pretrained(tmp_path)):
        np.testing.assert_array_equal(value, read_tensors(reference.folder)[tensor].numpy(), tensor)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_fused_expert_tensors_of_transformers_5_are_read_as_well(references, family, tmp_path):
    reference = references[f"{family}-plain"]
    reference.model.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in read_tensors(tmp_path))
    expected = read_tensors(reference.folder)
    found = dict(hub_arrays(qmj.from_pretrained(tmp_path)))
    assert found.keys() == expected.keys()
    for tensor, value in found.items():
        np.testing.assert_array_equal(value, expected[tensor].numpy(), tensor)


def test_dtypes_asked_for_are_kept_apart(references):
    folder = references["qwen3_moe-plain"].folder
    model = qmj.from_pretrained(folder, dtype="bfloat16", param_dtype="float32")
    assert model.lm_head.weight.dtype == "float32"
    assert {str(value.dtype) for _, value in hub_arrays(model)} == {"float32"}
    assert str(qmj.from_pretrained(folder, dtype="bfloat16").lm_head.weight.dtype) == "bfloat16"


def test_a_config_without_dtype_leaves_it_to_the_weights(references, tmp_path):
    """As published for Qwen3-Coder-30B-A3B. Float32 instead would double what the weights need."""
    transformers.AutoModelForCausalLM.from_pretrained(
        references["qwen3_moe-plain"].folder, dtype=torch.bfloat16
    ).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert {str(value.dtype) for _, value in hub_arrays(qmj.from_pretrained(tmp_path))} == {"bfloat16"}


def test_saving_over_a_folder_leaves_no_file_of_the_old_model(references, tmp_path):
    """Old shards beside new ones would be read together."""
    model = qmj.from_pretrained(references["qwen3_moe-plain"].folder)
    qmj.save_pretrained(model, tmp_path, max_shard_size=40_000)
    qmj.save_pretrained(model, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert_bit_equal(read_tensors(tmp_path), read_tensors(references["qwen3_moe-plain"].folder))


# ---- tied heads -----------------------------------------------------------------------------------------------------


def test_tied_head_is_absent_from_the_file_and_not_missed(references, tmp_path):
    qmj.save_pretrained(qmj.from_pretrained(references["qwen2-tied"].folder), tmp_path)
    assert "lm_head.weight" not in read_tensors(tmp_path)


def test_a_tied_config_with_the_same_head_written_out_is_read(references, tmp_path):
    """torch .bin state dicts, and files converted from them, carry both names."""

    def edit(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    reference = references["qwen2-tied"]
    output = run(
        qmj.from_pretrained(edited_copy(reference.folder, tmp_path / "both", edit)),
        reference.batch.tokens,
        reference.batch.mask,
    )
    real = reference.batch.real
    assert_near(np.asarray(output.logits)[real], reference.logits[real], 1e-5, "logits")


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_missing_untied_head_is_refused_by_name(references, tmp_path):
    """transformers would start it at random and only report it."""
    source = references["qwen3-plain"].folder
    folder = edited_copy(source, tmp_path / "headless", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(qmj.CheckpointError, match=r"lm_head\.weight"):
        qmj.from_pretrained(folder)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_every_missing_tensor_is_named(references, family, tmp_path):
    source = references[f"{family}-plain"].folder
    names = sorted(read_tensors(source))
    gone = [next(name for name in names if ".experts.5." in name), "model.norm.weight"]

    def edit(tensors):
        for name in gone:
            del tensors[name]

    with pytest.raises(qmj.CheckpointError) as failure:
        qmj.from_pretrained(edited_copy(source, tmp_path / "incomplete", edit))
    for name in gone:
        assert name in str(failure.value)


def test_every_unexpected_tensor_is_named(references, tmp_path):
    def edit(tensors):
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.layers.3.input_layernorm.weight"] = torch.zeros(32)

    source = references["qwen3_moe-plain"].folder
    with pytest.raises(qmj.CheckpointError) as failure:
        qmj.from_pretrained(edited_copy(source, tmp_path / "more", edit))
    assert "model.layers.0.self_attn.q_proj.bias" in str(failure.value)
    assert "model.layers.3.input_layernorm.weight" in str(failure.value)


def test_every_wrong_shape_is_named_with_found_and_expected(references, tmp_path):
    def edit(tensors):
        tensors["model.embed_tokens.weight"] = torch.zeros(90, 32)
        tensors["model.layers.1.mlp.experts.2.down_proj.weight"] = torch.zeros(24, 32)

    source = references["qwen3_moe-plain"].folder
    with pytest.raises(qmj.CheckpointError) as failure:
        qmj.from_pretrained(edited_copy(source, tmp_path / "shapes", edit))
    message = str(failure.value)
    for part in ("model.embed_tokens.weight", "90", "97", "model.layers.1.mlp.experts.2.down_proj.weight", "24, 32"):
        assert part in message


def test_rotary_frequencies_in_old_files_are_ignored(references, tmp_path):
    def edit(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    source = references["qwen3-plain"].folder
    qmj.from_pretrained(edited_copy(source, tmp_path / "old", edit))


def test_shard_named_by_the_index_but_absent_is_refused_by_name(references, tmp_path):
    references["qwen3_moe-plain"].model.save_pretrained(tmp_path, max_shard_size="40KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(qmj.CheckpointError, match=re.escape(gone.name)):
        qmj.from_pretrained(tmp_path)


def test_truncated_file_is_refused_by_name(references, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(references["qwen3-plain"].folder, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(qmj.CheckpointError, match=r"model\.safetensors"):
        qmj.from_pretrained(folder)


def test_folder_without_weights_is_refused_with_what_was_looked_for(references, tmp_path):
    shutil.copy(references["qwen3-plain"].folder / "config.json", tmp_path)
    with pytest.raises(qmj.CheckpointError, match=r"model\.safetensors"):
        qmj.from_pretrained(tmp_path)
