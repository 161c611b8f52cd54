"""Folders that are written beside and renamed, so that an interrupted one never looks finished."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.sharding.distributed import barrier, broadcast, is_process_zero


@contextlib.contextmanager
def replaced_folder(folder: Path, stale: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder to write into, put in the place of `folder` when the block ends without an error.

    On an error the old folder stays as it was. Several processes enter and leave together, and all are given the same
    new folder.

    Args:
        folder: to write.
        stale: whether a file of this name goes with the old folder. Other files that the new folder does not have are
            kept (a tokenizer, a README).

    Raises:
        CheckpointError: `folder` is a file, or a mount point, which cannot be renamed.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected a folder to write or none yet.")
    if folder.is_mount() or folder == Path.cwd():
        raise CheckpointError(f"{folder} cannot be replaced as a whole (it is in use): give a folder inside it.")
    staging = folder.parent / f".{folder.name}.{broadcast(secrets.token_hex(4))}.partial"
    try:
        if is_process_zero():
            staging.mkdir(parents=True)
        barrier(f"made {staging}")
        yield staging
        barrier(f"wrote {staging}")
        if is_process_zero():
            if folder.exists():
                _keep_other_files(folder, staging, stale)
                _swap(staging, folder)
            else:
                staging.rename(folder)
        barrier(f"renamed {staging}")
    finally:
        if is_process_zero():
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


def _keep_other_files(old: Path, new: Path, stale: Callable[[str], bool]) -> None:
    """Links (or copies, where links are not to be had) what the new folder does not have itself."""
    for path in old.iterdir():
        if stale(path.name) or (new / path.name).exists():
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
