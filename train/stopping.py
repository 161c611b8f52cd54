"""Signals that ask a run to stop: recorded, so that the current step is finished and saved first."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
def stop_requests() -> Iterator[Callable[[], signal.Signals | None]]:
    """Records Ctrl-C and SIGTERM (which schedulers send before they kill). A second Ctrl-C is raised at once.

    It works in the main thread only, as all signal handlers in Python.

    Yields:
        A function that returns the recorded signal, or None.
    """
    asked: signal.Signals | None = None

    def record(number: int, frame: object) -> None:
        nonlocal asked
        if asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = signal.Signals(number)

    before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
