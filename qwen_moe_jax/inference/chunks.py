"""In which chunks an engine reads prompts: the shapes of its programs, and which of them costs least.

A call takes the time of its tokens, padding included, and the time of reading the weights, whatever its tokens are.
Many short prompts are cheapest in the rows of one call; one long prompt is cheapest in a row of its own, whose length
is hardly more than what is left of it.
"""

import functools
from collections import Counter
from collections.abc import Sequence

from qwen_moe_jax.rounding import previous_power_of_two

#: Tokens of a prompt that take as long as reading the weights does; on CPUs, benchmarks/results/serve-cpu.md says it.
#: Accelerators multiply some hundred tokens in the time in which they read a weight.
WEIGHTS_ON_CPUS, WEIGHTS_ELSEWHERE = 32, 512


def chunk_shapes(shortest: int, chunk: int, rows: int) -> list[tuple[int, int]]:
    """Rows and tokens (R, T) of the programs that read prompts, for up to `chunk` tokens on a shard of so many rows.

    Lengths double from the shortest on. There is a program of one row for each, and for every other one, of as many
    rows as make a chunk together.
    """
    lengths = [shortest << power for power in range(chunk.bit_length()) if shortest << power < chunk] + [chunk]
    many = {length: min(previous_power_of_two(chunk // length), previous_power_of_two(rows)) for length in lengths[::2]}
    return sorted({(1, length) for length in lengths} | {(count, length) for length, count in many.items()})


class ChunkChoice:
    """Chooses the shape in which prompts are read next.

    Args:
        shapes: (R, T) of the programs, one of R = 1 for every T.
        weights: tokens that take as long as reading the weights.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], weights: int):
        self._shapes, self._weights = sorted(shapes), weights
        self._lengths = sorted({length for _, length in shapes})
        self._rest = functools.cache(self._cost_of_rest)

    def cost(self, unread: int) -> int:
        """What reading the rest of one prompt costs, in tokens, if it is read by itself."""
        longest = self._lengths[-1]
        return unread // longest * (longest + self._weights) + self._rest(unread % longest)

    def _cost_of_rest(self, unread: int) -> int:
        if unread <= 0:
            return 0
        return min(length + self._weights + self._rest(unread - length) for length in self._lengths)

    def best(self, unread: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """The shape that saves most against reading each prompt by itself.

        Args:
            unread: the shard of every prompt and the tokens that are left of it, at least one prompt; those that come
                first are the first that get a row.
        """
        return max(self._shapes, key=lambda shape: (self._saved(shape, unread), shape[1]))

    def _saved(self, shape: tuple[int, int], unread: Sequence[tuple[int, int]]) -> int:
        count, length = shape
        saved, used = -(count * length + self._weights), Counter[int]()
        for shard, tokens in unread:
            used[shard] += 1
            if used[shard] <= count:
                saved += self.cost(tokens) - self.cost(tokens - min(length, tokens))
        return saved
