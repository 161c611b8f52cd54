"""Which request has which slot of an engine, and what is read of which prompt next: plain data, no arrays of JAX.

Requests wait in the order in which they came. A free slot takes the first of them, if there are blocks for its prompt;
the prompt is read in chunks, one chunk between two decoding steps, and then it decodes with the others until it ends.
When a text needs a block and there is none, the youngest request goes back to the head of the queue: what it has is
read again later, and its answer is the same.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence

import numpy as np

from qwen_moe_jax.inference.chunks import ChunkChoice
from qwen_moe_jax.inference.paging import Paging
from qwen_moe_jax.inference.running import Running


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """What is read next: of R rows on each of X shards, T tokens at most.

    Attributes:
        parts: the requests, and how many tokens of each are read.
        tokens_RT, targets_RT: int32 [X · R, T]; the tokens, and the one after each.
        count_R, rows_R, lengths_R: int32 [X · R]; tokens of each row, its number on its shard, and the tokens that it
            has already. An unused place has no tokens and a number that is no row.
        with_targets: whether log-probabilities are asked for.
    """

    parts: tuple[tuple[Running, int], ...]
    tokens_RT: np.ndarray
    targets_RT: np.ndarray
    count_R: np.ndarray
    rows_R: np.ndarray
    lengths_R: np.ndarray
    table_RM: np.ndarray
    restored: dict[int, int]
    with_targets: bool


class Scheduler:
    """The slots of an engine and the requests that have them or wait.

    Args:
        slots: in all; slot s is row `s % rows` of shard `s // rows`.
        shards: devices that share the batch.
        shapes: (R, T) of the programs that read prompts, see `chunk_shapes`.
        weights: see `ChunkChoice`.
        log_prob_shape: (R, T) of the program that computes log-probabilities of a prompt as well.
        paging: the blocks.

    Attributes:
        waiting: requests without a slot.
        running: those with one, by slot.
        stopped: slots that were taken from a request that decoded, of which the device does not know yet.
        preempted: how often that happened.
    """

    def __init__(
        self,
        slots: int,
        shards: int,
        shapes: Sequence[tuple[int, int]],
        weights: int,
        log_prob_shape: tuple[int, int],
        paging: Paging,
    ):
        self.paging, self.stopped, self.preempted = paging, list[int](), 0
        self.shards, self.rows = shards, slots // shards
        self.shapes, self.log_prob_shape = list(shapes), log_prob_shape
        self._choice = ChunkChoice(shapes, weights)
        self.waiting: deque[Running] = deque()
        self.running: dict[int, Running] = {}  # by slot

    def admit(self) -> list[Running]:
        """Gives free slots to those who wait, first come, first served; the requests that got one."""
        admitted = []
        while self.waiting and (slot := self._slot_for(self.waiting[0])) is not None:
            running = self.waiting.popleft()
            running.slot = slot
            self.running[slot] = running
            admitted.append(running)
        return admitted

    def _slot_for(self, running: Running) -> int | None:
        """A free slot on the shard that knows most of a text, or has most blocks; None where there are too few."""
        best = None
        for shard in range(self.shards):
            slots = range(shard * self.rows, (shard + 1) * self.rows)
            others = [self.running[slot] for slot in slots if slot in self.running]
            free = next((slot for slot in slots if slot not in self.running), None)
            left = self.paging.available(shard, others) - self.paging.missing(running, shard)
            if free is not None and (left >= 0 or not others):
                choice = (self.paging.hit(running, shard), left, -free)
                best = choice if best is None else max(best, choice)
        return None if best is None else -best[2]

    def release(self, running: Running) -> None:
        """Takes a request off its slot, or out of the queue."""
        self.paging.release(running)
        if running.slot is None:
            self.waiting.remove(running)
        else:
            del self.running[running.slot]
            running.slot, running.decodes, running.known = None, False, 0

    def requeue(self, running: Running) -> None:
        """Takes a request off its slot; it is the next that gets one, and goes on where it was."""
        self.release(running)
        running.read = 0
        running.log_probs.clear()
        running.top.clear()
        self.waiting.appendleft(running)

    def reserve(self, running: Running, tokens: int) -> bool:
        """Makes sure that a text has the blocks of so many tokens; False where it went back to the queue itself."""
        shard = self.paging.shard(running.slot)
        while not self.paging.reserve(running, tokens):
            youngest = max((one for one in self.running.values() if self.paging.shard(one.slot) == shard), key=_age)
            if youngest.decodes:
                self.stopped.append(youngest.slot)
            self.preempted += 1
            self.requeue(youngest)
            if youngest is running:
                return False
        return True

    def next_chunk(self, most: int) -> ChunkPlan | None:
        """What is read next of the prompts: the oldest first, with as many others as the program has rows for.

        Args:
            most: tokens on each shard, padding included; None is returned where the best chunk has more.
                Log-probabilities are computed in chunks of one size.
        """
        if most < min(count * length for count, length in self.shapes):
            return None
        restored: dict[int, int] = {}
        unread: list[Running] = []
        for running in sorted(self.running.values(), key=_age):
            if running.decodes or self._follows(running, unread):
                continue
            if not running.begun and (copy := self.paging.begin(running)) is not None:
                restored[running.slot] = copy
            if running.unread > 0:
                unread.append(running)
        if unread and unread[0].wants_prompt:
            plan = self.plan(unread[:1], *self.log_prob_shape, with_targets=True)
        elif unread:
            plan = self._batch([running for running in unread if not running.wants_prompt], most)
        else:
            plan = None
        if plan is None or not plan.parts:
            return dataclasses.replace(self.plan([], *self.shapes[0]), restored=restored) if restored else None
        return dataclasses.replace(plan, restored=restored)

    def _follows(self, running: Running, older: Sequence[Running]) -> bool:
        """Whether it waits for an older request to read what both begin with."""
        if running.begun or running.wants_prompt:
            return False
        for one in older:
            common = self.paging.common(running, one)
            if self.paging.shard(one.slot) == self.paging.shard(running.slot) and one.read < common:
                one.borders.add(common)
                return True
        return False

    def _batch(self, unread: Sequence[Running], most: int) -> ChunkPlan | None:
        """The chunk that costs least for these requests; None where that has more than `most` tokens."""
        count, length = self._choice.best([(self.paging.shard(one.slot), one.unread) for one in unread])
        if count * length > most:
            return None
        chosen: list[Running] = []
        of_shard = [0] * self.shards
        for running in unread:
            shard = self.paging.shard(running.slot)
            if of_shard[shard] < count:
                of_shard[shard] += 1
                chosen.append(running)
        return self.plan(chosen, count, length)

    def plan(self, chosen: Sequence[Running], count: int, length: int, *, with_targets: bool = False) -> ChunkPlan:
        """The next T = `length` tokens of these requests, at most R = `count` of each shard, in blocks of theirs.

        A request that is put back for want of blocks is left out.
        """
        sizes = {running.number: self._next_size(running, length) for running in chosen}
        for running in chosen:
            if running.slot is not None:
                self.reserve(running, running.read + sizes[running.number])
        chosen = [running for running in chosen if running.slot is not None]
        rows_of_chunk = self.shards * count
        tokens_RT, targets_RT = np.zeros((2, rows_of_chunk, length), np.int32)
        count_R, lengths_R = np.zeros((2, rows_of_chunk), np.int32)
        rows_R = np.full(rows_of_chunk, self.rows, np.int32)
        table_RM = np.zeros((rows_of_chunk, self.paging.table_BM.shape[1]), np.int32)
        parts, used = [], [0] * self.shards
        for running in chosen:
            shard, row = divmod(running.slot, self.rows)
            place = shard * count + used[shard]
            used[shard] += 1
            size = sizes[running.number]
            text = running.tokens[running.read : running.read + size + 1]
            tokens_RT[place, :size], targets_RT[place, :size] = text[:-1], text[1:]
            count_R[place], lengths_R[place], rows_R[place] = size, running.read, row
            table_RM[place] = self.paging.table_BM[running.slot]
            parts.append((running, size))
        return ChunkPlan(
            parts=tuple(parts),
            tokens_RT=tokens_RT,
            targets_RT=targets_RT,
            count_R=count_R,
            rows_R=rows_R,
            lengths_R=lengths_R,
            table_RM=table_RM,
            restored={},
            with_targets=with_targets,
        )

    def empty_plans(self) -> dict[str, ChunkPlan]:
        """A chunk without tokens for every program that reads prompts, by a name of it."""
        plans = {f"reading {count} x {length} tokens": self.plan([], count, length) for count, length in self.shapes}
        return {**plans, "log-probabilities of a prompt": self.plan([], *self.log_prob_shape, with_targets=True)}

    def _next_size(self, running: Running, length: int) -> int:
        """Tokens of a request's next chunk: it ends where a copy of the state is wanted."""
        border = min((border for border in running.borders if border > running.read), default=len(running.tokens))
        return min(running.unread, length, border - running.read)


def _age(running: Running) -> int:
    return running.number
