"""Git LFS pointers: the small text files that a clone without LFS has in place of large files."""

from pathlib import Path

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def lfs_problem(path: Path) -> str | None:
    """What is wrong and what to do, if a file is a Git LFS pointer; None if it is not, or cannot be read."""
    try:
        with open(path, "rb") as file:
            found = file.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        return None
    if not found:
        return None
    return f"{path.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent.absolute()}"
