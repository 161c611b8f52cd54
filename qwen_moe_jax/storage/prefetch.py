"""Prefetch: a `map` whose next few results are computed in threads while the current one is used."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Concurrent calls, which mostly wait for a disk or a network; also how many finished results are kept in memory.
THREADS = 4


def prefetch(make: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(make, items)` in order, computed up to `THREADS` items ahead of the consumer.

    An exception of `make` is raised in place of its result, and calls that have not started are cancelled.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="read") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for late in waiting:
                late.cancel()
