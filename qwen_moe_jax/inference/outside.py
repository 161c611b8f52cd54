"""What comes to an engine from outside between two steps: requests, cancellations, deadlines, masks.

Of several processes, process 0 decides: what came to it is sent to the others at the beginning of every step, so that
all take the same steps. Masks are asked in process 0 alone.
"""

import base64
import dataclasses
import pickle
import time
from collections.abc import Iterable, Sequence

import numpy as np

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.masks import accept, as_request_error, checked_mask
from qwen_moe_jax.inference.request import Finish, Request, TokenMask
from qwen_moe_jax.inference.running import Running
from qwen_moe_jax.sharding.distributed import broadcast, num_processes


@dataclasses.dataclass(kw_only=True)
class Events:
    """What came between two steps.

    Attributes:
        submitted: number, request without its mask, and config.
        ended: number, how, and with which error; of a cancelled one, nobody waits for a chunk: None.
        masks: packed masks of the requests that have one, by number.
        steps: tokens of each request that are decoded at most.
        closed: whether this is the last step.
    """

    submitted: list[tuple[int, Request, GenerationConfig]] = dataclasses.field(default_factory=list)
    ended: list[tuple[int, Finish | None, RequestError | None]] = dataclasses.field(default_factory=list)
    masks: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    steps: int = 1
    closed: bool = False


class Outside:
    """Collects events, and gives those of process 0 to all. `words` are those of a packed mask."""

    def __init__(self, words: int):
        self._words = words
        self._events = Events()
        self._masks: dict[int, TokenMask] = {}
        self._packed: dict[int, np.ndarray] = {}  # of masks, until they have taken another token
        self.closed = False

    @property
    def submissions(self) -> int:
        """Requests that the next step takes in."""
        return len(self._events.submitted)

    def submit(self, number: int, request: Request, config: GenerationConfig) -> None:
        """A request, checked."""
        if request.mask is not None:
            self._masks[number] = request.mask
        self._events.submitted.append((number, dataclasses.replace(request, mask=None), config))

    def cancel(self, number: int) -> None:
        """The end of a request."""
        self._end(number, None)

    def close(self) -> None:
        """The end of all."""
        self._events.closed = True

    def accept(self, number: int, tokens: Sequence[int]) -> None:
        """Tells the mask of a request, if it has one, which tokens were chosen."""
        if number in self._masks:
            self._packed.pop(number, None)
            error = accept(self._masks[number], tokens)
            if error is not None:
                self._end(number, "error", error)

    def forget(self, number: int) -> None:
        """A request has ended."""
        self._masks.pop(number, None)
        self._packed.pop(number, None)

    def exchange(self, requests: Iterable[Running], steps: int) -> Events:
        """The events since the last step, of process 0; a collective where there are several.

        Args:
            requests: those that there are.
            steps: tokens of each that process 0 would decode at most.
        """
        now, submitted = time.monotonic(), self._events.submitted
        deadlines = [(one.number, one.request.deadline) for one in requests]
        deadlines += [(number, request.deadline) for number, request, _ in submitted]
        for number, deadline in deadlines:
            if deadline is not None and deadline <= now:
                self._end(number, "deadline")
        for number in list(self._masks):
            self._ask(number)
        events, self._events = self._events, Events()
        events.masks, events.steps = dict(self._packed), steps
        if num_processes() > 1:
            sent = broadcast(base64.b64encode(pickle.dumps(events)).decode())
            events = pickle.loads(base64.b64decode(sent))
        self.closed = events.closed
        return events

    def _ask(self, number: int) -> None:
        """Asks a mask what is allowed, where it has taken a token since."""
        if number in self._packed:
            return
        try:
            self._packed[number] = checked_mask(self._masks[number].allowed(), self._words)
        except Exception as error:
            self._end(number, "error", as_request_error("its mask", error))

    def _end(self, number: int, finished: Finish | None, error: RequestError | None = None) -> None:
        self._events.ended.append((number, finished, error))
        self.forget(number)
