"""Quantised folders: the numbers are those of the formula that the producing library has, bit for bit."""

import json
import re

import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint
from qwen_moe_jax.huggingface.quantised import dequantise
from qwen_moe_jax.huggingface.summary import summarize
from qwen_moe_jax.huggingface.tensors import hub_parameters, hub_tensors
from qwen_moe_jax.surgery.verify import compare_checkpoints
from tests.huggingface import quantisers as q
from tests.surgery.folders import config_of, fused, write

CASE = "qwen3_moe-plain"
QUANTISED = re.compile(r"\.(self_attn\.\w_proj|experts\.\d+\.\w+_proj|mlp\.\w+_proj)\.weight$")
CT = {"quant_method": "compressed-tensors"}


def ct(layout, block=None, **weights):
    weights |= {} if block is None else {"block_structure": list(block)}
    return CT | {"format": layout, "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}}


#: name: (quantization_config, quantiser, what `inspect` calls the stored dtype).
FORMATS = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, q.gptq(), "int4 (gptq)"),
    "gptq-act-order": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, q.gptq(act_order=True), "int4 (gptq)"),
    "gptq-asymmetric": ({"quant_method": "gptq", "bits": 4, "sym": False}, q.gptq(symmetric=False), "int4 (gptq)"),
    "gptq-8": (
        {"quant_method": "gptq", "bits": 8},
        q.gptq(8, symmetric=False, act_order=True, dtype="bfloat16"),
        "int8 (gptq)",
    ),
    "gptq-v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        q.gptq(symmetric=False, version=2),
        "int4 (gptq)",
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, q.awq(), "int4 (awq)"),
    "int8": (ct("int-quantized", num_bits=8), q.plain_integers(), "int8 (compressed-tensors)"),
    "int8-asymmetric": (
        ct("int-quantized", num_bits=8, symmetric=False),
        q.plain_integers(16, "float32", symmetric=False),
        "int8 (compressed-tensors)",
    ),
    "int4-packed": (ct("pack-quantized", num_bits=4), q.packed_integers(), "int4 (compressed-tensors)"),
    "int4-packed-asymmetric": (
        ct("pack-quantized", num_bits=4, symmetric=False),
        q.packed_integers(symmetric=False, dtype="float16"),
        "int4 (compressed-tensors)",
    ),
    "int8-packed-rows": (ct("pack-quantized", num_bits=8), q.packed_integers(8, None), "int8 (compressed-tensors)"),
    "fp8-tensor": (ct("float-quantized", num_bits=8, type="float"), q.float8("tensor"), "float8_e4m3fn"),
    "fp8-channel": (ct("float-quantized", num_bits=8, type="float"), q.float8("channel", "float32"), "float8_e4m3fn"),
    "fp8-block": (
        ct("float-quantized", (16, 24), num_bits=8, type="float"),
        q.float8("block", block=(16, 24)),
        "float8_e4m3fn",
    ),
    "nvfp4": (ct("nvfp4-pack-quantized", num_bits=4, type="float"), q.nvfp4("compressed"), "nvfp4"),
    "nvfp4-modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, q.nvfp4("modelopt"), "nvfp4"),
    "fp8-modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, q.float8("tensor", "float32"), "float8_e4m3fn"),
    "fp8-fbgemm": ({"quant_method": "fbgemm_fp8"}, q.float8("channel", "float32"), "float8_e4m3fn"),
    "mxfp4": (ct("mxfp4-pack-quantized", num_bits=4, type="float"), q.mxfp4, "mxfp4"),
    "nf4": ({"load_in_4bit": True}, q.four_bits(), "nf4 (bitsandbytes)"),
    "nf4-nested": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        q.four_bits(nested=True, dtype="float16", storage="bfloat16"),
        "nf4 (bitsandbytes)",
    ),
    "int8-bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        q.rows_of_int8,
        "int8 (bitsandbytes)",
    ),
}


def settings(case=CASE):
    """Sizes that hold groups of 32, with experts that are not of a whole number of blocks in each axis."""
    return config_of(case) | {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "dtype": "bfloat16",
    }


@pytest.fixture(scope="module")
def original():
    """Random matrices for every parameter."""
    rng = np.random.default_rng(1)
    abstract = qmj.CausalLM(qmj.ModelConfig.from_pretrained(settings()), rngs=None)
    shapes = {name: parameter.tensor_shape for name, parameter, _ in hub_tensors(hub_parameters(abstract))}
    return {name: (rng.standard_normal(shape) * 0.02).astype(np.float32) for name, shape in shapes.items()}


