"""Names on the Hub: what is downloaded of a model, and refusals with the way out, against a Hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.huggingface.hub import config_file, local_folder, tokenizer_folder
from tests.huggingface.fake_hub import TOKEN, FakeHub, use
from tests.surgery.folders import arrays_of, config_of, write

NAME = "someone/tiny-Qwen3"
CASE = "qwen3-plain"


@pytest.fixture(scope="module")
def server():
    return FakeHub()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The Hub with nothing asked of it yet, and an empty cache."""
    use(server, tmp_path / "cache", monkeypatch)
    return server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one file with files in addition that no model needs."""
    folder = write(tmp_path_factory.mktemp("hub") / "one", arrays_of(CASE), config_of(CASE))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "onnx").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "onnx/config.json", "picture.png"):
        (folder / name).write_bytes(b"unneeded")
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A hybrid in four files: two of its text model, one of its vision tower, one of its next-token head."""
    folder = tmp_path_factory.mktemp("hub") / "four"
    arrays = arrays_of("qwen3_5-plain")
    vision = {"model.visual.patch_embed.proj.weight": np.zeros((4, 4), np.float32)}
    own = [name for name in arrays if not name.startswith("mtp.")]
    mtp = {"mtp.fc.weight": np.zeros((4, 4), np.float32)}
    parts = [{name: arrays[name] for name in own[::2]}, {name: arrays[name] for name in own[1::2]}, vision, mtp]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        write(folder, part, config_of("qwen3_5-plain"))
        (folder / "model.safetensors").rename(folder / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_of_a_model_of_one_file_that_file_is_downloaded_with_its_small_files(hub, folder):
    hub.add(NAME, folder)
    found = local_folder(NAME)
    assert sorted(hub.fetched(NAME)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert np.array_equal(
        qmj.from_pretrained(NAME).lm_head.weight[...], qmj.from_pretrained(folder).lm_head.weight[...]
    )
    assert local_folder(NAME) == found and len(hub.fetched(NAME)) == 3


def test_pytorch_files_are_downloaded_where_there_are_no_safetensors(hub, folder):
    repository = hub.add(NAME, folder)
    repository.commit({name: data for name, data in repository.files.items() if name != "model.safetensors"})
    assert (local_folder(NAME) / "pytorch_model.bin").is_file()
    assert sorted(hub.fetched(NAME)) == ["config.json", "pytorch_model.bin", "tokenizer.json"]


def test_of_several_files_those_with_tensors_of_the_text_model_are_downloaded(hub, sharded):
    hub.add(NAME, sharded)
    local_folder(NAME, drop_mtp=True)
    assert {name for name in hub.fetched(NAME) if "-" in name} == {"model-1.safetensors", "model-2.safetensors"}
    local_folder(NAME)
    assert hub.fetched(NAME)[-1] == "model-4.safetensors" and "model-3.safetensors" not in hub.fetched(NAME)


def test_for_a_tokenizer_or_a_plan_no_weights_are_downloaded(hub, folder, capsys):
    hub.add(NAME, folder)
    tokenizer_folder(NAME)
    assert sorted(hub.fetched(NAME)) == ["config.json", "tokenizer.json"]
    hub.requests.clear()
    assert config_file(NAME).name == "config.json" and hub.fetched(NAME) == []


def test_a_revision_is_a_branch_a_tag_or_a_commit_in_the_name_or_in_an_argument(hub, folder):
    repository = hub.add(NAME, folder)
    first = repository.refs["main"]
    repository.commit({"config.json": b"{}"}, "wip/new")
    assert local_folder(f"{NAME}@wip/new").name == repository.refs["wip/new"] != first
    assert local_folder(NAME, revision=first).name == local_folder(f"{NAME}@{first[:]}").name == first
    assert json.loads(config_file(f"{NAME}@wip/new").read_text()) == {}
    with pytest.raises(qmj.CheckpointError, match=f"{NAME}@nowhere: the Hub has no such revision of {NAME}"):
        local_folder(f"{NAME}@nowhere")


def test_the_cache_and_the_token_are_those_that_are_given(hub, folder, tmp_path):
    hub.add(NAME, folder, private=True)
    with pytest.raises(qmj.CheckpointError, match=r"or it is private.*log in \(hf auth login\), or set HF_TOKEN"):
        qmj.from_pretrained(NAME)
    model = qmj.from_pretrained(NAME, token=TOKEN, cache_dir=tmp_path / "here")
    assert model.config.model_type == "qwen3" and len([*(tmp_path / "here").glob("models--*")]) == 1


def test_headers_alone_are_fetched_for_an_inspection_and_their_bytes_counted(hub, sharded, capsys):
    hub.add(NAME, sharded)
    assert main(["inspect", NAME, "--json"]) == 2  # its next-token head is not whole
    found = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(sharded), "--json"]) == 2
    local = json.loads(capsys.readouterr().out)
    different = ("where", "fetched", "ignored")
    assert {**found, **dict.fromkeys(different)} == {**local, **dict.fromkeys(different)}
    files = [(path, size) for _, path, size in hub.requests if path.endswith(".safetensors")]
    assert found["where"] == NAME and found["fetched"] == sum(size for _, size in files) > 0
    assert not any("model-3" in path for path, _ in files)
    assert not [*Path(constants.HF_HUB_CACHE).rglob("*.safetensors")]


