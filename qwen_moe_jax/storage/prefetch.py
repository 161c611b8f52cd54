"""Reading ahead: the next few results are made in threads while the present one is used."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Reads that wait for a disk or a network at the same time; also how many results may lie in memory unused.
THREADS = 4


def prefetch(make: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(make, items)`, a few items ahead of whoever takes the results; in order.

    An exception of `make` is raised where its result would have come, and nothing after it is begun.
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
