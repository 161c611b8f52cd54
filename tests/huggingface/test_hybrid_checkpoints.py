"""Folders of the hybrid families, in every layout that is published, load with transformers' logits and come back."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint
from qwen_moe_jax.huggingface.convert import convert
from qwen_moe_jax.huggingface.summary import summarize
from tests.cases import HYBRID_CASES, SPARSE_HYBRIDS
from tests.distance import assert_near
from tests.huggingface.test_checkpoint import assert_bit_equal, read_tensors
from tests.huggingface.test_layouts import CONFIG, SINGLE, assert_holds, fp8_tensors, widened_tensors
from tests.referee import load_file, logits_of, save_file, torch, transformers
from tests.subject import run

#: Two layers, a linear and a full one.
NEXT, DENSE, SPARSE = "qwen3_next-norm_topk_prob_off", "qwen3_5-tied", "qwen3_5_moe-attention_bias"
FLOAT32 = re.compile(r"\.linear_attn\.(A_log|norm\.weight)$")
QUANTISED = re.compile(
    r"(self_attn\.\w_proj|linear_attn\.(in_proj_qkvz|in_proj_qkv|in_proj_z|out_proj)|mlp\..+_proj)\.weight$"
)


def assert_answers_as(model, reference, expected: np.ndarray) -> None:
    logits = np.asarray(run(model, reference.batch.tokens, reference.batch.mask).logits)
    real = reference.batch.real
    assert_near(logits[real], expected[real], 3e-5, "logits")


@pytest.mark.parametrize("name", HYBRID_CASES)
def test_logits_are_those_of_transformers(references, name):
    reference = references[name]
    assert_answers_as(qmj.from_pretrained(reference.folder), reference, reference.logits)


@pytest.mark.parametrize("name", HYBRID_CASES)
def test_transformers_reads_what_we_save_completely_and_with_equal_logits(references, name, tmp_path):
    reference = references[name]
    qmj.save_pretrained(qmj.from_pretrained(reference.folder), tmp_path)
    assert_bit_equal(read_tensors(tmp_path), load_file(reference.folder / SINGLE))
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(reference.model) and not any(report.values()), report
    if reference.num_sparse_layers:
        again.set_experts_implementation("eager")
    np.testing.assert_array_equal(logits_of(again, reference.batch), reference.logits)


# ---- layouts --------------------------------------------------------------------------------------------------------


def tensors_of(reference, dtype: str = "float32", *, float32: bool = False) -> dict:
    """The published tensors of a reference, one per expert; `float32` keeps what Qwen3.5's files have in float32."""
    return {
        name: value if float32 and FLOAT32.search(name) else value.to(getattr(torch, dtype))
        for name, value in load_file(reference.folder / SINGLE).items()
    }


def fused(tensors: dict) -> dict:
    """The same with the experts of a layer in two tensors, gate and up rows of each expert together."""
    found, experts = {}, {}
    for name, value in tensors.items():
        expert = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
        if expert is None:
            found[name] = value
        else:
            experts.setdefault(expert[1], {})[int(expert[2]), expert[3]] = value
    for layer, own in experts.items():
        numbers = sorted({number for number, _ in own})
        gate_up = [torch.cat([own[number, "gate"], own[number, "up"]]) for number in numbers]
        found[f"{layer}.gate_up_proj"] = torch.stack(gate_up)
        found[f"{layer}.down_proj"] = torch.stack([own[number, "down"] for number in numbers])
    return found


def multimodal(tensors: dict) -> dict:
    """The names of a multimodal folder, and two tensors of its vision tower."""
    named = {re.sub(r"^model\.", "model.language_model.", name): value for name, value in tensors.items()}
    return named | {
        "model.visual.patch_embed.proj.weight": torch.ones(8, 3, 2, 2, 2, dtype=torch.bfloat16),
        "model.visual.blocks.0.attn.qkv.bias": torch.ones(24),
    }


