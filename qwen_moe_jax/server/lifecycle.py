"""The states of a server, and how many requests it is answering."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Literal

from qwen_moe_jax.server.errors import ApiError

State = Literal["loading", "ready", "draining", "failed"]

#: Seconds in Retry-After for a refused client while the model is loaded.
LOADING_RETRY = 5


class Lifecycle:
    """The state of one server. It belongs to the event loop.

    Attributes:
        state: "loading" until every program is compiled, "ready", "draining" after a signal to end, "failed" once the
            engine's thread has died.
        detail: a sentence on it, for /health.
        active: requests that are being answered.
    """

    def __init__(self) -> None:
        self.state: State = "loading"
        self.detail = "reading the checkpoint"
        self.active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def ready(self) -> None:
        """Every program is compiled."""
        if self.state == "loading":
            self.state, self.detail = "ready", ""

    def drain(self) -> None:
        """New requests are refused from here on, those that are being answered go on."""
        if self.state != "failed":
            self.state, self.detail = "draining", "the server is about to end"

    def fail(self, error: BaseException) -> None:
        """Nothing can be answered any more."""
        self.state, self.detail = "failed", f"{type(error).__name__}: {error}"

    def require_ready(self) -> None:
        """Refuses requests in every state but "ready".

        Raises:
            ApiError: 503 while loading and draining, 500 after a failure.
        """
        if self.state == "loading":
            raise ApiError(
                503, f"the model is being loaded ({self.detail}).", code="loading", retry_after=LOADING_RETRY
            )
        if self.state == "draining":
            raise ApiError(503, "the server is about to end and takes no new requests.", code="draining", retry_after=1)
        if self.state == "failed":
            raise ApiError(500, f"the engine has failed ({self.detail}).", code="engine_failed")

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Counts a request while it is answered."""
        self.active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.active -= 1
            if not self.active:
                self._idle.set()

    async def until_idle(self, seconds: float) -> bool:
        """Waits until no request is being answered; False if that takes longer."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True
