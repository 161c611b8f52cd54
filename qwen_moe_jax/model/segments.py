"""Which layers are stacked and scanned together.

Where kinds alternate, the smallest repeating period is the scanned unit: `dense, sparse, dense, sparse` is one segment
of two layers, twice; `dense, sparse, sparse, sparse` is two segments.
"""

import dataclasses
from collections.abc import Sequence

from qwen_moe_jax.config import LayerKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """`repeats` times the layers of `period`, starting at layer `start`."""

    start: int
    period: tuple[LayerKind, ...]
    repeats: int

    def layer_index(self, position: int, repeat: int) -> int:
        """The index of the layer at `position` of the `repeat`-th period."""
        return self.start + repeat * len(self.period) + position


def _preference(option: tuple[int, tuple[Segment, ...]]) -> tuple[int, int, int]:
    """Fewest compiled layers, then fewest segments, then the longest first segment."""
    compiled, segments = option
    return compiled, len(segments), -len(segments[0].period) * segments[0].repeats


def plan_segments(kinds: Sequence[LayerKind]) -> tuple[Segment, ...]:
    """Covers the layers with repeating periods, such that the fewest layers have to be compiled."""
    kinds = tuple(kinds)
    numbers = list(dict.fromkeys(kinds))
    codes = [numbers.index(kind) for kind in kinds]  # quick to compare
    #: From every layer on: how many layers are compiled, and the segments.
    best: dict[int, tuple[int, tuple[Segment, ...]]] = {len(kinds): (0, ())}
    for start in reversed(range(len(kinds))):
        options: list[tuple[int, tuple[Segment, ...]]] = []
        fewest = len(kinds)
        for size in range(1, len(kinds) - start + 1):
            if size > fewest:  # its period alone is more to compile
                break
            period, repeats = codes[start : start + size], 1
            while codes[start + repeats * size : start + (repeats + 1) * size] == period:
                repeats += 1
            compiled, rest = best[start + repeats * size]
            segment = Segment(start=start, period=kinds[start : start + size], repeats=repeats)
            options.append((compiled + size, (segment, *rest)))
            fewest = min(fewest, compiled + size)
        best[start] = min(options, key=_preference)
    return best[0][1]