def bare(tensors: dict) -> dict:
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def write_every_way(hub: Path, folder: Path) -> None:
    """Writes a folder's model as `saved` and `native`, and converts it to `converted`, `streamed` and `back`."""
    model = qmj.from_pretrained(hub)
    qmj.save_pretrained(model, folder / "saved")
    qmj.save_orbax(model, folder / "native")
    convert(hub, folder / "converted")
    convert(hub, folder / "streamed", to="orbax")
    convert(folder / "streamed", folder / "back")


def write(folder: Path, reference, tensors: dict, dtype: str = "float32", **config) -> Path:
    """A folder with the config of the case, nested where the case is, and these tensors in two files with an index."""
    folder.mkdir()
    content = {**reference.case.config, **config}
    text = content.get("text_config", content)
    text["torch_dtype"] = dtype
    (folder / CONFIG).write_text(json.dumps(content))
    files = {"model-00001.safetensors": {}, "model-00002.safetensors": {}}
    for place, (name, value) in enumerate(tensors.items()):
        files[list(files)[place % 2]][name] = value
    for file, own in files.items():
        save_file(own, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, own in files.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


LAYOUTS = {
    "per-expert": lambda tensors: tensors,
    "fused": fused,
    "multimodal": multimodal,
    "multimodal-fused": lambda tensors: multimodal(fused(tensors)),
    "old-multimodal": lambda tensors: {
        re.sub(r"^(model|lm_head)\.", r"language_model.\1.", name): value for name, value in tensors.items()
    },
    "bare": bare,
    "bare-fused": lambda tensors: bare(fused(tensors)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [NEXT, DENSE, SPARSE])
@pytest.mark.parametrize(("dtype", "float32"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_every_layout_is_read_bit_equal_in_the_dtypes_of_the_files(references, name, layout, dtype, float32, tmp_path):
    reference = references[name]
    tensors = tensors_of(reference, dtype, float32=float32)
    model = qmj.from_pretrained(write(tmp_path / "hub", reference, LAYOUTS[layout](tensors), dtype))
    assert model.config.linear_attention.float32_parameters == float32
    assert_holds(model, tensors)


@pytest.mark.parametrize("name", [NEXT, DENSE, SPARSE])
def test_what_files_have_in_float32_is_kept_by_every_way_out(references, name, tmp_path):
    reference = references[name]
    tensors = tensors_of(reference, "bfloat16", float32=True)
    hub = write(tmp_path / "hub", reference, multimodal(fused(tensors)), "bfloat16")
    write_every_way(hub, tmp_path)
    for folder in ("saved", "converted", "back"):
        assert_bit_equal(read_tensors(tmp_path / folder), tensors)
    for folder in ("saved", "native", "streamed", "back"):
        again = qmj.from_pretrained(tmp_path / folder)
        assert again.config == qmj.from_pretrained(tmp_path / "saved").config
        assert_holds(again, tensors)


def test_a_dtype_that_is_asked_for_is_that_of_all_but_what_files_have_in_float32(references, tmp_path):
    reference = references[DENSE]
    tensors = tensors_of(reference, "bfloat16", float32=True)
    folder = write(tmp_path / "hub", reference, tensors, "bfloat16")
    assert_holds(qmj.from_pretrained(folder, dtype="float32"), {name: t.float() for name, t in tensors.items()})
    halves = {name: value if FLOAT32.search(name) else value.half() for name, value in tensors.items()}
    assert_holds(qmj.from_pretrained(folder, dtype="float16"), halves)
    whole = write(tmp_path / "whole", reference, tensors_of(reference))
    assert not qmj.from_pretrained(whole, dtype="bfloat16").config.linear_attention.float32_parameters


def test_the_dtype_of_a_config_without_one_is_not_that_of_a_decay(references, tmp_path):
    reference = references[DENSE]
    tensors = tensors_of(reference, "bfloat16", float32=True)
    first = dict(sorted(tensors.items(), key=lambda entry: FLOAT32.search(entry[0]) is None))
    folder = write(tmp_path / "hub", reference, first)
    content = json.loads((folder / CONFIG).read_text())
    del content["text_config"]["torch_dtype"]
    (folder / CONFIG).write_text(json.dumps(content))
    assert_holds(qmj.from_pretrained(folder), tensors)


@pytest.mark.parametrize("name", [DENSE, SPARSE])
def test_a_multimodal_folder_has_the_logits_of_transformers_for_a_text(references, name, tmp_path):
    reference = references[name]
    folder = write(tmp_path / "hub", reference, multimodal(fused(tensors_of(reference))))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if reference.num_sparse_layers:
        theirs.set_experts_implementation("eager")
    expected = logits_of(theirs, reference.batch)
    np.testing.assert_array_equal(expected, reference.logits)
    assert_answers_as(qmj.from_pretrained(folder), reference, expected)


def test_the_vision_tower_is_skipped_and_said_once(references, tmp_path, capsys):
    reference = references[DENSE]
    folder = write(tmp_path / "hub", reference, multimodal(tensors_of(reference)))
    assert sorted(open_checkpoint(folder).ignored) == [
        "model.visual.blocks.0.attn.qkv.bias", "model.visual.patch_embed.proj.weight",
    ]  # fmt: skip
    open_checkpoint(folder)
    said = capsys.readouterr().err
    assert said == f"note: {folder}: the text model alone is loaded: 2 tensors of its vision tower are skipped.\n"


@pytest.mark.parametrize("tensor", ["model.visual.blocks.0.attn.qkv.bias", "mtp.fc.weight"])
@pytest.mark.parametrize("file", ["model-00002.safetensors", "absent.safetensors"])
def test_an_index_may_name_vision_and_next_token_tensors_that_are_not_there(references, tensor, file, tmp_path):
    reference = references[DENSE]
    folder = write(tmp_path / "hub", reference, tensors_of(reference))
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"metadata": {}, "weight_map": names | {tensor: file}}))
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.problems and checkpoint.whole and checkpoint.config.num_mtp_layers == 0
    qmj.from_pretrained(folder)


@pytest.mark.parametrize("name", [NEXT, SPARSE])
@pytest.mark.parametrize("block", [(8, 8), (16, 20), (128, 128)], ids=str)
def test_float8_is_widened_exactly_whatever_rows_it_is_read_by(references, name, block, tmp_path):
    """Blocks do not end where the rows of a key head do."""
    reference = references[name]
    stored = fp8_tensors(tensors_of(reference, "bfloat16", float32=True), block, pattern=QUANTISED)
    quantised = {name.rsplit(".", 2)[-2] for name in stored if name.endswith("_scale_inv")}
    assert quantised >= {"out_proj", "q_proj", "down_proj"} and len(quantised & {"in_proj_qkvz", "in_proj_qkv"}) == 1
    layout = stored if name == NEXT else multimodal(stored)
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    folder = write(tmp_path / "fp8", reference, layout, "bfloat16", quantization_config=config)
    model = qmj.from_pretrained(folder, dtype="float32")
    assert_holds(model, {name: value.float() for name, value in widened_tensors(stored, block, "float32").items()})


@pytest.mark.parametrize("name", [NEXT, SPARSE])
def test_a_summary_has_the_names_shapes_and_bytes_of_the_files(references, name, tmp_path):
    reference = references[name]
    tensors = tensors_of(reference, "bfloat16", float32=True)
    folder = write(tmp_path / "hub", reference, multimodal(tensors), "bfloat16")
    summary = summarize(folder)
    assert dict(summary.tensors) == {name: tuple(value.shape) for name, value in tensors.items()}
    assert summary.nbytes == sum(value.nbytes for value in tensors.values()) and not summary.problems
    dtypes = {row.names.rpartition("linear_attn.")[2]: row.dtype for row in summary.rows}
    assert dtypes["A_log"] == dtypes["norm.weight"] == "float32" and dtypes["conv1d.weight"] == "bfloat16"
    stored = fp8_tensors(tensors, (16, 16), pattern=QUANTISED)
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    quantised = summarize(write(tmp_path / "fp8", reference, stored, "bfloat16", quantization_config=config))
    scales = sum(value.nbytes for name, value in stored.items() if name.endswith("_scale_inv"))
    assert quantised.nbytes == sum(value.nbytes for value in stored.values()) - scales


# ---- refusals -------------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(qmj.CheckpointError) as failure:
        qmj.from_pretrained(folder)
    return str(failure.value)


def test_transposed_experts_are_refused_by_name(references, tmp_path):
    reference = references[SPARSE]
    tensors = fused(tensors_of(reference))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert tensors[name].shape == (8, 48, 32)
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    said = refusal(write(tmp_path / "hub", reference, tensors))
    assert f"shape: {name} is [8, 32, 48] in " in said
    assert "expected [8, 48, 32] (its matrices are transposed, as Qwen3-VL-MoE stores them)" in said


def test_a_head_that_the_outer_config_alone_ties_is_missing_and_the_way_out_is_said(references, tmp_path):
    """AutoModelForCausalLM of transformers would draw a random one."""
    reference = references[DENSE]
    content = reference.case.config
    content["text_config"]["tie_word_embeddings"] = False
    folder = write(tmp_path / "hub", reference, multimodal(tensors_of(reference)), **content)
    said = refusal(folder)
    assert "missing: lm_head.weight [97, 32]: add it, or set tie_word_embeddings to true in config.json (in its" in said
    content["text_config"]["tie_word_embeddings"] = True
    (folder / CONFIG).write_text(json.dumps(content))
    assert qmj.from_pretrained(folder).lm_head is None


def test_a_missing_projection_is_named_as_the_files_name_it(references, tmp_path):
    reference = references[NEXT]
    layer = "model.layers.0.linear_attn"
    tensors = tensors_of(reference)
    del tensors[f"{layer}.in_proj_qkvz.weight"]
    said = refusal(write(tmp_path / "hub", reference, tensors))
    assert "(2 problems)" in said
    assert f"missing: {layer}.in_proj_qkv.weight [80, 32], rows of {layer}.in_proj_qkvz.weight" in said
    assert f"missing: {layer}.in_proj_z.weight [48, 32], rows of {layer}.in_proj_qkvz.weight" in said


def test_a_projection_with_other_rows_is_one_problem(references, tmp_path):
    reference = references[NEXT]
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    tensors = tensors_of(reference)
    tensors[name] = tensors[name][:100].contiguous()
    said = refusal(write(tmp_path / "hub", reference, tensors))
    assert "(1 problem)" in said and f"shape: {name} is [100, 32] in " in said and "expected [128, 32]" in said


def test_rows_in_the_order_of_the_other_family_are_refused(references, tmp_path):
    """Names of the model's own, which a Qwen3-Next file does not have: their rows would be taken for grouped ones."""
    reference = references[NEXT]
    tensors = tensors_of(reference)
    layer = "model.layers.0.linear_attn"
    qkvz = tensors.pop(f"{layer}.in_proj_qkvz.weight")
    tensors |= {f"{layer}.in_proj_qkv.weight": qkvz[:80].clone(), f"{layer}.in_proj_z.weight": qkvz[80:].clone()}
    said = refusal(write(tmp_path / "hub", reference, tensors))
    assert f"unexpected: {layer}.in_proj_qkv.weight in " in said and "expected in_proj_qkvz of this family" in said


@pytest.mark.parametrize("family", SPARSE_HYBRIDS)
def test_a_device_reads_its_own_rows(references, family, tmp_path):
    """Over `tensor`, a linear layer's rows are sharded by key heads, whatever their order in the file."""
    reference = references[f"{family}-plain"]
    tensors = tensors_of(reference)
    vocabulary = {name: value[:96].contiguous() if value.shape[0] == 97 else value for name, value in tensors.items()}
    content = {**reference.case.config}
    content.get("text_config", content)["vocab_size"] = 96
    folder = write(tmp_path / "hub", reference, vocabulary, **content)
    for axes in (dict(expert=4, tensor=2), dict(fsdp=8)):
        assert_holds(qmj.from_pretrained(folder, mesh=qmj.make_mesh(**axes)), vocabulary)
