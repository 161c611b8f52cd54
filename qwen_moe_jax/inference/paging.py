"""The blocks of an engine's requests: which each has, and what of a prompt need not be read again."""

from collections.abc import Sequence

import numpy as np

from qwen_moe_jax.inference.blocks import BlockPool, StateCopies, digests
from qwen_moe_jax.inference.running import Running
from qwen_moe_jax.rounding import ceil_div


class Paging:
    """Blocks and copies of states on every shard, and the table of the slots' blocks.

    Keys and values of a text that begins like another are shared, block by block. What else layers keep of a text (the
    state of linear layers, the ring of sliding ones) belongs to one point of it: a text can go on only from a copy of
    that, made where a chunk of a prompt ended.

    Args:
        slots, shards: of the engine.
        blocks: of each shard, with the first, which represents none.
        size: tokens of a block.
        max_length: the largest number of tokens of a request.
        copies: of states on each shard; None for a model whose layers keep nothing else.
        every: a copy is made after so many tokens of a prompt, a multiple of `size`, and at its last full block.

    Attributes:
        table_BM: int32; the blocks of each slot, in order, and 0 after them.
        changed: whether it has changed since somebody set this to False.
    """

    def __init__(
        self, *, slots: int, shards: int, blocks: int, size: int, max_length: int, copies: int | None, every: int
    ):
        self.size, self._rows, self._every = size, slots // shards, every
        self._shards, self._blocks, self._copies_of_shard = shards, blocks, copies
        self.table_BM = np.zeros((slots, ceil_div(max_length, size)), np.int32)
        self.forget()

    def forget(self) -> None:
        """Begins anew, with no block in use and nothing known."""
        shards, copies = range(self._shards), self._copies_of_shard
        self._pools = [BlockPool(self._blocks) for _ in shards]
        self._copies = None if copies is None else [StateCopies(copies) for _ in shards]
        self.table_BM[:] = 0
        self.changed = True

    def shard(self, slot: int) -> int:
        """The shard of a slot."""
        return slot // self._rows

    @property
    def blocks(self) -> int:
        """Blocks that texts can have."""
        return sum(pool.count - 1 for pool in self._pools)

    @property
    def used_blocks(self) -> int:
        """Blocks that texts have."""
        return self.blocks - sum(pool.available for pool in self._pools)

    @property
    def kept_blocks(self) -> int:
        """Blocks that no text has, with tokens for texts to come."""
        return sum(pool.known for pool in self._pools)

    def missing(self, running: Running, shard: int) -> int:
        """Blocks that a request will take of those that are available on a shard, to begin there."""
        known = self._matching(running, shard)[0]
        return ceil_div(len(running.tokens) + 1, self.size) - len(known)

    def available(self, shard: int, others: Sequence[Running]) -> int:
        """Blocks of a shard that are left when the prompts of the requests on it are read."""
        promised = sum(max(ceil_div(len(one.tokens) + 1, self.size) - len(one.blocks), 0) for one in others)
        return self._pools[shard].available - promised

    def hit(self, running: Running, shard: int) -> int:
        """Tokens of a request that need not be read again on a shard."""
        return self._usable(running, shard)[0]

    def begin(self, running: Running) -> int | None:
        """Gives a request in a slot what is known of its text; the row with a copy of its state, if it needs one."""
        shard = self.shard(running.slot)
        tokens, copy = self._usable(running, shard)
        running.blocks = self._pools[shard].matching(running.digests[: tokens // self.size])
        self._pools[shard].share(running.blocks)
        running.read, running.begun = tokens, True
        if running.cached is None:
            running.cached = tokens
        running.borders = self._borders(running, shard)
        self._write(running)
        return copy

    def reserve(self, running: Running, tokens: int) -> bool:
        """Takes the blocks that a text of so many tokens needs; False where there are not as many."""
        needed = ceil_div(tokens, self.size) - len(running.blocks)
        pool = self._pools[self.shard(running.slot)]
        if needed > pool.available:
            return False
        if needed > 0:
            running.blocks += [pool.take() for _ in range(needed)]
            self._write(running)
        return True

    def release(self, running: Running) -> None:
        """Takes the blocks of a request back; those that are full stay known."""
        if running.slot is None:
            return
        self._pools[self.shard(running.slot)].release(running.blocks)
        running.blocks, running.begun = [], False
        self.table_BM[running.slot] = 0
        self.changed = True

    def remember(self, running: Running) -> None:
        """Makes the blocks known that are full now."""
        full = min(running.read // self.size, len(running.blocks))
        if full > len(running.digests):
            running.digests = digests(running.tokens[: full * self.size], self.size, running.salt, running.digests)
        pool = self._pools[self.shard(running.slot)]
        for index in range(running.known, full):
            pool.remember(running.blocks[index], running.digests[index])
        running.known = full

    def place_copy(self, running: Running) -> int | None:
        """The row for a copy of a request's state, where one is wanted at its last token that was read."""
        if self._copies is None or running.read not in running.borders:
            return None
        return self._copies[self.shard(running.slot)].place(running.digests[running.read // self.size - 1])

    def spoiled(self, running: Running) -> list[int]:
        """Makes a request's blocks unknown, for they have no meaning; those that no other has."""
        return self._pools[self.shard(running.slot)].unusable(running.blocks)

    def common(self, running: Running, older: Running) -> int:
        """Tokens in full blocks that two requests begin with."""
        pairs = zip(self._prefix(running), self._prefix(older), strict=False)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        return self.size * (min(len(self._prefix(running)), len(self._prefix(older))) if same is None else same)

    def _prefix(self, running: Running) -> list[bytes]:
        """The digests of the full blocks that are read before a request decodes."""
        count = (len(running.tokens) - 1) // self.size
        if len(running.digests) < count:
            running.digests = digests(running.tokens[: count * self.size], self.size, running.salt, running.digests)
        return running.digests[:count]

    def _matching(self, running: Running, shard: int) -> tuple[list[int], list[bytes]]:
        if running.wants_prompt:
            return [], []
        prefix = self._prefix(running)
        return self._pools[shard].matching(prefix), prefix

    def _usable(self, running: Running, shard: int) -> tuple[int, int | None]:
        """Tokens that are known, up to a copy of the state where one is needed, and that copy's row."""
        blocks, prefix = self._matching(running, shard)
        if self._copies is None:
            return len(blocks) * self.size, None
        copies = self._copies[shard]
        count = next((count for count in range(len(blocks), 0, -1) if prefix[count - 1] in copies), 0)
        return count * self.size, copies.row(prefix[count - 1]) if count else None

    def _borders(self, running: Running, shard: int) -> set[int]:
        """Where copies of its state are wanted: at its last full block, here and there, and where it leaves another."""
        if self._copies is None:
            return set()
        blocks, prefix = self._matching(running, shard)
        regular = range(self._every, len(prefix) * self.size, self._every)
        return {*regular, len(prefix) * self.size, len(blocks) * self.size} - {0}

    def _write(self, running: Running) -> None:
        self.table_BM[running.slot, : len(running.blocks)] = running.blocks
        self.changed = True