def quantised(original, quantise, only=QUANTISED):
    """A folder's tensors with the matrices quantised, and the numbers of each."""
    tensors, numbers = {}, {}
    for name, array in original.items():
        if only.search(name):
            parts, numbers[name] = quantise(name, array)
            tensors |= {f"{name.removesuffix('.weight')}.{part}": np.asarray(value) for part, value in parts.items()}
        else:
            tensors[name] = numbers[name] = array
    return tensors, numbers


@pytest.mark.parametrize("name", FORMATS)
def test_the_numbers_are_those_of_the_formula_in_whole_and_in_slices(name, original, tmp_path, monkeypatch):
    monkeypatch.setattr(dequantise, "_CHUNK", 1000)  # of several rows
    method, quantise, stored = FORMATS[name]
    tensors, numbers = quantised(original, quantise)
    folder = write(tmp_path, tensors, settings() | {"quantization_config": method})
    found = summarize(folder)
    assert found.problems == () and stored in {row.dtype for row in found.rows}
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors.keys() == original.keys()
    for key, tensor in checkpoint.tensors.items():
        expected = numbers[key]
        assert (tensor.dtype, tensor.shape) == (expected.dtype.name, expected.shape), key
        assert tensor.read().tobytes() == expected.tobytes(), key
        if QUANTISED.search(key):
            part = (slice(5, expected.shape[0] - 2), slice(7, 31))
            assert tensor.read(part).tobytes() == np.ascontiguousarray(expected[part]).tobytes(), key


def test_every_command_reads_a_quantised_folder(original, tmp_path, capsys):
    plain = write(tmp_path / "plain", original, settings())
    method, quantise, _ = FORMATS["int4-packed-asymmetric"]
    tensors, numbers = quantised(original, quantise)
    folder = write(tmp_path / "quantised", tensors, settings() | {"quantization_config": method})
    assert main(["inspect", str(folder)]) == 0
    assert main(["convert", str(folder), str(tmp_path / "converted")]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "converted/config.json").read_text())
    capsys.readouterr()
    assert main(["verify", str(plain), str(folder)]) == 0
    assert "half a step of quantised values" in capsys.readouterr().out
    broken = dict(original)
    broken["model.layers.0.self_attn.q_proj.weight"] = broken["model.layers.0.self_attn.q_proj.weight"] * 1.5
    assert compare_checkpoints(write(tmp_path / "broken", broken, settings()), folder).verdict == "differs"
    model = qmj.from_pretrained(folder, dtype="float32")
    stacked = np.asarray(model.model.layers.segments[0][0].mlp.experts.up_proj[...])
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert (stacked[1, 2] == numbers[name].astype(np.float32)).all()


def test_modules_that_are_not_quantised_are_read_as_they_are(original, tmp_path):
    """As modules_to_not_convert and ignore lists leave them."""
    only = re.compile(r"experts\.\d+\.\w+_proj\.weight$")
    tensors, numbers = quantised(original, q.awq(), only)
    method = FORMATS["awq"][0] | {"modules_to_not_convert": ["self_attn"]}
    found = open_checkpoint(write(tmp_path, tensors, settings() | {"quantization_config": method})).tensors
    assert all(found[name].read().tobytes() == value.tobytes() for name, value in numbers.items())


def fused_blocks(original):
    """Fused experts in MXFP4 blocks, and the numbers of their parts."""
    tensors, numbers = {}, {}
    for name, array in fused(original).items():
        if ".experts." not in name:
            tensors[name] = array
            continue
        codes, exponents, numbers[name] = q.mx_parts(array)
        tensors |= {f"{name}_blocks": q.fp4_bytes(codes), f"{name}_scales": exponents}
    return tensors, numbers


