"""Folders written under a temporary name and renamed when complete, so that a partial one never looks finished."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.sharding.distributed import barrier, broadcast, is_process_zero
from qwen_moe_jax.storage.write_errors import WAYS_OUT, described, write_errno_behind


@contextlib.contextmanager
def replaced_folder(folder: Path, stale: Callable[[str], bool]) -> Iterator[Path]:
    """A temporary folder to write into, which replaces `folder` when the block ends without an error.

    On an error the old folder is unchanged. With several processes this is collective: all enter and leave it, and all
    get the same temporary folder.

    Args:
        folder: that is written.
        stale: (file name) → whether the file is removed with the old folder. Other files that the new folder does not
            have (a tokenizer, a README) are kept.

    Raises:
        CheckpointError: `folder` is a file, or a mount point, which cannot be renamed; it cannot be written (a full
            disk, no permission).
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: expected a folder, or a path that does not exist yet.")
    if folder.is_mount() or folder == Path.cwd():
        raise CheckpointError(
            f"{folder} is a mount point or the working directory and cannot be renamed: give a folder inside it."
        )
    staging = folder.parent / f".{folder.name}.{broadcast(secrets.token_hex(4))}.partial"
    try:
        if is_process_zero():
            _make(staging, folder)
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
    except Exception as error:
        number = write_errno_behind(error, folder.parent)
        if number is None:
            raise
        way_out = WAYS_OUT.get(number, "Choose another folder")
        reason = described(number, folder.parent)
        raise CheckpointError(
            f"{folder}: cannot be written: {reason}. What was there is unchanged. {way_out}."
        ) from error
    finally:
        if is_process_zero():
            shutil.rmtree(staging, ignore_errors=True)


def _make(staging: Path, folder: Path) -> None:
    try:
        staging.mkdir(parents=True)
    except (FileExistsError, FileNotFoundError) as error:  # a link to nothing above it, or no folder for files
        raise CheckpointError(f"{folder}: {error.filename} cannot be made a folder: {error.strerror}.") from None


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
    """Links (or copies, where the file system has no hard links) the files that the new folder does not have."""
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
