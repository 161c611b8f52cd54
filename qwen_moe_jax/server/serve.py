"""The life of a server: bound, loading, ready, draining, ended."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.server.app import make_app
from qwen_moe_jax.server.runner import EngineLike
from qwen_moe_jax.server.service import Service

#: The exit code after the engine's thread has died: EX_SOFTWARE of sysexits.h.
ENGINE_FAILED = 70
#: Seconds for which a server whose engine has failed still says so, to clients and to /health.
FAILED_SECONDS = 10.0
#: Seconds for the last bytes of answers that a drain has ended.
_FLUSH_SECONDS = 2


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is a free one.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot be listened on ({error.strerror or error}).") from None
    listening.setblocking(False)
    return listening


def address_of(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def serve(
    service: Service,
    load: Callable[[], EngineLike],
    listening: socket.socket,
    *,
    drain_seconds: float = 30.0,
    failed_seconds: float = FAILED_SECONDS,
    on_ready: Callable[[], None] = lambda: None,
    say: Callable[[str, str], None] = lambda name, text: None,
    stop: asyncio.Event | None = None,
) -> int:
    """Serves until a signal (SIGTERM, SIGINT), or `stop`, and returns the exit code.

    Requests that are being answered then have `drain_seconds` to end, and new ones are refused. A second signal ends
    the process at once, and so does one while the model is loaded, which nothing can interrupt.

    Args:
        service: what is served.
        load: makes the engine; called in the engine's thread, while /health already answers.
        listening: of `bind`.
        failed_seconds: seconds for which /health reports a failure of the engine before the end.
        on_ready: called when the model can be used.
        say: called with name and text of a line when a drain begins ("draining") and when it has ended ("ended").

    Raises:
        Exception: what `load` has raised.
    """
    stop = stop or asyncio.Event()
    failed = asyncio.Event()
    service.runner.failed = failed.set

    def ready() -> None:
        service.life.ready()
        on_ready()

    settings: dict[str, Any] = {"lifespan": "off", "ws": "none", "log_config": None, "access_log": False}
    config = uvicorn.Config(make_app(service), timeout_graceful_shutdown=_FLUSH_SECONDS, **settings)
    server = _Server(config)
    with _signals(service, stop):
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        service.runner.start(load, ready)
        events = [asyncio.create_task(event.wait()) for event in (stop, failed)]
        await asyncio.wait([serving, *events], return_when=asyncio.FIRST_COMPLETED)
        failure = service.runner.failure
        if failure is None:
            await _drain(service, drain_seconds, say)
        elif service.runner.engine is not None:
            await asyncio.wait(events[:1], timeout=failed_seconds)
        server.should_exit = True
        await serving
        for event in events:
            event.cancel()
    await asyncio.to_thread(service.runner.stop)
    if failure is not None and service.runner.engine is None:
        raise failure
    return 0 if failure is None else ENGINE_FAILED


async def _drain(service: Service, seconds: float, say: Callable[[str, str], None]) -> None:
    """Refuses new requests, and waits for those that are being answered."""
    running = service.life.active
    service.life.drain()
    if running:
        say("draining", f"{_requests(running)} may take {seconds:g} s more, and new ones are refused")
    left = 0
    if not await service.life.until_idle(seconds):
        left = service.life.active
        service.runner.give_up("the server has ended before the answer.")
        await service.life.until_idle(_FLUSH_SECONDS)
    cut_off = f", {left} cut off" if left else ""
    say("ended", f"{_requests(running - left)} answered since the signal{cut_off}")


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Installs no handlers."""
        yield


@contextlib.contextmanager
def _signals(service: Service, stop: asyncio.Event) -> Iterator[None]:
    """The first SIGTERM or SIGINT sets `stop`; the next one, or one while the model is loaded, ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def on(number: signal.Signals) -> None:
        if stop.is_set() or service.life.state == "loading":
            os._exit(128 + number)
        stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
