"""Which request has which slot of an engine, and what is read of which prompt next: plain data, no arrays of JAX.

Requests wait in the order in which they came. A free slot takes the first of them; its prompt is read in chunks, one
chunk between two decoding steps, and then it decodes with the others until it ends.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence

import numpy as np

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.inference.request import PromptLogProbs, Request, TopTokens
from qwen_moe_jax.rounding import previous_power_of_two


@dataclasses.dataclass(kw_only=True)
class Running:
    """A request from its submission to its end.

    Attributes:
        number: that `submit` returned.
        request: as it was submitted.
        config: its own, with a seed where it samples and `max_new_tokens` set.
        tokens: prompt and output.
        slot: that it has, or None while it waits.
        read: tokens that are in the cache.
        decodes: whether its prompt is read, but for the last token, which decoding begins with.
        log_probs, top: of the prompt's tokens, as far as they were read, where they are asked for.
    """

    number: int
    request: Request
    config: GenerationConfig
    tokens: list[int]
    slot: int | None = None
    read: int = 0
    decodes: bool = False
    log_probs: list[float] = dataclasses.field(default_factory=list)
    top: list[TopTokens] = dataclasses.field(default_factory=list)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.token_ids)

    @property
    def generated(self) -> int:
        """Tokens that were decoded."""
        return len(self.tokens) - self.prompt

    @property
    def left(self) -> int:
        """Tokens that it may still generate."""
        return self.config.max_new_tokens - self.generated

    @property
    def unread(self) -> int:
        """Tokens to read before it decodes: all but the last."""
        return len(self.tokens) - 1 - self.read

    def is_late(self, now: float) -> bool:
        """Whether its deadline has passed."""
        return self.request.deadline is not None and self.request.deadline <= now

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be computed."""
        asked = self.request.prompt_logprobs is not None and self.generated == 0
        return asked and len(self.log_probs) < self.prompt - 1

    def prompt_log_probs(self) -> PromptLogProbs | None:
        """Those of its prompt, where they were asked for."""
        if self.request.prompt_logprobs is None:
            return None
        return PromptLogProbs(log_probs=tuple(self.log_probs), top=tuple(self.top))


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
    with_targets: bool


def chunk_shapes(buckets: Sequence[int], chunk: int, rows: int) -> list[tuple[int, int]]:
    """Rows and tokens (R, T) of the programs that read prompts, for up to `chunk` tokens on a shard of so many rows.

    Of each length there are two: one row alone, and as many as make a chunk together.
    """
    lengths = [length for length in buckets if length < chunk] + [chunk]
    many = {length: min(previous_power_of_two(chunk // length), previous_power_of_two(rows)) for length in lengths}
    return sorted({(count, length) for length in lengths for count in (1, many[length])})


class Scheduler:
    """The slots of an engine and the requests that have them or wait.

    Args:
        slots: in all; slot s is row `s % rows` of shard `s // rows`.
        shards: devices that share the batch.
        shapes: (R, T) of the programs that read prompts, see `chunk_shapes`.
        log_prob_shape: (R, T) of the program that computes log-probabilities of a prompt as well.
    """

    def __init__(self, slots: int, shards: int, shapes: Sequence[tuple[int, int]], log_prob_shape: tuple[int, int]):
        self.shards, self.rows = shards, slots // shards
        self.shapes, self.log_prob_shape = list(shapes), log_prob_shape
        self.waiting: deque[Running] = deque()
        self.running: dict[int, Running] = {}  # by slot

    def admit(self) -> list[Running]:
        """Gives free slots to those who wait, on the shard with most of them free; the requests that got one."""
        admitted = []
        while self.waiting and (free := self._free_slots()):
            running = self.waiting.popleft()
            shard = max(range(self.shards), key=lambda shard: len(free[shard]))
            running.slot, running.read, running.decodes = free[shard][0], 0, False
            self.running[running.slot] = running
            admitted.append(running)
        return admitted

    def release(self, running: Running) -> None:
        """Takes a request off its slot, or out of the queue."""
        if running.slot is None:
            self.waiting.remove(running)
        else:
            del self.running[running.slot]
            running.slot, running.decodes = None, False

    def requeue(self, running: Running) -> None:
        """Takes a request off its slot; it is the next that gets one, and goes on where it was."""
        self.release(running)
        running.read = 0
        running.log_probs.clear()
        running.top.clear()
        self.waiting.appendleft(running)

    def next_chunk(self) -> ChunkPlan | None:
        """What is read next of the prompts: the oldest first, with as many others as the program has rows for."""
        unread = [running for running in self.running.values() if running.unread > 0]
        if not unread:
            return None
        unread.sort(key=lambda running: running.number)
        if unread[0].wants_prompt:
            return self.plan(unread[:1], *self.log_prob_shape, with_targets=True)
        unread = [running for running in unread if not running.wants_prompt]
        lengths = sorted({length for _, length in self.shapes})
        length = next((length for length in lengths if length >= unread[0].unread), lengths[-1])
        chosen: list[Running] = []
        of_shard = [0] * self.shards
        most = max(count for count, tokens in self.shapes if tokens == length)
        for running in unread:
            shard = running.slot // self.rows
            if of_shard[shard] < most:
                of_shard[shard] += 1
                chosen.append(running)
        counts = [count for count, tokens in self.shapes if tokens == length]
        count = min(count for count in counts if count >= max(of_shard))
        return self.plan(chosen, count, length)

    def plan(self, chosen: Sequence[Running], count: int, length: int, *, with_targets: bool = False) -> ChunkPlan:
        """The next T = `length` tokens of these requests, at most R = `count` of each shard."""
        places = self.shards * count
        tokens_RT, targets_RT = np.zeros((2, places, length), np.int32)
        count_R, lengths_R = np.zeros((2, places), np.int32)
        rows_R = np.full(places, self.rows, np.int32)
        parts, used = [], [0] * self.shards
        for running in chosen:
            shard, row = divmod(running.slot, self.rows)
            place = shard * count + used[shard]
            used[shard] += 1
            size = min(running.unread, length)
            text = running.tokens[running.read : running.read + size + 1]
            tokens_RT[place, :size], targets_RT[place, :size] = text[:-1], text[1:]
            count_R[place], lengths_R[place], rows_R[place] = size, running.read, row
            parts.append((running, size))
        return ChunkPlan(
            parts=tuple(parts),
            tokens_RT=tokens_RT,
            targets_RT=targets_RT,
            count_R=count_R,
            rows_R=rows_R,
            lengths_R=lengths_R,
            with_targets=with_targets,
        )

    def empty_plans(self) -> dict[str, ChunkPlan]:
        """A chunk without tokens for every program that reads prompts, by a name of it."""
        plans = {f"reading {count} x {length} tokens": self.plan([], count, length) for count, length in self.shapes}
        return {**plans, "log-probabilities of a prompt": self.plan([], *self.log_prob_shape, with_targets=True)}

    def _free_slots(self) -> dict[int, list[int]] | None:
        """The free slots of each shard; None where there is none at all."""
        free = {
            shard: [slot for slot in range(shard * self.rows, (shard + 1) * self.rows) if slot not in self.running]
            for shard in range(self.shards)
        }
        return free if any(free.values()) else None
