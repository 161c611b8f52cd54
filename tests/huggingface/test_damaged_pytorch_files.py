"""Damaged PyTorch files: no code in them is run, and the message names the file and what was found."""

import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import qwen_moe_jax as qmj
from tests.huggingface import damaged
from tests.huggingface.damaged import NORM, SINGLE, cut, refused, text

whole = damaged.whole
BIN = "pytorch_model.bin"


@pytest.fixture
def bin_folder(whole, tmp_path):
    folder = Path(shutil.copytree(whole / "single", tmp_path / "checkpoint"))
    (folder / SINGLE).unlink()
    return folder


def import_torch():
    return pytest.importorskip("torch", reason="torch is not installed")


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("written_by", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(bin_folder, tmp_path, written_by):
    torch = import_torch()
    marker = tmp_path / "ran"
    content = {NORM: Bomb(marker)}
    if written_by == "torch":
        torch.save(content, bin_folder / BIN)
    else:
        (bin_folder / BIN).write_bytes(pickle.dumps(content, protocol=2))
    message = refused(bin_folder, qmj.CheckpointError)
    assert f"damaged: {BIN} is not a PyTorch file of tensors only" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(content))
    assert marker.exists(), "the pickle has no code in it"


def test_a_pytorch_file_where_torch_is_absent_is_refused_with_the_way_out(bin_folder, monkeypatch):
    (bin_folder / BIN).write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refused(bin_folder, qmj.CheckpointError)
    assert f"{bin_folder / BIN} is a PyTorch file" in message
    for word in ("torch is not installed", "pip install torch", "save_pretrained", "safetensors"):
        assert word in message


def save_bin(folder: Path, content: Any) -> None:
    torch = import_torch()
    torch.save(content(torch), folder / BIN)


PYTORCH_KINDS = {
    "truncated": (lambda torch: {NORM: torch.ones(8)}, cut(BIN, -200), f"damaged: {BIN} is not a PyTorch file"),
    "empty": (lambda torch: {}, text(BIN, b""), f"damaged: {BIN} is not a PyTorch file"),
    "HTML": (lambda torch: {}, text(BIN, b"<html>"), f"damaged: {BIN} is not a PyTorch file"),
    "a list": (lambda torch: [torch.ones(8)], None, f"damaged: {BIN} does not hold a dictionary of tensors by name"),
    "no tensors": (lambda torch: {}, None, f"damaged: {BIN} does not hold a dictionary of tensors by name"),
    "numbers": (lambda torch: {NORM: 1.0}, None, f"damaged: {BIN} does not hold a dictionary of tensors by name"),
    "nested": (
        lambda torch: {"epoch": 3, "state_dict": {NORM: torch.ones(8)}},
        None,
        f"nested: {BIN} holds its tensors under the key 'state_dict'",
    ),
    "sparse": (lambda torch: {NORM: torch.ones(8).to_sparse()}, None, f"damaged: {BIN} does not hold a dictionary"),
    "without data": (lambda torch: {NORM: torch.ones(8, device="meta")}, None, f"damaged: {BIN} does not hold"),
    "complex": (
        lambda torch: {NORM: torch.ones(8) + 0j},
        None,
        f"dtype: {NORM} is complex64 in {BIN}, expected one of",
    ),
    "wrong shape": (lambda torch: {NORM: torch.ones(9)}, None, f"shape: {NORM} is [9] in {BIN}, expected [8]"),
}


@pytest.mark.parametrize("kind", PYTORCH_KINDS)
def test_a_damaged_pytorch_file_is_refused(bin_folder, kind):
    content, damage, line = PYTORCH_KINDS[kind]
    save_bin(bin_folder, content)
    if damage is not None:
        damage(bin_folder)
    assert line in refused(bin_folder, qmj.CheckpointError)
