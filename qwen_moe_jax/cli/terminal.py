"""What a terminal needs: text that cannot steer it, and a Ctrl-C that waits for a good moment."""

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def show(text: str) -> None:
    """Prints a piece of a model's text at once; on a terminal, with codes in the place of what would steer it."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def visible(text: str) -> str:
    """The same with codes in the place of what would steer a terminal."""
    return _CONTROLS.sub(lambda match: f"‹U+{ord(match[0]):04X}›", text)


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Remembers a Ctrl-C instead of raising it, so that nothing is left half done; a second one is raised.

    For the main thread, as all of Python's signals.

    Yields:
        Whether there was one.
    """
    seen = False

    def update_cache(*_: object) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    before = signal.signal(signal.SIGINT, update_cache)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)
