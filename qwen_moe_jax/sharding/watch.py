"""A line from every process to the first, which the operating system cuts when either end dies.

JAX's own heartbeats notice a dead process after some time, and then abort the others with a page of C++; until then
they wait in a collective that never ends. A connection that is cut is noticed at once, whatever the main thread waits
for, and without a clock: a process that is merely slow is left alone.

What is said on a line is an exit code and a reason, once: `0` for an end as it should be, anything else for one that
the others are to share. Silence to the end is death.
"""

import contextlib
import os
import secrets
import selectors
import socket
import threading
from typing import NoReturn

#: Exit code of a process that ends because another one died.
ANOTHER_DIED = 75
#: Seconds to wait for what the other end should do at once.
_PATIENCE = 5.0


class FirstWatch:
    """The end of process 0, which hears all and tells all."""

    def __init__(self) -> None:
        self._name = _name(0)
        self._listener = _listen()
        self._token = secrets.token_hex(16)  # a port is open to strangers
        self._lock = threading.Lock()
        self._lines: dict[socket.socket, str] = {}  # and the name of who is at the other end
        self._ended = False
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    @property
    def address(self) -> str:
        """What an `OtherWatch` needs to know besides the host."""
        return f"{self._listener.getsockname()[1]} {self._token} {self._name}"

    def done(self) -> None:
        """Says that this process ends as it should, once all of them may."""
        self._tell_all(0, "")

    def fail(self, code: int, reason: str) -> NoReturn:
        """Ends all processes with an exit code; this one has said why, the others say it with `reason`."""
        self._tell_all(code, f"{self._name} ended: {reason}")
        os._exit(code)

    def _tell_all(self, code: int, reason: str) -> None:
        with self._lock:
            self._ended, lines = True, list(self._lines)
        for line in lines:
            _say(line, code, reason)
        for line in lines if code else []:  # until they have read it: JAX aborts them where this process is gone first
            line.settimeout(_PATIENCE)
            with contextlib.suppress(OSError):
                while line.recv(4096):
                    pass

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        while not self._ended:
            for key, _ in selector.select():
                if key.fileobj is self._listener:
                    line = self._welcome()
                    if line is not None:
                        selector.register(line, selectors.EVENT_READ)
                elif isinstance(key.fileobj, socket.socket):
                    selector.unregister(key.fileobj)
                    self._hear(key.fileobj)

    def _welcome(self) -> socket.socket | None:
        line, _ = self._listener.accept()
        line.settimeout(_PATIENCE)
        token, _, name = _read(line).partition(" ")
        if not secrets.compare_digest(token.encode(), self._token.encode()):
            line.close()
            return None
        line.settimeout(None)
        with self._lock:
            self._lines[line] = name
        return line

    def _hear(self, line: socket.socket) -> None:
        with self._lock:
            name = self._lines.pop(line)
        code, reason = _last_words(line, name)
        if code and not self._ended:
            self._tell_all(code, reason)
            _leave(self._name, code, reason)


class OtherWatch:
    """The end of any other process."""

    def __init__(self, process: int, host: str, address: str) -> None:
        """Calls process 0, at `host` and what its `address` says. Raises OSError where it cannot be reached."""
        self._name = _name(process)
        port, token, first = address.split(" ", 2)
        self._ended = False
        self._line = socket.create_connection((host, int(port)), timeout=_PATIENCE)
        self._line.settimeout(None)
        self._line.sendall(f"{token} {self._name}\n".encode())
        threading.Thread(target=self._run, args=[first], name="watch", daemon=True).start()

    def done(self) -> None:
        """As of `FirstWatch`."""
        self._ended = True
        _say(self._line, 0, "")

    def fail(self, code: int, reason: str) -> NoReturn:
        """As of `FirstWatch`."""
        self._ended = True
        _say(self._line, code, f"{self._name} ended: {reason}")
        os._exit(code)

    def _run(self, first: str) -> None:
        code, reason = _last_words(self._line, first)
        if code and not self._ended:
            _leave(self._name, code, reason)


def _name(process: int) -> str:
    return f"process {process} on {socket.gethostname()}"


def _listen() -> socket.socket:
    """On a port of the system's choice, on all networks of this host."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _say(line: socket.socket, code: int, reason: str) -> None:
    with contextlib.suppress(OSError):  # whoever is gone needs not be told
        line.sendall(f"{code} {reason.splitlines()[0] if reason else ''}\n".encode())


def _read(line: socket.socket) -> str:
    """A line of text, without its end; an empty one where the connection is cut, or silent for too long."""
    try:
        with line.makefile("rb") as file:
            text = file.readline(4096)
    except OSError:
        return ""
    return text.decode(errors="replace").rstrip("\n") if text.endswith(b"\n") else ""


def _last_words(line: socket.socket, name: str) -> tuple[int, str]:
    """The exit code and the reason that the other end gives, or those of its death."""
    code, _, reason = _read(line).partition(" ")
    if code.isdigit():
        return int(code), reason
    return ANOTHER_DIED, f"{name} has died: it was killed, ran out of memory, or crashed (its own output may say more)"


def _leave(name: str, code: int, reason: str) -> NoReturn:
    # Not by an exception: the main thread may be in a collective that never ends.
    advice = " Start all processes again; training goes on from its last checkpoint." if code == ANOTHER_DIED else ""
    os.write(2, f"{name} ends, because {reason.rstrip('.')}.{advice}\n".encode())
    os._exit(code)
