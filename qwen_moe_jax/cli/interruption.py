"""Ctrl-C that waits for a good moment."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Remembers a Ctrl-C instead of raising it, so that nothing is left half done; a second one is raised.

    For the main thread, as all of Python's signals.

    Yields:
        Whether there was one.
    """
    seen = False

    def remember(*_: object) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)