def test_fused_experts_in_mxfp4_blocks_are_read_expert_by_expert(original, tmp_path):
    tensors, numbers = fused_blocks(original)
    folder = write(tmp_path, tensors, settings() | {"quantization_config": {"quant_method": "mxfp4"}})
    assert summarize(folder).problems == ()
    found = open_checkpoint(folder).tensors
    both = numbers["model.layers.1.mlp.experts.gate_up_proj"][3]
    assert (found["model.layers.1.mlp.experts.3.up_proj.weight"].read() == both[len(both) // 2 :]).all()
    columns = (slice(2, 9), slice(33, 50))
    down = numbers["model.layers.0.mlp.experts.down_proj"][2]
    tensor = found["model.layers.0.mlp.experts.2.down_proj.weight"]
    assert (tensor.read((slice(2, 9), slice(3, 20))) == down[2:9, 3:20]).all()
    assert (found["model.layers.1.mlp.experts.3.gate_proj.weight"].read(columns) == both[2:9, 33:50]).all()


def test_mxfp4_blocks_are_those_of_transformers(original):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, numbers = fused_blocks(original)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = (torch.from_numpy(tensors[f"{name}_{part}"]) for part in ("blocks", "scales"))
    theirs = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    assert (theirs.float().numpy() == numbers[name].astype(np.float32)).all()


@pytest.mark.parametrize(
    "method, said",
    [
        ({"quant_method": "hqq"}, "quant_method='hqq'"),
        ({"quant_method": ["gptq"]}, "quant_method=['gptq']"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": ["gptq"]}, "checkpoint_format=['gptq']"),
        (ct("pack-quantized", num_bits=[4]), "num_bits=[4]"),
        (ct("float-quantized", (16, "x"), num_bits=8, type="float"), "block_structure=[[16, 'x']]"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3 is not supported: expected 2, 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv' is not supported: expected 'gemm'"),
        (CT | {"format": "marlin-24"}, "format='marlin-24'"),
        (ct("pack-quantized", num_bits=3), "num_bits=3"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config='sparse-24-bitmask'"),
        (CT | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config="),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "inputs have a scale"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit=False"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name(method, said):
    with pytest.raises(qmj.ConfigError, match=re.escape(said)):
        qmj.ModelConfig.from_pretrained(settings() | {"quantization_config": method})


GATE = "model.layers.0.mlp.experts.1.gate_proj"


@pytest.mark.parametrize(
    "name, part, change, said",
    [
        ("gptq", "scales", None, f"gptq: {GATE}.scales missing in model.safetensors"),
        ("gptq", "qzeros", lambda a: a[:, :1], "expected [in / n, out], [groups, out] and [groups, out / n]"),
        ("gptq", "g_idx", lambda a: a[:5], f"{GATE}.g_idx is [5] in model.safetensors, expected [64]"),
        ("awq", "scales", lambda a: a[:3], "expected [in, out / 8], [groups, out] and [groups, out / 8]"),
        ("awq", "qweight", lambda a: a.astype("i8"), f"{GATE}.qweight is int64 in model.safetensors, expected int32"),
        ("int8", "weight_scale", lambda a: a[:5], "expected a scale for the matrix, each row, each group"),
        ("int4-packed", "weight_shape", None, f"{GATE}.weight_shape missing"),
        ("int4-packed", "weight_packed", lambda a: a[:, :3], "in words of 2, 4 or 8 bits a code"),
        ("nvfp4", "weight_global_scale", None, f"{GATE}.weight_global_scale missing"),
        ("nvfp4-modelopt", "weight_scale", lambda a: a[:, :1], f"{GATE}.weight_scale is [32, 1]"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", None, "has no weight.quant_state.bitsandbytes__nf4 or fp4"),
        ("nf4", "weight", lambda a: a[:9], "has 9 bytes, expected 4 bits for each of 32 × 64 values"),
        ("int8-bitsandbytes", "weight_format", lambda a: a + 1, "weight_format in model.safetensors is not 0"),
    ],
)
def test_a_damaged_module_is_named(name, part, change, said, original, tmp_path):
    method, quantise, _ = FORMATS[name]
    tensors, _ = quantised({f"{GATE}.weight": original[f"{GATE}.weight"]}, quantise)
    key = f"{GATE}.{part}"
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors[key])
    found = summarize(write(tmp_path, tensors, settings() | {"quantization_config": method})).problems
    assert any(said in problem for problem in found), found[:3]


def test_groups_that_have_no_scale_are_refused_when_they_are_read(original, tmp_path):
    method, quantise, _ = FORMATS["gptq"]
    tensors, _ = quantised({f"{GATE}.weight": original[f"{GATE}.weight"]}, quantise)
    tensors[f"{GATE}.g_idx"][3] = 99
    folder = write(tmp_path, tensors, settings() | {"quantization_config": method})
    with pytest.raises(qmj.CheckpointError, match=r"g_idx\) from 0 to 99, expected numbers below 4"):
        open_checkpoint(folder).tensors[f"{GATE}.weight"].read()
