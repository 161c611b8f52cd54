"""Checkpoint folders on disk: safetensors files behind one mapping, and writing beside before renaming."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors looks up by name
import numpy as np
from safetensors import SafetensorError, safe_open

from qwen_moe_jax.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """Where a tensor stands, what it is, and how to read it.

    Attributes:
        path: the file.
        shape, dtype: of the tensor.
        slices: safetensors' lazy tensor: indexing it reads that part of the file.
        expert, first_row: where the tensor is a part of a larger one in the file, [expert, first_row:…, :] of it.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    slices: Any
    expert: int | None = None
    first_row: int = 0

    def part(self, expert: int, first_row: int, rows: int) -> "TensorFile":
        """One expert's rows of a tensor [experts, rows, columns]."""
        shape = (rows, *self.shape[2:])
        return dataclasses.replace(self, shape=shape, expert=expert, first_row=first_row)

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a part of the tensor, given with start and stop, and no more, from the file."""
        index = index or tuple(slice(0, size) for size in self.shape)
        if self.expert is None:
            return self.slices[index] if index else self.slices[...]
        rows = slice(index[0].start + self.first_row, index[0].stop + self.first_row)
        return self.slices[(self.expert, rows, *index[1:])]


def open_tensors(folder: Path) -> dict[str, TensorFile]:
    """All tensors of a folder by name, from the headers alone; nothing is read yet.

    Raises:
        CheckpointError: no safetensors, an index that names an absent file or tensor, a damaged file.
    """
    if (folder / SINGLE).is_file():  # wins over an index, as in transformers
        weight_map = None
    elif (folder / INDEX).is_file():
        weight_map = _weight_map(folder / INDEX)
    else:
        raise CheckpointError(
            f"{folder}: found neither {SINGLE} nor {INDEX}. A checkpoint folder needs one of them; other formats have "
            "to be saved as safetensors first."
        )
    files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"{folder / INDEX} names files that are not there: {', '.join(absent)}.")
    tensors: dict[str, TensorFile] = {}
    for name in files:
        opened = _open_file(folder / name)
        # A tensor counts in the file that the index names for it, not in another one that happens to have it as well.
        tensors |= {key: found for key, found in opened.items() if (weight_map or {}).get(key, name) == name}
    if weight_map is not None:
        lost = sorted(name for name in weight_map if name not in tensors)
        if lost:
            raise CheckpointError(f"{folder / INDEX} names tensors that its files do not hold: {', '.join(lost)}.")
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise TypeError("weight_map is not an object of file names")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a safetensors index ({error!r}).") from None
    outside = [name for name in found.values() if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{path}: file names must stand in the folder itself, found {outside[0]!r}.")
    return found


def _open_file(path: Path) -> dict[str, TensorFile]:
    try:
        opened = safe_open(path, framework="numpy")
        tensors = {}
        for name in opened.keys():
            lazy = opened.get_slice(name)
            dtype = DTYPES.get(lazy.get_dtype(), lazy.get_dtype())
            tensors[name] = TensorFile(path, tuple(lazy.get_shape()), dtype, lazy)
        return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error}).") from None


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, put in the place of `folder` when the block ends without an error.

    Files of the old folder that the new one does not have are kept (a tokenizer, a README), except weights, which
    belong to the config beside them. On an error the old folder stays as it was.

    Raises:
        CheckpointError: `folder` is a file, or a mount point, which cannot be renamed.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected a folder to write or none yet.")
    if folder.is_mount() or folder == Path.cwd():
        raise CheckpointError(f"{folder} cannot be replaced as a whole (it is in use): give a folder inside it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        staging.chmod(0o755)
        yield staging
        if folder.exists():
            _keep_other_files(folder, staging)
            _swap(staging, folder)
        else:
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(new: Path, old: Path) -> None:
    retired = Path(tempfile.mkdtemp(prefix=f".{old.name}.", suffix=".old", dir=old.parent))
    old.rename(retired / old.name)
    try:
        new.rename(old)
    except BaseException:
        (retired / old.name).rename(old)
        retired.rmdir()
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _keep_other_files(old: Path, new: Path) -> None:
    """Links (or copies, where links are not to be had) what the new folder does not have itself."""
    for path in old.iterdir():
        weights = path.name == INDEX or (path.name.startswith("model") and path.suffix == ".safetensors")
        if weights or (new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, new / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
