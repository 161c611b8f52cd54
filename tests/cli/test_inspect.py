"""`inspect`: sizes and parameters of a checkpoint from its headers, and whether it loads."""

import json

import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.huggingface.convert import convert
from qwen_moe_jax.huggingface.summary import summarize
from tests.cases import CASES

CONFIGS = "configs/models"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = qmj.ModelConfig.from_pretrained({**CASES["qwen2_moe-mlp_only_layers"].config, "torch_dtype": "bfloat16"})
    folder = tmp_path_factory.mktemp("inspected") / "hub"
    qmj.save_pretrained(qmj.CausalLM(config, rngs=nnx.Rngs(0)), folder)
    return folder


@pytest.mark.parametrize(
    "name", ["qwen3-30b-a3b", "qwen2-57b-a14b", "mixtral-8x7b-v0.1", "qwen3-0.6b", "qwen3.5-0.8b", "qwen3.5-35b-a3b"]
)
def test_of_a_config_alone_the_published_counts(name):
    path = f"{CONFIGS}/{name}.json"
    config, summary = qmj.ModelConfig.from_pretrained(path), summarize(path)
    assert (summary.parameters, summary.active_parameters) == (
        config.num_parameters(),
        config.num_active_parameters(),
    )
    assert sum(row.parameters for row in summary.rows) == summary.parameters + summary.mtp_parameters
    assert sum(row.count for row in summary.rows) == len(summary.tensors)
    assert not summary.problems


def test_of_a_config_alone_every_tensor_by_name_and_shape(capsys):
    assert main(["inspect", f"{CONFIGS}/mixtral-8x7b-v0.1.json", "--tensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + 32 * (2 + 4 + 1 + 8 * 3)
    assert "model.layers.31.block_sparse_moe.experts.7.w2.weight [4096, 14336]" in lines
    assert lines.index("model.layers.2.input_layernorm.weight [4096]") < lines.index(
        "model.layers.10.input_layernorm.weight [4096]"
    )


def test_layers_of_one_kind_are_one_block_of_the_table_under_the_names_of_the_files(capsys):
    assert main(["inspect", f"{CONFIGS}/qwen3-next-80b-a3b-instruct.json"]) == 0
    out = capsys.readouterr().out
    assert "36 layers: 512 experts, 10 a token, one shared, gated delta rule; 12 layers: " in out.replace("\n", "")
    assert out.count("model.layers.{0-2,4-6,…,44-46}.") == out.count("model.layers.{3,7,…,47}.") == 1
    rows = {line.split()[0]: line.split()[1:5] for line in out.splitlines() if line.startswith("  ")}
    assert rows["linear_attn.in_proj_qkvz.weight"] == ["12288", "×", "2048", "36"]
    assert rows["linear_attn.in_proj_ba.weight"] == ["64", "×", "2048", "36"]
    assert not {"linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight"} & rows.keys()


def test_the_table_fits_a_narrow_terminal_and_says_that_it_loads(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "qwen2_moe, CausalLM" in out and out.endswith("It loads.\n")
    assert "  mlp.experts.{0-7}.gate_proj.weight" in out  # layer by layer kind, names unbroken
    assert all(len(line) <= 80 for line in out.splitlines()[1:])


def test_a_native_folder_has_the_same_tensors(folder, tmp_path):
    convert(folder, tmp_path / "native", to="orbax")
    hub, native = summarize(folder), summarize(tmp_path / "native")
    assert native.rows == hub.rows and native.tensors == hub.tensors and not native.problems
    assert (hub.form, native.form) == ("Hub folder", "native folder")


def test_a_checkpoint_that_does_not_load_is_an_error_after_its_table(folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    convert(folder, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    assert main(["inspect", str(broken), "--json"]) == 2
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["problems"] == [
        "shape: lm_head.weight is [97, 32] in model.safetensors, expected [99, 32]",
        "shape: model.embed_tokens.weight is [97, 32] in model.safetensors, expected [99, 32]",
    ]
    assert "does not load" in err and summary["problems"][0] in err


def test_a_folder_without_weights_still_shows_what_its_config_says(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert main(["inspect", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "model.norm.weight" in out and "It loads" not in out
    assert "found none of model.safetensors" in err
