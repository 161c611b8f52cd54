"""The folder that a checkpoint is written into: new, empty or a checkpoint's; what is kept of it is named."""

import sys

import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.huggingface import unused_fields
from qwen_moe_jax.huggingface.adapter_config import read_adapter_config
from qwen_moe_jax.huggingface.convert import convert
from qwen_moe_jax.huggingface.model_card import write_card
from qwen_moe_jax.surgery.prune import prune
from tests.surgery.folders import arrays_of, config_of, write

CASE = "qwen3_moe-plain"
TOKENS = np.random.default_rng(0).integers(0, 90, (2, 24))


@pytest.fixture
def source(tmp_path):
    folder = write(tmp_path / "source", arrays_of(CASE), config_of(CASE))
    for name in ("tokenizer.json", "LICENSE", "README.md"):
        (folder / name).write_text("of the source")
    return folder


@pytest.fixture
def others(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("README.md", "LICENSE", "main.py"):
        (folder / name).write_text("mine")
    return folder


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(unused_fields, "_said", set())


@pytest.fixture(scope="module")
def model():
    return qmj.CausalLM(qmj.ModelConfig.from_pretrained(config_of(CASE)), rngs=nnx.Rngs(0))


def saved_adapter(folder):
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(config_of(CASE)), rngs=nnx.Rngs(0))
    qmj.add_lora(model, qmj.LoraConfig(r=2, target_modules=("q_proj",)), rngs=nnx.Rngs(0))
    qmj.save_adapter(model, folder)
    return folder


@pytest.mark.parametrize("way", ["save_pretrained", "save_orbax", "convert", "prune"])
def test_a_folder_of_other_files_is_refused_and_left_as_it_is(way, source, others, model, request):
    before = {path.name: path.read_text() for path in others.iterdir()}
    with pytest.raises(
        qmj.CheckpointError, match=r"holds other files and no checkpoint \(main.py\): expected a folder"
    ):
        match way:
            case "convert":
                convert(source, others)
            case "prune":
                prune(source, others, num_experts=4, tokens=TOKENS)
            case _:
                getattr(qmj, way)(model, others)
    assert {path.name: path.read_text() for path in others.iterdir()} == before


def test_what_is_kept_of_a_checkpoint_is_named_once(source, tmp_path, capsys):
    target = tmp_path / "out"
    convert(source, target)
    (source / "tokenizer.json").unlink()
    for name in ("notes.md", "model-00001-of-00002.safetensors", ".gitattributes"):
        (target / name).write_text("old")
    capsys.readouterr()
    convert(source, target)
    said = capsys.readouterr().err
    assert said.count(f"{target}: kept what was there and is not of the new checkpoint: notes.md, tokenizer.json.") == 1
    assert not (target / "model-00001-of-00002.safetensors").exists() and (target / ".gitattributes").exists()


def test_saving_next_to_a_tokenizer_is_no_news(model, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tokenizer.json").write_text("{}")
    qmj.save_pretrained(model, tmp_path / "out")
    qmj.save_pretrained(model, tmp_path / "out")
    assert capsys.readouterr().err == "" and (tmp_path / "out/tokenizer.json").exists()


def test_the_model_card_is_copied_only_where_it_is_true_of_what_is_written(source, tmp_path, capsys):
    convert(source, tmp_path / "same", dtype="bfloat16")
    assert (tmp_path / "same/README.md").read_text() == "of the source" and capsys.readouterr().err == ""
    convert(source, tmp_path / "merged", adapter=saved_adapter(tmp_path / "adapter"))
    prune(source, tmp_path / "pruned", num_experts=4, tokens=TOKENS)
    for name in ("merged", "pruned"):
        names = {path.name for path in (tmp_path / name).iterdir()}
        assert "README.md" not in names and {"tokenizer.json", "LICENSE"} <= names
    assert f"{source / 'README.md'} is about the model that it came with, and was not copied" in capsys.readouterr().err


def test_a_folder_of_adapters_is_refused_with_what_to_do_where_a_model_is_expected(tmp_path):
    folder = saved_adapter(tmp_path / "adapter")
    with pytest.raises(qmj.CheckpointError, match="holds low-rank adapters and no model.*`push` uploads adapters"):
        write_card(folder)
    with pytest.raises(qmj.ConfigError, match="holds low-rank adapters: give the checkpoint of their base, and this"):
        qmj.from_pretrained(folder)
    with pytest.raises(qmj.ConfigError, match=f"The adapters of this training run are in {folder}"):
        read_adapter_config(tmp_path / "adapter_config.json")


@pytest.mark.parametrize("command", ["card", "push"])
def test_a_folder_that_is_not_there_is_refused_before_anything_is_imported(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)  # importing it would fail
    assert main([command, str(tmp_path / "nowhere"), *(["me/model"] if command == "push" else [])]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
