"""Failed writes (a full disk, a quota, a folder without permission): recognised, and put into words.

Orbax's failures are `ValueError`s with TensorStore's text.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwen_moe_jax.units import format_bytes

_WRITE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
#: Those that reading another file raises, too: they count where they name a path of the run.
_PATH_ERRNOS = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG}
#: What to do, by errno.
WAYS_OUT = {
    errno.ENOSPC: "Free some space on that disk",
    errno.EDQUOT: "Free some of your quota",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "Make that file system writable",
    errno.EIO: "Check that disk",
    errno.EACCES: "Make that folder writable",
    errno.EPERM: "Make that folder writable",
}
_TENSORSTORE_ERRNO = re.compile(r"os_error_code='(\d+)'")


def described(number: int, folder: Path) -> str:
    """The system's reason for a failed write to a folder; of a full disk, with what is free."""
    return os.strerror(number) + (f" ({_free(folder)} free)" if number == errno.ENOSPC else "")


def write_errno_behind(error: BaseException, folder: Path) -> int | None:
    """The errno of the failed write behind an exception; None where there is none."""
    return next((number for one in chain(error) if (number := write_errno(one, folder)) is not None), None)


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, and those behind it."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]


def write_errno(error: BaseException, folder: Path) -> int | None:
    """The errno of a failed write; None for any other exception."""
    if isinstance(error, OSError):
        if error.errno in _WRITE_ERRNOS:
            return error.errno
        if error.errno in _PATH_ERRNOS and isinstance(error.filename, str | Path):
            run, path = folder.absolute(), Path(error.filename).absolute()
            return error.errno if run.is_relative_to(path) or path.is_relative_to(run) else None
        return None
    found = _TENSORSTORE_ERRNO.search(str(error)) if isinstance(error, ValueError) else None
    return int(found[1]) if found and int(found[1]) in _WRITE_ERRNOS | _PATH_ERRNOS else None


def _free(folder: Path) -> str:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return format_bytes(shutil.disk_usage(existing).free)
