"""Writing folders: beside and renamed, in few fetches, and nothing lost when something goes wrong."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.files import replaced_folder
from qwen_moe_jax.huggingface.save import export_tensors


@pytest.fixture(scope="module")
def model():
    hub = dict(
        model_type="mixtral",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    return qmj.CausalLM(qmj.ModelConfig.from_pretrained(hub), rngs=nnx.Rngs(0))


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def test_the_experts_of_a_layer_are_fetched_once(model, monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x.nbytes) or device_get(x))
    tensors = dict(export_tensors(model))
    assert sum(fetched) == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert all(array.base is None for array in tensors.values()), "a view would keep its whole layer in memory"


def test_other_files_of_an_existing_folder_are_kept_and_stale_weights_are_not(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "notes").mkdir(parents=True)
    write(folder, {"tokenizer.json": "old", "config.json": "old", "model-00001-of-00009.safetensors": "old"})
    write(folder / "notes", {"a": "old"})
    with replaced_folder(folder) as new:
        write(new, {"config.json": "new", "model.safetensors": "new"})
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    kept = {"tokenizer.json": "old", "notes/a": "old"}
    assert found == {"config.json": "new", "model.safetensors": "new"} | kept
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_error_while_writing_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder, {"config.json": "old"})
    with pytest.raises(RuntimeError), replaced_folder(folder) as new:
        write(new, {"config.json": "new"})
        raise RuntimeError
    assert (folder / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_swap_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder, {"config.json": "old"})
    rename = Path.rename

    def fails_into_place(self, target):
        if self.suffix == ".partial":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_into_place)
    with pytest.raises(OSError, match="no"), replaced_folder(folder) as new:
        write(new, {"config.json": "new"})
    assert (folder / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_file_or_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    write(tmp_path, {"plain": "a file"})
    with pytest.raises(qmj.CheckpointError, match="is a file"), replaced_folder(tmp_path / "plain"):
        pass
    monkeypatch.chdir(tmp_path)
    with pytest.raises(qmj.CheckpointError, match="in use"), replaced_folder(Path(".")):
        pass
    assert (tmp_path / "plain").read_text() == "a file"


def test_a_tensor_counts_in_the_file_that_the_index_names(model, tmp_path):
    folder = tmp_path / "checkpoint"
    qmj.save_pretrained(model, folder, max_shard_size="10KB")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    last = folder / max(weight_map.values())
    assert weight_map["model.norm.weight"] == last.name != weight_map["lm_head.weight"]
    stray = load_file(last) | {"lm_head.weight": np.zeros((32, 16), np.float32)}
    save_file(stray, last, metadata={"format": "pt"})
    np.testing.assert_array_equal(qmj.from_pretrained(folder).lm_head.weight[...], model.lm_head.weight[...])
