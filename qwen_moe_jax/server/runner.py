"""The one thread that runs the engine, and its way to asyncio and back.

Coroutines put commands into a list; the thread takes them between two steps of the engine. What a step returns goes
to the event loop in one call, so that a step costs one wake-up whatever the number of requests. Nobody waits for a slow
reader: its chunks wait in its `Inbox`, which the length of its answers bounds.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.expert_loads import ExpertLoads
from qwen_moe_jax.inference.request import Chunk, Request


class EngineLike(Protocol):
    """What the server needs of an engine."""

    @property
    def idle(self) -> bool: ...

    @property
    def load(self) -> Any: ...

    def expert_loads(self) -> ExpertLoads | None: ...

    def submit(self, request: Request) -> int: ...

    def cancel(self, request: int) -> None: ...

    def step(self) -> list[Chunk]: ...

    def close(self) -> None: ...


class EngineFailed(RuntimeError):
    """The engine's thread has ended with an exception; no request can be served any more."""


class Ended(RuntimeError):
    """The server has ended before the answer."""


class Inbox:
    """Chunks that wait to be read, of all sequences of one HTTP request. It belongs to the event loop."""

    def __init__(self) -> None:
        self._chunks: list[tuple[int, Chunk]] = []
        self._ready = asyncio.Event()
        self._failure: Exception | None = None

    def put(self, sequence: int, chunk: Chunk) -> None:
        """Adds a chunk of one of the sequences."""
        self._chunks.append((sequence, chunk))
        self._ready.set()

    def fail(self, error: Exception) -> None:
        """Ends the waiting of the reader with an exception."""
        self._failure = error
        self._ready.set()

    async def take(self) -> list[tuple[int, Chunk]]:
        """All that has come since the last call, at least one chunk.

        Raises:
            EngineFailed, Ended: there will be no more.
        """
        await self._ready.wait()
        if self._failure is not None:
            raise self._failure
        self._ready.clear()
        chunks, self._chunks = self._chunks, []
        return chunks


@dataclass(eq=False)
class Ticket:
    """A request that was given to the engine.

    Attributes:
        request: itself.
        inbox: where its chunks go.
        sequence: its number there.
        accepted: done when the engine has taken it; a RequestError, if it cannot be served.
        submitted: seconds of `time.monotonic()`.
        number: the engine's, once it has one; of the thread alone.
        tokens, last: how many tokens have come, and when; of the event loop alone.
    """

    request: Request
    inbox: Inbox
    sequence: int
    accepted: asyncio.Future[None]
    submitted: float = field(default_factory=time.monotonic)
    number: int | None = None
    tokens: int = 0
    last: float = 0.0


Command = Callable[[], None]


