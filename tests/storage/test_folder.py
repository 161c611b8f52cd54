"""Writing folders: beside and renamed, and nothing lost when something goes wrong."""

import errno
import os
from pathlib import Path

import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.storage import folder as storage_folder


def replaced_folder(folder: Path):
    return storage_folder.replaced_folder(folder, stale=lambda name: name.endswith(".safetensors"))


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


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


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            r"No space left on device \(.* free\)\. What was there is unchanged\. Free some space on that disk\.",
        ),
        (errno.EACCES, r"Permission denied\. What was there is unchanged\. Make that folder writable\."),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path, number, message):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder, {"config.json": "old"})
    with (
        pytest.raises(qmj.CheckpointError, match=f"^{folder}: cannot be written: {message}$"),
        replaced_folder(folder) as new,
    ):
        write(new, {"config.json": "new"})
        raise OSError(number, os.strerror(number), str(new / "model.safetensors"))
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
    with pytest.raises(qmj.CheckpointError, match="mount point or the working directory"), replaced_folder(Path(".")):
        pass
    assert (tmp_path / "plain").read_text() == "a file"


def test_a_folder_below_a_link_to_nothing_is_refused_by_its_path(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(qmj.CheckpointError, match="link/new: .*link cannot be made a folder: File exists"):
        with replaced_folder(tmp_path / "link" / "new"):
            pass
