"""Failed writes (a full disk, a quota, a folder without permission) as one line that says what the run still has.

Orbax's failures are `ValueError`s with TensorStore's text, each of them also logged with its stack trace by every
thread that it passes through: more than a thousand lines for one full disk.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_moe_jax.storage.write_errors import WAYS_OUT, chain, described, write_errno, write_errno_behind
from train.errors import SaveError


@contextmanager
def write_errors(folder: Path, when: str | Callable[[], str]) -> Iterator[None]:
    """Raises `SaveError` instead of an exception behind which is a failed write.

    Args:
        folder: of the run.
        when: what failed, as the message calls it: "step 8", or a function that is called for it.

    Raises:
        SaveError: with the path and the system's reason, the newest complete checkpoint, and what the next start does.
    """
    try:
        yield
    except Exception as error:
        for earlier in chain(error):
            if isinstance(earlier, SaveError):
                raise earlier from None  # what failed first; files that are closed afterwards fail again
        number = write_errno_behind(error, folder)
        if number is None:
            raise
        raise SaveError(_message(folder, when if isinstance(when, str) else when(), number)) from error


@contextmanager
def quiet_write_errors(folder: Path) -> Iterator[list[int]]:
    """Keeps Orbax and TensorStore from printing stack traces of failed writes.

    After an exception it stays in force: their threads print until the process ends.

    Yields:
        A list to which the errno of every failed write that they report is appended.
    """
    absl, hook = logging.getLogger("absl"), sys.unraisablehook
    for earlier in [one for one in absl.filters if isinstance(one, _FailedWrites)]:
        absl.removeFilter(earlier)  # of a run of this process that failed
    failed = _FailedWrites(folder)

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        # TensorStore completes futures of a loop that Orbax has closed after the failure.
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    absl.addFilter(failed)
    sys.unraisablehook = report
    yield failed.numbers
    absl.removeFilter(failed)
    if sys.unraisablehook is report:
        sys.unraisablehook = hook


class _FailedWrites(logging.Filter):
    """Drops log records of failed writes, and collects the errno of each."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.numbers: list[int] = []
        self._folder = folder

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        errors = chain(error) if error else ()
        found = [number for one in errors if (number := write_errno(one, self._folder)) is not None]
        self.numbers += found
        return not found


def complete_steps(checkpoints: Path) -> list[int]:
    """The steps with a complete checkpoint, in order: Orbax renames a folder to its step's number when it is."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())


def _message(folder: Path, when: str, number: int) -> str:
    steps = complete_steps(folder / "checkpoints")
    kept = f"The checkpoint of step {steps[-1]} is complete" if steps else "There is no complete checkpoint yet"
    next_start = "it goes on from there" if steps else "it begins anew"
    found = f"{when}: cannot write to {folder}: {described(number, folder)}. {kept}."
    if number not in WAYS_OUT:
        return f"{found} Choose another folder: --run.output_dir FOLDER."
    return f"{found} {WAYS_OUT[number]}, then give the same command again: {next_start}."
