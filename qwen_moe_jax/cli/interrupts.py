"""Ctrl-C that ends a program at once, also while modules are imported or XLA compiles.

Python raises KeyboardInterrupt only when a compilation has ended; raised in a callback of JAX it is swallowed, raised
in an import it leaves half-made modules, and an exit while XLA's threads compile ends in a crash. A thread that reads
the signals ends the process instead, where nothing has to be saved.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

INTERRUPTED = 128 + signal.SIGINT
_END = b"\0"
_SHOW_CURSOR = "\x1b[?25h"  # progress bars hide it


@contextmanager
def watched_signals(
    handlers: dict[signal.Signals, Callable[..., object]], see: Callable[[int], object]
) -> Iterator[None]:
    """Has a thread see every signal at once; Python calls its handler in the main thread, when that is free to.

    It works in the main thread only, as all signal handlers of Python; elsewhere it does nothing.

    Args:
        handlers: by signal. While another one is installed, the signal is not seen.
        see: called with the number of each.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while (byte := os.read(reading, 1)) != _END:
            asked = signal.Signals(byte[0])
            if asked in handlers and signal.getsignal(asked) is handlers[asked]:
                see(asked)

    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    before_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, previous in before.items():
            signal.signal(number, previous)
        os.write(writing, _END)
        watcher.join()
        os.close(writing)
        os.close(reading)


@contextmanager
def leaving_on_interrupt(message: str = "", leave: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Ends the process at a Ctrl-C, with exit code 130.

    Args:
        message: a line for stderr.
        leave: called before.
    """

    def wait(number: int, frame: object) -> None:
        """The thread ends the process."""

    with watched_signals({signal.SIGINT: wait}, lambda number: end_process(INTERRUPTED, message, leave)):
        yield


def raise_interrupts() -> None:
    """From here on, a Ctrl-C is a KeyboardInterrupt again, for code that handles it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_process(code: int, message: str = "", leave: Callable[[], object] = lambda: None) -> None:
    """Ends the process without the end of Python. Callable from any thread.

    Args:
        code: of the exit.
        message: a line for stderr.
        leave: called before; what it raises is dropped.
    """
    with suppress(Exception):
        leave()
    shown = (_SHOW_CURSOR + "\n" if sys.stderr is not None and sys.stderr.isatty() else "") + (
        message and message + "\n"
    )
    with suppress(OSError):
        os.write(2, shown.encode())
    os._exit(code)
