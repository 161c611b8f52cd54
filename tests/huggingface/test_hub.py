"""Names on the Hub: found in its cache without a network, refused with the way out where there is neither."""

import huggingface_hub
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.hub import local_folder, tokenizer_folder
from tests.cases import CASES

NAME = "someone/tiny-Qwen3"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of a machine without a network, with nothing in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def cached_folder(cache, name: str):
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def test_a_model_in_the_cache_is_loaded_by_its_name(cache):
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(CASES["qwen3-plain"].config), rngs=nnx.Rngs(0))
    folder = cached_folder(cache, NAME)
    qmj.save_pretrained(model, folder)
    assert local_folder(NAME) == folder
    again = qmj.from_pretrained(NAME)
    assert np.array_equal(again.lm_head.weight[...], model.lm_head.weight[...])


def test_without_a_network_the_way_out_is_a_folder(cache):
    with pytest.raises(qmj.CheckpointError, match=f"hf download {NAME} --local-dir FOLDER"):
        qmj.from_pretrained(NAME)


def test_safetensors_are_asked_for_first_and_pytorch_files_where_there_are_none(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns[-1]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    local_folder(NAME)
    (tmp_path / "model.safetensors").touch()
    local_folder(NAME)
    assert asked == [(NAME, "model*.safetensors"), (NAME, "pytorch_model*.bin"), (NAME, "model*.safetensors")]


def test_for_a_tokenizer_no_weights_are_asked_for(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert tokenizer_folder(NAME) == tmp_path and tokenizer_folder(tmp_path) == tmp_path
    assert "*.json" in asked and not any("safetensors" in pattern or "bin" in pattern for pattern in asked)


def test_a_name_the_hub_does_not_know_is_refused_with_what_it_said(monkeypatch):
    def download(name, allow_patterns):
        raise LocalEntryNotFoundError("no such thing\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(qmj.CheckpointError, match=r"LocalEntryNotFoundError: no such thing\)"):
        local_folder(NAME)


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "/absolute/path", "~/model"])
def test_what_can_be_no_name_is_a_folder_that_is_missing(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(qmj.CheckpointError, match="no such folder, and not a name on the Hub"):
        local_folder(source)
