"""A TCP connection from every process to process 0, which the operating system closes when either process dies.

JAX's public heartbeats (`jax.distributed.initialize(heartbeat_timeout_seconds=…)`) stay on, for hosts that vanish from
the network. Alone they do not do what this file does. Measured with jax 0.10.2 and three processes on CPUs, one of
them killed, as seconds until the others ended:

- 44 with a timeout of 45 s, 9.7 with 10 s, 2.1 with 3 s; a timeout that short also ends processes that are only slow;
- 0.2, whatever the timeout, where process 0 was the one killed;
- in a collective over gloo: an exception at once in the others, whose end takes 6 s more.

In all of them the others end by SIGABRT (exit code 134) and a C++ stack trace which gives the dead task's number, not
its host. Neither that exit code nor that message can be set (`missed_heartbeat_callback` is private), barriers end by a
timeout only, and a process that has raised an exception, but lives, is not noticed. With the connection, the others end
at once with exit code 75 and the name of the dead process, and no timeout has to be short.

Each process sends one line, once: an exit code and a reason. `0` is a normal end; any other code is one that all
processes are to end with. A connection that is closed without a line means that its process died.
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
#: Seconds to wait for a reply of the other process.
_REPLY_TIMEOUT = 5.0


class WatchServer:
    """The watch of process 0, which accepts the connections and passes on what one process reports to all others."""

    def __init__(self) -> None:
        self._name = _name(0)
        self._listener = _listen()
        self._token = secrets.token_hex(16)  # the port is open to other programs
        self._lock = threading.Lock()
        self._names: dict[socket.socket, str] = {}  # of the process that each connection leads to
        self._ended = False
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    @property
    def address(self) -> str:
        """What a `WatchClient` needs besides the host: port, token and name of process 0."""
        return f"{self._listener.getsockname()[1]} {self._token} {self._name}"

    def done(self) -> None:
        """Reports the normal end of this process; the others may end, too."""
        self._broadcast(0, "")

    def fail(self, code: int, reason: str) -> NoReturn:
        """Ends all processes with an exit code. The others print `reason`; this one has printed it already."""
        self._broadcast(code, f"{self._name} ended: {reason}")
        os._exit(code)

    def _broadcast(self, code: int, reason: str) -> None:
        with self._lock:
            self._ended, connections = True, list(self._names)
        for connection in connections:
            _send(connection, code, reason)
        for connection in connections if code else []:  # until they have read it: JAX aborts them if process 0 is gone
            connection.settimeout(_REPLY_TIMEOUT)
            with contextlib.suppress(OSError):
                while connection.recv(4096):
                    pass

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        while not self._ended:
            for key, _ in selector.select():
                if key.fileobj is self._listener:
                    connection = self._accept()
                    if connection is not None:
                        selector.register(connection, selectors.EVENT_READ)
                elif isinstance(key.fileobj, socket.socket):
                    selector.unregister(key.fileobj)
                    self._receive(key.fileobj)

    def _accept(self) -> socket.socket | None:
        """The next connection; None for one without the token."""
        connection, _ = self._listener.accept()
        connection.settimeout(_REPLY_TIMEOUT)
        token, _, name = _read_line(connection).partition(" ")
        if not secrets.compare_digest(token.encode(), self._token.encode()):
            connection.close()
            return None
        connection.settimeout(None)
        with self._lock:
            self._names[connection] = name
        return connection

    def _receive(self, connection: socket.socket) -> None:
        with self._lock:
            name = self._names.pop(connection)
        code, reason = _read_report(connection, name)
        if code and not self._ended:
            self._broadcast(code, reason)
            _exit(self._name, code, reason)


class WatchClient:
    """The watch of any other process: a connection to process 0."""

    def __init__(self, process: int, host: str, address: str) -> None:
        """Connects to process 0 at `host` and the server's `address`. Raises OSError where it cannot be reached."""
        self._name = _name(process)
        port, token, server = address.split(" ", 2)
        self._ended = False
        self._connection = socket.create_connection((host, int(port)), timeout=_REPLY_TIMEOUT)
        self._connection.settimeout(None)
        self._connection.sendall(f"{token} {self._name}\n".encode())
        threading.Thread(target=self._run, args=[server], name="watch", daemon=True).start()

    def done(self) -> None:
        """As of `WatchServer`."""
        self._ended = True
        _send(self._connection, 0, "")

    def fail(self, code: int, reason: str) -> NoReturn:
        """As of `WatchServer`."""
        self._ended = True
        _send(self._connection, code, f"{self._name} ended: {reason}")
        os._exit(code)

    def _run(self, server: str) -> None:
        code, reason = _read_report(self._connection, server)
        if code and not self._ended:
            _exit(self._name, code, reason)


def _name(process: int) -> str:
    return f"process {process} on {socket.gethostname()}"


def _listen() -> socket.socket:
    """A listening socket on a free port of all networks of this host."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _send(connection: socket.socket, code: int, reason: str) -> None:
    with contextlib.suppress(OSError):  # a process that has ended needs no report
        connection.sendall(f"{code} {reason.splitlines()[0] if reason else ''}\n".encode())


def _read_line(connection: socket.socket) -> str:
    """A line of text, without its end; "" where the connection is closed, or silent for longer than its timeout."""
    try:
        with connection.makefile("rb") as file:
            text = file.readline(4096)
    except OSError:
        return ""
    return text.decode(errors="replace").rstrip("\n") if text.endswith(b"\n") else ""


def _read_report(connection: socket.socket, name: str) -> tuple[int, str]:
    """The exit code and the reason that process `name` reports, or those of its death."""
    code, _, reason = _read_line(connection).partition(" ")
    if code.isdigit():
        return int(code), reason
    return ANOTHER_DIED, f"{name} has died: it was killed, ran out of memory, or crashed (its own output may say more)"


def _exit(name: str, code: int, reason: str) -> NoReturn:
    # Not by an exception: the main thread may be in a collective that never ends.
    advice = " Start all processes again; training goes on from its last checkpoint." if code == ANOTHER_DIED else ""
    os.write(2, f"{name} ends, because {reason.rstrip('.')}.{advice}\n".encode())
    os._exit(code)
