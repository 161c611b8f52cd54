"""Signals that ask a run to stop: recorded, so that the current step is finished and saved first."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qwen_moe_jax.cli.arguments import end_all_processes
from qwen_moe_jax.cli.interrupts import INTERRUPTED, end_process, watched_signals
from train.folder import RunFolder

#: What a run says that was stopped without being saved first.
LEFT = "Stopped. The same command goes on from the last checkpoint."
_FINISHING = "Finishing this step, then saving; Ctrl-C again stops at once.\n"


def leave(folder: RunFolder | None) -> None:
    """What a process does before a Ctrl-C ends it at once: the folder is free, and other processes end as well."""
    if folder is not None:
        folder.unlock()
        os.write(2, f"{LEFT}\n".encode())
    end_all_processes(INTERRUPTED, LEFT)


class Stopped(Exception):
    """A signal ended the run early; everything is saved.

    Attributes:
        step: the last finished step.
        signal: the signal that was received.
    """

    def __init__(self, step: int, asked: signal.Signals):
        super().__init__(f"stopped by {asked.name} after step {step}")
        self.step = step
        self.signal = asked


@contextmanager
def stop_requests(
    leave: Callable[[], object] = lambda: None, *, says: bool = True
) -> Iterator[Callable[[], signal.Signals | None]]:
    """Records Ctrl-C and SIGTERM (which schedulers send before they kill). A second Ctrl-C ends the process at once.

    It works in the main thread only, as all signal handlers in Python.

    Args:
        leave: called before the process ends at a second Ctrl-C.
        says: whether the first Ctrl-C is answered on stderr, if that is a terminal.

    Yields:
        A function that returns the recorded signal, or None.
    """
    asked: signal.Signals | None = None
    presses = 0

    def record(number: int, frame: object) -> None:
        nonlocal asked
        asked = asked or signal.Signals(number)

    def see(number: int) -> None:
        # In a thread: Python calls `record` only when the compilation or step that is under way has ended.
        nonlocal presses
        presses += number == signal.SIGINT
        if presses > 1:
            end_process(INTERRUPTED, leave=leave)
        if number == signal.SIGINT and says and os.isatty(2):
            os.write(2, _FINISHING.encode())

    with watched_signals({signal.SIGINT: record, signal.SIGTERM: record}, see):
        yield lambda: asked
