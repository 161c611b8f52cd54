"""Terminal output without control characters, and a Ctrl-C that is handled at a safe moment."""

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def show(text: str) -> None:
    """Prints a piece of a model's text, unbuffered; on a terminal with codes for control characters."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def visible(text: str) -> str:
    """The text with control characters replaced by their codes."""
    return _CONTROLS.sub(lambda match: f"‹U+{ord(match[0]):04X}›", text)


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Records a Ctrl-C instead of raising it, so that no work is left half done; a second one is raised.

    For the main thread, as all of Python's signals.

    Yields:
        Whether there was one.
    """
    seen = False

    def record(*_: object) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    before = signal.signal(signal.SIGINT, record)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)
