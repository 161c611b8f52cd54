"""Which rows of its slots an engine decodes in a call, and how many tokens: plain data, no arrays of JAX.

There are programs for a few numbers of rows. Each call takes the smallest that holds the requests that decode: what one
request costs does not depend on how many there might be.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

#: Seconds that a call of the decoding program takes at most, if a single token does not take longer: so long may a new
#: request wait before its prompt is read. What the host does for a call takes about 2 ms.
CALL_SECONDS = 0.08
#: The part of the latest measurement in the time that a token is expected to take.
_LATEST = 0.5
#: Numbers of rows on a shard below this have no program, but for one row alone.
_FEWEST = 4


def row_counts(rows: int, factor: int) -> tuple[int, ...]:
    """Numbers of rows that have a program on a shard of so many, in ascending order.

    Args:
        rows: of the shard.
        factor: from one number to the next.
    """
    counts = [rows]
    while counts[-1] // factor >= _FEWEST:
        counts.append(counts[-1] // factor)
    return tuple(sorted({1, *counts}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowChoice:
    """The rows of one call.

    Attributes:
        rows_R: int32 [X · R]; their numbers on their shards (`model.cache_rows`), or None for all in their order. A
            position that is not used has a number that is no row.
        slot_R: int32 [X · R]; the slot of each, that of another row where it is not used.
        position: of each of the slots.
    """

    rows_R: np.ndarray | None
    slot_R: np.ndarray
    position: dict[int, int]


def choose_rows(slots: Collection[int], *, rows: int, shards: int, counts: Sequence[int]) -> RowChoice:
    """The rows of the smallest program that has a row for each of these slots.

    Args:
        slots: that decode; slot s is row `s % rows` of shard `s // rows`.
        rows: of a shard.
        shards: of the engine.
        counts: of rows that have a program (`row_counts`).
    """
    of_shard = [sorted(slot for slot in slots if slot // rows == shard) for shard in range(shards)]
    most = max(map(len, of_shard))
    count = next(count for count in counts if count >= most)
    if count == rows:
        return RowChoice(rows_R=None, slot_R=np.arange(shards * rows), position={slot: slot for slot in slots})
    rows_R = np.full(shards * count, rows, np.int32)
    slot_R = np.repeat(np.arange(shards) * rows, count)
    position = {slot: shard * count + at for shard, own in enumerate(of_shard) for at, slot in enumerate(own)}
    for slot, at in position.items():
        rows_R[at], slot_R[at] = slot % rows, slot
    return RowChoice(rows_R=rows_R, slot_R=slot_R, position=position)


class Pace:
    """How many tokens a call decodes: as many as take `CALL_SECONDS`, by the time that they took lately.

    Args:
        most: tokens of a call at most.
    """

    def __init__(self, most: int):
        self._most, self._seconds = most, 0.0

    def add(self, passes: int, seconds: float) -> None:
        """Takes in how long a call with so many forward passes took."""
        if passes:
            latest = seconds / passes
            self._seconds = latest if self._seconds == 0 else _LATEST * latest + (1 - _LATEST) * self._seconds

    @property
    def steps(self) -> int:
        """Tokens of each request in the next call at most."""
        return self._most if self._seconds == 0 else max(1, min(self._most, int(CALL_SECONDS / self._seconds)))