class Runner:
    """Runs an engine in a thread of its own.

    Args:
        on_chunks: called in the event loop with the chunks of every step, before their readers see them.
        on_failure: called in the event loop when the thread has died.

    Attributes:
        engine: once it is there.
        unfinished: requests that were submitted and have not ended; of the event loop.
        failure: what has ended the thread.
        failed: called in the event loop, after `on_failure`.
        heartbeat: seconds after which an idle engine runs a step nevertheless; None is never.
    """

    def __init__(
        self,
        on_chunks: Callable[[list[tuple[Ticket, Chunk]]], None] = lambda chunks: None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ):
        self.engine: Any = None
        self.unfinished: set[Ticket] = set()
        self.failure: BaseException | None = None
        self.failed: Callable[[], None] = lambda: None
        self.heartbeat: float | None = None
        self._on_chunks = on_chunks
        self._on_failure = on_failure
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._commands: list[Command] = []
        self._calls: set[asyncio.Future[Any]] = set()  # of the event loop
        self._stopping = False
        self._running: dict[int, Ticket] = {}  # of the thread

    def start(self, load: Callable[[], EngineLike], on_ready: Callable[[], None] = lambda: None) -> None:
        """Starts the thread, which loads the engine, says so in the event loop, and then runs it."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(load, on_ready), name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, inbox: Inbox, sequence: int = 0) -> Ticket:
        """Gives a request to the engine before its next step. Await `accepted` to know whether it was taken."""
        ticket = Ticket(request, inbox, sequence, asyncio.get_running_loop().create_future())
        if self.failure is not None:
            ticket.accepted.set_exception(EngineFailed(str(self.failure)))
            return ticket
        self.unfinished.add(ticket)
        self._command(lambda: self._submit(ticket))
        return ticket

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """Lets go of requests; those that have ended are left alone."""
        for ticket in tickets:
            if ticket in self.unfinished:
                self.unfinished.discard(ticket)
                self._command(lambda ticket=ticket: self._cancel(ticket))  # type: ignore[misc]

    async def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function that uses the model, run in the thread between two steps."""
        if self.failure is not None:
            raise EngineFailed(str(self.failure))
        result = asyncio.get_running_loop().create_future()
        self._calls.add(result)
        result.add_done_callback(self._calls.discard)

        def run() -> None:
            try:
                self._in_loop(_resolve, result, function(), None)
            except Exception as error:
                self._in_loop(_resolve, result, None, error)

        self._command(run)
        return await result

    def give_up(self, why: str) -> None:
        """Cancels all requests; their readers get `Ended`."""
        given_up = list(self.unfinished)
        self.cancel(given_up)
        for ticket in given_up:
            _resolve(ticket.accepted, None, Ended(why))
            ticket.inbox.fail(Ended(why))

    def stop(self) -> None:
        """Ends the thread after its present step, and waits for it."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _command(self, command: Command) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _in_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop has ended
            self._stopping = True

    # In the thread.

    def _run(self, load: Callable[[], EngineLike], on_ready: Callable[[], None]) -> None:
        try:
            self.engine = load()
            self._in_loop(on_ready)
            while self._next():
                chunks = self.engine.step()
                if chunks:
                    self._in_loop(self._deliver, [self._addressed(chunk) for chunk in chunks])
            self.engine.close()
        except BaseException as error:
            self._in_loop(self._fail, error)

    def _next(self) -> bool:
        """Waits for work and runs the commands; False at the end."""
        with self._wake:
            while not self._commands and not self._stopping and self.engine.idle:
                if not self._wake.wait(self.heartbeat):
                    break
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        return not self._stopping

    def _submit(self, ticket: Ticket) -> None:
        try:
            ticket.number = self.engine.submit(ticket.request)
        except RequestError as error:
            self._in_loop(self._refuse, ticket, error)
            return
        self._running[ticket.number] = ticket
        self._in_loop(_resolve, ticket.accepted, None, None)

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.number is not None and self._running.pop(ticket.number, None) is not None:
            self.engine.cancel(ticket.number)

    def _addressed(self, chunk: Chunk) -> tuple[Ticket | None, Chunk]:
        number = chunk.request
        ticket = self._running.get(number) if chunk.finished is None else self._running.pop(number, None)
        return ticket, chunk

    # In the event loop.

    def _deliver(self, chunks: list[tuple[Ticket | None, Chunk]]) -> None:
        known = [(ticket, chunk) for ticket, chunk in chunks if ticket is not None and ticket in self.unfinished]
        self._on_chunks(known)
        for ticket, chunk in known:
            if chunk.finished is not None:
                self.unfinished.discard(ticket)
            ticket.inbox.put(ticket.sequence, chunk)

    def _refuse(self, ticket: Ticket, error: RequestError) -> None:
        self.unfinished.discard(ticket)
        _resolve(ticket.accepted, None, error)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        failed = EngineFailed(f"{type(error).__name__}: {error}")
        for ticket in self.unfinished:
            _resolve(ticket.accepted, None, failed)
            ticket.inbox.fail(failed)
        for call in list(self._calls):
            _resolve(call, None, failed)
        self.unfinished.clear()
        self._on_failure(error)
        self.failed()


def _resolve(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    """Ends a future, unless its reader has gone."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
        future.exception()  # seen: nobody may be waiting for it
