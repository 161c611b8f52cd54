"""What is between a request and its handler: state, keys, size of the body, and clients that have gone."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_moe_jax.server.errors import ApiError
from qwen_moe_jax.server.keys import ApiKeys
from qwen_moe_jax.server.lifecycle import Lifecycle

Result = TypeVar("Result")

#: Status of an answer that nobody waits for any more; it is seen in metrics only.
CLIENT_GONE = 499


class Gate:
    """ASGI middleware of the paths below /v1: refuses by state and key, and counts what is being answered.

    Args:
        observe: called with path and status of every answer.
    """

    def __init__(self, app: ASGIApp, life: Lifecycle, keys: ApiKeys, observe: Callable[[str, int], None]):
        self._app = app
        self._life = life
        self._keys = keys
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._observe(scope["path"], message["status"])
            await send(message)

        with self._life.answering():
            try:
                self._check(Request(scope))
            except ApiError as error:
                await error.response()(scope, receive, observed)
                return
            await self._app(scope, receive, observed)

    def _check(self, request: Request) -> None:
        if not self._keys.admit(request.headers.get("authorization")):
            raise ApiError(
                401,
                "there is no such API key: expected the header `Authorization: Bearer KEY`.",
                code="invalid_api_key",
            )
        self._life.require_ready()


async def read_json(request: Request, most_bytes: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
        ApiError: 415 for another type than JSON, which web pages could send without asking; 413 for a body of more
            than so many bytes; 408 for one that takes longer than so many seconds.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the Content-Type is {kind or 'not given'}, expected application/json.")
    too_large = ApiError(413, f"the body has more than {most_bytes} bytes, the most that this server reads.")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > most_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body has not come within {seconds:g} seconds.") from None
    return b"".join(parts)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of the work, which is cancelled when the client goes; None then.

    Args:
        receive: of the request, whose body has been read.
        work: is awaited in a task.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event of JSON."""
    return b"data: " + _JSON.encode(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """A stream of server-sent events, which ends when the client goes, or reads nothing for too long.

    Args:
        events: pieces of the stream. An `ApiError` that they raise is the last event.
        close: called at the end, whatever it was.
        write_seconds: how long a client may take to accept a piece.
    """

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], write_seconds: float):
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._write_seconds = write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._write(send))
        finally:
            self._close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for data in self._events:
                await self._send(send, data)
        except ApiError as error:
            await self._send(send, event(error.body))
        except TimeoutError:
            return  # the connection is closed unfinished: the client took nothing for too long
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        async with asyncio.timeout(self._write_seconds):
            await send({"type": "http.response.body", "body": data, "more_body": True})