def test_of_a_large_file_a_header_and_rows_of_a_tied_head_are_fetched(hub, tmp_path, capsys):
    arrays = arrays_of("qwen3-plain") | {"model.layers.0.mlp.gate_proj.bias": np.zeros(200_000, np.float32)}
    hub.add(NAME, write(tmp_path / "large", arrays, {**config_of("qwen3-plain"), "tie_word_embeddings": True}))
    assert main(["inspect", NAME]) == 2  # the bias is none of the model's
    said = capsys.readouterr()
    assert "of its files were fetched from the Hub, for their headers" in said.out
    assert "unexpected: model.layers.0.mlp.gate_proj.bias" in said.err
    assert sum(size for _, path, size in hub.requests if path.endswith(".safetensors")) < 110_000


def test_what_is_damaged_on_the_hub_is_reported_as_of_a_folder(hub, sharded, capsys):
    repository = hub.add(NAME, sharded)
    files = {**repository.files, "model-1.safetensors": b"no header here"}
    repository.commit({name: data for name, data in files.items() if name != "model-2.safetensors"})
    assert main(["inspect", NAME]) == 2
    said = capsys.readouterr().err
    assert "damaged: model-1.safetensors is not a safetensors file" in said
    assert "absent: model.safetensors.index.json names model-2.safetensors" in said


def test_a_gated_model_is_refused_with_the_page_of_its_conditions(hub, folder, capsys):
    hub.add(NAME, folder, gated=True)
    for command in (["inspect", NAME], ["plan", NAME, "--target", "cpu:1"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"conditions: accept them at {hub.url}/{NAME}, then log in (hf auth login)" in said
        assert said.count("\n") == 1


def test_a_wrong_token_and_a_name_that_is_not_there_are_refused_with_the_way_out(hub, monkeypatch, capsys):
    assert main(["convert", NAME, "out"]) == 2
    assert "the Hub has no model of this name, or it is private. Check the name" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["convert", NAME, "out"]) == 2
    said = capsys.readouterr().err
    assert f"{NAME}: the Hub refuses access (401" in said and said.count("\n") == 1


def test_offline_a_model_of_the_cache_is_loaded_and_another_refused_with_the_way_out(hub, folder, monkeypatch):
    hub.add(NAME, folder)
    found = local_folder(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_folder(NAME) == found and qmj.from_pretrained(NAME).config.model_type == "qwen3"
    with pytest.raises(qmj.CheckpointError, match=r"HF_HUB_OFFLINE is set.*not in the cache.*Unset it, or download it"):
        local_folder("someone/else")


def test_without_a_network_the_way_out_is_a_folder(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(qmj.CheckpointError, match=f"hf download {NAME} --local-dir FOLDER"):
        qmj.from_pretrained(NAME)


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "/absolute/path", "~/model"])
def test_what_can_be_no_name_is_a_folder_that_is_missing(source):
    with pytest.raises(qmj.CheckpointError, match="no such folder, and not a name on the Hub"):
        local_folder(source)


def test_the_variables_of_huggingface_hub_are_those_of_a_command(hub, folder, tmp_path):
    hub.add(NAME, folder, private=True)
    variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_CACHE": str(tmp_path / "own")}
    command = [sys.executable, "-m", "qwen_moe_jax", "inspect", f"{NAME}@main"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=True)
    assert f"{NAME}@main" in done.stdout and "It loads." in done.stdout
    assert (tmp_path / "own" / f"models--{NAME.replace('/', '--')}").is_dir()
