"""Signals that ask a run to stop: remembered, so that the step under way is finished and saved first."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """A run ended early because it was asked to, with everything saved.

    Attributes:
        step: the last finished step.
        signal: that asked for it.
    """

    def __init__(self, step: int, asked: signal.Signals):
        super().__init__(f"stopped by {asked.name} after step {step}")
        self.step = step
        self.signal = asked


@contextmanager
def stop_requests() -> Iterator[Callable[[], signal.Signals | None]]:
    """Remembers Ctrl-C and SIGTERM (what schedulers send before they kill). A second Ctrl-C is raised at once.

    For the main thread, as all of Python's signals.

    Yields:
        Which of them came, or None.
    """
    asked: signal.Signals | None = None

    def update_cache(number: int, frame: object) -> None:
        nonlocal asked
        if asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = signal.Signals(number)

    before = {number: signal.signal(number, update_cache) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
