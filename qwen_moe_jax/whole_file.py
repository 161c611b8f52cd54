"""Text files that are written as a whole: a reader sees the old file or the new one, never a part of either."""

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Writes a temporary file and renames it: a file of this name is always complete.

    Raises:
        OSError: it cannot be written.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
